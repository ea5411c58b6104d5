package kernels

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

// bitsOf makes NaNs one, as processors differ in them.
func bitsOf(x []float32) []uint32 {
	b := make([]uint32, len(x))
	for i, v := range x {
		b[i] = math.Float32bits(number(v))
	}
	return b
}

// equalMinifloats holds the sets against the plain Go.
func equalMinifloats(t require.TestingT, x []float32, codes []byte, by []float32) {
	n := len(x)
	whole := n / Group * Group
	plain := &Set{name: "purego"}
	type result struct {
		bytes [][]byte
		bits  [][]uint32
	}
	run := func(s *Set) (r result) {
		for _, plus := range []float32{0, float32(math.Copysign(0, -1))} {
			dst := make([]byte, n)
			s.EncodeE4M3(dst, x, plus)
			half := make([]byte, n/2)
			s.EncodeE2M1(half, x[:n/2*2], plus)
			r.bytes = append(r.bytes, dst, half)
		}
		most := make([]uint32, whole/Group)
		s.Magnitudes(most, x[:whole])
		divided, multiplied := append([]float32(nil), x[:whole]...), append([]float32(nil), x[:whole]...)
		s.Divide(divided, by, Group)
		s.Multiply(multiplied, by)
		values := [16]float32{0, 1, 2, 3, 4, 5, 6, 7, -1, -2, -3, -4, -5, -6, -7, 0.5}
		read := make([]float32, whole)
		s.Nibbles(read, codes, &values, by)
		r.bits = append(r.bits, most, bitsOf(divided), bitsOf(multiplied), bitsOf(read))
		return r
	}
	want := run(plain)
	for _, s := range Sets() {
		require.Equal(t, want, run(s), s.name)
	}
}

func TestMinifloats(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for n := range 300 {
		for kind := range 4 {
			x, by := make([]float32, n), make([]float32, n/Group)
			codes := make([]byte, len(by)*Group/2)
			for i := range x {
				switch kind {
				case 0: // any bits
					x[i] = math.Float32frombits(r.Uint32())
				case 1: // what codes have, and beside it
					x[i] = math.Float32frombits(uint32(110+r.IntN(28))<<23|r.Uint32N(16)<<19|r.Uint32N(3)) *
						float32(1-2*r.IntN(2))
				case 2:
					x[i] = oddities(r, 1)[0]
				case 3: // zeros and no numbers
					x[i] = []float32{0, float32(math.Copysign(0, -1)), float32(math.NaN()), float32(math.Inf(-1)), 1}[r.IntN(5)]
				}
			}
			for i := range codes {
				codes[i] = byte(r.Uint32())
			}
			for i := range by {
				by[i] = math.Float32frombits(r.Uint32())
			}
			equalMinifloats(t, x, codes, by)
		}
	}
}

// TestAllE4M3 goes through all float32 with few digits, and those beside them.
func TestAllE4M3(t *testing.T) {
	x := make([]float32, 0, 3<<14)
	for top := range uint32(1 << 14) {
		for _, rest := range []uint32{0, 1, 1<<18 - 1} {
			x = append(x, math.Float32frombits(top<<18|rest))
		}
	}
	equalMinifloats(t, x, make([]byte, len(x)/2), make([]float32, len(x)/Group))
}
