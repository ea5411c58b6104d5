package main

import (
	. "github.com/mmcloughlin/avo/build"
	"github.com/mmcloughlin/avo/gotypes"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

const (
	mergeRowSignature  = "func(dst, src []byte, delta []float32, scale float32, share *[2][16]float64) (done int)"
	addScaledSignature = "func(dst, src, delta []float32, scale float32) (done int)"
	keptSignature      = "func(out, base, total, delta []float32, share *[2][16]float64) (done int)"
	dotSignature       = "func(x, y []float32) (sums [16]float64, done int)"
)

// wide is what a sum in float64 needs of a set of instructions.
type wide interface {
	tile
	// half returns a half of a vector of float32, as a vector half as wide.
	half(v VecVirtual, upper bool) VecVirtual
	// number makes a NaN the one.
	number(v VecVirtual, replacement Op)
	// wideNumber makes a NaN of float64 the one.
	wideNumber(v VecVirtual, replacement Op)
	// loadFloat widens a vector of elements.
	loadFloat(f float, m Mem) VecVirtual
	// storeFloat rounds a vector and stores it, and returns the float32 of what
	// was stored. A NaN has to be the one, but for bf16.
	storeFloat(f float, r rounding, v VecVirtual, m Mem) VecVirtual
}

func (avx512) half(v VecVirtual, upper bool) VecVirtual {
	if !upper {
		return v.AsY().(VecVirtual)
	}
	y := YMM()
	VEXTRACTF32X8(U8(1), v, y)
	return y
}

func (avx2) half(v VecVirtual, upper bool) VecVirtual {
	if !upper {
		return v.AsX().(VecVirtual)
	}
	x := XMM()
	VEXTRACTF128(U8(1), v, x)
	return x
}

func (avx512) number(v VecVirtual, replacement Op) {
	k := K()
	VCMPPS(U8(unordered), v, v, k)
	VMOVDQU32(replacement, k, v)
}

func (avx2) number(v VecVirtual, replacement Op) {
	isNaN := YMM()
	VCMPPS(U8(unordered), v, v, isNaN)
	VBLENDVPS(isNaN, replacement, v, v)
}

func (s avx512) loadFloat(f float, m Mem) VecVirtual { return s.load(f, m) }
func (s avx2) loadFloat(f float, m Mem) VecVirtual   { return s.load(f, m) }

func (s avx512) storeFloat(f float, r rounding, v VecVirtual, m Mem) VecVirtual {
	switch f {
	case f16:
		VCVTPS2PH(U8(0), v, v.AsY())
		VMOVDQU(v.AsY(), m)
		VCVTPH2PS(v.AsY(), v)
	case bf16:
		isNaN := K()
		VCMPPS(U8(unordered), v, v, isNaN)
		v = s.bf16(r, v)
		VMOVDQU32(r.nan, isNaN, v)
		VPMOVDW(v, m)
		VPSLLD(U8(16), v, v)
	default:
		VMOVUPS(v, m)
	}
	return v
}

func (s avx2) storeFloat(f float, r rounding, v VecVirtual, m Mem) VecVirtual {
	switch f {
	case f16:
		VCVTPS2PH(U8(0), v, v.AsX())
		VMOVDQU(v.AsX(), m)
		VCVTPH2PS(v.AsX(), v)
	case bf16:
		isNaN := YMM()
		VCMPPS(U8(unordered), v, v, isNaN)
		v = s.bf16(r, v)
		VPBLENDVB(isNaN, r.nan, v, v)
		words := YMM()
		VPACKUSDW(v, v, words)
		VPERMQ(U8(0x08), words, words)
		VMOVDQU(words.AsX(), m)
		VPSLLD(U8(16), v, v)
	default:
		VMOVUPS(v, m)
	}
	return v
}

// constants are in memory: sums leave no register for them.
var (
	everyOne  = data("everyOne", repeat(0x00000001))
	everyHalf = data("everyHalf", repeat(0x00007fff))
	everyNaN  = data("everyNaN", repeat(nan))
	everyBF16 = data("everyBF16NaN", repeat(nan>>16))
)

func repeat(v uint32) (b []byte) {
	for range 16 {
		b = append(b, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
	}
	return b
}

// sums returns the 16 lanes of a sum, zero.
func sums(s wide) (lanes []VecVirtual) {
	for n := 0; n < 16; {
		v, floats := s.vector()
		VXORPS(v, v, v)
		lanes, n = append(lanes, v), n+floats/2
	}
	return lanes
}

// storeSums stores the lanes of a sum.
func storeSums(s wide, lanes []VecVirtual, c gotypes.Component) {
	for i, v := range lanes {
		a, err := c.Index(16 / len(lanes) * i).Resolve()
		if err != nil {
			panic(err)
		}
		VMOVUPD(v, a.Addr)
	}
}

// storeShare stores the lanes of two sums where share leads. As results they would be more than a frame can have
// that is not checked, in a build without optimisation.
func storeShare(ed, dd []VecVirtual) {
	share := Load(Param("share"), GP64())
	for i, lanes := range [][]VecVirtual{ed, dd} {
		for k, v := range lanes {
			VMOVUPD(v, Mem{Base: share, Disp: 128*i + 128/len(lanes)*k})
		}
	}
}

// hide returns its argument, which the compiler then takes for another: what is handed to a function of a Set need not
// be moved to the heap, as each of them leaves it where it is.
func hide() {
	function("hide", "func(share *[2][16]float64) (same *[2][16]float64)")
	Store(Load(Param("share"), GP64()), Return("same"))
	RET()
}

// double widens a vector of half as many elements as a vector holds float32.
func double(s wide, from Op) VecVirtual {
	v, _ := s.vector()
	VCVTPS2PD(from, v)
	return v
}

func broadcast(s wide, offset int) VecVirtual {
	v, _ := s.vector()
	VBROADCASTSS(NewParamAddr("scale", offset), v)
	return v
}

func mergeRow(s wide, set string, to, from float) {
	function("mergeRow"+from.name+"To"+to.name+set, mergeRowSignature)
	dst, src, delta, n := base("dst"), base("src"), base("delta"), length("delta")
	scale := broadcast(s, 72)
	ed, dd := sums(s), sums(s)
	r := rounding{everyOne(), everyHalf(), everyBF16()}
	done := elements(n, 16, func() {
		_, width := s.vector()
		for i := range 16 / width {
			v := s.loadFloat(from, at(src, i*width*from.size))
			d, _ := s.vector()
			VMULPS(at(delta, i*width*4), scale, d)
			out, _ := s.vector()
			VADDPS(v, d, out)
			if to != bf16 {
				s.number(out, everyNaN())
			}
			out = s.storeFloat(to, r, out, at(dst, i*width*to.size))
			for half := range 2 {
				e := double(s, s.half(out, half == 1))
				VSUBPD(double(s, s.half(v, half == 1)), e, e)
				change := double(s, s.half(d, half == 1))
				VSUBPD(change, e, e)
				VFMADD231PD(change, e, ed[2*i+half])
				VFMADD231PD(change, change, dd[2*i+half])
			}
		}
		ADDQ(I32(int32(16*from.size)), src)
		ADDQ(I32(int32(16*to.size)), dst)
		ADDQ(U8(64), delta)
	})
	storeShare(ed, dd)
	Store(done, Return("done"))
	VZEROUPPER()
	RET()
}

func addScaled(s wide, set string) {
	function("addScaled"+set, addScaledSignature)
	dst, src, delta, n := base("dst"), base("src"), base("delta"), length("dst")
	scale := broadcast(s, 72)
	Store(elements(n, 16, func() {
		_, width := s.vector()
		for i := range 16 / width {
			v, _ := s.vector()
			VMULPS(at(delta, i*width*4), scale, v)
			VADDPS(at(src, i*width*4), v, v)
			s.number(v, everyNaN())
			VMOVUPS(v, at(dst, i*width*4))
		}
		ADDQ(U8(64), dst)
		ADDQ(U8(64), src)
		ADDQ(U8(64), delta)
	}), Return("done"))
	VZEROUPPER()
	RET()
}

func kept(s wide, set string) {
	function("kept"+set, keptSignature)
	out, from, total, delta, n := base("out"), base("base"), base("total"), base("delta"), length("out")
	ed, dd := sums(s), sums(s)
	done := elements(n, 16, func() {
		for i := range ed {
			m := func(p Register) Mem { return at(p, 64/len(ed)*i) }
			e := double(s, m(out))
			VSUBPD(double(s, m(from)), e, e)
			VSUBPD(double(s, m(total)), e, e)
			d := double(s, m(delta))
			VFMADD231PD(d, e, ed[i])
			VFMADD231PD(d, d, dd[i])
		}
		for _, p := range []Register{out, from, total, delta} {
			ADDQ(U8(64), p)
		}
	})
	storeShare(ed, dd)
	Store(done, Return("done"))
	VZEROUPPER()
	RET()
}

func dot(s wide, set string) {
	function("dot"+set, dotSignature)
	x, y, n := base("x"), base("y"), length("x")
	sum := sums(s)
	done := elements(n, 16, func() {
		for i := range sum {
			VFMADD231PD(double(s, at(x, 64/len(sum)*i)), double(s, at(y, 64/len(sum)*i)), sum[i])
		}
		ADDQ(U8(64), x)
		ADDQ(U8(64), y)
	})
	storeSums(s, sum, Return("sums"))
	Store(done, Return("done"))
	VZEROUPPER()
	RET()
}
