package checkpoint

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/internal/kernels/race"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/nf4"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// storedWeight returns a weight of random values in a scheme, or plain, in a file.
func storedWeight(tb testing.TB, typ string, rows, cols int, d tensor.DType) *Weight {
	tb.Helper()
	w := matrixWeight(rows, cols, d)
	if typ != "" {
		scheme, err := quant.ForType(typ)
		require.NoError(tb, err)
		spec, err := scheme.Spec(typ, quant.Params{{Name: "double_quant", Value: true}})
		require.NoError(tb, err)
		w, err = Quantized(context.Background(), w, spec)
		require.NoError(tb, err)
	}
	f, err := os.Create(filepath.Join(tb.TempDir(), "w"))
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, f.Close()) })
	at := int64(0)
	for i := range w.Parts {
		p := &w.Parts[i]
		_, err := io.Copy(f, io.NewSectionReader(p.Data, p.Offset, p.Bytes))
		require.NoError(tb, err)
		p.Data, p.Offset = f, at
		at += p.Bytes
	}
	return w
}

// parameterOf is a parameter that is one weight.
func parameterOf(tb testing.TB, w *Weight) *Parameter {
	tb.Helper()
	p := &Parameter{Name: w.Name, Pieces: []Piece{{w, models.Slice{Param: w.Name, Expert: -1}}}}
	require.NoError(tb, p.assemble())
	return p
}

// TestExact: what is not rounded is the code times the block's absmax, and what is rounded is that, rounded.
func TestExact(t *testing.T) {
	const rows, cols = 5, 320
	w := storedWeight(t, "nf4", rows, cols, tensor.BF16)
	part := func(i int) []byte {
		b := make([]byte, w.Parts[i].Bytes)
		require.NoError(t, ReadPart(&w.Parts[i], b, 0))
		return b
	}
	floatsOf := func(b []byte) []float32 {
		x := make([]float32, len(b)/4)
		require.NoError(t, tensor.ToFloats(x, b, tensor.F32))
		return x
	}
	var state struct {
		Offset float64 `json:"nested_offset"`
	}
	require.NoError(t, json.Unmarshal(part(3), &state))
	absmax := make([]float32, rows*cols/64)
	nf4.DequantizeAbsmax(absmax, part(1), (*[256]float32)(floatsOf(part(5))), floatsOf(part(4)), float32(state.Offset))
	want, codes := make([]float32, rows*cols), part(0)
	for i := range want {
		want[i] = nf4.NF4.Code()[codes[i/2]>>(4-4*(i%2))&15] * absmax[i/64]
	}

	p := parameterOf(t, w)
	exact := rowsOf(t, p.Exact().Matrix(0))
	require.Equal(t, want, exact)
	rounded := make([]byte, 2*len(exact))
	require.NoError(t, tensor.FromFloats(rounded, tensor.BF16, exact))
	require.NoError(t, tensor.ToFloats(exact, rounded, tensor.BF16))
	require.Equal(t, exact, rowsOf(t, p.Matrix(0)))
	require.NotEqual(t, want, exact)
}

// TestReadInto reads rows of whole blocks and of others, with gaps between the rows, in either orientation and from
// any row on.
func TestReadInto(t *testing.T) {
	const rows, gap = 21, 5
	for _, typ := range []string{"nf4", "fp4", "int8", ""} {
		for _, d := range []tensor.DType{tensor.BF16, tensor.F32} {
			for _, cols := range []int{128, 100, 1} {
				w := storedWeight(t, typ, rows, cols, d)
				whole := rowsOf(t, NewMatrix(w.Exact(), false))
				for _, turned := range []bool{false, true} {
					p := parameterOf(t, w).Exact()
					if turned {
						p = p.T()
					}
					require.Equal(t, turned, p.Turned())
					m := p.Matrix(0)
					r, c := m.Dims()
					for lo := 0; lo < r; lo += 4 {
						hi := min(lo+6, r)
						got := make([]float32, (hi-lo)*(c+gap)-gap)
						for i := range got {
							got[i] = 0.5
						}
						require.NoError(t, m.ReadInto(got, c+gap, lo, hi))
						for i := range got {
							want := float32(0.5)
							switch row, col := lo+i/(c+gap), i%(c+gap); {
							case col >= c:
							case turned:
								want = whole[col*cols+row]
							default:
								want = whole[row*cols+col]
							}
							require.Equal(t, want, got[i], "%s %v, %d columns, turned %v: number %d", typ, d, cols, turned, i)
						}
					}
				}
			}
		}
	}
}

