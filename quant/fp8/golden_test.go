package fp8_test

import (
	"encoding/binary"
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant/fp8"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

// TestGolden holds weights against what the peers make of them.
func TestGolden(t *testing.T) {
	for _, name := range []string{"fp8-bf16", "fp8-f16", "fp8-f32", "fp8-ue8m0-bf16",
		"fp8-ue8m0-f16", "fp8-ue8m0-f32", "fp8-whole",
		"fp8-experts", "fp8-early", "fp8-e2m1"} {
		t.Run(name, func(t *testing.T) {
			quanttest.Check(t, fp8.Scheme{}, quanttest.Open(t, "../../fixtures/compressed/"+name+".safetensors"))
		})
	}
}

// TestAutoFP8 reads the names and the config of AutoFP8, whose one scale has no dimension or one, and writes them
// again.
func TestAutoFP8(t *testing.T) {
	s := fp8.Scheme{}
	for _, shape := range []tensor.Shape{{}, {1}} {
		codes := []byte{0x38, 0xb8, 0x40, 0x00, 0x7e, 0x08} // 1, -1, 2, 0, 448, 2^-6
		stored := &quanttest.Stored{Data: map[string][]byte{}, Model: tensor.BF16, JSON: []byte(`{"quantization_config": ` +
			`{"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}}`)}
		stored.Add(tensor.Info{Name: "a.weight", DType: tensor.F8E4M3, Shape: tensor.Shape{2, 3}}, codes)
		stored.Add(tensor.Info{Name: "a.weight_scale", DType: tensor.F32, Shape: shape},
			binary.LittleEndian.AppendUint32(nil, math.Float32bits(0.5)))
		found, err := s.Find(t.Context(), stored)
		require.NoError(t, err)
		require.Len(t, found, 1)
		values, err := quanttest.Decode(stored, found[0], 1)
		require.NoError(t, err)
		var got []float32
		for ; len(values) > 0; values = values[4:] {
			got = append(got, math.Float32frombits(binary.LittleEndian.Uint32(values)))
		}
		require.Equal(t, []float32{0.5, -0.5, 1, 0, 224, 0x1p-7}, got)

		info := found[0].Info()
		info.DType = tensor.F32
		e, err := s.Encoder(t.Context(), found[0].Spec(), info)
		require.NoError(t, err)
		require.Equal(t, []tensor.Info{stored.Infos[0], stored.Infos[1]}, e.Outputs())
	}
	// Blocks are blocks, whatever the scales are called.
	stored := &quanttest.Stored{Data: map[string][]byte{}, Model: tensor.BF16, JSON: []byte(`{"quantization_config": ` +
		`{"quant_method": "fp8", "weight_block_size": [1, 3]}}`)}
	stored.Add(tensor.Info{Name: "a.weight", DType: tensor.F8E4M3, Shape: tensor.Shape{2, 3}}, make([]byte, 6))
	stored.Add(tensor.Info{Name: "a.weight_scale", DType: tensor.F32, Shape: tensor.Shape{1}}, make([]byte, 4))
	_, err := s.Find(t.Context(), stored)
	require.ErrorContains(t, err, "expected [2, 1]")
}
