package main

import (
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// minifloat is a float of 8 or 4 bits without infinities, as bits of float32.
type minifloat struct {
	name     string
	mantissa int     // its bits
	bias     int     // of the exponent
	largest  float32 // its greatest number
	nan      uint32  // its code, 0 for none
	signBit  int
}

var (
	e4m3 = minifloat{"E4M3", 3, 7, 448, 0x7f, 7}
	e2m1 = minifloat{"E2M1", 1, 1, 6, 0, 3}
)

// constant is a vector of one number in memory.
func (f minifloat) constant(name string, v uint32) func() Mem { return data(f.name+name, repeat(v)) }

// encode rounds whole vectors of 32 elements, each plus a number: 0 makes -0 positive, -0 does nothing.
func (s avx2) encodeMinifloat(f minifloat) {
	function("encode"+f.name+"AVX2", "func(dst []byte, x []float32, plus float32)")
	dst, x, n := base("dst"), base("x"), length("x")
	plus := YMM()
	a, err := Param("plus").Resolve()
	if err != nil {
		panic(err)
	}
	VBROADCASTSS(a.Addr, plus)
	shift := 23 - f.mantissa
	// Numbers below the least normal one: an addition rounds them, to a multiple of the least of all.
	magic := float32(math.Ldexp(1, 23+1-f.bias-f.mantissa))
	least := f.constant("Least", uint32(127+1-f.bias)<<23)
	largest := f.constant("Largest", math.Float32bits(f.largest))
	half := f.constant("Half", 1<<(shift-1)-1)
	odd := f.constant("Odd", 1)
	bias := f.constant("Bias", uint32(127-f.bias)<<f.mantissa)
	add := f.constant("Add", math.Float32bits(magic))
	sign := f.constant("Sign", 1<<f.signBit)
	infinite := f.constant("Infinite", infinity)
	nan := f.constant("NaN", f.nan)
	pairs := data("nibblePairs", repeat(0x10011001))
	elements(n, 32, func() {
		var codes [4]VecVirtual
		for i := range codes {
			v, a, t, c, small := YMM(), YMM(), YMM(), YMM(), YMM()
			VADDPS(at(x, 32*i), plus, v)
			VPAND(magnitude(), v, a)
			var isNaN VecVirtual
			if f.nan != 0 {
				isNaN = YMM()
				VPCMPGTD(infinite(), a, isNaN)
			}
			VPMINUD(largest(), a, a)
			VPSRLD(U8(shift), a, c)
			VPAND(odd(), c, t)
			VPADDD(a, t, t)
			VPADDD(half(), t, t)
			VPSRLD(U8(shift), t, c)
			VPSUBD(bias(), c, c)
			VADDPS(add(), a, t)
			VPSUBD(add(), t, t)
			VMOVDQU(least(), small)
			VPCMPGTD(a, small, small)
			VPBLENDVB(small, t, c, c)
			if f.nan != 0 {
				VPBLENDVB(isNaN, nan(), c, c)
			}
			VPSRLD(U8(31-f.signBit), v, v)
			VPAND(sign(), v, v)
			VPOR(v, c, c)
			codes[i] = c
		}
		VPACKUSDW(codes[1], codes[0], codes[0])
		VPACKUSDW(codes[3], codes[2], codes[2])
		VPACKUSWB(codes[2], codes[0], codes[0])
		o := YMM()
		VMOVDQU(unpacked(), o)
		VPERMD(codes[0], o, codes[0])
		if f.signBit == 7 {
			VMOVDQU(codes[0], at(dst, 0))
			ADDQ(U8(32), dst)
		} else {
			VPMADDUBSW(pairs(), codes[0], codes[0])
			upper := XMM()
			VEXTRACTI128(U8(1), codes[0], upper)
			VPACKUSWB(upper, codes[0].AsX(), upper)
			VMOVDQU(upper, at(dst, 0))
			ADDQ(U8(16), dst)
		}
		SUBQ(I8(-128), x)
	})
	VZEROUPPER()
	RET()
}

// magnitudes finds the bits of the largest magnitude of each 16 elements.
func (s avx2) magnitudes() {
	function("magnitudesAVX2", "func(dst []uint32, x []float32)")
	dst, x, n := base("dst"), base("x"), length("x")
	abs := YMM()
	VMOVUPS(magnitude(), abs)
	elements(n, 16, func() {
		a, b, c := YMM(), YMM(), XMM()
		VPAND(at(x, 0), abs, a)
		VPAND(at(x, 32), abs, b)
		VPMAXUD(a, b, a)
		VEXTRACTI128(U8(1), a, c)
		VPMAXUD(a.AsX(), c, c)
		MOVL(largest32(c), at(dst, 0))
		ADDQ(U8(4), dst)
		ADDQ(U8(64), x)
	})
	VZEROUPPER()
	RET()
}

// groups divides or multiplies each 16 elements by a number.
func (s avx2) byGroups(name string, op func(m, x, r Op)) {
	function(name, "func(x, by []float32)")
	x, by, n := base("x"), base("by"), length("x")
	elements(n, 16, func() {
		f := YMM()
		VBROADCASTSS(at(by, 0), f)
		for i := range 2 {
			v := YMM()
			VMOVUPS(at(x, 32*i), v)
			op(f, v, v)
			VMOVUPS(v, at(x, 32*i))
		}
		ADDQ(U8(4), by)
		ADDQ(U8(64), x)
	})
	VZEROUPPER()
	RET()
}

// nibbles is the values of codes of 4 bits, of which there is a table, times a number for each 16.
func (s avx2) nibbles() {
	function("nibblesAVX2", "func(dst []float32, codes []byte, values *[16]float32, by []float32)")
	dst, codes, by, n := base("dst"), base("codes"), base("by"), length("dst")
	values := Load(Param("values"), GP64())
	low, high := YMM(), YMM()
	VMOVUPS(at(values, 0), low)
	VMOVUPS(at(values, 32), high)
	elements(n, 16, func() {
		f, c, t := YMM(), YMM(), YMM()
		VBROADCASTSS(at(by, 0), f)
		VPMOVZXBD(at(codes, 0), c)
		VPSRLD(U8(4), c, t)
		var v [2]VecVirtual
		for i, index := range []VecVirtual{c, t} {
			v[i] = YMM()
			b, where := YMM(), YMM()
			VPERMPS(low, index, v[i])
			VPERMPS(high, index, b)
			VPSLLD(U8(28), index, where) // bit 3 becomes the sign
			VBLENDVPS(where, b, v[i], v[i])
			VMULPS(f, v[i], v[i])
		}
		a, b, x := YMM(), YMM(), YMM()
		VUNPCKLPS(v[1], v[0], a)
		VUNPCKHPS(v[1], v[0], b)
		VPERM2F128(U8(0x20), b, a, x)
		VMOVUPS(x, at(dst, 0))
		VPERM2F128(U8(0x31), b, a, x)
		VMOVUPS(x, at(dst, 32))
		ADDQ(U8(4), by)
		ADDQ(U8(8), codes)
		ADDQ(U8(64), dst)
	})
	VZEROUPPER()
	RET()
}
