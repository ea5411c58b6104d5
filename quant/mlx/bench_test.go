package mlx_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/mlx"
	"github.com/lorakit/lorakit/tensor"
)

// BenchmarkScheme works on one core on a tile of the pipeline, and counts the bytes of its values in bfloat16.
func BenchmarkScheme(b *testing.B) {
	info := tensor.Info{Name: "m.weight", DType: tensor.BF16, Shape: tensor.Shape{64, 4096}}
	r := rand.New(rand.NewPCG(1, 2))
	x := make([]float32, info.Count())
	for i := range x {
		x[i] = float32(r.NormFloat64() * 0.02)
	}
	src := make([]byte, 2*info.Count())
	require.NoError(b, tensor.FromFloats(src, info.DType, x))
	for _, typ := range (mlx.Scheme{}).Types() {
		if typ.ReadOnly {
			continue
		}
		s, err := mlx.Scheme{}.Spec(typ.Name, nil)
		require.NoError(b, err)
		b.Run(fmt.Sprintf("encode/%s", typ.Name), func(b *testing.B) {
			e, err := mlx.Scheme{}.Encoder(b.Context(), s, info)
			require.NoError(b, err)
			var out [][]byte
			for _, o := range e.Outputs() {
				size, err := o.Size()
				require.NoError(b, err)
				out = append(out, make([]byte, size))
			}
			measure(b, len(src), func() error { return e.Encode(out, nil, 0, info.Count(), src) })
		})
		b.Run(fmt.Sprintf("decode/%s", typ.Name), func(b *testing.B) {
			m, err := encode(s, info, src, 1<<20)
			require.NoError(b, err)
			d := m.only(b)
			in := inputs(m, d, info.Count())
			dst := make([]byte, len(src))
			measure(b, len(src), func() error { return d.Decode(dst, 0, info.Count(), in) })
		})
	}
}

// measure reports the bytes a second, on average and in the fastest call: on a busy machine the latter says more.
func measure(b *testing.B, bytes int, call func() error) {
	b.SetBytes(int64(bytes))
	best := time.Hour
	for b.Loop() {
		start := time.Now()
		require.NoError(b, call())
		best = min(best, time.Since(start))
	}
	b.ReportMetric(float64(bytes)/best.Seconds()/1e6, "best-MB/s")
}

func inputs(m *memory, d quant.Decoder, n int64) (in [][]byte) {
	for _, r := range d.Inputs(nil, 0, n) {
		in = append(in, m.Data[m.Infos[r.Part].Name][r.Offset:][:r.Length])
	}
	return in
}
