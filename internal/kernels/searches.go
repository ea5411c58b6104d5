package kernels

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels/race"
)

// Lanes is the number of groups that a search for scales takes side by side. Within a group everything is computed in
// order, so that the bytes are those of a search by itself.
const Lanes = 8

// longestGroup is the number of elements in the longest group.
const longestGroup = 32

// Search is what the searches for scales work with: the elements of groups, with weights where there are any, and what
// is found. Element i of group g is at index Lanes*i + g.
type Search struct {
	X, Weights [Lanes * longestGroup]float32
	// Scale and Min are those of each group. Its codes were RoundCode(Inverse * (x - Low)), within the range of codes.
	Scale, Min, Inverse, Low [Lanes]float32

	work [48][Lanes]float32 // of the assembly, what it finds in the first rows
}

// group copies a group from n elements of each.
func (f *Search) group(dst *[longestGroup]float32, src *[Lanes * longestGroup]float32, g, n int) []float32 {
	for i := range n {
		dst[i] = src[Lanes*i+g]
	}
	return dst[:n]
}

// MinRule is how SearchMin looks for the scale and the minimum of groups. NewMinRule makes one.
type MinRule struct {
	trials   []float32 // steps between the minimum and the maximum; the first is the largest code
	absolute bool
}

// tenth is by how much the trials of a search differ.
const tenth = float32(0.1)

// NewMinRule returns a rule for codes from 0 to largest. The first trial of the search has largest + start steps
// between the minimum and the maximum, each of the others a tenth more. The error of an element is its magnitude where
// absolute is set, else its square.
func NewMinRule(largest, start float32, trials int, absolute bool) *MinRule {
	r := &MinRule{trials: []float32{largest}, absolute: absolute}
	for k := range trials {
		r.trials = append(r.trials, float32(start+float32(tenth*float32(k)))+largest)
	}
	return r
}

// SearchMin finds, for each group of n elements, the scale s and the minimum m for which the codes q have the least
// weighted error between s*q - m and x, as ggml's make_qkx2_quants does. Where all elements are the same, s is 0.
func SearchMin(f *Search, n int, r *MinRule) { active.SearchMin(f, n, r) }

// SearchMin is the function SearchMin by this set.
func (s *Set) SearchMin(f *Search, n int, r *MinRule) {
	checkGroup(n)
	race.ReadSlice(f.X[:Lanes*n])
	race.ReadSlice(f.Weights[:Lanes*n])
	assembly := s.searchMinSquared
	if r.absolute {
		assembly = s.searchMinAbsolute
	}
	if assembly != nil {
		assembly(&f.work, f.X[:Lanes*n], f.Weights[:Lanes*n], r.trials)
		f.Scale, f.Min, f.Inverse, f.Low = f.work[0], f.work[1], f.work[2], f.work[3]
		for g, low := range f.Min {
			f.Min[g] = -low
		}
		return
	}
	var x, w [longestGroup]float32
	for g := range Lanes {
		searchMin(f, g, f.group(&x, &f.X, g, n), f.group(&w, &f.Weights, g, n), r)
	}
}

