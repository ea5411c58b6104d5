package modelopt_test

import (
	"context"
	"encoding/binary"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/modelopt"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

// TestRefused changes checkpoints so that they contradict themselves.
func TestRefused(t *testing.T) {
	const nvfp4, fp8 = "modelopt-nvfp4", "modelopt-fp8"
	remove, shaped := quanttest.Removed, quanttest.Shaped
	second := func(v float32) func(*quanttest.Stored) {
		return func(s *quanttest.Stored) {
			s.Data["a.weight_scale_2"] = binary.LittleEndian.AppendUint32(nil, math.Float32bits(v))
		}
	}
	for _, c := range []struct {
		name, file string
		change     func(*quanttest.Stored)
		want       string
	}{
		{"no scale", nvfp4, remove("a.weight_scale"), `"a.weight_scale" is missing`},
		{"no second", nvfp4, remove("a.weight_scale_2"), `"a.weight_scale_2" is missing`},
		{"no codes", nvfp4, remove("a.weight"), `"a.weight" is missing`},
		{"zero", nvfp4, second(0), "weight_scale_2\" is 0"},
		{"no number", nvfp4, second(float32(math.NaN())), "is NaN"},
		{"infinite", nvfp4, second(float32(math.Inf(1))), "is +Inf"},
		{"several second", nvfp4, shaped("a.weight_scale_2", tensor.F32, 2), "F32 [2]"},
		{"fewer scales", nvfp4, shaped("a.weight_scale", tensor.F8E4M3, 16, 3), "[16, 3], expected F8_E4M3 [16, 4]"},
		{"scales of F32", nvfp4, shaped("a.weight_scale", tensor.F32, 16, 4), "F32"},
		{"no groups", nvfp4, shaped("a.weight", tensor.U8, 16, 33), "multiple of 16"},
		{"no matrix", nvfp4, shaped("a.weight", tensor.U8, 16), "two dimensions"},
		{"no rows", nvfp4, shaped("a.weight", tensor.U8, 0, 32), "not empty"},
		{"another algorithm", nvfp4, shaped("a.pre_quant_scale", tensor.F32, 64), "pre_quant_scale"},
		{"a part in full precision", nvfp4, shaped("a.svdquant_lora_a", tensor.BF16, 4, 64), "svdquant_lora_a"},
		{"signed codes", nvfp4, shaped("a.weight", tensor.I8, 16, 32), `it is I8 beside "a.weight_scale"`},
		{"plain beside a scale", fp8, shaped("b.weight", tensor.BF16, 16, 32), `it is BF16 beside "b.weight_scale"`},
		{"no scale of floats", fp8, remove("b.weight_scale"), `"b.weight_scale" is missing`},
		{"scales of blocks", fp8, shaped("b.weight_scale", tensor.F32, 4, 4), "[4, 4]"},
		{"two scales", fp8, shaped("b.weight_scale_2", tensor.F32), "expected U8"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := "../../fixtures/compressed/" + c.file + ".safetensors"
			quanttest.Refused(t, modelopt.Scheme{}, path, c.change, `tensor "`, c.want)
		})
	}
}

// TestUndeclared reads checkpoints whose config.json says nothing, as older ones have a file of their own for that, but
// none of another scheme.
func TestUndeclared(t *testing.T) {
	for name, n := range map[string]int{"modelopt-nvfp4": 2, "modelopt-fp8": 2} {
		s := quanttest.Open(t, "../../fixtures/compressed/"+name+".safetensors").Clone()
		for config, want := range map[string]int{"": n, "{}": n, `{"quantization_config": {"quant_method": "fp8"}}`: 0} {
			s.JSON = []byte(config)
			found, err := modelopt.Scheme{}.Find(context.Background(), s)
			require.NoError(t, err)
			require.Len(t, found, want, config)
		}
	}
}

// TestMembers refuses members that are of another kind, by their names.
func TestMembers(t *testing.T) {
	for _, wrong := range []string{`"quant_algo": 4`, `"ignore": "lm_head"`} {
		s := quanttest.Open(t, "../../fixtures/compressed/modelopt-nvfp4.safetensors").Clone()
		s.JSON = []byte(`{"quantization_config": {"quant_method": "modelopt", ` + wrong + `}}`)
		_, err := modelopt.Scheme{}.Find(context.Background(), s)
		require.ErrorIs(t, err, quant.ErrMalformed)
		require.ErrorContains(t, err, strings.Split(wrong, `"`)[1])
		_, ours := modelopt.Scheme{}.Declaration(quant.Quantization(s.JSON))
		require.True(t, ours)
	}
}

func TestDeclaration(t *testing.T) {
	s := modelopt.Scheme{}
	d, ok := s.Declaration([]byte(`{"quant_method": "modelopt", "ignore": ["lm_head", "model.layers.0*", "*.gate*x"]}`))
	require.True(t, ok)
	for module, skipped := range map[string]bool{
		"lm_head": true, "a.lm_head": false, "model.layers.0.q": true, "model.layers.1.q": false, "a.gate_x": true,
		"a.gate": false,
	} {
		require.Equal(t, skipped, d.Skips(module), module)
	}
	_, ok = s.Declaration([]byte(`{"quant_method": "fp8"}`))
	require.False(t, ok)
	_, err := s.Encoder(context.Background(), quant.Spec{Type: "modelopt-fp8"}, tensor.Info{})
	require.ErrorIs(t, err, quant.ErrUnsupported)
}

// TestLongRows refuses rows that cannot be decoded at once.
func TestLongRows(t *testing.T) {
	s := &quanttest.Stored{Infos: []tensor.Info{
		{Name: "m.weight", DType: tensor.F8E4M3, Shape: tensor.Shape{1, 1<<20 + 128}},
		{Name: "m.weight_scale", DType: tensor.F32, Shape: tensor.Shape{}},
	}}
	s.JSON = []byte(`{"quantization_config": {"quant_method": "modelopt"}}`)
	_, err := modelopt.Scheme{}.Find(context.Background(), s)
	require.ErrorIs(t, err, quant.ErrMalformed)
	require.ErrorContains(t, err, `tensor "m.weight"`)
	require.ErrorContains(t, err, "its rows have 1048704 elements, expected at most 1048576")
}
