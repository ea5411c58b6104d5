package kernels

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels/race"
)

// sums are the lanes of a sum in float64: element i goes to lane i mod 16. A lane takes its elements in rising order,
// by fused multiply-adds.
type sums = [16]float64

// total adds the lanes, the upper half to the lower half until one is left. A NaN has one pattern.
func total(s *sums) float64 {
	for n := len(s) / 2; n > 0; n /= 2 {
		for l := range n {
			s[l] += s[n+l]
		}
	}
	if s[0] != s[0] {
		return math.NaN()
	}
	return s[0]
}

// MergeRow sets dst, of type to, to src + scale*delta: the product rounded to float32, the sum rounded to float32, and
// that rounded to nearest even to the type of dst. A NaN that comes out has one pattern. Where the types are the same
// dst may be src.
//
// It returns what has become of the delta. With d the product and e = (what dst holds - src) - d in float64, ed is the
// sum of e·d and dd the sum of d·d. Element i goes to the sum i mod 16, by a fused multiply-add in float64; these
// sums are added in halves, the upper to the lower. So the result is the same everywhere.
func MergeRow(dst []byte, to Float, src []byte, from Float, delta []float32, scale float32) (ed, dd float64) {
	return active.MergeRow(dst, to, src, from, delta, scale)
}

// MergeRow is the function MergeRow by this set.
func (s *Set) MergeRow(dst []byte, to Float, src []byte, from Float, delta []float32, scale float32) (ed, dd float64) {
	if n := len(delta); elements(dst, to) != n || elements(src, from) != n {
		panic(fmt.Sprintf("kernels: %d elements and a delta of %d into %d", elements(src, from), n, elements(dst, to)))
	}
	race.ReadSlice(src)
	race.ReadSlice(delta)
	race.WriteSlice(dst)
	var share [2]sums
	done := s.mergeRowFast(dst, to, src, from, delta, scale, &share)
	mergeRow(&share, dst[done*to.Size():], to, src[done*from.Size():], from, delta[done:], scale)
	return total(&share[0]), total(&share[1])
}

// AddScaled sets dst[i] to src[i] + scale*delta[i], the product rounded before the sum. A NaN that comes out has one
// pattern. dst may be src.
func AddScaled(dst, src, delta []float32, scale float32) { active.AddScaled(dst, src, delta, scale) }

// AddScaled is the function AddScaled by this set.
func (s *Set) AddScaled(dst, src, delta []float32, scale float32) {
	if len(src) != len(dst) || len(delta) != len(dst) {
		panic(fmt.Sprintf("kernels: %d elements and a delta of %d into %d", len(src), len(delta), len(dst)))
	}
	race.ReadSlice(src)
	race.ReadSlice(delta)
	race.WriteSlice(dst)
	done := 0
	if s.addScaled != nil {
		done = s.addScaled(dst, src, delta, scale)
	}
	addScaled(dst[done:], src[done:], delta[done:], scale)
}

// Kept returns the sums of e·d and d·d, with e = (out[i] - base[i]) - total[i] and d = delta[i] in float64, summed
// as MergeRow sums. total and delta may be the same slice.
func Kept(out, base, total, delta []float32) (ed, dd float64) {
	return active.Kept(out, base, total, delta)
}

// Kept is the function Kept by this set.
func (s *Set) Kept(out, base, all, delta []float32) (ed, dd float64) {
	n := len(out)
	if len(base) != n || len(all) != n || len(delta) != n {
		panic(fmt.Sprintf("kernels: %d elements, a base of %d, deltas of %d and %d", n, len(base), len(all), len(delta)))
	}
	race.ReadSlice(out)
	race.ReadSlice(base)
	race.ReadSlice(all)
	race.ReadSlice(delta)
	var share [2]sums
	done := s.keptFast(out, base, all, delta, &share)
	kept(&share, out[done:], base[done:], all[done:], delta[done:])
	return total(&share[0]), total(&share[1])
}

// Dot returns the sum of x[i]·y[i] in float64, summed as MergeRow sums.
func (s *Set) Dot(x, y []float32) float64 {
	if len(x) != len(y) {
		panic(fmt.Sprintf("kernels: a product of %d elements and %d", len(x), len(y)))
	}
	race.ReadSlice(x)
	race.ReadSlice(y)
	var sum sums
	done := 0
	if s.dot != nil {
		sum, done = s.dot(x, y)
	}
	dot(&sum, x[done:], y[done:])
	return total(&sum)
}

// SquaredNorm returns the sum of x[i]² in float64, summed as MergeRow sums.
func SquaredNorm(x []float32) float64 { return active.Dot(x, x) }

// mergeRow is the twin of Set.mergeRow. It goes on with sums whose elements so far were a multiple of lanes.
func mergeRow(share *[2]sums, dst []byte, to Float, src []byte, from Float, delta []float32, scale float32) {
	var base, change, out [piece]float32
	for len(delta) > 0 {
		n := min(len(delta), piece)
		widenAll(base[:n], src, from)
		for i, v := range delta[:n] {
			change[i] = float32(scale * v)
			out[i] = number(base[i] + change[i])
		}
		storeAll(dst, to, out[:n])
		widenAll(out[:n], dst, to)
		kept(share, out[:n], base[:n], change[:n], change[:n])
		dst, src, delta = dst[n*to.Size():], src[n*from.Size():], delta[n:]
	}
}

// kept is the twin of Set.kept. It goes on after a multiple of 16 elements.
func kept(share *[2]sums, out, base, total, delta []float32) {
	base, total, delta = base[:len(out)], total[:len(out)], delta[:len(out)]
	ed, dd := &share[0], &share[1]
	for i, v := range out {
		e := (float64(v) - float64(base[i])) - float64(total[i])
		d, l := float64(delta[i]), i%len(ed)
		ed[l] = math.FMA(e, d, ed[l])
		dd[l] = math.FMA(d, d, dd[l])
	}
}

// addScaled is the twin of Set.addScaled.
func addScaled(dst, src, delta []float32, scale float32) {
	src, delta = src[:len(dst)], delta[:len(dst)]
	for i := range dst {
		dst[i] = number(src[i] + float32(scale*delta[i]))
	}
}

// dot is the twin of Set.dot. It goes on after a multiple of 16 elements.
func dot(sum *sums, x, y []float32) {
	y = y[:len(x)]
	for i, v := range x {
		l := i % len(sum)
		sum[l] = math.FMA(float64(v), float64(y[i]), sum[l])
	}
}
