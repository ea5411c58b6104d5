package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// avx512 needs AVX512F, BW, DQ and VL.
type avx512 struct{}

// every fills a vector with a constant.
func (avx512) every(value uint32) VecVirtual {
	v := ZMM()
	VPBROADCASTD(bits(value), v)
	return v
}

func (avx512) table(lookup Register, offset int) VecVirtual {
	v := ZMM()
	VMOVDQU32(at(lookup, offset), v)
	return v
}

// load widens 16 elements.
func (avx512) load(f float, m Mem) VecVirtual {
	v := ZMM()
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

// rounding has the constants of bf16.
type rounding struct{ one, half, nan Op }

func (s avx512) rounding(f float) rounding {
	if f != bf16 {
		return rounding{}
	}
	return rounding{s.every(1), s.every(0x7fff), s.every(nan >> 16)}
}

// bf16 rounds float32 to nearest even, in the lower halves of the doublewords.
// The result for a NaN is wrong.
func (avx512) bf16(r rounding, v VecVirtual) VecVirtual {
	t := ZMM()
	VPSRLD(U8(16), v, t)
	VPANDD(r.one, t, t)
	VPADDD(r.half, t, t)
	VPADDD(v, t, t)
	VPSRLD(U8(16), t, t)
	return t
}

// store rounds 16 float32.
func (s avx512) store(f float, r rounding, v VecVirtual, m Mem) {
	switch f {
	case f32:
		VMOVUPS(v, m)
	case f16:
		VCVTPS2PH(U8(0), v, m)
	case bf16:
		isNaN := K()
		VCMPPS(U8(unordered), v, v, isNaN)
		t := s.bf16(r, v)
		VMOVDQA32(r.nan, isNaN, t)
		VPMOVDW(t, m)
	}
}

// pairs loads 32 elements, those of even index apart from those of odd index. A
// pair is in the same place of both vectors, but for wide types the groups of
// four bytes that finish makes of them are out of order.
func (s avx512) pairs(f float, src Register, upper VecVirtual) (even, odd VecVirtual) {
	even, odd = ZMM(), ZMM()
	if f == bf16 {
		VMOVDQU32(at(src, 0), odd)
		VPSLLD(U8(16), odd, even)
		VPANDD(upper, odd, odd)
		return even, odd
	}
	a, b := s.load(f, at(src, 0)), s.load(f, at(src, 16*f.size))
	VSHUFPS(U8(0x88), b, a, even)
	VSHUFPS(U8(0xdd), b, a, odd)
	return even, odd
}

// magnitude returns the largest magnitude, as bits, of the vectors of n elements
// that each gives to take.
func (s avx512) magnitude(f float, each func(n int, take func(m Mem))) GPVirtual {
	x, y, z, v := XMM(), YMM(), ZMM(), ZMM()
	if f == f32 {
		mask := s.every(0x7fffffff)
		VPXORD(z, z, z)
		each(16, func(m Mem) {
			VPANDD(m, mask, v)
			VPMAXUD(v, z, z)
		})
		VEXTRACTI64X4(U8(1), z, y)
		VPMAXUD(z.AsY(), y, y)
		VEXTRACTI128(U8(1), y, x)
		VPMAXUD(y.AsX(), x, x)
		return largest32(x)
	}
	// The instruction that finds the least of words has no counterpart.
	mask := s.every(0x7fff7fff)
	VMOVDQA32(mask, z)
	each(32, func(m Mem) {
		VMOVDQU32(m, v)
		VPANDND(mask, v, v)
		VPMINUW(v, z, z)
	})
	VEXTRACTI64X4(U8(1), z, y)
	VPMINUW(z.AsY(), y, y)
	VEXTRACTI128(U8(1), y, x)
	VPMINUW(y.AsX(), x, x)
	r := least16(x)
	XORL(U32(0x7fff), r)
	return r
}

func (s avx512) quantize4(f float, buckets bool) {
	name := "bisect4" + f.name + "AVX512"
	if buckets {
		name = "bucket4" + f.name + "AVX512"
	}
	function(name, quantize4Signature)
	lookup := Load(Param("lookup"), GP64())
	packed, src := base("packed"), base("src")
	blockSize := Load(Param("blockSize"), GP64())

	var codes func(even, odd VecVirtual) VecVirtual // the two of a pair in a byte
	if buckets {
		codes = s.bucket(lookup)
	} else {
		codes = s.bisect(lookup)
	}
	var upper, order VecVirtual
	if f == bf16 {
		upper = s.every(0xffff0000)
	} else {
		order = XMM()
		VMOVDQU(wordOrder(), order)
	}
	unit, least := s.every(one), s.every(tiny)
	ahead := GP64()
	MOVQ(src, ahead)
	groups(f, 16, blockSize,
		func() GPVirtual {
			return s.magnitude(f, func(n int, take func(Mem)) {
				within("absmax", blockSize, n, func() {
					take(at(ahead, 0))
					ADDQ(U8(64), ahead)
				})
			})
		},
		func(m Mem) {
			v := ZMM()
			VPMAXUD(m, least, v)
			VDIVPS(v, unit, v)
			VMOVUPS(v, m)
		},
		func(m Mem) {
			factor := ZMM()
			VBROADCASTSS(m, factor)
			within("codes", blockSize, 32, func() {
				even, odd := s.pairs(f, src, upper)
				VMULPS(factor, even, even)
				VMULPS(factor, odd, odd)
				v := codes(even, odd)
				if f == bf16 {
					VPMOVDB(v, at(packed, 0))
				} else {
					x := XMM()
					VPMOVDB(v, x)
					VPSHUFB(order, x, x)
					VMOVDQU(x, at(packed, 0))
				}
				ADDQ(U8(32*f.size), src)
				ADDQ(U8(16), packed)
			})
		})
}

// wordOrder puts the words 0 4 1 5 2 6 3 7 back in their order.
var wordOrder = data("wordOrder", []byte{0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15})

// bisect finds a rank in four steps, for any code, and looks up its index.
func (s avx512) bisect(lookup Register) func(even, odd VecVirtual) VecVirtual {
	one, two, four, eight := s.every(1), s.every(2), s.every(4), s.every(8)
	half := ZMM()
	VBROADCASTSS(at(lookup, middle), half)
	t1, t2, t4 := s.table(lookup, above1), s.table(lookup, above2), s.table(lookup, above4)
	highs, lows := s.table(lookup, high), s.table(lookup, low)
	code := func(v, indices VecVirtual) VecVirtual {
		r, t, k := ZMM(), ZMM(), K()
		VCMPPS(U8(greater), half, v, k)
		VMOVDQA32_Z(eight, k, r)
		for _, level := range []struct{ table, weight VecVirtual }{{t4, four}, {t2, two}, {t1, one}} {
			VPERMPS(level.table, r, t)
			VCMPPS(U8(greater), t, v, k)
			VPADDD(level.weight, r, k, r)
		}
		VPERMD(indices, r, r)
		return r
	}
	return func(even, odd VecVirtual) VecVirtual {
		h, l := code(even, highs), code(odd, lows)
		VPORD(h, l, l)
		return l
	}
}

// bucket finds a rank, which is the index, in one step. It is for a sorted code
// with at most one threshold in each of 31 buckets. The bucket of v is round(15
// v); adding 1.5 * 2^23 leaves it in the lowest bits.
func (s avx512) bucket(lookup Register) func(even, odd VecVirtual) VecVirtual {
	fifteen, magic := s.every(0x41700000), s.every(0x4b400000)
	lo, hi := s.table(lookup, bucket), s.table(lookup, bucket+64)
	code := func(v, below0, below1, one VecVirtual) VecVirtual {
		r, t, k := ZMM(), ZMM(), K()
		VMOVAPS(magic, t)
		VFMADD231PS(fifteen, v, t)
		VMOVDQA32(t, r)
		VPERMI2PS(hi, lo, t)
		VPERMI2D(below1, below0, r)
		VCMPPS(U8(greater), t, v, k)
		VPADDD(one, r, k, r)
		return r
	}
	below0, below1, one := s.table(lookup, below), s.table(lookup, below+64), s.every(1)
	high0, high1, sixteen := ZMM(), ZMM(), s.every(16)
	VPSLLD(U8(4), below0, high0)
	VPSLLD(U8(4), below1, high1)
	return func(even, odd VecVirtual) VecVirtual {
		h, l := code(even, high0, high1, sixteen), code(odd, below0, below1, one)
		VPORD(h, l, l)
		return l
	}
}

func (s avx512) dequantize4(f float) {
	function("dequantize4"+f.name+"AVX512", dequantize4Signature)
	dst, packed, absmax := base("dst"), base("packed"), base("absmax")
	code, blockSize := Load(Param("code"), GP64()), Load(Param("blockSize"), GP64())
	values := s.table(code, 0)
	r := s.rounding(f)
	blocks(func(done Register) {
		table := ZMM()
		VBROADCASTSS(finite(absmax, done), table)
		VMULPS(values, table, table)
		// The low bits of an index count alone, as the table repeats itself.
		switch f {
		case f16:
			VCVTPS2PH(U8(0), table, table.AsY())
			VINSERTI64X4(U8(1), table.AsY(), table, table)
		case bf16:
			VPMOVDW(s.bf16(r, table), table.AsY())
			VINSERTI64X4(U8(1), table.AsY(), table, table)
		}
		within("codes", blockSize, 32, func() {
			if f == f32 {
				for i := range 2 {
					index, out := ZMM(), ZMM()
					VPMOVZXBQ(at(packed, 8*i), index)
					VPSRLQ(U8(4), index, out)
					VPSLLQ(U8(32), index, index)
					VPORQ(out, index, index)
					VPERMPS(table, index, out)
					VMOVUPS(out, at(dst, 64*i))
				}
			} else {
				index, out := ZMM(), ZMM()
				VPMOVZXBD(at(packed, 0), index)
				VPSRLD(U8(4), index, out)
				VPSLLD(U8(16), index, index)
				VPORD(out, index, index)
				VPERMW(table, index, out)
				VMOVDQU32(out, at(dst, 0))
			}
			ADDQ(U8(16), packed)
			ADDQ(U8(32*f.size), dst)
		})
	})
}

func (s avx512) maxAbs(f float) {
	function("maxAbs"+f.name+"AVX512", maxAbsSignature)
	src, n := base("src"), count("src", f)
	var done Register
	largest := s.magnitude(f, func(step int, take func(Mem)) {
		done = elements(n, step, func() {
			take(at(src, 0))
			ADDQ(U8(64), src)
		})
	})
	Store(largest, Return("largest"))
	Store(done, Return("done"))
	VZEROUPPER()
	RET()
}

func (s avx512) quantize8(f float) {
	function("quantize8"+f.name+"AVX512", quantize8Signature)
	q, src, n := base("q"), base("src"), length("q")
	factor := ZMM()
	VBROADCASTSS(NewParamAddr("scale", 48), factor)
	Store(elements(n, 16, func() {
		v := s.load(f, at(src, 0))
		if f != f16 {
			y := YMM()
			VCVTPS2PH(U8(0), v, y)
			VCVTPH2PS(y, v)
		}
		VMULPS(factor, v, v)
		VCVTPS2DQ(v, v)
		VPMOVDB(v, at(q, 0))
		ADDQ(U8(16*f.size), src)
		ADDQ(U8(16), q)
	}), Return("done"))
	VZEROUPPER()
	RET()
}

func (s avx512) dequantize8(f float) {
	function("dequantize8"+f.name+"AVX512", dequantize8Signature)
	dst, q, n := base("dst"), base("q"), length("q")
	factor := ZMM()
	VBROADCASTSS(NewParamAddr("scale", 48), factor)
	last, r := s.every(oneOver127), s.rounding(f)
	Store(elements(n, 16, func() {
		v := ZMM()
		VPMOVSXBD(at(q, 0), v)
		VCVTDQ2PS(v, v)
		VMULPS(factor, v, v)
		VMULPS(last, v, v)
		s.store(f, r, v, at(dst, 0))
		ADDQ(U8(16), q)
		ADDQ(U8(16*f.size), dst)
	}), Return("done"))
	VZEROUPPER()
	RET()
}

func (s avx512) convert(to, from float) {
	function("convert"+from.name+"To"+to.name+"AVX512", convertSignature)
	dst, src, n := base("dst"), base("src"), count("src", from)
	r := s.rounding(to)
	Store(elements(n, 32, func() {
		for i := range 2 {
			s.store(to, r, s.load(from, at(src, 16*i*from.size)), at(dst, 16*i*to.size))
		}
		ADDQ(I32(32*int32(from.size)), src)
		ADDQ(I32(32*int32(to.size)), dst)
	}), Return("done"))
	VZEROUPPER()
	RET()
}