// searchMin is the twin of Set.searchMinSquared and Set.searchMinAbsolute, for one group.
func searchMin(found *Search, g int, x, w []float32, r *MinRule) {
	w = w[:len(x)]
	low, high := x[0], x[0]
	sumW, sumX := w[0], float32(w[0]*x[0])
	for i := 1; i < len(x); i++ {
		if x[i] < low {
			low = x[i]
		}
		if x[i] > high {
			high = x[i]
		}
		sumW += w[i]
		sumX += float32(w[i] * x[i])
	}
	if low > 0 {
		low = 0
	}
	var room [longestGroup]float32
	codes, largest := room[:len(x)], r.trials[0]
	inverse := largest / (high - low) // infinite where all is the same: all codes and errors are 0
	for i, v := range x {
		codes[i] = code(float32(inverse*(v-low)), largest)
	}
	scale := 1 / inverse
	best := codesError(codes, x, w, scale, low, r.absolute)
	found.Scale[g], found.Inverse[g], found.Low[g] = scale, inverse, low
	for _, steps := range r.trials[1:] {
		inverse = steps / (high - low)
		var sumL, sumL2, sumXL float32
		for i, v := range x {
			l := code(float32(inverse*(v-low)), largest)
			codes[i] = l
			wl := float32(w[i] * l)
			sumL += wl
			sumL2 += float32(wl * l)
			sumXL += float32(wl * v)
		}
		det := float32(sumW*sumL2) - float32(sumL*sumL)
		if !(det > 0) {
			continue
		}
		scale = (float32(sumW*sumXL) - float32(sumX*sumL)) / det
		least := (float32(sumL2*sumX) - float32(sumL*sumXL)) / det
		if least > 0 {
			least, scale = 0, sumXL/sumL2
		}
		if e := codesError(codes, x, w, scale, least, r.absolute); e < best {
			best = e
			found.Scale[g], found.Inverse[g], found.Low[g] = scale, inverse, low
			low = least
		}
	}
	found.Min[g] = -low
}

// codesError is the weighted error of codes.
func codesError(codes, x, w []float32, scale, low float32, absolute bool) (sum float32) {
	x, w = x[:len(codes)], w[:len(codes)]
	for i, l := range codes {
		diff := float32(float32(scale*l)+low) - x[i]
		if absolute {
			diff = abs32(diff)
		} else {
			diff *= diff
		}
		sum += float32(w[i] * diff)
	}
	return sum
}

// code returns the code nearest to v, from 0 to largest.
func code(v, largest float32) float32 { return max(0, min(largest, float32(RoundCode(v)))) }

// RoundCode rounds a number below 2^22 to the nearest integer, to even where two are as near. Of a greater one, of an
// infinity and of a NaN it returns what ggml makes of them, which has no meaning.
func RoundCode(v float32) int32 {
	return int32(math.Float32bits(v+12582912)&0x7fffff) - 0x400000
}

func abs32(x float32) float32 { return math.Float32frombits(math.Float32bits(x) &^ (1 << 31)) }

// symTrials are the codes of the largest element that SearchSym tries.
var symTrials = func() []float32 {
	const negative = float32(32) // codes
	trials := []float32{-negative}
	for i := -9; i <= 9; i++ {
		if i != 0 {
			trials = append(trials, -(negative + float32(tenth*float32(i))))
		}
	}
	return trials
}()

// tinyGroup is the least magnitude that makes a group's scale.
const tinyGroup = float32(1e-15)

// SearchSym finds, for each group of n elements, the scale for which codes from -32 to 31 have the least error,
// weighted by the squares of the elements, as ggml's make_qx_quants does. The largest element of a group has the code
// -32 at first. Scale and Inverse are 0 for a group of zeros; Min and Low are not set.
func SearchSym(f *Search, n int) { active.SearchSym(f, n) }

// SearchSym is the function SearchSym by this set.
func (s *Set) SearchSym(f *Search, n int) {
	checkGroup(n)
	race.ReadSlice(f.X[:Lanes*n])
	if s.searchSym != nil {
		s.searchSym(&f.work, f.X[:Lanes*n], symTrials)
		f.Scale, f.Inverse = f.work[0], f.work[2]
		return
	}
	var x [longestGroup]float32
	for g := range Lanes {
		f.Scale[g], f.Inverse[g] = searchSym(f.group(&x, &f.X, g, n))
	}
}

// searchSym is the twin of Set.searchSym, for one group.
func searchSym(x []float32) (scale, inverse float32) {
	m := LargestSigned(x)
	if abs32(m) < tinyGroup {
		return 0, 0
	}
	inverse = symTrials[0] / m
	a, b := symSums(x, inverse)
	if b != 0 {
		scale = a / b
	}
	best := float32(scale * a)
	for _, trial := range symTrials[1:] {
		trial /= m
		if a, b = symSums(x, trial); b > 0 && float32(a*a) > float32(best*b) {
			inverse, scale = trial, a/b
			best = float32(scale * a)
		}
	}
	return scale, inverse
}

