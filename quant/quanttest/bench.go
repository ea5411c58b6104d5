package quanttest

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Benchmark measures how fast one goroutine quantises a matrix of BF16, and reads it back as BF16, in the tiles that
// the pipeline has. Speeds are in bytes of BF16.
func Benchmark(b *testing.B, scheme quant.Scheme, typ string, params quant.Params) {
	const rows, cols, tile = 1024, 4096, 256 << 10
	ctx := context.Background()
	info := tensor.Info{Name: "a.weight", DType: tensor.BF16, Shape: tensor.Shape{rows, cols}}
	x := make([]float32, rows*cols)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range x {
		x[i] = float32(r.NormFloat64() * 0.05)
	}
	values := make([]byte, 2*rows*cols)
	require.NoError(b, tensor.FromFloats(values, tensor.BF16, x))
	spec, err := scheme.Spec(typ, params)
	require.NoError(b, err)
	write := func(b *testing.B) *Stored {
		e, err := scheme.Encoder(ctx, spec, info)
		require.NoError(b, err)
		s, err := Encode([]Weight{{e, info, values}}, max(1, tile/e.Unit()))
		require.NoError(b, err)
		return s
	}
	s := write(b)
	b.Run(typ+"/write", func(b *testing.B) {
		b.SetBytes(2 * rows * cols)
		for range b.N {
			write(b)
		}
	})
	key, object, err := scheme.Config([]quant.Assigned{{Name: info.Name, Spec: spec}}, nil)
	require.NoError(b, err)
	s.JSON = []byte(`{"` + key + `": ` + string(object) + `}`)
	found, err := scheme.Find(ctx, s)
	require.NoError(b, err)
	Read(b, typ, s, found[0])
}

// Read measures how fast one goroutine reads a weight as BF16.
func Read(b *testing.B, name string, s *Stored, d quant.Decoder) {
	const tile = 256 << 10
	n, step := d.Info().Count(), max(d.Unit(), tile/d.Unit()*d.Unit())
	b.Run(name+"/read", func(b *testing.B) {
		out, cast, raw := make([]byte, 4*step), make([]byte, 2*step), []byte(nil)
		b.SetBytes(2 * n)
		for range b.N {
			for lo := int64(0); lo < n; lo += step {
				hi := min(n, lo+step)
				var in [][]byte
				at := int64(0)
				for _, r := range d.Inputs(nil, lo, hi) {
					data := s.Data[d.Parts()[r.Part]][r.Offset:]
					if r.Scattered() { // which a reader has put together
						if int64(len(raw)) < at+r.Bytes() {
							raw = make([]byte, at+r.Bytes())
						}
						for k := range r.Count {
							copy(raw[at+k*r.Length:][:r.Length], data[k*r.Stride:])
						}
						data = raw[at:]
						at += r.Bytes()
					}
					in = append(in, data[:r.Bytes()])
				}
				width := d.Values().Bits() / 8
				require.NoError(b, d.Decode(out[:(hi-lo)*width], lo, hi, in))
				if d.Values() != tensor.BF16 {
					require.NoError(b, tensor.Convert(cast[:2*(hi-lo)], tensor.BF16, out[:(hi-lo)*width], d.Values()))
				}
			}
		}
	})
}
