package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// ggml's Q8_0: blocks of 32 elements, a scale in float16 and a signed byte each.

const blockQ8 = 34

var (
	belowHalf = data("belowHalf", repeat(0x3effffff))
	lowByte   = data("lowByte", repeat(0x000000ff))
	unpacked  = data("unpacked", words(0, 4, 1, 5, 2, 6, 3, 7))
)

func words(x ...byte) (b []byte) {
	for _, v := range x {
		b = append(b, v, 0, 0, 0)
	}
	return b
}

func (s avx2) encodeQ8() {
	function("encodeQ8AVX2", "func(dst []byte, src []float32)")
	dst, src, n := base("dst"), base("src"), length("src")
	abs, half, low, order, sign := YMM(), YMM(), YMM(), YMM(), YMM()
	VMOVUPS(magnitude(), abs)
	VMOVUPS(belowHalf(), half)
	VMOVUPS(lowByte(), low)
	VMOVUPS(unpacked(), order)
	VMOVUPS(signBit(), sign)
	elements(n, 32, func() {
		var v [4]VecVirtual
		most := YMM()
		for i := range v {
			v[i] = YMM()
			VMOVUPS(at(src, 32*i), v[i])
			if i == 0 {
				VANDPS(abs, v[i], most)
				continue
			}
			t := YMM()
			VANDPS(abs, v[i], t)
			VMAXPS(t, most, most)
		}
		t := YMM()
		VPERM2F128(U8(1), most, most, t)
		VMAXPS(t, most, most)
		VSHUFPS(U8(0x4e), most, most, t)
		VMAXPS(t, most, most)
		VSHUFPS(U8(0xb1), most, most, t)
		VMAXPS(t, most, most)

		VDIVPS(most127(), most, most)
		x := XMM()
		VCVTPS2PH(U8(0), most.AsX(), x)
		VPEXTRW(U8(0), x, at(dst, 0))
		// The reciprocal, 0 of 0.
		isZero, inverse := zeroed(), YMM()
		VCMPPS(U8(0), isZero, most, isZero)
		VMOVUPS(unit(), inverse)
		VDIVPS(most, inverse, inverse)
		VANDNPS(inverse, isZero, inverse)
		for i := range v {
			// A half but for its last bit, away from zero, and the fraction cut off: so halves go away from zero, and what is
			// next to one does not.
			VMULPS(inverse, v[i], v[i])
			t := YMM()
			VANDPS(sign, v[i], t)
			VORPS(half, t, t)
			VADDPS(t, v[i], v[i])
			VCVTTPS2DQ(v[i], v[i])
			VPAND(low, v[i], v[i])
		}
		VPACKUSDW(v[1], v[0], v[0])
		VPACKUSDW(v[3], v[2], v[2])
		VPACKUSWB(v[2], v[0], v[0])
		VPERMD(v[0], order, v[0])
		VMOVDQU(v[0], at(dst, 2))
		SUBQ(I8(-128), src)
		ADDQ(U8(blockQ8), dst)
	})
	VZEROUPPER()
	RET()
}

func (s avx2) decodeQ8() {
	function("decodeQ8AVX2", "func(dst []float32, src []byte)")
	dst, src, n := base("dst"), base("src"), length("dst")
	elements(n, 32, func() {
		scale := YMM()
		VPBROADCASTW(at(src, 0), scale.AsX())
		VCVTPH2PS(scale.AsX(), scale)
		for i := range 4 {
			v := YMM()
			VPMOVSXBD(at(src, 2+8*i), v)
			VCVTDQ2PS(v, v)
			VMULPS(scale, v, v)
			VMOVUPS(v, at(dst, 32*i))
		}
		ADDQ(U8(blockQ8), src)
		SUBQ(I8(-128), dst)
	})
	VZEROUPPER()
	RET()
}

// scaleCodes is for groups of 16 codes with a scale each, and a minimum that is
// taken off where there are any.
func (s avx2) scaleCodes(name string, minima bool) {
	signature := "func(dst []float32, codes []byte, scales []float32)"
	if minima {
		signature = "func(dst []float32, codes []byte, scales, mins []float32)"
	}
	function(name, signature)
	dst, codes, scales, n := base("dst"), base("codes"), base("scales"), length("dst")
	var mins Register
	if minima {
		mins = base("mins")
	}
	elements(n, 16, func() {
		scale, low := YMM(), YMM()
		VBROADCASTSS(at(scales, 0), scale)
		if minima {
			VBROADCASTSS(at(mins, 0), low)
			ADDQ(U8(4), mins)
		}
		for i := range 2 {
			v := YMM()
			VPMOVSXBD(at(codes, 8*i), v)
			VCVTDQ2PS(v, v)
			VMULPS(scale, v, v)
			if minima {
				VSUBPS(low, v, v)
			}
			VMOVUPS(v, at(dst, 32*i))
		}
		ADDQ(U8(4), scales)
		ADDQ(U8(16), codes)
		ADDQ(U8(64), dst)
	})
	VZEROUPPER()
	RET()
}

// quantizeCodes is for groups of 16 elements.
func (s avx2) quantizeCodes() {
	function("quantizeCodesAVX2", "func(codes []byte, x, scales, mins []float32, least, most int32)")
	codes, x, scales, mins, n := base("codes"), base("x"), base("scales"), base("mins"), length("x")
	limit := func(param string) VecVirtual {
		v := YMM()
		VMOVD(Load(Param(param), GP32()), v.AsX())
		VPBROADCASTD(v.AsX(), v)
		return v
	}
	least, most := limit("least"), limit("most")
	elements(n, 16, func() {
		scale, low := YMM(), YMM()
		VBROADCASTSS(at(scales, 0), scale)
		VBROADCASTSS(at(mins, 0), low)
		var v [2]VecVirtual
		for i := range v {
			v[i] = YMM()
			VADDPS(at(x, 32*i), low, v[i])
			VDIVPS(scale, v[i], v[i])
			rounded(v[i])
			VPMAXSD(least, v[i], v[i])
			VPMINSD(most, v[i], v[i])
			VPSUBD(least, v[i], v[i])
		}
		VPACKSSDW(v[1], v[0], v[0])
		VPERMQ(U8(0xd8), v[0], v[0])
		upper := XMM()
		VEXTRACTI128(U8(1), v[0], upper)
		VPACKUSWB(upper, v[0].AsX(), upper)
		VMOVDQU(upper, at(codes, 0))
		ADDQ(U8(4), scales)
		ADDQ(U8(4), mins)
		ADDQ(U8(16), codes)
		ADDQ(U8(64), x)
	})
	VZEROUPPER()
	RET()
}
