package kernels

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var minRules = []*MinRule{NewMinRule(3, -0.5, 16, true), NewMinRule(15, -1, 21, false), NewMinRule(31, -0.5, 16, false)}

// numbers makes the NaNs among x one, as processors differ in their signs.
func numbers(x ...[Lanes]float32) (bits [][Lanes]uint32) {
	for _, row := range x {
		var b [Lanes]uint32
		for i, v := range row {
			b[i] = math.Float32bits(number(v))
		}
		bits = append(bits, b)
	}
	return bits
}

// equalSearches holds the sets against the plain Go, for groups of finite elements and weights.
func equalSearches(t require.TestingT, x, w []float32) {
	n := len(x) / Lanes
	find := func(s *Set) (all [][Lanes]uint32) {
		var f Search
		copy(f.X[:], x)
		copy(f.Weights[:], w)
		for _, r := range minRules {
			s.SearchMin(&f, n, r)
			all = append(all, numbers(f.Scale, f.Min, f.Inverse, f.Low)...)
		}
		s.SearchSym(&f, n)
		all = append(all, numbers(f.Scale, f.Inverse)...)
		s.SearchNonLinear(&f, n)
		all = append(all, numbers(f.Scale)...)
		var scales [2 * Lanes]float32
		s.SearchMoving(&scales, &f)
		all = append(all, numbers([Lanes]float32(scales[:Lanes]), [Lanes]float32(scales[Lanes:]))...)
		for g, scale := range scales {
			for i := range movingWidth {
				if scale != 0 {
					all = append(all, [Lanes]uint32{uint32(f.MovedCode(g, i))})
				}
			}
		}
		return all
	}
	want := find(&Set{name: "purego"})
	for _, s := range Sets() {
		require.Equal(t, want, find(s), s.name)
	}
}

// oddities are rows of what is not a normal number, or on the border of something.
func oddities(r *rand.Rand, n int) []float32 {
	x := make([]float32, n)
	some := []float32{0, float32(math.Copysign(0, -1)), 1, -1, 0.5, 1e-15, -1e-15, 1e-38, 1e-45, 3e38, -3e38, 1e19, 7}
	switch r.IntN(5) {
	case 0: // a few kinds of numbers
		a, b := some[r.IntN(len(some))], some[r.IntN(len(some))]
		for i := range x {
			x[i] = a
			if r.IntN(3) == 0 {
				x[i] = b
			}
		}
	case 1: // any finite bits
		for i := range x {
			if v := math.Float32frombits(r.Uint32()); v-v == 0 {
				x[i] = v
			}
		}
	case 2: // one side of zero
		sign := float32(1 - 2*r.IntN(2))
		for i := range x {
			x[i] = sign * float32(math.Abs(r.NormFloat64()))
		}
	case 3: // small whole numbers
		for i := range x {
			x[i] = float32(r.IntN(5) - 2)
		}
	default: // of some size
		size := math.Exp(r.Float64()*170 - 90)
		for i := range x {
			x[i] = float32(r.NormFloat64() * size)
		}
	}
	return x
}

func TestSearchesEqualTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 2000 {
		for _, n := range []int{2, 16, 32} {
			x := oddities(r, n*Lanes)
			w := slices.Clone(x)
			for i, v := range w {
				w[i] = abs32(v)
			}
			if r.IntN(2) == 0 {
				w = oddities(r, n*Lanes)
			}
			equalSearches(t, x, w)
		}
	}
}

func FuzzSearches(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4}, false)
	f.Add(weights(4*2*256, F32), true)
	f.Fuzz(func(t *testing.T, b []byte, long bool) {
		n := 16 * Lanes
		if long {
			n *= 2
		}
		x := make([]float32, 2*n)
		for i := range x {
			if 4*i+4 <= len(b) {
				if v := math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:])); v-v == 0 {
					x[i] = v
				}
			}
		}
		equalSearches(t, x[:n], x[n:])
	})
}

// equalQ8 holds the sets against the plain Go, for whole blocks of finite elements.
func equalQ8(t require.TestingT, x []float32) {
	plain := &Set{name: "purego"}
	blocks := make([]byte, len(x)/32*blockQ8)
	plain.EncodeQ8(blocks, x)
	values := make([]float32, len(x))
	for i := 1; i < len(blocks); i += blockQ8 {
		blocks[i] &^= 0x40 // finite
	}
	plain.DecodeQ8(values, blocks)
	for _, s := range Sets() {
		got, y := make([]byte, len(blocks)), make([]float32, len(x))
		s.EncodeQ8(got, x)
		for i := 1; i < len(blocks); i += blockQ8 {
			got[i] &^= 0x40
		}
		require.Equal(t, blocks, got, s.name)
		s.DecodeQ8(y, blocks)
		require.Equal(t, float32Bits(values), float32Bits(y), s.name)
	}
}

