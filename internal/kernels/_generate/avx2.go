package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// avx2 needs AVX2 and F16C.
type avx2 struct{}

func (avx2) every(value uint32) VecVirtual {
	v := YMM()
	VMOVD(bits(value), v.AsX())
	VPBROADCASTD(v.AsX(), v)
	return v
}

// load widens 8 elements.
func (avx2) load(f float, m Mem) VecVirtual {
	v := YMM()
	switch f {
	case f32:
		VMOVUPS(m, v)
	case f16:
		VCVTPH2PS(m, v)
	case bf16:
		VPMOVZXWD(m, v)
		VPSLLD(U8(16), v, v)
	}
	return v
}

func (s avx2) rounding(f float) rounding {
	if f != bf16 {
		return rounding{}
	}
	return rounding{s.every(1), s.every(0x7fff), s.every(nan >> 16)}
}

// bf16 rounds float32 to nearest even, in the lower halves of the doublewords.
// The result for a NaN is wrong.
func (avx2) bf16(r rounding, v VecVirtual) VecVirtual {
	t := YMM()
	VPSRLD(U8(16), v, t)
	VPAND(r.one, t, t)
	VPADDD(r.half, t, t)
	VPADDD(v, t, t)
	VPSRLD(U8(16), t, t)
	return t
}

// store rounds 16 float32.
func (s avx2) store(f float, r rounding, a, b VecVirtual, m Mem) {
	switch f {
	case f32:
		VMOVUPS(a, m)
		VMOVUPS(b, m.Offset(32))
	case f16:
		VCVTPS2PH(U8(0), a, m)
		VCVTPS2PH(U8(0), b, m.Offset(16))
	case bf16:
		round := func(v VecVirtual) VecVirtual {
			isNaN := YMM()
			VCMPPS(U8(unordered), v, v, isNaN)
			t := s.bf16(r, v)
			VPBLENDVB(isNaN, r.nan, t, t)
			return t
		}
		ra, rb := round(a), round(b)
		VPACKUSDW(rb, ra, ra)
		VPERMQ(U8(0xd8), ra, ra)
		VMOVDQU(ra, m)
	}
}

// pairs loads 16 elements, those of even index apart from those of odd index. A
// pair is in the same place of both vectors: in order for bf16, else as
// 0 1 4 5, 2 3 6 7.
func (s avx2) pairs(f float, m Mem, upper Op) (even, odd VecVirtual) {
	even, odd = YMM(), YMM()
	if f == bf16 {
		VMOVDQU(m, odd)
		VPSLLD(U8(16), odd, even)
		VPAND(upper, odd, odd)
		return even, odd
	}
	a, b := s.load(f, m), s.load(f, m.Offset(8*f.size))
	VSHUFPS(U8(0x88), b, a, even)
	VSHUFPS(U8(0xdd), b, a, odd)
	return even, odd
}

// magnitude returns the largest magnitude, as bits, of the vectors of n elements
// that each gives to take.
func (avx2) magnitude(f float, each func(n int, take func(m Mem))) GPVirtual {
	x, y, v, mask := XMM(), YMM(), YMM(), YMM()
	VPCMPEQD(mask, mask, mask)
	if f == f32 {
		VPSRLD(U8(1), mask, mask)
		VPXOR(y, y, y)
		each(8, func(m Mem) {
			VPAND(m, mask, v)
			VPMAXUD(v, y, y)
		})
		VEXTRACTI128(U8(1), y, x)
		VPMAXUD(y.AsX(), x, x)
		return largest32(x)
	}
	// The instruction that finds the least of words has no counterpart.
	VPSRLW(U8(1), mask, mask)
	VMOVDQA(mask, y)
	each(16, func(m Mem) {
		VMOVDQU(m, v)
		VPANDN(mask, v, v)
		VPMINUW(v, y, y)
	})
	VEXTRACTI128(U8(1), y, x)
	VPMINUW(y.AsX(), x, x)
	r := least16(x)
	XORL(U32(0x7fff), r)
	return r
}

