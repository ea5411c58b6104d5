package kernels

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels/race"
	"github.com/lorakit/lorakit/internal/minifloat"
)

// Group is how many elements in a row have a number of their own in what follows.
const Group = 16

// EncodeE4M3 sets dst to the codes of x + plus: where plus is 0, that of -0 is that of 0, where it is -0 nothing is
// changed.
func EncodeE4M3(dst []byte, x []float32, plus float32) { active.EncodeE4M3(dst, x, plus) }

// EncodeE4M3 is the function EncodeE4M3 by this set.
func (s *Set) EncodeE4M3(dst []byte, x []float32, plus float32) {
	if len(dst) != len(x) {
		panic(fmt.Sprintf("kernels: %d elements to %d codes", len(x), len(dst)))
	}
	race.ReadSlice(x)
	race.WriteSlice(dst)
	done := 0
	if s.encodeE4M3 != nil {
		s.encodeE4M3(dst, x, plus)
		done = len(x) &^ 31
	}
	for i, v := range x[done:] {
		dst[done+i] = minifloat.ToE4M3(v + plus)
	}
}

// EncodeE2M1 sets dst to the codes of x + plus, two in a byte, the first in its lower half.
func EncodeE2M1(dst []byte, x []float32, plus float32) { active.EncodeE2M1(dst, x, plus) }

// EncodeE2M1 is the function EncodeE2M1 by this set.
func (s *Set) EncodeE2M1(dst []byte, x []float32, plus float32) {
	if 2*len(dst) != len(x) {
		panic(fmt.Sprintf("kernels: %d elements to %d pairs of codes", len(x), len(dst)))
	}
	race.ReadSlice(x)
	race.WriteSlice(dst)
	done := 0
	if s.encodeE2M1 != nil {
		s.encodeE2M1(dst, x, plus)
		done = len(x) &^ 31
	}
	for i := done; i < len(x); i += 2 {
		dst[i/2] = minifloat.ToE2M1(x[i]+plus) | minifloat.ToE2M1(x[i+1]+plus)<<4
	}
}

// Magnitudes sets dst to the bits of the largest magnitude of each Group of x; a NaN is larger than an infinity.
func Magnitudes(dst []uint32, x []float32) { active.Magnitudes(dst, x) }

// Magnitudes is the function Magnitudes by this set.
func (s *Set) Magnitudes(dst []uint32, x []float32) {
	groups(len(x), len(dst))
	race.ReadSlice(x)
	race.WriteSlice(dst)
	if s.magnitudes != nil {
		s.magnitudes(dst, x)
		return
	}
	for g := range dst {
		most := uint32(0)
		for _, v := range x[Group*g:][:Group] {
			most = max(most, math.Float32bits(v)&^(1<<31))
		}
		dst[g] = most
	}
}

func groups(elements, numbers int) {
	if elements != Group*numbers {
		panic(fmt.Sprintf("kernels: %d numbers for %d elements", numbers, elements))
	}
}

// Multiply multiplies each Group of x by its number.
func Multiply(x, by []float32) { active.Multiply(x, by) }

// Multiply is the function Multiply by this set.
func (s *Set) Multiply(x, by []float32) {
	groups(len(x), len(by))
	race.WriteSlice(x)
	race.ReadSlice(by)
	if s.multiply != nil {
		s.multiply(x, by)
		return
	}
	for g, f := range by {
		for i := range x[Group*g:][:Group] {
			x[Group*g+i] *= f
		}
	}
}

// Nibbles sets dst to the values of codes, two in a byte, times the number of each Group.
func Nibbles(dst []float32, codes []byte, values *[16]float32, by []float32) {
	active.Nibbles(dst, codes, values, by)
}

// Nibbles is the function Nibbles by this set.
func (s *Set) Nibbles(dst []float32, codes []byte, values *[16]float32, by []float32) {
	groups(len(dst), len(by))
	if 2*len(codes) != len(dst) {
		panic(fmt.Sprintf("kernels: %d pairs of codes to %d elements", len(codes), len(dst)))
	}
	race.ReadSlice(codes)
	race.ReadSlice(by)
	race.WriteSlice(dst)
	if s.nibbles != nil {
		s.nibbles(dst, codes, values, by)
		return
	}
	for g, f := range by {
		for i, c := range codes[Group/2*g:][:Group/2] {
			dst[Group*g+2*i], dst[Group*g+2*i+1] = values[c&15]*f, values[c>>4]*f
		}
	}
}
