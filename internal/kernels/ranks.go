package kernels

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels/race"
)

// rankStep is what Ranks works on at once.
const rankStep = 32

// Ranks sets codes to how many of the first seven limits, which ascend, the magnitude of each number is above: the code
// of a float of few values whose middles they are. Bit 3 is the sign of a number whose magnitude is above the last
// limit. A NaN is above all.
func Ranks(codes []byte, x []float32, limits *[8]float32) { active.Ranks(codes, x, limits) }

// Ranks is the function Ranks by this set.
func (s *Set) Ranks(codes []byte, x []float32, limits *[8]float32) {
	if len(codes) != len(x) {
		panic(fmt.Sprintf("kernels: %d numbers to %d codes", len(x), len(codes)))
	}
	race.ReadSlice(x)
	race.ReadSlice(limits[:])
	race.WriteSlice(codes)
	done := 0
	if s.ranks != nil {
		done = len(x) / rankStep * rankStep
		s.ranks(codes[:done], x[:done], limits)
	}
	for i, v := range x[done:] {
		a, c := abs32(v), byte(0)
		for _, l := range limits[:7] {
			if !(a <= l) {
				c++
			}
		}
		if !(a <= limits[7]) {
			c |= byte(math.Float32bits(v) >> 28 & 8)
		}
		codes[done+i] = c
	}
}

// Divide divides numbers by those of groups of so many, a multiple of 16.
func Divide(x, divisors []float32, group int) { active.Divide(x, divisors, group) }

// Divide is the function Divide by this set.
func (s *Set) Divide(x, divisors []float32, group int) {
	if group <= 0 || group%16 != 0 || len(x) != group*len(divisors) {
		panic(fmt.Sprintf("kernels: %d divisors for %d numbers in groups of %d", len(divisors), len(x), group))
	}
	race.WriteSlice(x)
	race.ReadSlice(divisors)
	if s.divide != nil {
		s.divide(x, divisors, group)
		return
	}
	for g, d := range divisors {
		for i, v := range x[g*group:][:group] {
			x[g*group+i] = number(v / d)
		}
	}
}
