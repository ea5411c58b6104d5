package ggml_test

import (
	"context"
	"encoding/binary"
	"io"
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/gguf"
	"github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/ggml/ggmltest"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/storage/storagetest"
	"github.com/lorakit/lorakit/tensor"
)

// TestQuantizedFiles makes the tensors of whole files and holds them against those of llama-quantize: every file type
// of three models.
func TestQuantizedFiles(t *testing.T) {
	made, refused := 0, map[error]int{}
	for _, m := range ggmltest.Read(t, "../fixtures/ggml/quantized.json.gz") {
		dir := storagetest.Memory{"in.gguf": m.Bytes(t)}
		c, err := gguf.Format{}.Open(context.Background(), dir, "in.gguf")
		require.NoError(t, err)
		require.Len(t, c.Tensors(), len(m.Tensors))
		tensors, values := make([]ggml.Tensor, len(m.Tensors)), make([][]float32, len(m.Tensors))
		stored := map[string]int{}
		for i, x := range m.Tensors {
			info := c.Tensors()[i]
			require.Equal(t, x.Name, info.Name)
			require.Equal(t, x.Shape, info.Shape)
			tensors[i], values[i], stored[x.Name] = x.Tensor, read(t, c.Tensors()[i]), i
		}
		data := map[string]map[ggml.Type][]byte{}
		for _, f := range ggml.FileTypes() {
			types, err := ggml.TypeOf(f, tensors, m.Known)
			switch reason := m.Refused(f); reason {
			case "":
			case "this quantization requires an imatrix!":
				assert.ErrorIs(t, err, ggml.ErrImportance, "%s to %v", m.Name, f)
				refused[ggml.ErrImportance]++
				continue
			default:
				assert.ErrorIs(t, err, ggml.ErrNoType, "%s to %v: %s", m.Name, f, reason)
				refused[ggml.ErrNoType]++
				continue
			}
			require.NoError(t, err, "%s to %v", m.Name, f)
			m.Check(t, f, func(name string) (ggml.Type, []byte) {
				i := stored[name]
				typ := types[i]
				if typ == ggml.Keep {
					typ = m.Tensors[i].Type
				}
				if data[name] == nil {
					data[name] = map[ggml.Type][]byte{}
				}
				if data[name][typ] == nil {
					data[name][typ] = quantised(t, values[i], typ)
				}
				return typ, data[name][typ]
			})
			made++
		}
	}
	assert.Equal(t, 77, made)
	assert.Equal(t, map[error]int{ggml.ErrImportance: 27, ggml.ErrNoType: 1}, refused)
}

// read reads the elements of a tensor.
func read(t *testing.T, stored formats.Tensor) []float32 {
	b, err := io.ReadAll(io.NewSectionReader(stored, 0, stored.Bytes))
	require.NoError(t, err)
	x := make([]float32, stored.Count())
	for i := range x {
		switch stored.DType {
		case tensor.F32:
			x[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
		case tensor.F16:
			x[i] = kernels.FromHalf(binary.LittleEndian.Uint16(b[2*i:]))
		case tensor.BF16:
			x[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(b[2*i:])) << 16)
		default:
			t.Fatalf("%s is %v", stored.Name, stored.DType)
		}
	}
	return x
}

// quantised makes the bytes of a tensor.
func quantised(t *testing.T, x []float32, typ ggml.Type) (b []byte) {
	switch typ {
	case ggml.F32:
		for _, v := range x {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
		}
	case ggml.F16:
		for _, v := range x {
			b = binary.LittleEndian.AppendUint16(b, kernels.ToHalf(v))
		}
	case ggml.BF16:
		for _, v := range x {
			n := math.Float32bits(v)
			b = binary.LittleEndian.AppendUint16(b, uint16((n+0x7fff+n>>16&1)>>16))
		}
	default:
		b = make([]byte, len(x)/typ.Elements()*typ.Bytes())
		require.Equal(t, -1, typ.Quantize(b, x))
	}
	return b
}
