package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Groups of integers with a scale and a bias each. The size of a group is a
// multiple of 32.

const (
	extremesSignature         = "func(lo, hi []float32, src []byte, group int) (done int)"
	quantizeAffineSignature   = "func(codes, src []byte, scales, biases []float32, group int, most float32)"
	dequantizeAffineSignature = "func(dst, codes []byte, scales, biases []float32, group int) (done int)"
)

var (
	plusInfinity  = data("plusInfinity", repeat(infinity))
	minusInfinity = data("minusInfinity", repeat(infinity|1<<31))
)

// groupsOf is the loop over count groups. It ends with them, or by a jump to
// groups_done; body gets the number of those done.
func groupsOf(count Register, body func(done Register)) (done Register) {
	done = GP64()
	XORQ(done, done)
	Label("group")
	CMPQ(done, count)
	JGE(LabelRef("groups_done"))
	body(done)
	INCQ(done)
	JMP(LabelRef("group"))
	Label("groups_done")
	return done
}

// word addresses element i of float32.
func word(p, i Register) Mem { return Mem{Base: p, Index: i, Scale: 4} }

func (s avx2) extremes(f float) {
	function("extremes"+f.name+"AVX2", extremesSignature)
	lo, hi, src := base("lo"), base("hi"), base("src")
	count, group := length("lo"), Load(Param("group"), GP64())
	abs := YMM()
	VMOVUPS(magnitude(), abs)
	done := groupsOf(count, func(done Register) {
		var least, most [2]VecVirtual
		for i := range least {
			least[i], most[i] = YMM(), YMM()
			VMOVUPS(plusInfinity(), least[i])
			VMOVUPS(minusInfinity(), most[i])
		}
		largest := zeroed()
		within("extremes", group, 16, func() {
			for i := range least {
				v, t := s.load(f, at(src, 8*i*f.size)), YMM()
				VMINPS(v, least[i], least[i])
				VMAXPS(v, most[i], most[i])
				VPAND(abs, v, t)
				VPMAXUD(t, largest, largest)
			}
			ADDQ(U8(16*f.size), src)
		})
		x := XMM()
		VEXTRACTI128(U8(1), largest, x)
		VPMAXUD(largest.AsX(), x, x)
		r := largest32(x)
		CMPL(r, U32(infinity))
		JAE(LabelRef("groups_done"))
		VMINPS(least[1], least[0], least[0])
		VMAXPS(most[1], most[0], most[0])
		// Both of one end, side by side: the least as the largest of what has its sign changed.
		t := YMM()
		VXORPS(signBit(), least[0], least[0])
		VPERM2F128(U8(0x20), most[0], least[0], t)
		VPERM2F128(U8(0x31), most[0], least[0], most[0])
		VMAXPS(t, most[0], most[0])
		VSHUFPS(U8(0x4e), most[0], most[0], t)
		VMAXPS(t, most[0], most[0])
		VSHUFPS(U8(0xb1), most[0], most[0], t)
		VMAXPS(t, most[0], most[0])
		VEXTRACTF128(U8(1), most[0], x)
		negative := most[0].AsX()
		zero := XMM()
		VXORPS(zero, zero, zero)
		VADDSS(zero, x, x) // no negative zero
		VMOVSS(x, word(hi, done))
		VSUBSS(negative, zero, x)
		VMOVSS(x, word(lo, done))
	})
	Store(done, Return("done"))
	VZEROUPPER()
	RET()
}

func (s avx2) quantizeAffine(f float) {
	function("quantizeAffine"+f.name+"AVX2", quantizeAffineSignature)
	codes, src, scales, biases := base("codes"), base("src"), base("scales"), base("biases")
	count, group := length("scales"), Load(Param("group"), GP64())
	most, zero, order := YMM(), zeroed(), YMM()
	VBROADCASTSS(NewParamAddr("most", 104), most)
	VMOVDQU(laneOrder(), order)
	groupsOf(count, func(done Register) {
		scale, bias := YMM(), YMM()
		VBROADCASTSS(word(scales, done), scale)
		VBROADCASTSS(word(biases, done), bias)
		within("codes", group, 32, func() {
			var v [4]VecVirtual
			for i := range v {
				v[i] = s.load(f, at(src, 8*i*f.size))
				VSUBPS(bias, v[i], v[i])
				VDIVPS(scale, v[i], v[i])
				VMAXPS(zero, v[i], v[i]) // zero for a NaN
				VMINPS(most, v[i], v[i])
				VCVTPS2DQ(v[i], v[i])
			}
			VPACKUSDW(v[1], v[0], v[0])
			VPACKUSDW(v[3], v[2], v[2])
			VPACKUSWB(v[2], v[0], v[0])
			VPERMD(v[0], order, v[0])
			VMOVDQU(v[0], at(codes, 0))
			ADDQ(I32(32*int32(f.size)), src)
			ADDQ(U8(32), codes)
		})
	})
	VZEROUPPER()
	RET()
}

func (s avx2) dequantizeAffine(f float) {
	function("dequantizeAffine"+f.name+"AVX2", dequantizeAffineSignature)
	dst, codes, scales, biases := base("dst"), base("codes"), base("scales"), base("biases")
	count, group := length("scales"), Load(Param("group"), GP64())
	r := s.rounding(f)
	done := groupsOf(count, func(done Register) {
		for _, p := range []Register{scales, biases} {
			x := GP32()
			MOVL(word(p, done), x)
			ANDL(U32(0x7fffffff), x)
			CMPL(x, U32(infinity))
			JAE(LabelRef("groups_done"))
		}
		scale, bias := YMM(), YMM()
		VBROADCASTSS(word(scales, done), scale)
		VBROADCASTSS(word(biases, done), bias)
		within("values", group, 16, func() {
			var v [2]VecVirtual
			for i := range v {
				v[i] = YMM()
				VPMOVZXBD(at(codes, 8*i), v[i])
				VCVTDQ2PS(v[i], v[i])
				VMULPS(scale, v[i], v[i])
				switch f {
				case f16:
					x := XMM()
					VCVTPS2PH(U8(0), v[i], x)
					VCVTPH2PS(x, v[i])
				case bf16:
					v[i] = s.bf16(r, v[i])
					VPSLLD(U8(16), v[i], v[i])
				}
				VADDPS(bias, v[i], v[i])
			}
			s.storeFinite(f, r, v[0], v[1], at(dst, 0))
			ADDQ(U8(16), codes)
			ADDQ(U8(16*f.size), dst)
		})
	})
	Store(done, Return("done"))
	VZEROUPPER()
	RET()
}

// storeFinite is store where none is a NaN.
func (s avx2) storeFinite(f float, r rounding, a, b VecVirtual, m Mem) {
	if f != bf16 {
		s.store(f, r, a, b, m)
		return
	}
	a, b = s.bf16(r, a), s.bf16(r, b)
	VPACKUSDW(b, a, a)
	VPERMQ(U8(0xd8), a, a)
	VMOVDQU(a, m)
}