func (s avx2) quantize4(f float) {
	function("bisect4"+f.name+"AVX2", quantize4Signature)
	lookup := Load(Param("lookup"), GP64())
	packed, src := base("packed"), base("src")
	blockSize := Load(Param("blockSize"), GP64())

	half, t4, t2, t1, index := YMM(), YMM(), YMM(), YMM(), YMM()
	VBROADCASTSS(at(lookup, middle), half)
	VBROADCASTF128(at(lookup, negative4), t4)
	VBROADCASTF128(at(lookup, negative2), t2)
	VMOVUPS(at(lookup, negative1), t1)
	VBROADCASTI128(at(lookup, negative), index)
	// rank returns eight ranks, each with its sign changed: a comparison gives -1
	// where it holds. The low bits of that choose the next threshold.
	rank := func(v VecVirtual) VecVirtual {
		r, t := YMM(), YMM()
		VCMPPS(U8(greater), half, v, r)
		VPERMILPS(r, t4, t)
		VCMPPS(U8(greater), t, v, t)
		VPADDD(r, r, r)
		VPADDD(t, r, r)
		VPERMILPS(r, t2, t)
		VCMPPS(U8(greater), t, v, t)
		VPADDD(r, r, r)
		VPADDD(t, r, r)
		VPERMPS(t1, r, t)
		VCMPPS(U8(greater), t, v, t)
		VPADDD(r, r, r)
		VPADDD(t, r, r)
		return r
	}
	nibble, upper := s.every(0x0f0f0f0f), s.every(0xffff0000)
	ahead := GP64()
	MOVQ(src, ahead)
	groups(f, 8, blockSize,
		func() GPVirtual {
			return s.magnitude(f, func(n int, take func(Mem)) {
				within("absmax", blockSize, n, func() {
					take(at(ahead, 0))
					ADDQ(U8(32), ahead)
				})
			})
		},
		func(m Mem) {
			v, unit := s.every(tiny), s.every(one)
			VPMAXUD(m, v, v)
			VDIVPS(v, unit, v)
			VMOVUPS(v, m)
		},
		func(m Mem) {
			factor := YMM()
			VBROADCASTSS(m, factor)
			within("codes", blockSize, 32, func() {
				var evens, odds [2]VecVirtual
				for i := range 2 {
					even, odd := s.pairs(f, at(src, 16*i*f.size), upper)
					VMULPS(factor, even, even)
					VMULPS(factor, odd, odd)
					evens[i], odds[i] = rank(even), rank(odd)
				}
				// In each half of all: eight even indices, eight odd ones.
				all, y := YMM(), YMM()
				VPACKSSDW(evens[1], evens[0], evens[0])
				VPACKSSDW(odds[1], odds[0], odds[0])
				VPACKSSWB(odds[0], evens[0], all)
				VPAND(nibble, all, all)
				VPSHUFB(all, index, all)
				VPSRLDQ(U8(8), all, y)
				VPSLLW(U8(4), all, all)
				VPOR(y, all, all)
				x := XMM()
				VEXTRACTI128(U8(1), all, x)
				if f == bf16 {
					VPUNPCKLDQ(x, all.AsX(), x)
				} else {
					VPUNPCKLWD(x, all.AsX(), x)
				}
				VMOVDQU(x, at(packed, 0))
				ADDQ(U8(32*f.size), src)
				ADDQ(U8(16), packed)
			})
		})
}

func (s avx2) dequantize4(f float) {
	function("dequantize4"+f.name+"AVX2", dequantize4Signature)
	dst, packed, absmax := base("dst"), base("packed"), base("absmax")
	code, blockSize := Load(Param("code"), GP64()), Load(Param("blockSize"), GP64())
	values0, values1 := YMM(), YMM()
	VMOVUPS(at(code, 0), values0)
	VMOVUPS(at(code, 32), values1)
	r := s.rounding(f)
	nibble := s.every(0x0f0f0f0f)
	blocks(func(done Register) {
		table0, table1 := YMM(), YMM()
		VBROADCASTSS(finite(absmax, done), table1)
		VMULPS(values0, table1, table0)
		VMULPS(values1, table1, table1)
		if f == f32 {
			within("codes", blockSize, 8, func() {
				index, t, out := YMM(), YMM(), YMM()
				VPMOVZXBQ(at(packed, 0), index)
				VPSRLQ(U8(4), index, t)
				VPSLLQ(U8(32), index, index)
				VPOR(t, index, index)
				VPERMPS(table0, index, out)
				VPERMPS(table1, index, t)
				VPSLLD(U8(28), index, index)
				VBLENDVPS(index, t, out, out)
				VMOVUPS(out, at(dst, 0))
				ADDQ(U8(4), packed)
				ADDQ(U8(32), dst)
			})
			return
		}
		// words has the 16 values in order.
		words := YMM()
		if f == f16 {
			x := XMM()
			VCVTPS2PH(U8(0), table0, words.AsX())
			VCVTPS2PH(U8(0), table1, x)
			VINSERTI128(U8(1), x, words, words)
		} else {
			VPACKUSDW(s.bf16(r, table1), s.bf16(r, table0), words)
			VPERMQ(U8(0xd8), words, words)
		}
		// Their lower bytes, and their upper bytes, twice each.
		lower, upper := YMM(), YMM()
		VPSLLW(U8(8), words, lower)
		VPSRLW(U8(8), lower, lower)
		VPSRLW(U8(8), words, upper)
		VPACKUSWB(upper, lower, lower)
		VPERMQ(U8(0xd8), lower, lower)
		VPERM2I128(U8(0x11), lower, lower, upper)
		VPERM2I128(U8(0x00), lower, lower, lower)
		within("codes", blockSize, 32, func() {
			index, t := YMM(), YMM()
			VPMOVZXBW(at(packed, 0), index)
			VPSRLW(U8(4), index, t)
			VPSLLW(U8(8), index, index)
			VPOR(t, index, index)
			VPAND(nibble, index, index)
			VPSHUFB(index, upper, t)
			VPSHUFB(index, lower, index)
			a, b := YMM(), YMM()
			VPUNPCKLBW(t, index, a)
			VPUNPCKHBW(t, index, b)
			VPERM2I128(U8(0x20), b, a, t)
			VPERM2I128(U8(0x31), b, a, a)
			VMOVDQU(t, at(dst, 0))
			VMOVDQU(a, at(dst, 32))
			ADDQ(U8(16), packed)
			ADDQ(U8(64), dst)
		})
	})
}