func TestQ8EqualsTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for range 3000 {
		equalQ8(t, oddities(r, 32*r.IntN(5)))
	}
	// Next to halves of steps.
	for range 3000 {
		x := make([]float32, 64)
		for i := range x {
			half := float32(r.IntN(253)-126) + 0.5
			x[i] = math.Float32frombits(uint32(int32(math.Float32bits(half)) + int32(r.IntN(5)-2)))
		}
		x[0], x[63] = 127, -127
		equalQ8(t, x)
	}
}

func FuzzQ8(f *testing.F) {
	f.Add(weights(4*64, F32))
	f.Fuzz(func(t *testing.T, b []byte) {
		x := make([]float32, len(b)/128*32)
		for i := range x {
			if v := math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:])); v-v == 0 {
				x[i] = v
			}
		}
		equalQ8(t, x)
	})
}

// TestNearestNonLinear holds the thresholds against the differences that they stand for.
func TestNearestNonLinear(t *testing.T) {
	nearest := func(v float32) int {
		if v <= NonLinear[0] {
			return 0
		}
		for i := 1; i < 16; i++ {
			if v < NonLinear[i] {
				if v-NonLinear[i-1] < NonLinear[i]-v {
					return i - 1
				}
				return i
			}
		}
		return 15
	}
	for _, m := range append(slices.Clone(nonLinearMiddles[:]), NonLinear[:]...) {
		for d := -1000; d <= 1000; d++ {
			v := math.Float32frombits(uint32(int32(math.Float32bits(m)) + int32(d)))
			assert.Equal(t, nearest(v), NearestNonLinear(v), "%v", v)
		}
	}
	r := rand.New(rand.NewPCG(1, 9))
	for range 100_000 {
		v := float32(r.NormFloat64() * 70)
		require.Equal(t, nearest(v), NearestNonLinear(v), "%v", v)
	}
}

func TestRoundAway(t *testing.T) {
	for v, want := range map[float32]int32{
		0.5: 1, -0.5: -1, 0.49999997: 0, 1.5: 2, 2.5: 3, -2.5: -3, 2.4999998: 2, 0: 0, 8388609: 8388609, 2e9: 2e9,
		inf: math.MinInt32, -inf: math.MinInt32, 3e9: math.MinInt32, -3e9: math.MinInt32,
	} {
		assert.Equal(t, want, RoundAway(v), "%v", v)
	}
	assert.Equal(t, int32(math.MinInt32), RoundAway(nan))
}

func TestScaleCodesEqualTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 12))
	plain := &Set{name: "purego"}
	for n := range 40 {
		codes, scales, mins := make([]byte, 16*n), oddities(r, n), oddities(r, n)
		for i := range codes {
			codes[i] = byte(r.Uint32())
		}
		for i := range n { // what is multiplied stays finite
			scales[i] /= 256
		}
		for _, m := range [][]float32{mins, nil} {
			want := make([]float32, 16*n)
			plain.ScaleCodes(want, codes, scales, m)
			for _, s := range Sets() {
				got := make([]float32, 16*n)
				s.ScaleCodes(got, codes, scales, m)
				require.Equal(t, float32Bits(want), float32Bits(got), s.name)
			}
		}
	}
}

func TestQuantizeCodesEqualsTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(13, 14))
	plain := &Set{name: "purego"}
	for range 100 {
		for n := range 20 {
			x, scales, mins := oddities(r, 16*n), oddities(r, n), oddities(r, n)
			for i, s := range scales {
				if s == 0 || s-s != 0 {
					scales[i] = 1
				}
			}
			for _, limits := range [][2]int32{{0, 3}, {0, 15}, {0, 31}, {-32, 31}, {-4, 3}} {
				want := make([]byte, 16*n)
				plain.QuantizeCodes(want, x, scales, mins, limits[0], limits[1])
				for _, s := range Sets() {
					got := make([]byte, 16*n)
					s.QuantizeCodes(got, x, scales, mins, limits[0], limits[1])
					require.Equal(t, want, got, s.name)
				}
			}
		}
	}
}
