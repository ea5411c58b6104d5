package minifloat

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestValues(t *testing.T) {
	for b, want := range map[byte]float32{
		0: 0, 1: 0x1p-9, 7: 7 * 0x1p-9, 8: 0x1p-6, 0x38: 1, 0x39: 1.125, 0x7e: 448, 0xfe: -448, 0x81: -0x1p-9,
	} {
		require.Equal(t, want, E4M3[b], "%#x", b)
	}
	require.True(t, math.IsNaN(float64(E4M3[0x7f])))
	require.True(t, math.IsNaN(float64(E4M3[0xff])))
	require.True(t, math.Signbit(float64(E4M3[0x80])))
	require.True(t, math.Signbit(float64(E2M1[8])))
	require.Equal(t, []float32{0x1p-127, 0x1p-126, 1, 2, 0x1p127},
		[]float32{E8M0[0], E8M0[1], E8M0[127], E8M0[128], E8M0[254]})
	require.True(t, math.IsNaN(float64(E8M0[255])))
}

// TestNearest holds the codes of all float32 with few digits, and of those beside them, to the definition.
func TestNearest(t *testing.T) {
	for _, f := range []struct {
		name      string
		values    []float32 // of the codes without a sign, ascending
		sign, nan byte
		code      func(float32) byte
	}{
		{"E4M3", E4M3[:0x7f], 0x80, NaNE4M3, ToE4M3},
		{"E2M1", E2M1[:8], 8, 7, ToE2M1},
	} {
		nearest := func(x float32) (code byte) {
			sign := byte(0)
			if math.Signbit(float64(x)) {
				sign = f.sign
			}
			if x != x {
				return sign | f.nan
			}
			a := math.Min(math.Abs(float64(x)), 1e6)
			for c := 1; c < len(f.values); c++ {
				d, best := math.Abs(float64(f.values[c])-a), math.Abs(float64(f.values[code])-a)
				if d < best || d == best && c%2 == 0 {
					code = byte(c)
				}
			}
			return code | sign
		}
		for top := range uint32(1 << 14) {
			for _, rest := range []uint32{0, 1, 1<<18 - 1} {
				x := math.Float32frombits(top<<18 | rest)
				if want := nearest(x); f.code(x) != want {
					t.Fatalf("%s of %x: %#x, expected %#x", f.name, x, f.code(x), want)
				}
			}
		}
	}
}
