package compressedtensors_test

import (
	"context"
	"encoding/binary"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/compressedtensors"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

// TestRefused changes golden checkpoints so that they contradict themselves.
func TestRefused(t *testing.T) {
	replace, remove, shaped := quanttest.Replaced, quanttest.Removed, quanttest.Shaped
	global := func(v float32) func(*quanttest.Stored) {
		return func(s *quanttest.Stored) {
			s.Data["a.q_proj.weight_global_scale"] = binary.LittleEndian.AppendUint32(nil, math.Float32bits(v))
		}
	}
	says := func(rows, cols int64) func(*quanttest.Stored) {
		return func(s *quanttest.Stored) {
			b := binary.LittleEndian.AppendUint64(nil, uint64(rows))
			s.Data["a.0.q.weight_shape"] = binary.LittleEndian.AppendUint64(b, uint64(cols))
		}
	}
	const ints, floats, nv = "w4a16-bf16", "fp8-channel-bf16", "nvfp4-bf16"
	const q, p = `"a.0.q.weight_packed"`, `"a.q_proj.weight_packed"`
	for _, c := range []struct {
		name, file string
		change     func(*quanttest.Stored)
		want       []string
	}{
		{"no scale", ints, remove("a.0.q.weight_scale"), []string{q, `"a.0.q.weight_scale" is missing`}},
		{"no shape", ints, remove("a.0.q.weight_shape"), []string{q, `"a.0.q.weight_shape" is missing`}},
		{"no codes", ints, remove("a.0.q.weight_packed"), []string{`"a.0.q.weight_packed" is missing`}},
		{"no zero points", "w4a16-asymmetric", remove("a.0.q.weight_zero_point"),
			[]string{q, `weight_zero_point" is missing`}},
		{"no global scale", nv, remove("a.q_proj.weight_global_scale"), []string{p, `weight_global_scale" is missing`}},
		{"no scale of floats", floats, remove("a.0.q.weight_scale"), []string{`"a.0.q.weight"`, `weight_scale" is missing`}},
		{"scale of zero", nv, global(0), []string{p, "weight_global_scale", "is 0, expected a finite number above 0"}},
		{"scale below zero", nv, global(-1), []string{p, "is -1"}},
		{"scale no number", nv, global(float32(math.NaN())), []string{p, "is NaN"}},
		{"scale infinite", nv, global(float32(math.Inf(1))), []string{p, "is +Inf"}},
		{"shape of fewer rows", ints, says(15, 256), []string{q, "weight_shape", "[15, 256]"}},
		{"shape of more columns", ints, says(16, 257),
			[]string{q, "its rows have 257 elements, expected a multiple of the group size 128"}},
		{"shape contradicts words", ints, says(16, 384),
			[]string{q, "weight_shape", "[16, 384]", "[16, 32]", "expected I32 [16, 48]"}},
		{"shape negative", ints, says(16, -128), []string{q, "weight_shape"}},
		{"shape overflows", ints, says(16, 1<<62), []string{q, "overflow"}},
		{"shape overflows bytes", ints, says(16, math.MaxInt64/128*128), []string{q, "overflow"}},
		{"shape no matrix", ints, shaped("a.0.q.weight_shape", tensor.I64, 3), []string{q, "weight_shape", "I64 [3]"}},
		{"shape of floats", ints, shaped("a.0.q.weight_shape", tensor.F32, 2), []string{q, "F32 [2], expected I64 [2]"}},
		{"scale of bytes", ints, shaped("a.0.q.weight_scale", tensor.U8, 16, 2), []string{q, "weight_scale", "U8"}},
		{"too few scales", ints, shaped("a.0.q.weight_scale", tensor.BF16, 16, 1),
			[]string{q, "weight_scale", "BF16 [16, 1], expected BF16 [16, 2]"}},
		{"scales turned round", ints, shaped("a.0.q.weight_scale", tensor.BF16, 2, 16), []string{q, "[2, 16]"}},
		{"codes of three dimensions", ints, shaped("a.0.q.weight_packed", tensor.I32, 16, 32, 1),
			[]string{q, "two dimensions"}},
		{"no rows", nv, shaped("a.q_proj.weight_packed", tensor.U8, 0, 40), []string{p, "[0, 80]", "not empty"}},
		{"codes of bytes", ints, shaped("a.0.q.weight_packed", tensor.U8, 16, 32),
			[]string{q, "U8 [16, 32], expected I32 [16, 32]"}},
		{"short zero points", "w3a16-asymmetric", shaped("a.0.q.weight_zero_point", tensor.I32, 3, 4),
			[]string{q, "weight_zero_point", "[3, 4], expected I32 [4, 4]"}},
		{"zero points of symmetric groups", "w3a16-asymmetric", replace(`"symmetric": false`, `"symmetric": true`),
			[]string{q, `"a.0.q.weight_zero_point" is there`, "symmetric"}},
		{"zero points of floats", floats, shaped("a.0.q.weight_zero_point", tensor.I8, 16, 1),
			[]string{`"a.0.q.weight"`, `"a.0.q.weight_zero_point" is there`}},
		{"order of activations", ints, shaped("a.0.q.weight_g_idx", tensor.I32, 256),
			[]string{q, "weight_g_idx", "not read"}},
		{"actorder group", ints, replace(`"num_bits"`, `"actorder": "group", "num_bits"`), []string{q, "actorder group"}},
		{"actorder true", ints, replace(`"num_bits"`, `"actorder": true, "num_bits"`), []string{q, "actorder true"}},
		{"plain codes beside a scale", floats, shaped("a.0.q.weight", tensor.BF16, 16, 72),
			[]string{`"a.0.q.weight"`, "BF16", "expected F8_E4M3"}},
		{"floats of another kind", floats, shaped("a.0.q.weight", tensor.F8E4M3FNUZ, 16, 72),
			[]string{`"a.0.q.weight"`, "F8_E4M3FNUZ"}},
		{"0 bits", ints, replace(`"num_bits": 4`, `"num_bits": 0`), []string{q, "num_bits 0, expected 1 to 8"}},
		{"9 bits", ints, replace(`"num_bits": 4`, `"num_bits": 9`), []string{q, "num_bits 9, expected 1 to 8"}},
		{"half a bit", ints, replace(`"num_bits": 4`, `"num_bits": 4.5`), []string{"num_bits"}},
		{"other bits", ints, replace(`"num_bits": 4`, `"num_bits": 5`), []string{q, "expected I32 [16, 40] for 5 bits"}},
		{"groups of none", ints, replace(`"group_size": 128`, `"group_size": 0`), []string{q, "group size 0"}},
		{"groups below none", ints, replace(`"group_size": 128`, `"group_size": -7`), []string{q, "group size -7"}},
		{"groups that do not divide", ints, replace(`"group_size": 128`, `"group_size": 100`),
			[]string{q, "multiple of the group size 100"}},
		{"groups of nvfp4", nv, replace(`"group_size": 16`, `"group_size": 8`),
			[]string{"found the group size 8, expected 16"}},
		{"unknown strategy", ints, replace(`"strategy": "group"`, `"strategy": "token"`),
			[]string{q, `the strategy "token"`}},
		{"unknown type", ints, replace(`"type": "int"`, `"type": "nf"`), []string{q, `the type "nf"`}},
		{"marlin", ints, func(s *quanttest.Stored) {
			s.JSON = []byte(strings.ReplaceAll(string(s.JSON), `"format": "pack-quantized"`, `"format": "marlin-24"`))
		}, []string{q, `"marlin-24"`}},
		{"sparse", ints, replace(`"ignore"`, `"sparsity_config": {"format": "sparse-24-bitmask"}, "ignore"`),
			[]string{`sparsity_config`, "sparse-24-bitmask"}},
		{"a target twice", ints, replace(`["Linear"]`, `["Linear", "Linear"]`),
			[]string{q, `names the target "Linear" twice`}},
		{"a target in two groups", ints, replace(`"config_groups": {`, `"config_groups": {"other": {"targets": ["Linear"], "weights": {"num_bits": 8}}, `),
			[]string{q, `"Linear" twice, in "other" and in "group_0"`}},
		{"no target", ints, replace(`["Linear"]`, `["re:b\\..*"]`), []string{q, "no group with a target"}},
		{"no expression", ints, replace(`["Linear"]`, `["re:("]`), []string{q, `"re:("`}},
		{"no weights", ints, replace(`"weights": {`, `"weights": null, "was": {`), []string{q, "no weights"}},
		{"no groups", ints, replace(`"config_groups": {`, `"config_groups": 7, "was": {`),
			[]string{"config_groups are no object"}},
		{"a block of one number", "fp8-block", replace(`[16, 24]`, `[16]`), []string{`"a.0.q.weight"`, "block_structure"}},
		{"a block of nothing", "fp8-block", replace(`[16, 24]`, `[0, 24]`), []string{`"a.0.q.weight"`, "blocks of 0 x 24"}},
		{"a block of halves", "fp8-block", replace(`[16, 24]`, `[1.5, 24]`), []string{`"a.0.q.weight"`, "block_structure"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := "../../fixtures/compressed/" + c.file + ".safetensors"
			quanttest.Refused(t, compressedtensors.Scheme{}, path, c.change, c.want...)
		})
	}
}

// TestRotated leaves rotated weights alone that are not the model's without a transform at run time, and says so.
func TestRotated(t *testing.T) {
	const apply = `{"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "%s"}]}}}`
	for config, online := range map[string]string{
		"null": "", "{}": "", `{"config_groups": {}}`: "",
		strings.Replace(apply, "%s", "weight_input", 1):  "",
		strings.Replace(apply, "%s", "weight_output", 1): "",
		strings.Replace(apply, "%s", "input", 1):         `at "input"`,
		strings.Replace(apply, "%s", "output", 1):        `at "output"`,
		strings.Replace(apply, "%s", "k_cache", 1):       `at "k_cache"`,
		strings.Replace(apply, "%s", "", 1):              `at ""`,
	} {
		g := quanttest.Open(t, "../../fixtures/compressed/w4a16-bf16.safetensors")
		quanttest.Replaced(`"quant_method"`, `"transform_config": `+config+`, "quant_method"`)(g.Stored)
		require.Contains(t, string(g.JSON), "transform_config")
		found, err := compressedtensors.Scheme{}.Find(context.Background(), g)
		require.NoError(t, err)
		require.Equal(t, online == "", len(found) > 0, config)
		d, ok := compressedtensors.Scheme{}.Declaration(quant.Quantization(g.JSON))
		require.True(t, ok)
		require.Contains(t, d.Unread.Name, online)
		require.Equal(t, online == "", d.Unread == quant.Layout{})
	}
}

// TestGroups finds the group of each module by its name first, then by expressions, then by its class, and writes
// groups of several kinds.
func TestGroups(t *testing.T) {
	s := compressedtensors.Scheme{}
	spec := func(typ string, p ...quant.Param) quant.Spec {
		x, err := s.Spec(typ, p)
		require.NoError(t, err)
		return x
	}
	weights := []quant.Assigned{
		{Name: "model.layers.0.q.weight", Spec: spec("nvfp4")}, {Name: "model.layers.1.q.weight", Spec: spec("nvfp4")},
		{Name: "model.layers.0.up.weight", Spec: spec("fp8-channel")},
		{Name: "model.layers.1.up.weight", Spec: spec("nvfp4")},
		{Name: "model.layers.10.o.weight", Spec: spec("w4a16", quant.Param{Name: "asymmetric", Value: true})},
	}
	key, object, err := s.Config(weights, []string{"lm_head", "model.layers.1.o"})
	require.NoError(t, err)
	require.Equal(t, "quantization_config", key)
	text := string(object)
	for _, want := range []string{
		`"format":"mixed-precision"`, `"ignore":["lm_head","model.layers.1.o"]`,
		`"targets":["re:(?:.*\\.)?layers\\.\\d+\\.q$","model.layers.1.up"]`, `"targets":["model.layers.0.up"]`,
		`"targets":["model.layers.10.o"]`, `"quantization_status":"compressed"`,
	} {
		require.Contains(t, text, want)
	}
	d, ok := s.Declaration(object)
	require.True(t, ok)
	for module, skipped := range map[string]bool{
		"model.layers.7.q": false, "model.text.layers.7.q": false, "players.7.q": true,
		"model.layers.0.up": false, "model.layers.2.up": true, "lm_head": true,
		"model.layers.1.o": true, "model.layers.10.o": false,
	} {
		require.Equal(t, skipped, d.Skips(module), module)
	}
	_, ok = s.Declaration([]byte(`{"quant_method": "gptq"}`))
	require.False(t, ok)

	require.Equal(t, [][]string{{"a.q_proj.weight", "a.v_proj.weight"}, {"e.1.w3.weight", "e.1.w1.weight"}},
		s.Groups(spec("nvfp4"), []string{"a.q_proj.weight", "b.k_proj.weight", "a.v_proj.weight", "a.o_proj.weight",
			"e.1.w3.weight", "e.2.w1.weight", "e.1.w1.weight", "e.1.w2.weight"}))
	require.Nil(t, s.Groups(spec("mxfp4"), []string{"a.q_proj.weight", "a.k_proj.weight"}))
}

// TestUnsupported refuses what cannot be written.
func TestUnsupported(t *testing.T) {
	s := compressedtensors.Scheme{}
	for _, c := range []struct {
		typ, name string
		d         tensor.DType
		shape     tensor.Shape
		want      string
	}{
		{"w4a16", "a.weight", tensor.I8, tensor.Shape{8, 128}, "its dtype is I8"},
		{"w4a16", "a.kernel", tensor.BF16, tensor.Shape{8, 128}, "does not end in .weight"},
		{"w4a16", "a.weight", tensor.BF16, tensor.Shape{8, 100}, "expected a multiple of the group size 128"},
		{"nvfp4", "a.weight", tensor.BF16, tensor.Shape{8, 100}, "expected a multiple of the group size 16"},
		{"mxfp8", "a.weight", tensor.BF16, tensor.Shape{2, 8, 32}, "expected two dimensions"},
		{"fp8-channel", "a.weight", tensor.F16, tensor.Shape{8, 0}, "not empty"},
	} {
		spec, err := s.Spec(c.typ, nil)
		require.NoError(t, err)
		_, err = s.Encoder(context.Background(), spec, tensor.Info{Name: c.name, DType: c.d, Shape: c.shape})
		require.ErrorIs(t, err, quant.ErrUnsupported)
		require.ErrorContains(t, err, c.want)
	}
	for want, p := range map[string]quant.Params{
		`group size 0`:   {{Name: "group_size", Value: int64(0)}},
		`strategy "row"`: {{Name: "scales", Value: "row"}},
		`zero point`:     {{Name: "scales", Value: "tensor"}, {Name: "asymmetric", Value: true}},
		`padded`:         {{Name: "padded", Value: true}},
	} {
		_, err := s.Spec("w4a16", p)
		require.ErrorIs(t, err, quant.ErrParameter)
		require.ErrorContains(t, err, want)
	}
	_, err := s.Spec("w9a16", nil)
	require.ErrorIs(t, err, quant.ErrUnknown)
}

// TestNonFinite refuses a NaN, an infinity and what no power of two can scale, and says where; or writes them.
func TestNonFinite(t *testing.T) {
	s := compressedtensors.Scheme{}
	for _, typ := range []string{"fp8-channel", "fp8-tensor", "fp8-block", "w8a8", "w4a16", "nvfp4", "mxfp4", "mxfp8"} {
		for i, bad := range []float32{float32(math.NaN()), float32(math.Inf(-1)), math.MaxFloat32} {
			if i == 2 && !strings.HasPrefix(typ, "mx") {
				continue
			}
			spec, err := s.Spec(typ, nil)
			require.NoError(t, err)
			info := tensor.Info{Name: "a.weight", DType: tensor.F32, Shape: tensor.Shape{6, 256}}
			values := make([]byte, 4*6*256)
			const at = 3*256 + 32
			binary.LittleEndian.PutUint32(values[4*at:], math.Float32bits(bad))
			e, err := s.Encoder(context.Background(), spec, info)
			require.NoError(t, err)
			_, err = quanttest.Encode([]quanttest.Weight{{Encoder: e, Info: info, Data: values}}, 2)
			var found *quant.NonFiniteError
			require.ErrorAs(t, err, &found, typ)
			require.Equal(t, int64(at), found.Index, typ)
			spec.AllowNonFinite = true
			e, err = s.Encoder(context.Background(), spec, info)
			require.NoError(t, err)
			_, err = quanttest.Encode([]quanttest.Weight{{Encoder: e, Info: info, Data: values}}, 2)
			require.NoError(t, err)
		}
	}
}

// TestLongRows refuses rows that cannot be decoded at once.
func TestLongRows(t *testing.T) {
	s := &quanttest.Stored{Infos: []tensor.Info{
		{Name: "m.weight", DType: tensor.F8E4M3, Shape: tensor.Shape{1, 1<<20 + 128}},
		{Name: "m.weight_scale", DType: tensor.BF16, Shape: tensor.Shape{1, 1}},
	}}
	s.JSON = []byte(`{"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": {
		"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}}}`)
	_, err := compressedtensors.Scheme{}.Find(context.Background(), s)
	require.ErrorIs(t, err, quant.ErrMalformed)
	require.ErrorContains(t, err, `tensor "m.weight"`)
	require.ErrorContains(t, err, "its rows have 1048704 elements, expected at most 1048576")
}
