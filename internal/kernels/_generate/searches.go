package main

import (
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// The searches for the scales of ggml's types. A vector holds an element of each
// of eight groups, so that what is added up within a group keeps its order.

const (
	searchMinSignature = "func(work *[48][8]float32, x, w, trials []float32)"
	searchSignature    = "func(work *[48][8]float32, x, trials []float32)"
)

// Rows of what a search works with: what it finds, what has no register, and the
// codes of a trial.
const (
	foundScale = 32 * iota
	foundLow
	foundInverse
	foundLowUsed
	sumOfWeights
	sumOfElements
	highest
	leastError
	allCodes = 32 * 16
)

// Predicates of VCMPPS that are false for a NaN, and one that is true.
const (
	less     = 0x11
	notLess  = 0x1d
	notEqual = 0x04
)

var (
	magnitude  = data("magnitude", repeat(0x7fffffff))
	codeRound  = constant("codeRound", 0x1.8p23)
	codeDigits = data("codeDigits", repeat(0x007fffff))
	codeZero   = data("codeZero", repeat(0x00400000))
	symLeast   = data("symLeast", repeat(0xffffffe0))
	symMost    = data("symMost", repeat(31))
	tinyGroup  = constant("tinyGroup", 1e-15)
	unit       = constant("searchUnit", 1)
	most127    = constant("searchMost", 127)

	nonLinear       = []float32{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}
	nonLinearLower  = table("nonLinearLower", nonLinear[:8])
	nonLinearUpper  = table("nonLinearUpper", nonLinear[8:])
	nonLinearMiddle = constant("nonLinearMiddle", middleOf(7))
	nonLinear2      = []func() Mem{constant("nonLinearMiddle3", middleOf(3)), constant("nonLinearMiddle11", middleOf(11))}
	nonLinear4      = table("nonLinearMiddles4", []float32{middleOf(1), middleOf(5), middleOf(9), middleOf(13),
		middleOf(1), middleOf(5), middleOf(9), middleOf(13)})
	nonLinear8 = table("nonLinearMiddles8", []float32{middleOf(0), middleOf(2), middleOf(4), middleOf(6),
		middleOf(8), middleOf(10), middleOf(12), middleOf(14)})
)

func middleOf(i int) float32 { return (nonLinear[i] + nonLinear[i+1]) / 2 }

// table is a vector of eight float32.
func table(name string, x []float32) func() Mem {
	var b []byte
	for _, v := range x {
		bits := math.Float32bits(v)
		b = append(b, byte(bits), byte(bits>>8), byte(bits>>16), byte(bits>>24))
	}
	return data(name, b)
}

// overGroup repeats body for each element of the groups; index is 32 times its
// number.
func overGroup(name string, size Register, body func(index Register)) {
	index := GP64()
	XORQ(index, index)
	Label(name)
	body(index)
	ADDQ(U8(32), index)
	CMPQ(index, size)
	JB(LabelRef(name))
}

func indexed(p, index Register) Mem { return Mem{Base: p, Index: index, Scale: 1} }

// overTrials repeats body for each trial from the one at p on.
func overTrials(p, count Register, body func(trial VecVirtual)) {
	Label("trial")
	TESTQ(count, count)
	JE(LabelRef("end"))
	trial := YMM()
	VBROADCASTSS(at(p, 0), trial)
	body(trial)
	ADDQ(U8(4), p)
	DECQ(count)
	JMP(LabelRef("trial"))
	Label("end")
}

// rounded makes integers of numbers as RoundCode does.
func rounded(v VecVirtual) {
	VADDPS(codeRound(), v, v)
	VPAND(codeDigits(), v, v)
	VPSUBD(codeZero(), v, v)
}

// add adds a*b to sum, with a rounding for each. It changes a.
func add(sum, a VecVirtual, b Op) {
	VMULPS(b, a, a)
	VADDPS(a, sum, sum)
}

// zeroed returns a vector of zeros.
func zeroed() VecVirtual {
	v := YMM()
	VXORPS(v, v, v)
	return v
}

// searchMin is for errors that are magnitudes, or squares.
func searchMin(name string, absolute bool) {
	function(name, searchMinSignature)
	work := Load(Param("work"), GP64())
	x, w, trials := base("x"), base("w"), base("trials")
	size, count := length("x"), length("trials")
	SHLQ(U8(2), size)
	row := func(i int) Mem { return at(work, i) }

	// What is said of the whole group.
	low, high, sw, sx, v, t := YMM(), YMM(), YMM(), YMM(), YMM(), YMM()
	VMOVUPS(at(x, 0), low)
	VMOVUPS(low, high)
	VMOVUPS(at(w, 0), sw)
	VMULPS(sw, low, sx)
	next := GP64()
	MOVQ(U32(32), next)
	Label("sums")
	VMOVUPS(indexed(x, next), v)
	VMINPS(low, v, low)
	VMAXPS(high, v, high)
	VMOVUPS(indexed(w, next), t)
	VADDPS(t, sw, sw)
	add(sx, t, v)
	ADDQ(U8(32), next)
	CMPQ(next, size)
	JB(LabelRef("sums"))
	VXORPS(t, t, t)
	VMINPS(low, t, low)
	VMOVUPS(sw, row(sumOfWeights))
	VMOVUPS(sx, row(sumOfElements))
	VMOVUPS(high, row(highest))

	largest := YMM()
	VBROADCASTSS(at(trials, 0), largest)
	integer, zero := YMM(), zeroed()
	VCVTPS2DQ(largest, integer)

	// codesOf sets the codes of a trial, and hands them on.
	codesOf := func(label string, inverse VecVirtual, each func(index Register, v, l VecVirtual)) {
		overGroup(label, size, func(index Register) {
			v, l := YMM(), YMM()
			VMOVUPS(indexed(x, index), v)
			VSUBPS(low, v, l)
			VMULPS(inverse, l, l)
			rounded(l)
			VPMAXSD(zero, l, l)
			VPMINSD(integer, l, l)
			VCVTDQ2PS(l, l)
			VMOVUPS(l, Mem{Base: work, Index: index, Scale: 1, Disp: allCodes})
			each(index, v, l)
		})
	}
	errorOf := func(label string, scale, least VecVirtual) VecVirtual {
		e := zeroed()
		overGroup(label, size, func(index Register) {
			d := YMM()
			VMULPS(Mem{Base: work, Index: index, Scale: 1, Disp: allCodes}, scale, d)
			VADDPS(least, d, d)
			VSUBPS(indexed(x, index), d, d)
			if absolute {
				VANDPS(magnitude(), d, d)
			} else {
				VMULPS(d, d, d)
			}
			add(e, d, indexed(w, index))
		})
		return e
	}

	// The first trial is the range of the elements itself.
	inverse, scale := YMM(), YMM()
	VSUBPS(low, high, inverse)
	VDIVPS(inverse, largest, inverse)
	VMOVUPS(unit(), scale)
	VDIVPS(inverse, scale, scale)
	codesOf("codes0", inverse, func(Register, VecVirtual, VecVirtual) {})
	VMOVUPS(errorOf("error0", scale, low), row(leastError))
	VMOVUPS(scale, row(foundScale))
	VMOVUPS(inverse, row(foundInverse))
	VMOVUPS(low, row(foundLowUsed))
	ADDQ(U8(4), trials)
	DECQ(count)

	overTrials(trials, count, func(inverse VecVirtual) {
		t := YMM()
		VMOVUPS(row(highest), t)
		VSUBPS(low, t, t)
		VDIVPS(t, inverse, inverse)
		sl, sl2, sxl := zeroed(), zeroed(), zeroed()
		codesOf("codes", inverse, func(index Register, v, l VecVirtual) {
			wl := YMM()
			VMULPS(indexed(w, index), l, wl)
			VADDPS(wl, sl, sl)
			add(sl2, l, wl)
			add(sxl, wl, v)
		})
		det, scale, least, u := YMM(), YMM(), YMM(), YMM()
		VMULPS(row(sumOfWeights), sl2, det)
		VMULPS(sl, sl, u)
		VSUBPS(u, det, det)
		VMULPS(row(sumOfWeights), sxl, scale)
		VMULPS(row(sumOfElements), sl, u)
		VSUBPS(u, scale, scale)
		VDIVPS(det, scale, scale)
		VMULPS(row(sumOfElements), sl2, least)
		VMULPS(sxl, sl, u)
		VSUBPS(u, least, least)
		VDIVPS(det, least, least)
		VDIVPS(sl2, sxl, sxl)
		VCMPPS(U8(greater), zero, least, u)
		VBLENDVPS(u, sxl, scale, scale)
		VANDNPS(least, u, least)
		VCMPPS(U8(greater), zero, det, det)
		e := errorOf("error", scale, least)
		VCMPPS(U8(less), row(leastError), e, u)
		VANDPS(det, u, u)
		keep := func(v VecVirtual, i int) {
			t := YMM()
			VMOVUPS(row(i), t)
			VBLENDVPS(u, v, t, t)
			VMOVUPS(t, row(i))
		}
		keep(e, leastError)
		keep(scale, foundScale)
		keep(inverse, foundInverse)
		keep(low, foundLowUsed)
		VBLENDVPS(u, least, low, low)
	})
	VMOVUPS(low, row(foundLow))
	VZEROUPPER()
	RET()
}

// searchWeighted is a search by sums a and b that sumsOf adds up of elements, the
// factor of which is inverse: the scale is a/b, and is better the greater a*a/b.
func searchWeighted(name string, first func(inverse, m, trial VecVirtual), sumsOf func(v, inverse, a, b VecVirtual)) {
	function(name, searchSignature)
	work := Load(Param("work"), GP64())
	x, trials := base("x"), base("trials")
	size, count := length("x"), length("trials")
	SHLQ(U8(2), size)

	m, most := zeroed(), zeroed()
	overGroup("largest", size, func(index Register) {
		v, a, more := YMM(), YMM(), YMM()
		VMOVUPS(indexed(x, index), v)
		VANDPS(magnitude(), v, a)
		VCMPPS(U8(greater), most, a, more)
		VBLENDVPS(more, v, m, m)
		VMAXPS(most, a, most)
	})
	enough := YMM()
	VCMPPS(U8(notLess), tinyGroup(), most, enough)

	sums := func(label string, inverse VecVirtual) (a, b VecVirtual) {
		a, b = zeroed(), zeroed()
		overGroup(label, size, func(index Register) {
			v := YMM()
			VMOVUPS(indexed(x, index), v)
			sumsOf(v, inverse, a, b)
		})
		return a, b
	}
	inverse, scale, best := YMM(), YMM(), YMM()
	VBROADCASTSS(at(trials, 0), best)
	first(inverse, m, best)
	a, b := sums("sums0", inverse)
	t := zeroed()
	VCMPPS(U8(notEqual), t, b, t)
	VDIVPS(b, a, scale)
	VANDPS(t, scale, scale)
	VMULPS(a, scale, best)
	ADDQ(U8(4), trials)
	DECQ(count)

	overTrials(trials, count, func(trial VecVirtual) {
		VDIVPS(m, trial, trial)
		a, b := sums("sums", trial)
		better, t := zeroed(), YMM()
		VCMPPS(U8(greater), better, b, better)
		u := YMM()
		VMULPS(a, a, t)
		VMULPS(b, best, u)
		VCMPPS(U8(greater), u, t, t)
		VANDPS(t, better, better)
		VDIVPS(b, a, t)
		VBLENDVPS(better, t, scale, scale)
		VBLENDVPS(better, trial, inverse, inverse)
		VMULPS(a, t, t)
		VBLENDVPS(better, t, best, best)
	})
	VANDPS(enough, scale, scale)
	VANDPS(enough, inverse, inverse)
	VMOVUPS(scale, at(work, foundScale))
	VMOVUPS(inverse, at(work, foundInverse))
	VZEROUPPER()
	RET()
}

func searches() {
	searchMin("searchMinAbsoluteAVX2", true)
	searchMin("searchMinSquaredAVX2", false)
	searchWeighted("searchSymAVX2",
		func(inverse, m, trial VecVirtual) { VDIVPS(m, trial, inverse) },
		func(v, inverse, a, b VecVirtual) {
			l, w, t := YMM(), YMM(), YMM()
			VMULPS(v, inverse, l)
			rounded(l)
			VPMAXSD(symLeast(), l, l)
			VPMINSD(symMost(), l, l)
			VCVTDQ2PS(l, l)
			VMULPS(v, v, w)
			VMULPS(v, w, t)
			add(a, t, l)
			VMULPS(l, w, w)
			add(b, w, l)
		})
	searchWeighted("searchNonLinearAVX2",
		func(inverse, m, _ VecVirtual) {
			VDIVPS(most127(), m, inverse)
			t := YMM()
			VMOVUPS(unit(), t)
			VDIVPS(inverse, t, inverse)
		},
		func(v, inverse, a, b VecVirtual) {
			k := nearest(v, inverse)
			w := YMM()
			VMULPS(v, v, w)
			VMULPS(k, w, w)
			add(b, k, w)
			add(a, w, v)
		})
}

// nearest returns the value of NonLinear that is nearest to v*inverse.
func nearest(v, inverse VecVirtual) VecVirtual {
	y, upper, more, index, t := YMM(), YMM(), YMM(), YMM(), YMM()
	VMULPS(v, inverse, y)
	VCMPPS(U8(notLess), nonLinearMiddle(), y, upper)
	VMOVUPS(nonLinear2[0](), t)
	VBLENDVPS(upper, nonLinear2[1](), t, t)
	VCMPPS(U8(notLess), t, y, more)
	VPADDD(upper, upper, index) // numbers with their signs changed
	VPADDD(more, index, index)
	zero := YMM()
	VPXOR(zero, zero, zero)
	VPSUBD(index, zero, index)
	VMOVUPS(nonLinear4(), t)
	VPERMILPS(index, t, t)
	VCMPPS(U8(notLess), t, y, more)
	VPADDD(index, index, index)
	VPSUBD(more, index, index)
	VMOVUPS(nonLinear8(), t)
	VPERMPS(t, index, t)
	VCMPPS(U8(notLess), t, y, more)
	VPADDD(index, index, index)
	VPSUBD(more, index, index)
	k := YMM()
	VMOVUPS(nonLinearLower(), t)
	VPERMPS(t, index, t)
	VMOVUPS(nonLinearUpper(), k)
	VPERMPS(k, index, k)
	VBLENDVPS(upper, k, t, k)
	return k
}

var (
	minusFour  = constant("minusFour", -4)
	movingMost = data("movingMost", repeat(3))
	movingLow  = data("movingLow", repeat(0xfffffffc))
)

// searchMoving is for two times eight groups of 16: rows 0 and 1 are their scales,
// the codes those of allCodes.
func searchMoving() {
	const size = 32 * 16 // of eight groups
	function("searchMovingAVX2", "func(work *[48][8]float32, x []float32)")
	work, x := Load(Param("work"), GP64()), base("x")
	length := GP64()
	MOVQ(U32(size), length)
	element := func(h int, index Register) Mem { return Mem{Base: x, Index: index, Scale: 1, Disp: h * size} }
	code := func(h int, index Register) Mem {
		return Mem{Base: work, Index: index, Scale: 1, Disp: allCodes + h*size}
	}
	clipped := func(l VecVirtual) {
		rounded(l)
		VPMAXSD(movingLow(), l, l)
		VPMINSD(movingMost(), l, l)
		VCVTDQ2PS(l, l)
	}
	var a, b, inverse [2]VecVirtual
	for h := range 2 {
		m, most := zeroed(), zeroed()
		overGroup([]string{"largest0", "largest1"}[h], length, func(index Register) {
			v, a, more := YMM(), YMM(), YMM()
			VMOVUPS(element(h, index), v)
			VANDPS(magnitude(), v, a)
			VCMPPS(U8(greater), most, a, more)
			VBLENDVPS(more, v, m, m)
			VMAXPS(most, a, most)
		})
		VCMPPS(U8(notLess), tinyGroup(), most, most)
		VMOVUPS(most, at(work, 32*(2+h)))
		inverse[h] = YMM()
		VMOVUPS(minusFour(), inverse[h])
		VDIVPS(m, inverse[h], inverse[h])
		a[h], b[h] = zeroed(), zeroed()
	}
	overGroup("codes", length, func(index Register) {
		for h := range 2 {
			v, l, w, t := YMM(), YMM(), YMM(), YMM()
			VMOVUPS(element(h, index), v)
			VMULPS(v, inverse[h], l)
			clipped(l)
			VMOVUPS(l, code(h, index))
			VMULPS(v, v, w)
			VMULPS(v, w, t)
			add(a[h], t, l)
			VMULPS(l, w, w)
			add(b[h], w, l)
		}
	})
	rounds := GP64()
	MOVQ(U32(5), rounds)
	Label("round")
	changed := zeroed()
	overGroup("moves", length, func(index Register) {
		for h := range 2 {
			v, w, wv, l := YMM(), YMM(), YMM(), YMM()
			VMOVUPS(element(h, index), v)
			VMULPS(v, v, w)
			VMULPS(v, w, wv)
			VMOVUPS(code(h, index), l)
			a1, b1, n := YMM(), YMM(), YMM()
			VMULPS(l, wv, a1)
			VSUBPS(a1, a[h], a1)
			VMULPS(l, w, b1)
			VMULPS(l, b1, b1)
			VSUBPS(b1, b[h], b1)
			VMULPS(b1, v, n)
			VDIVPS(a1, n, n)
			clipped(n)
			// Only where something is gained.
			take, t := YMM(), YMM()
			VXORPS(t, t, t)
			VCMPPS(U8(greater), t, a1, take)
			VCMPPS(U8(notEqual), l, n, t)
			VANDPS(t, take, take)
			add(a1, wv, n)
			VMULPS(n, w, w)
			add(b1, w, n)
			VXORPS(t, t, t)
			VCMPPS(U8(greater), t, b1, t)
			VANDPS(t, take, take)
			u := YMM()
			VMULPS(a1, a1, t)
			VMULPS(b[h], t, t)
			VMULPS(a[h], a[h], u)
			VMULPS(b1, u, u)
			VCMPPS(U8(greater), u, t, t)
			VANDPS(t, take, take)
			VORPS(take, changed, changed)
			VBLENDVPS(take, a1, a[h], a[h])
			VBLENDVPS(take, b1, b[h], b[h])
			VBLENDVPS(take, n, l, l)
			VMOVUPS(l, code(h, index))
		}
	})
	any := GP32()
	VMOVMSKPS(changed, any)
	TESTL(any, any)
	JE(LabelRef("still"))
	DECQ(rounds)
	JNE(LabelRef("round"))
	Label("still")
	for h := range 2 {
		t := zeroed()
		VCMPPS(U8(greater), t, b[h], t)
		VDIVPS(b[h], a[h], a[h])
		VANDPS(t, a[h], a[h])
		VANDPS(at(work, 32*(2+h)), a[h], a[h])
		VMOVUPS(a[h], at(work, 32*h))
	}
	VZEROUPPER()
	RET()
}
