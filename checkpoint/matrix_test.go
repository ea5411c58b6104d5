package checkpoint

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/x448/float16"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"

	_ "github.com/lorakit/lorakit/quant/bnb" // registers the scheme
)

// matrixWeight is a weight of random values in memory.
func matrixWeight(rows, cols int, d tensor.DType) *Weight {
	r := rand.New(rand.NewPCG(1, 2))
	var b []byte
	for range rows * cols {
		x := float32(r.NormFloat64())
		switch v := math.Float32bits(x); d {
		case tensor.BF16:
			b = binary.LittleEndian.AppendUint16(b, uint16(v>>16))
		case tensor.F16:
			b = binary.LittleEndian.AppendUint16(b, float16.Fromfloat32(x).Bits())
		default:
			b = binary.LittleEndian.AppendUint32(b, v)
		}
	}
	info := tensor.Info{Name: "w.weight", DType: d, Shape: tensor.Shape{int64(rows), int64(cols)}}
	part := formats.Tensor{Info: info, File: "f", Data: bytes.NewReader(b), Bytes: int64(len(b))}
	return &Weight{Info: info, Values: d, Role: models.Tensor{Kind: models.Linear}, Parts: []formats.Tensor{part}}
}

// TestComputed: a computed weight reads as the matrix it is computed from, wherever a piece begins.
func TestComputed(t *testing.T) {
	for _, d := range []tensor.DType{tensor.F32, tensor.BF16} {
		w := matrixWeight(37, 53, d)
		c := Computed(w, NewMatrix(w, false))
		want, err := io.ReadAll(io.NewSectionReader(w.Parts[0].Data, 0, w.Parts[0].Bytes))
		require.NoError(t, err)
		require.Equal(t, w.Parts[0].Bytes, c.Parts[0].Bytes)
		width := d.Bits() / 8
		for _, x := range [][2]int64{
			{0, 37 * 53}, {1, 2}, {52, 54}, {53, 106}, {100, 1900}, {37*53 - 1, 37 * 53}, {5, 5},
		} {
			got := make([]byte, (x[1]-x[0])*width)
			n, err := c.Parts[0].Data.ReadAt(got, x[0]*width)
			require.NoError(t, err)
			require.Len(t, got, n)
			require.Equal(t, want[x[0]*width:x[1]*width], got)
		}
		for _, x := range [][2]int64{{1, 4}, {0, w.Parts[0].Bytes + width}, {-width, 0}} {
			_, err := c.Parts[0].Data.ReadAt(make([]byte, max(0, x[1]-x[0])), x[0])
			require.Error(t, err)
		}
	}
}

// TestQuantizedBySeveralTiles: what goes through a quantisation is the same computed or read, with scales that are
// quantised as well and with plain ones.
func TestQuantizedBySeveralTiles(t *testing.T) {
	w := matrixWeight(700, 515, tensor.F32)
	for _, double := range []bool{false, true} {
		spec := quant.Spec{Type: "nf4", Params: quant.Params{{Name: "block_size", Value: int64(64)},
			{Name: "double_quant", Value: double}}}
		a, err := Quantized(context.Background(), w, spec)
		require.NoError(t, err)
		b, err := Quantized(context.Background(), Computed(w, NewMatrix(w, false)), spec)
		require.NoError(t, err)
		whole, read := rowsOf(t, NewMatrix(w, false)), rowsOf(t, NewMatrix(a, false))
		require.Equal(t, read, rowsOf(t, NewMatrix(b, false)))
		var norm, lost float64
		for i, v := range whole {
			norm += float64(v) * float64(v)
			lost += float64(v-read[i]) * float64(v-read[i])
		}
		require.InDelta(t, 0.092, math.Sqrt(lost/norm), 0.003)
	}
}

// rowsOf reads all of a matrix.
func rowsOf(t *testing.T, m Rows) []float32 {
	t.Helper()
	rows, cols := m.Dims()
	x := make([]float32, rows*cols)
	require.NoError(t, m.ReadRows(x, 0, rows))
	return x
}