func (s avx2) maxAbs(f float) {
	function("maxAbs"+f.name+"AVX2", maxAbsSignature)
	src, n := base("src"), count("src", f)
	var done Register
	largest := s.magnitude(f, func(step int, take func(Mem)) {
		done = elements(n, step, func() {
			take(at(src, 0))
			ADDQ(U8(32), src)
		})
	})
	Store(largest, Return("largest"))
	Store(done, Return("done"))
	VZEROUPPER()
	RET()
}

func (s avx2) quantize8(f float) {
	function("quantize8"+f.name+"AVX2", quantize8Signature)
	q, src, n := base("q"), base("src"), length("q")
	factor, order := YMM(), YMM()
	VBROADCASTSS(NewParamAddr("scale", 48), factor)
	VMOVDQU(laneOrder(), order)
	Store(elements(n, 32, func() {
		var w [4]VecVirtual
		for i := range w {
			w[i] = s.load(f, at(src, 8*i*f.size))
			if f != f16 {
				x := XMM()
				VCVTPS2PH(U8(0), w[i], x)
				VCVTPH2PS(x, w[i])
			}
			VMULPS(factor, w[i], w[i])
			VCVTPS2DQ(w[i], w[i])
		}
		VPACKSSDW(w[1], w[0], w[0])
		VPACKSSDW(w[3], w[2], w[2])
		VPACKSSWB(w[2], w[0], w[0])
		VPERMD(w[0], order, w[0])
		VMOVDQU(w[0], at(q, 0))
		ADDQ(I32(32*int32(f.size)), src)
		ADDQ(U8(32), q)
	}), Return("done"))
	VZEROUPPER()
	RET()
}

// laneOrder gathers the quarters of four vectors that were packed by lanes.
var laneOrder = data("laneOrder", []byte{0: 0, 4: 4, 8: 1, 12: 5, 16: 2, 20: 6, 24: 3, 28: 7, 31: 0})

func (s avx2) dequantize8(f float) {
	function("dequantize8"+f.name+"AVX2", dequantize8Signature)
	dst, q, n := base("dst"), base("q"), length("q")
	factor := YMM()
	VBROADCASTSS(NewParamAddr("scale", 48), factor)
	last, r := s.every(oneOver127), s.rounding(f)
	Store(elements(n, 16, func() {
		var v [2]VecVirtual
		for i := range v {
			v[i] = YMM()
			VPMOVSXBD(at(q, 8*i), v[i])
			VCVTDQ2PS(v[i], v[i])
			VMULPS(factor, v[i], v[i])
			VMULPS(last, v[i], v[i])
		}
		s.store(f, r, v[0], v[1], at(dst, 0))
		ADDQ(U8(16), q)
		ADDQ(U8(16*f.size), dst)
	}), Return("done"))
	VZEROUPPER()
	RET()
}

func (s avx2) convert(to, from float) {
	function("convert"+from.name+"To"+to.name+"AVX2", convertSignature)
	dst, src, n := base("dst"), base("src"), count("src", from)
	r := s.rounding(to)
	Store(elements(n, 16, func() {
		s.store(to, r, s.load(from, at(src, 0)), s.load(from, at(src, 8*from.size)), at(dst, 0))
		ADDQ(U8(16*from.size), src)
		ADDQ(U8(16*to.size), dst)
	}), Return("done"))
	VZEROUPPER()
	RET()
}