func symSums(x []float32, inverse float32) (a, b float32) {
	for _, v := range x {
		l := float32(max(-32, min(RoundCode(float32(inverse*v)), 31)))
		w := float32(v * v)
		a += float32(float32(w*v) * l)
		b += float32(float32(w*l) * l)
	}
	return a, b
}

// LargestSigned returns the first element of the greatest magnitude, +0 where all are zero.
func LargestSigned(x []float32) (largest float32) {
	var magnitude float32
	for _, v := range x {
		if a := abs32(v); a > magnitude {
			magnitude, largest = a, v
		}
	}
	return largest
}

// NonLinear are the values that the codes of ggml's IQ4 types stand for.
var NonLinear = [16]float32{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}

// nonLinearMiddles are the least numbers that are no nearer to the value below than to the one above.
var nonLinearMiddles = [15]float32{-115.5, -93.5, -74, -57, -42, -28.5, -16, -4.5, 7, 19, 31.5, 45.5, 61, 79, 101}

// NearestNonLinear returns the code whose value is nearest to v, the upper one where two are as near.
func NearestNonLinear(v float32) (code int) {
	if v >= nonLinearMiddles[7] {
		code = 8
	}
	if v >= nonLinearMiddles[code+3] {
		code += 4
	}
	if v >= nonLinearMiddles[code+1] {
		code += 2
	}
	if v >= nonLinearMiddles[code] {
		code++
	}
	return code
}

// nonLinearTrials are what the largest element is that SearchNonLinear tries. The first is the least value.
var nonLinearTrials = func() []float32 {
	trials := []float32{NonLinear[0]}
	for i := -7; i <= 7; i++ {
		trials = append(trials, float32(i)+NonLinear[0])
	}
	return trials
}()

// SearchNonLinear finds, for each group of n elements, the Scale for which the values NonLinear have the least error,
// weighted by the squares of the elements, as ggml does for its IQ4 types. A group of zeros has the scale 0.
func SearchNonLinear(f *Search, n int) { active.SearchNonLinear(f, n) }

// SearchNonLinear is the function SearchNonLinear by this set.
func (s *Set) SearchNonLinear(f *Search, n int) {
	checkGroup(n)
	race.ReadSlice(f.X[:Lanes*n])
	if s.searchNonLinear != nil {
		s.searchNonLinear(&f.work, f.X[:Lanes*n], nonLinearTrials)
		f.Scale = f.work[0]
		return
	}
	var x [longestGroup]float32
	for g := range Lanes {
		f.Scale[g] = searchNonLinear(f.group(&x, &f.X, g, n))
	}
}

// searchNonLinear is the twin of Set.searchNonLinear, for one group.
func searchNonLinear(x []float32) (scale float32) {
	m := LargestSigned(x)
	if abs32(m) < tinyGroup {
		return 0
	}
	a, b := nonLinearSums(x, 1/(-m/NonLinear[0]))
	if b != 0 {
		scale = a / b
	}
	best := float32(scale * a)
	for _, trial := range nonLinearTrials[1:] {
		if a, b = nonLinearSums(x, trial/m); b > 0 && float32(a*a) > float32(best*b) {
			scale = a / b
			best = float32(scale * a)
		}
	}
	return scale
}

func nonLinearSums(x []float32, inverse float32) (a, b float32) {
	for _, v := range x {
		k := NonLinear[NearestNonLinear(float32(inverse*v))]
		wk := float32(float32(v*v) * k)
		a += float32(wk * v)
		b += float32(wk * k)
	}
	return a, b
}

// checkGroup panics unless groups may have n elements.
func checkGroup(n int) {
	if n < 2 || n > longestGroup {
		panic(fmt.Sprintf("kernels: groups of %d elements, expected 2 to %d", n, longestGroup))
	}
}

