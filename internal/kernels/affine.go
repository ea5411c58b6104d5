package kernels

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels/race"
)

// affineStep is what the size of a group is a multiple of.
const affineStep = 32

// Extremes sets lo and hi to the least and the largest element of each group of so many elements, a multiple of 32. A
// NaN is passed over, and a zero is positive. It returns the index of the first element that is a NaN or an infinity,
// or -1.
func Extremes(lo, hi []float32, src []byte, from Float, group int) (bad int) {
	return active.Extremes(lo, hi, src, from, group)
}

// Extremes is the function Extremes by this set.
func (s *Set) Extremes(lo, hi []float32, src []byte, from Float, group int) (bad int) {
	checkAffine(elements(src, from), lo, hi, group)
	race.ReadSlice(src)
	race.WriteSlice(lo)
	race.WriteSlice(hi)
	bad = -1
	f, size := s.extremes[from], group*from.Size()
	for g := 0; g < len(lo); g++ {
		if f != nil {
			if g += f(lo[g:], hi[g:], src[g*size:], group); g == len(lo) {
				break
			}
		}
		var at int
		if lo[g], hi[g], at = extremes(src[g*size:][:size], from); at >= 0 && bad < 0 {
			bad = g*group + at
		}
	}
	return bad
}

// extremes is the twin of Set.extremes, for one group.
func extremes(src []byte, from Float) (lo, hi float32, bad int) {
	var x [piece]float32
	lo, hi, bad = float32(math.Inf(1)), float32(math.Inf(-1)), -1
	for at := 0; at*from.Size() < len(src); at += piece {
		widenAll(x[:], src[at*from.Size():], from)
		for i, v := range x {
			if v-v != 0 && bad < 0 {
				bad = at + i
			}
			if v < lo {
				lo = v
			}
			if v > hi {
				hi = v
			}
		}
	}
	if lo == 0 {
		lo = 0
	}
	if hi == 0 {
		hi = 0
	}
	return lo, hi, bad
}

// QuantizeAffine sets codes to the integers nearest to (element - bias) / scale, of two the even one, within 0 and
// most, which is at most 255. Each scale and each bias is for a group of so many elements, a multiple of 32. What is
// no number becomes 0.
func QuantizeAffine(codes, src []byte, from Float, scales, biases []float32, group int, most float32) {
	active.QuantizeAffine(codes, src, from, scales, biases, group, most)
}

// QuantizeAffine is the function QuantizeAffine by this set.
func (s *Set) QuantizeAffine(codes, src []byte, from Float, scales, biases []float32, group int, most float32) {
	n := elements(src, from)
	checkAffine(n, scales, biases, group)
	if len(codes) != n || !(most >= 0 && most <= math.MaxUint8) {
		panic(fmt.Sprintf("kernels: %d elements to %d codes of at most %v", n, len(codes), most))
	}
	race.ReadSlice(src)
	race.ReadSlice(scales)
	race.ReadSlice(biases)
	race.WriteSlice(codes)
	if f := s.quantizeAffine[from]; f != nil {
		f(codes, src, scales, biases, group, most)
		return
	}
	// Where numbers have no digits after the point: what is added rounds, and leaves the integer in the lowest digits.
	const whole = 1 << 23
	var x [piece]float32
	for i := 0; i < n; i += piece {
		scale, bias, q := scales[i/group], biases[i/group], (*[piece]byte)(codes[i:])
		widenAll(x[:], src[i*from.Size():], from)
		for k, v := range x {
			v = (v - bias) / scale
			if !(v > 0) {
				v = 0
			}
			q[k] = byte(math.Float32bits(min(v, most) + whole))
		}
	}
}

// DequantizeAffine decodes codes into dst, whose type is to: code * scale, rounded to that type, plus bias, rounded
// again. Each scale and each bias is for a group of so many elements, a multiple of 32.
func DequantizeAffine(dst []byte, to Float, codes []byte, scales, biases []float32, group int) {
	active.DequantizeAffine(dst, to, codes, scales, biases, group)
}

// DequantizeAffine is the function DequantizeAffine by this set.
func (s *Set) DequantizeAffine(dst []byte, to Float, codes []byte, scales, biases []float32, group int) {
	n := elements(dst, to)
	checkAffine(n, scales, biases, group)
	if len(codes) != n {
		panic(fmt.Sprintf("kernels: %d codes to %d elements", len(codes), n))
	}
	race.ReadSlice(codes)
	race.ReadSlice(scales)
	race.ReadSlice(biases)
	race.WriteSlice(dst)
	f, size := s.dequantizeAffine[to], group*to.Size()
	for g := 0; g < len(scales); g++ {
		if f != nil {
			if g += f(dst[g*size:], codes[g*group:], scales[g:], biases[g:], group); g == len(scales) {
				break
			}
		}
		dequantizeAffine(dst[g*size:][:size], to, codes[g*group:], scales[g], biases[g])
	}
}

// dequantizeAffine is the twin of Set.dequantizeAffine, for one group.
func dequantizeAffine(dst []byte, to Float, codes []byte, scale, bias float32) {
	var x [piece]float32
	for len(dst) > 0 {
		for i, c := range (*[piece]byte)(codes) {
			x[i] = float32(c) * scale
		}
		storeAll(dst, to, x[:])
		widenAll(x[:], dst, to)
		for i, v := range x {
			x[i] = number(v + bias)
		}
		storeAll(dst, to, x[:])
		dst, codes = dst[piece*to.Size():], codes[piece:]
	}
}

func checkAffine(n int, scales, biases []float32, group int) {
	if group <= 0 || group%affineStep != 0 || n%group != 0 || len(scales) != n/group || len(biases) != n/group {
		panic(fmt.Sprintf("kernels: %d and %d numbers for %d elements in groups of %d", len(scales), len(biases), n, group))
	}
}
