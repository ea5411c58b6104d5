package tensor

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// TestRound holds the rounding of a number to that of stored elements.
func TestRound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := math.Float32frombits(rapid.Uint32().Draw(t, "bits"))
		for _, d := range []DType{F32, F16, BF16} {
			b, want := make([]byte, d.Bits()/8), []float32{0}
			require.NoError(t, FromFloats(b, d, []float32{x}))
			require.NoError(t, ToFloats(want, b, d))
			got := Round(x, d)
			if x != x {
				require.True(t, got != got)
				continue
			}
			require.Equal(t, math.Float32bits(want[0]), math.Float32bits(got))
		}
	})
}