// movingWidth is how long the groups of SearchMoving are.
const movingWidth = 16

// SearchMoving finds, for each of two times Lanes groups of 16 elements, the scale for which codes from -4 to 3 have
// the least error, weighted by the squares of the elements, as ggml's make_q3_quants does: it takes the codes nearest
// to four steps for the largest element, and then moves single codes as long as that helps. The second Lanes groups are
// in the second half of X. A group of zeros has the scale 0; MovedCode returns the codes.
func SearchMoving(scales *[2 * Lanes]float32, f *Search) { active.SearchMoving(scales, f) }

// SearchMoving is the function SearchMoving by this set.
func (s *Set) SearchMoving(scales *[2 * Lanes]float32, f *Search) {
	race.ReadSlice(f.X[:])
	if s.searchMoving != nil {
		s.searchMoving(&f.work, f.X[:])
		copy(scales[:Lanes], f.work[0][:])
		copy(scales[Lanes:], f.work[1][:])
		return
	}
	for g := range scales {
		var x, codes [movingWidth]float32
		half, lane := g/Lanes*movingWidth, g%Lanes
		for i := range x {
			x[i] = f.X[Lanes*(half+i)+lane]
		}
		scales[g] = searchMoving(&codes, &x)
		for i, l := range codes {
			f.work[movingCodes+half+i][lane] = l
		}
	}
}

// movingCodes is the first row of the codes.
const movingCodes = 16

// MovedCode returns the code, from 0 to 7, that SearchMoving has found for element i of group g. For the elements of a
// group of zeros it has no meaning.
func (f *Search) MovedCode(g, i int) byte {
	return byte(int32(f.work[movingCodes+g/Lanes*movingWidth+i][g%Lanes]) + 4)
}

// searchMoving is the twin of Set.searchMoving, for one group.
func searchMoving(codes, x *[movingWidth]float32) (scale float32) {
	m := LargestSigned(x[:])
	if abs32(m) < tinyGroup {
		return 0
	}
	clipped := func(v float32) float32 { return float32(max(-4, min(RoundCode(v), 3))) }
	inverse := -4 / m
	var a, b float32
	for i, v := range x {
		l, w := clipped(float32(inverse*v)), float32(v*v)
		codes[i] = l
		a += float32(float32(w*v) * l)
		b += float32(float32(w*l) * l)
	}
	for range 5 {
		changed := false
		for i, v := range x {
			l, w := codes[i], float32(v*v)
			a1 := a - float32(float32(w*v)*l)
			if !(a1 > 0) {
				continue
			}
			b1 := b - float32(float32(w*l)*l)
			next := clipped(float32(v*b1) / a1)
			if next == l {
				continue
			}
			a1 += float32(float32(w*v) * next)
			b1 += float32(float32(w*next) * next)
			if b1 > 0 && float32(float32(a1*a1)*b) > float32(float32(a*a)*b1) {
				codes[i], a, b = next, a1, b1
				changed = true
			}
		}
		if !changed {
			break
		}
	}
	if b > 0 {
		scale = a / b
	}
	return scale
}

// ToHalf rounds x to a float16, to nearest even. A NaN keeps its sign.
func ToHalf(x float32) uint16 { return f16FromF32(x) }

// FromHalf returns the value of a float16.
func FromHalf(h uint16) float32 { return f32FromF16(h) }

// MaxAbs returns the bits of the largest magnitude among the elements of src; a NaN is larger than an infinity.
func MaxAbs(src []byte, from Float) uint32 { return active.MaxAbs(src, from) }

// MaxAbs is the function MaxAbs by this set.
func (s *Set) MaxAbs(src []byte, from Float) uint32 {
	elements(src, from)
	race.ReadSlice(src)
	largest, done := uint32(0), 0
	if f := s.maxAbs[from]; f != nil {
		largest, done = f(src)
	}
	return max(largest, maxAbs(src[done*from.Size():], from))
}
