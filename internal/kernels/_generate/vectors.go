package main

import (
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

const (
	mapSignature         = "func(dst, src []float32) (done int)"
	siluMulSignature     = "func(dst, gate, up []float32) (done int)"
	siluMulGradSignature = "func(dGate, dUp, d, gate, up []float32) (done int)"
	addProductsSignature = "func(acc []float64, x, y []float32) (done int)"
)

// The numbers of an exponential, as vectors.go has them.
var (
	expMost  = constant("expMost", 89)
	expLeast = constant("expLeast", -104)
	expLog2E = constant("expLog2E", math.Log2E)
	expRound = constant("expRound", 0x1.8p23)
	expHigh  = constant("expLn2High", 0.693359375)
	expLow   = constant("expLn2Low", -2.12194440e-4)
	expPower = []func() Mem{
		constant("expPower7", 1.9875691500e-4), constant("expPower6", 1.3981999507e-3), constant("expPower5", 8.3334519073e-3),
		constant("expPower4", 4.1665795894e-2), constant("expPower3", 1.6666665459e-1), constant("expPower2", 5.0000001201e-1),
	}
	expUnit   = constant("expUnit", 1)
	expBias   = data("expBias", repeat(127))
	signBit   = data("signBit", repeat(1<<31))
	everyWide = data("everyFloat64NaN", wideNaN())
)

// constant is a vector of one float32.
func constant(name string, x float32) func() Mem { return data(name, repeat(math.Float32bits(x))) }

func wideNaN() (b []byte) {
	for range 8 {
		for i := range 8 {
			b = append(b, byte(math.Float64bits(math.NaN())>>(8*i)))
		}
	}
	return b
}

func (avx512) wideNumber(v VecVirtual, replacement Op) {
	k := K()
	VCMPPD(U8(unordered), v, v, k)
	VMOVDQU64(replacement, k, v)
}

func (avx2) wideNumber(v VecVirtual, replacement Op) {
	isNaN := YMM()
	VCMPPD(U8(unordered), v, v, isNaN)
	VBLENDVPD(isNaN, replacement, v, v)
}

// exponential returns e^x, and some NaN for one.
func exponential(s wide, x VecVirtual) VecVirtual {
	vector := func() VecVirtual { v, _ := s.vector(); return v }
	// The second operand is what comes out where one is a NaN.
	limited := vector()
	VMOVUPS(expMost(), limited)
	VMINPS(x, limited, limited)
	least := vector()
	VMOVUPS(expLeast(), least)
	VMAXPS(limited, least, limited)

	n := vector()
	VMULPS(expLog2E(), limited, n)
	VADDPS(expRound(), n, n)
	VSUBPS(expRound(), n, n)
	r, t := vector(), vector()
	VMULPS(expHigh(), n, t)
	VSUBPS(t, limited, r)
	VMULPS(expLow(), n, t)
	VSUBPS(t, r, r)

	y := vector()
	VMULPS(expPower[0](), r, y)
	VADDPS(expPower[1](), y, y)
	for _, c := range expPower[2:] {
		VMULPS(r, y, y)
		VADDPS(c(), y, y)
	}
	VMULPS(r, r, t)
	VMULPS(t, y, y)
	VADDPS(r, y, y)
	VADDPS(expUnit(), y, y)

	// By 2^n in two steps, as one factor has not enough bits of an exponent.
	half, rest := vector(), vector()
	VCVTPS2DQ(n, rest)
	VPSRAD(U8(1), rest, half)
	VPSUBD(half, rest, rest)
	for _, k := range []VecVirtual{half, rest} {
		VPADDD(expBias(), k, k)
		VPSLLD(U8(23), k, k)
		VMULPS(k, y, y)
	}
	return y
}

// sigmoid returns 1 / (1 + e^-x), and some NaN for one.
func sigmoid(s wide, x VecVirtual) VecVirtual {
	minus, _ := s.vector()
	VXORPS(signBit(), x, minus)
	e := exponential(s, minus)
	VADDPS(expUnit(), e, e)
	y, _ := s.vector()
	VMOVUPS(expUnit(), y)
	VDIVPS(e, y, y)
	return y
}

// each is a function of 16 elements a step: body gets the offset in bytes of a vector of them.
func each(s wide, pointers []Register, n Register, body func(offset int)) {
	Store(elements(n, 16, func() {
		_, width := s.vector()
		for i := range 16 / width {
			body(4 * width * i)
		}
		for _, p := range pointers {
			ADDQ(U8(64), p)
		}
	}), Return("done"))
	VZEROUPPER()
	RET()
}

// mapped stores what f makes of each vector.
func mapped(s wide, name string, f func(s wide, x VecVirtual) VecVirtual) {
	function(name, mapSignature)
	dst, src, n := base("dst"), base("src"), length("dst")
	each(s, []Register{dst, src}, n, func(offset int) {
		x, _ := s.vector()
		VMOVUPS(at(src, offset), x)
		y := f(s, x)
		s.number(y, everyNaN())
		VMOVUPS(y, at(dst, offset))
	})
}

func siluMul(s wide, set string) {
	function("siluMul"+set, siluMulSignature)
	dst, gate, up, n := base("dst"), base("gate"), base("up"), length("dst")
	each(s, []Register{dst, gate, up}, n, func(offset int) {
		x, _ := s.vector()
		VMOVUPS(at(gate, offset), x)
		y := sigmoid(s, x)
		VMULPS(y, x, y)
		VMULPS(at(up, offset), y, y)
		s.number(y, everyNaN())
		VMOVUPS(y, at(dst, offset))
	})
}

func siluMulGrad(s wide, set string) {
	function("siluMulGrad"+set, siluMulGradSignature)
	dGate, dUp, d, gate, up := base("dGate"), base("dUp"), base("d"), base("gate"), base("up")
	n := length("d")
	each(s, []Register{dGate, dUp, d, gate, up}, n, func(offset int) {
		x, _ := s.vector()
		VMOVUPS(at(gate, offset), x)
		y := sigmoid(s, x)
		slope, _ := s.vector()
		VMOVUPS(expUnit(), slope)
		VSUBPS(y, slope, slope)
		VMULPS(slope, x, slope)
		VADDPS(expUnit(), slope, slope)
		VMULPS(slope, y, slope)
		g, _ := s.vector()
		VMOVUPS(at(d, offset), g)
		VMULPS(y, x, y)
		VMULPS(g, y, y)
		VMULPS(at(up, offset), g, g)
		VMULPS(slope, g, g)
		s.number(g, everyNaN())
		s.number(y, everyNaN())
		VMOVUPS(g, at(dGate, offset))
		VMOVUPS(y, at(dUp, offset))
	})
}

// addProducts needs no fused operation: the product of two float32 is exact.
func addProducts(s wide, set string) {
	function("addProducts"+set, addProductsSignature)
	acc, x, y, n := base("acc"), base("x"), base("y"), length("acc")
	Store(elements(n, 16, func() {
		_, width := s.vector()
		for i := range 32 / width {
			offset := 2 * width * i
			sum, _ := s.vector()
			VMOVUPD(at(acc, 2*offset), sum)
			VFMADD231PD(double(s, at(x, offset)), double(s, at(y, offset)), sum)
			s.wideNumber(sum, everyWide())
			VMOVUPD(sum, at(acc, 2*offset))
		}
		ADDQ(I32(128), acc)
		ADDQ(U8(64), x)
		ADDQ(U8(64), y)
	}), Return("done"))
	VZEROUPPER()
	RET()
}