// TestReadIntoAllocates: a second read of rows takes no memory.
func TestReadIntoAllocates(t *testing.T) {
	if race.Enabled {
		t.Skip("with the race detector sync.Pool drops values at random, which are then allocated again")
	}
	const rows, cols = 16, 256
	for _, typ := range []string{"nf4", "int8", ""} {
		for _, d := range []tensor.DType{tensor.BF16, tensor.F16, tensor.F32} {
			m, dst := parameterOf(t, storedWeight(t, typ, rows, cols, d)).Exact().Matrix(0), make([]float32, rows*cols)
			require.Zero(t, testing.AllocsPerRun(20, func() {
				if err := m.ReadInto(dst, cols, 0, rows); err != nil {
					panic(err)
				}
			}), "%s %v", typ, d)
		}
	}
}

// shifting is a decoder whose ranges depend on where they begin.
type shifting struct{ quant.Decoder }

func (s shifting) Inputs(r []quant.Range, lo, hi int64) []quant.Range {
	if lo > 0 {
		return append(r, quant.Range{Part: 1, Length: 4})
	}
	return s.Decoder.Inputs(r, lo, hi)
}

// TestReadIntoRefused: what does not fit is an error.
func TestReadIntoRefused(t *testing.T) {
	w := storedWeight(t, "int8", 4, 64, tensor.BF16)
	m := parameterOf(t, w).Matrix(0)
	for _, c := range []struct{ n, stride, lo, hi int }{
		{256, 63, 0, 4}, {256, 64, -1, 3}, {256, 64, 1, 5}, {256, 64, 2, 1}, {255, 64, 0, 4}, {63, 64, 0, 1}, {0, 64, 3, 4},
	} {
		require.ErrorContains(t, m.ReadInto(make([]float32, c.n), c.stride, c.lo, c.hi), "of a matrix of 4 x 64", c)
	}
	require.NoError(t, m.ReadInto(nil, 64, 4, 4))
	require.NoError(t, m.ReadInto(make([]float32, 3*70+64), 70, 0, 4))

	require.NoError(t, parameterOf(t, matrixWeight(3, 0, tensor.F32)).Matrix(0).ReadInto(nil, 5, 0, 3))

	w.Decoder = shifting{w.Decoder}
	err := parameterOf(t, w).Matrix(0).ReadInto(make([]float32, 256), 64, 0, 4)
	require.ErrorIs(t, err, quant.ErrMalformed)
	require.ErrorContains(t, err, "elements 64 to 128")
}

// BenchmarkReadInto decodes a weight tile by tile, from the page cache and into rows of a padded stride.
func BenchmarkReadInto(b *testing.B) {
	const rows, cols, tile, stride = 5632, 2048, 64, 2048 + 16
	for _, c := range []struct {
		typ string
		d   tensor.DType
	}{{"nf4", tensor.BF16}, {"int8", tensor.BF16}, {"", tensor.BF16}, {"", tensor.F32}} {
		b.Run(fmt.Sprintf("%s%v", c.typ, c.d), func(b *testing.B) {
			m := parameterOf(b, storedWeight(b, c.typ, rows, cols, c.d)).Exact().Matrix(0)
			dst, best := make([]float32, tile*stride), math.Inf(1)
			b.ReportAllocs()
			for b.Loop() {
				begin := time.Now()
				for lo := 0; lo < rows; lo += tile {
					if err := m.ReadInto(dst, stride, lo, lo+tile); err != nil {
						b.Fatal(err)
					}
				}
				best = min(best, time.Since(begin).Seconds())
			}
			b.ReportMetric(rows*cols/best/1e9, "best-Gweights/s")
		})
	}
}
