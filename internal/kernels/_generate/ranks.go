package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// notUpTo is a predicate of VCMPPS that is true for a NaN.
const notUpTo = 0x16

// ranks is for multiples of 32 numbers.
func (s avx2) ranks() {
	function("ranksAVX2", "func(codes []byte, x []float32, limits *[8]float32)")
	codes, x, n := base("codes"), base("x"), length("x")
	limits := Load(Param("limits"), GP64())
	var limit [8]VecVirtual
	for i := range limit {
		limit[i] = YMM()
		VBROADCASTSS(at(limits, 4*i), limit[i])
	}
	elements(n, 32, func() {
		var c [4]VecVirtual
		for i := range c {
			a, t := YMM(), YMM()
			c[i] = YMM()
			VMOVUPS(at(x, 32*i), a)
			VPSRLD(U8(31), a, c[i])
			VPSLLD(U8(3), c[i], c[i])
			VANDPS(magnitude(), a, a)
			VCMPPS(U8(notUpTo), limit[7], a, t)
			VPAND(t, c[i], c[i])
			for _, l := range limit[:7] {
				VCMPPS(U8(notUpTo), l, a, t)
				VPSUBD(t, c[i], c[i])
			}
		}
		VPACKUSDW(c[1], c[0], c[0])
		VPACKUSDW(c[3], c[2], c[2])
		VPACKUSWB(c[2], c[0], c[0])
		order := YMM()
		VMOVDQU(laneOrder(), order)
		VPERMD(c[0], order, c[0])
		VMOVDQU(c[0], at(codes, 0))
		SUBQ(I8(-128), x)
		ADDQ(U8(32), codes)
	})
	VZEROUPPER()
	RET()
}

// divide is for groups of multiples of 16 numbers.
func (s avx2) divide() {
	function("divideAVX2", "func(x, divisors []float32, group int)")
	x, divisors, count := base("x"), base("divisors"), length("divisors")
	group := Load(Param("group"), GP64())
	nan := YMM()
	VMOVUPS(everyNaN(), nan)
	groupsOf(count, func(done Register) {
		by := YMM()
		VBROADCASTSS(word(divisors, done), by)
		within("divided", group, 16, func() {
			for i := range 2 {
				v := YMM()
				VMOVUPS(at(x, 32*i), v)
				VDIVPS(by, v, v)
				s.number(v, nan)
				VMOVUPS(v, at(x, 32*i))
			}
			ADDQ(U8(64), x)
		})
	})
	VZEROUPPER()
	RET()
}
