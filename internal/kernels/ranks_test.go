package kernels

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var fewValues = [8]float32{0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 0.25}

// equalRanks holds all sets against the twin.
func equalRanks(t *testing.T, x, divisors []float32, group int, limits *[8]float32) {
	t.Helper()
	codes := make([]byte, len(x))
	twin.Ranks(codes, x, limits)
	n := len(x) / group
	quotients := slices.Clone(x[:n*group])
	twin.Divide(quotients, divisors[:n], group)
	for _, s := range Sets() {
		c := output(len(x))
		s.Ranks(c, x, limits)
		require.Equal(t, codes, c, s.name)
		require.True(t, intact(c), s.name)
		q := outputFloats(n * group)
		copy(q, x)
		s.Divide(q, divisors[:n], group)
		require.Equal(t, float32Bits(quotients), float32Bits(q), s.name)
		require.True(t, intactFloats(q), s.name)
	}
}

func TestRankSetsAreEqual(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for range 300 {
		x := oddities(r, r.IntN(200))
		for i := range x {
			switch r.IntN(20) {
			case 0:
				x[i] = []float32{nan, inf, -inf, -nan}[r.IntN(4)]
			case 1, 2, 3:
				x[i] = fewValues[r.IntN(8)] * float32(1-2*r.IntN(2))
			}
		}
		limits := fewValues
		limits[7] = float32(r.IntN(3)) - 1
		equalRanks(t, x, oddities(r, 20), 16<<r.IntN(2), &limits)
	}
}

func TestRanks(t *testing.T) {
	x := []float32{0, 0.25, 0.3, 0.75, 1, 1.5, 2, 3, 4, 5, 5.1, 100, inf, nan}
	want := []byte{0, 0, 1, 1, 2, 3, 4, 5, 6, 6, 7, 7, 7, 7}
	codes := make([]byte, len(x))
	twin.Ranks(codes, x, &fewValues)
	assert.Equal(t, want, codes)
	for i, v := range x {
		x[i] = -v
		if want[i] > 0 {
			want[i] |= 8
		}
	}
	twin.Ranks(codes, x, &fewValues)
	assert.Equal(t, want, codes)
	all := fewValues
	all[7] = -1
	twin.Ranks(codes[:2], x[:2], &all)
	assert.Equal(t, []byte{8, 8}, codes[:2])
	y := []float32{15: 3, 31: -1}
	twin.Divide(y, []float32{2, 0}, 16)
	assert.Equal(t, []float32{15: 1.5}, y[:16])
	assert.Equal(t, math.Float32bits(float32(math.Inf(-1))), math.Float32bits(y[31]))
	assert.Equal(t, uint32(f32NaN), math.Float32bits(y[30]))
}

func FuzzRanks(f *testing.F) {
	fuzzed(f, func(b []byte) { f.Add(b, uint8(40), float32(0.25)) })
	f.Fuzz(func(t *testing.T, b []byte, n uint8, last float32) {
		limits := fewValues
		limits[7] = last
		equalRanks(t, fuzzedFloats(b, int(n), 1), fuzzedFloats(b, 16, 2), 16, &limits)
	})
}

// BenchmarkRanks counts the bytes of the numbers.
func BenchmarkRanks(b *testing.B) {
	for _, name := range []string{"ranks", "divide"} {
		b.Run(name, func(b *testing.B) {
			everySet(b, []Float{F32}, func(s *Set, _ Float, size int) func() {
				x, codes, by := random(size/4, 3), make([]byte, size/4), slices.Repeat([]float32{1.01}, size/4/32)
				return func() {
					if name == "ranks" {
						s.Ranks(codes, x, &fewValues)
					} else {
						s.Divide(x, by, 32)
					}
				}
			})
		})
	}
}
