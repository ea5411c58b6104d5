package kernels

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// equalAffine holds all sets against the twin, for groups of elements of any bits.
func equalAffine(t *testing.T, src []byte, from Float, group int, most float32) {
	t.Helper()
	src = unaligned(src)
	n := len(src) / from.Size()
	groups := n / group
	lo, hi := make([]float32, groups), make([]float32, groups)
	bad := twin.Extremes(lo, hi, src, from, group)
	scales, biases := make([]float32, groups), slices.Clone(lo)
	for i := range scales {
		scales[i] = (hi[i] - lo[i]) / most
		if i%3 == 0 {
			scales[i], biases[i] = -scales[i], hi[i]
		}
	}
	codes := make([]byte, n)
	twin.QuantizeAffine(codes, src, from, scales, biases, group, most)
	values := make([]byte, len(src))
	twin.DequantizeAffine(values, from, codes, scales, biases, group)
	for _, s := range Sets() {
		l, h := outputFloats(groups), outputFloats(groups)
		require.Equal(t, bad, s.Extremes(l, h, src, from, group), s.name)
		require.Equal(t, float32Bits(lo), float32Bits(l), s.name)
		require.Equal(t, float32Bits(hi), float32Bits(h), s.name)
		require.True(t, intactFloats(l) && intactFloats(h), s.name)
		q := output(n)
		s.QuantizeAffine(q, src, from, scales, biases, group, most)
		require.Equal(t, codes, q, "%s %v", s.name, from)
		require.True(t, intact(q), s.name)
		v := output(len(values))
		s.DequantizeAffine(v, from, unaligned(codes), scales, biases, group)
		require.Equal(t, values, v, "%s %v", s.name, from)
		require.True(t, intact(v), s.name)
	}
}

func TestAffineSetsAreEqual(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for _, from := range types {
		for range 200 {
			group := 32 << r.IntN(3)
			n := group * r.IntN(9)
			src := make([]byte, n*from.Size())
			x := oddities(r, n)
			if r.IntN(2) == 0 {
				for i := range x {
					x[i] = float32(r.NormFloat64())
				}
			}
			for i, v := range x {
				store(src, from, i, v)
			}
			if n > 0 && r.IntN(4) == 0 {
				store(src, from, r.IntN(n), []float32{nan, inf, -inf}[r.IntN(3)])
			}
			equalAffine(t, src, from, group, float32(int(1)<<(1+r.IntN(8))-1))
		}
	}
}

// TestAffine holds the twin against numbers that were worked out by hand.
func TestAffine(t *testing.T) {
	src := make([]byte, 64*4)
	for i := range 64 {
		store(src, F32, i, float32(i%32)/2-4)
	}
	store(src, F32, 40, float32(math.NaN()))
	lo, hi := make([]float32, 2), make([]float32, 2)
	assert.Equal(t, 40, twin.Extremes(lo, hi, src, F32, 32))
	assert.Equal(t, []float32{-4, -4}, lo)
	assert.Equal(t, []float32{11.5, 11.5}, hi)
	codes := make([]byte, 64)
	twin.QuantizeAffine(codes, src, F32, []float32{1, -2}, []float32{-4, 3}, 32, 10)
	assert.Equal(t, []byte{0, 0, 1, 2, 2, 2, 3, 4, 4, 4}, codes[:10]) // halves to the even
	assert.Equal(t, []byte{10, 10}, codes[30:32])
	assert.Equal(t, []byte{4, 3, 3, 3, 2, 2}, codes[32:38]) // 3.5, 3.25, 3, 2.75, 2.5, 2.25
	assert.Zero(t, codes[40])
	assert.Zero(t, codes[63])

	// Rounded twice: 3 * 85.5 is 256.5, 256 in bfloat16, and with 1.5 257.5, 258.
	dst := make([]byte, 64)
	twin.DequantizeAffine(dst, BF16, []byte{31: 3}, []float32{85.5}, []float32{1.5}, 32)
	assert.Equal(t, float32(258), widen(load(dst, BF16, 31), BF16))
	assert.Equal(t, float32(1.5), widen(load(dst, BF16, 0), BF16))
}

func FuzzAffine(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4}, uint8(2), uint8(3))
	f.Add([]byte{0xff, 0xff, 0x7f, 0x80}, uint8(1), uint8(7))
	f.Fuzz(func(t *testing.T, b []byte, from, bits uint8) {
		for _, group := range []int{32, 64} {
			size := group * types[from%3].Size()
			equalAffine(t, b[:len(b)/size*size], types[from%3], group, float32(int(1)<<(1+bits%8)-1))
		}
	})
}

// BenchmarkAffine has groups of 64, and counts the bytes of the elements.
func BenchmarkAffine(b *testing.B) {
	const group = 64
	for name, call := range map[string]func(s *Set, codes, src []byte, f Float, x, y []float32){
		"extremes": func(s *Set, _, src []byte, f Float, x, y []float32) { s.Extremes(x, y, src, f, group) },
		"quantize": func(s *Set, codes, src []byte, f Float, x, y []float32) {
			s.QuantizeAffine(codes, src, f, x, y, group, 15)
		},
		"dequantize": func(s *Set, codes, src []byte, f Float, x, y []float32) {
			s.DequantizeAffine(src, f, codes, x, y, group)
		},
	} {
		b.Run(name, func(b *testing.B) {
			everySet(b, types, func(s *Set, f Float, size int) func() {
				src := weights(size, f)
				n := size / f.Size()
				codes, x, y := make([]byte, n), make([]float32, n/group), make([]float32, n/group)
				for i := range x {
					x[i], y[i] = 0.01, -0.07
				}
				return func() { call(s, codes, src, f, x, y) }
			})
		})
	}
}
