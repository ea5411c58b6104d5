package ggml

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestThresholds holds the thresholds against the comparison of errors that they stand for.
func TestThresholds(t *testing.T) {
	nearest := func(x, scale float32) (code byte) {
		least := float32(math.Inf(1))
		for q, v := range doubled {
			if e := abs(float32(v*scale) - x); e < least {
				least, code = e, byte(q)
			}
		}
		return code
	}
	r := rand.New(rand.NewPCG(1, 2))
	for u := range 0x7f + 1 + 253 {
		scale := halfUE4M3(byte(u))
		if u > 0x7f {
			scale = powerOfTwo(byte(u - 0x80))
		}
		th := newThresholds(scale)
		for _, m := range middles {
			for d := -40; d <= 40; d++ {
				x := math.Float32frombits(uint32(max(0, int32(math.Float32bits(m*scale))+int32(d))))
				if math.IsInf(float64(x), 0) || x != x {
					continue
				}
				require.Equal(t, nearest(x, scale), th.code(x), "%v of scale %v", x, scale)
				require.Equal(t, nearest(-x, scale), th.code(-x), "%v of scale %v", -x, scale)
			}
		}
		for range 1000 {
			x := max(-math.MaxFloat32, min(float32(r.NormFloat64())*scale*6, math.MaxFloat32))
			require.Equal(t, nearest(x, scale), th.code(x), "%v of scale %v", x, scale)
		}
	}
}
