package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// The rounding to vectors of ggml's IQ3_S. Elements are rounded, and sums added up, for eight groups at once; the
// nearest vector is looked for among eight at once.

// Rows of what the rounding works with, as package kernels has them.
const (
	latticeInverse = 32 * iota
	latticeScale
	latticeXQ
	latticeQQ
	latticeOff
	latticeCodes = 32 * 16
	latticeFours = 8
)

var (
	halfOf      = constant("latticeHalf", 0.5)
	latticeMost = data("latticeMost", repeat(7))
	latticeOdd  = table("latticeLevels", []float32{1, 3, 5, 7, 9, 11, 13, 15})
	latticeOne  = data("latticeOne", repeat(1))
)

func roundLattice() {
	const width = 32 // bytes of an element of all groups
	function("roundLatticeAVX2",
		"func(work *[48][8]float32, x, w *[256]float32, near []uint32, lists *[4097]uint32)")
	work, x, w := Load(Param("work"), GP64()), Load(Param("x"), GP64()), Load(Param("w"), GP64())
	near, lists := base("near"), Load(Param("lists"), GP64())
	row := func(i int) Mem { return at(work, i) }
	codes := GP64() // of the four elements of all groups that are in hand
	LEAQ(at(work, latticeCodes), codes)
	end := GP64()
	LEAQ(at(work, latticeCodes+latticeFours*width), end)
	zero := zeroed()
	VMOVUPS(zero, row(latticeXQ))
	VMOVUPS(zero, row(latticeQQ))
	VMOVUPS(zero, row(latticeOff))

	Label("four")
	rounds, inverse := YMM(), YMM()
	VMOVUPS(row(latticeInverse), inverse)
	for j := range 4 {
		l := YMM()
		VMULPS(at(x, width*j), inverse, l)
		VSUBPS(unit(), l, l)
		VMULPS(halfOf(), l, l)
		rounded(l)
		least := YMM()
		VPXOR(least, least, least)
		VPMAXSD(least, l, l)
		VPMINSD(latticeMost(), l, l)
		if j == 0 {
			VMOVDQA(l, rounds)
			continue
		}
		VPSLLD(U8(3*j), l, l)
		VPOR(l, rounds, rounds)
	}
	VMOVDQU(rounds, at(codes, 0))

	// Each group by itself.
	lane := GP64()
	XORQ(lane, lane)
	Label("lane")
	vector, list, listEnd := GP64(), GP64(), GP64()
	MOVL(Mem{Base: codes, Index: lane, Scale: 1}, vector.As32())
	MOVL(Mem{Base: lists, Index: vector, Scale: 4}, list.As32())
	MOVL(Mem{Base: lists, Index: vector, Scale: 4, Disp: 4}, listEnd.As32())
	LEAQ(Mem{Base: near, Index: list, Scale: 4}, list)
	LEAQ(Mem{Base: near, Index: listEnd, Scale: 4}, listEnd)
	levels := YMM()
	VBROADCASTSS(Mem{Base: work, Index: lane, Scale: 1, Disp: latticeScale}, levels)
	VMULPS(latticeOdd(), levels, levels)
	var errs [4]VecVirtual
	for j := range errs {
		d, t := YMM(), YMM()
		VBROADCASTSS(Mem{Base: x, Index: lane, Scale: 1, Disp: width * j}, t)
		VSUBPS(t, levels, d)
		VBROADCASTSS(Mem{Base: w, Index: lane, Scale: 1, Disp: width * j}, t)
		VMULPS(d, t, t)
		VMULPS(d, t, t)
		errs[j] = t
	}
	// errorsOf looks up the errors of eight vectors: an index are the lowest three bits.
	errorsOf := func(m Mem) (e, vectors VecVirtual) {
		e, vectors = YMM(), YMM()
		VMOVDQU(m, vectors)
		VPERMPS(errs[0], vectors, e)
		for j := 1; j < 4; j++ {
			i := YMM()
			VPSRLD(U8(3*j), vectors, i)
			VPERMPS(errs[j], i, i)
			VADDPS(i, e, e)
		}
		return e, vectors
	}
	best, found := errorsOf(at(list, 0))
	another := func(m Mem) {
		e, vectors := errorsOf(m)
		smaller := YMM()
		VCMPPS(U8(less), best, e, smaller)
		VMINPS(e, best, best)
		VBLENDVPS(smaller, vectors, found, found)
	}
	another(at(list, 32))
	ADDQ(U8(64), list)
	Label("more")
	CMPQ(list, listEnd)
	JAE(LabelRef("whole"))
	another(at(list, 0))
	ADDQ(U8(32), list)
	JMP(LabelRef("more"))
	Label("whole")
	// The least of the eight, and of those with it the one that is first in the list.
	least, t := YMM(), YMM()
	VPERM2F128(U8(1), best, best, t)
	VMINPS(t, best, least)
	VSHUFPS(U8(0x4e), least, least, t)
	VMINPS(t, least, least)
	VSHUFPS(U8(0xb1), least, least, t)
	VMINPS(t, least, least)
	VCMPPS(U8(notEqual), least, best, t) // all bits where it is not
	VPOR(t, found, found)
	u := XMM()
	VEXTRACTI128(U8(1), found, u)
	VPMINUD(u, found.AsX(), u)
	v := XMM()
	VPSHUFD(U8(0x4e), u, v)
	VPMINUD(v, u, u)
	VPSHUFD(U8(0xb1), u, v)
	VPMINUD(v, u, u)
	VMOVD(u, vector.As32())
	ANDL(U32(0xfff), vector.As32())
	MOVL(vector.As32(), Mem{Base: codes, Index: lane, Scale: 1})
	ADDQ(U8(4), lane)
	CMPQ(lane, U8(4*8))
	JB(LabelRef("lane"))

	// The sums.
	taken, off, xq, qq := YMM(), YMM(), YMM(), YMM()
	VMOVDQU(at(codes, 0), taken)
	VPCMPEQD(taken, rounds, off)
	VPANDN(latticeOne(), off, off)
	VPOR(row(latticeOff), off, off)
	VMOVDQU(off, row(latticeOff))
	VMOVUPS(row(latticeXQ), xq)
	VMOVUPS(row(latticeQQ), qq)
	for j := range 4 {
		q, v, s, t := YMM(), YMM(), YMM(), YMM()
		VPSRLD(U8(3*j), taken, q)
		VPAND(latticeMost(), q, q)
		VPADDD(q, q, q)
		VPADDD(latticeOne(), q, q)
		VCVTDQ2PS(q, q)
		VMOVUPS(at(x, width*j), v)
		VMULPS(v, v, s)
		VMULPS(v, s, t)
		add(xq, t, q)
		VMULPS(q, s, s)
		add(qq, s, q)
	}
	VMOVUPS(xq, row(latticeXQ))
	VMOVUPS(qq, row(latticeQQ))
	ADDQ(U32(4*width), x)
	ADDQ(U32(4*width), w)
	ADDQ(U8(width), codes)
	CMPQ(codes, end)
	JB(LabelRef("four"))
	VZEROUPPER()
	RET()
}
