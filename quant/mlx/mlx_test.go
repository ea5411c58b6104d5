package mlx_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/mlx"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

// stored is a tensor with its data.
type stored struct {
	tensor.Info
	data []byte
}

// memory is a checkpoint in memory.
type memory struct{ quanttest.Stored }

func newMemory(dtype tensor.DType, config string) *memory {
	return &memory{quanttest.Stored{Data: map[string][]byte{}, Model: dtype, JSON: []byte(config)}}
}

func (m *memory) put(name string, d tensor.DType, shape tensor.Shape, data []byte) {
	m.Add(tensor.Info{Name: name, DType: d, Shape: shape}, data)
}

// only is the one weight of m.
func (m *memory) only(t testing.TB) quant.Decoder {
	t.Helper()
	found, err := mlx.Scheme{}.Find(context.Background(), m)
	require.NoError(t, err)
	require.Len(t, found, 1)
	return found[0]
}

// encode quantises src in tiles of the given number of units.
func encode(s quant.Spec, info tensor.Info, src []byte, units int64) (*memory, error) {
	e, err := mlx.Scheme{}.Encoder(context.Background(), s, info)
	if err != nil {
		return nil, err
	}
	key, object, err := mlx.Scheme{}.Config([]quant.Assigned{{Name: info.Name, Spec: s}}, nil)
	if err != nil {
		return nil, err
	}
	out, err := quanttest.Encode([]quanttest.Weight{{Encoder: e, Info: info, Data: src}}, units)
	if err != nil {
		return nil, err
	}
	out.Model, out.JSON = info.DType, fmt.Appendf(nil, "{%q: %s}", key, object)
	return &memory{*out}, nil
}

// decode reads a weight in tiles of the given number of units.
func decode(t testing.TB, m *memory, d quant.Decoder, units int64) []byte {
	t.Helper()
	out, err := quanttest.Decode(m, d, units)
	require.NoError(t, err)
	return out
}

// ramp is a weight of numbers in a row.
func ramp(d tensor.DType, shape tensor.Shape) (tensor.Info, []byte) {
	info := tensor.Info{Name: "m.weight", DType: d, Shape: shape}
	x := make([]float32, info.Count())
	for i := range x {
		x[i] = float32(i%97)/16 - 2
	}
	b := make([]byte, info.Count()*d.Bits()/8)
	if err := tensor.FromFloats(b, d, x); err != nil {
		panic(err)
	}
	return info, b
}

func specOf(t testing.TB, typ string, group int64) quant.Spec {
	s, err := mlx.Scheme{}.Spec(typ, quant.Params{{Name: "block_size", Value: group}})
	require.NoError(t, err)
	return s
}

func TestSpec(t *testing.T) {
	var s mlx.Scheme
	for want, asked := range map[string]quant.Params{
		"mlx4, block 64": nil, "mlx4, block 128": {{Name: "block_size", Value: int64(128)}},
		"mlx8, block 32":  {{Name: "block_size", Value: int64(32)}, {Name: "double_quant", Value: true}},
		"mlx-mxfp4":       {{Name: "block_size", Value: int64(64)}},
		"mlx-nvfp4":       nil,
		"mlx1, block 128": {{Name: "block_size", Value: int64(128)}},
	} {
		typ, _, _ := strings.Cut(want, ",")
		got, err := s.Spec(typ, asked)
		require.NoError(t, err)
		assert.Equal(t, want, got.String())
	}
	for _, group := range []int64{0, -64, 16, 48, 256} {
		_, err := s.Spec("mlx4", quant.Params{{Name: "block_size", Value: group}})
		require.ErrorIs(t, err, quant.ErrParameter)
	}
	_, err := s.Spec("mlx7", nil)
	require.ErrorIs(t, err, quant.ErrUnknown)
	registered, err := quant.ForType("mlx-mxfp8")
	require.NoError(t, err)
	assert.Equal(t, s, registered)
}

// TestRefusedWeights: what the scheme has no place for.
func TestRefusedWeights(t *testing.T) {
	for _, c := range []struct {
		typ, want string
		info      tensor.Info
	}{
		{"mlx4", "expected rows of a multiple of 64",
			tensor.Info{Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{2, 96}}},
		{"mlx-nvfp4", "expected rows of a multiple of 16",
			tensor.Info{Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{2, 8}}},
		{"mlx4", "expected two dimensions", tensor.Info{Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{64}}},
		{"mlx4", "expected two dimensions", tensor.Info{Name: "m.weight", DType: tensor.F32}},
		{"mlx4", "it is empty", tensor.Info{Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{0, 64}}},
		{"mlx4", "its dtype is F64", tensor.Info{Name: "m.weight", DType: tensor.F64, Shape: tensor.Shape{2, 64}}},
		{"mlx4", "does not end in .weight", tensor.Info{Name: "m", DType: tensor.F32, Shape: tensor.Shape{2, 64}}},
		{"mlx1", "read only", tensor.Info{Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{2, 64}}},
	} {
		_, err := mlx.Scheme{}.Encoder(t.Context(), quant.Spec{Type: c.typ}, c.info)
		assert.ErrorIs(t, err, quant.ErrUnsupported, c.want)
		assert.ErrorContains(t, err, c.want)
	}
	_, err := mlx.Scheme{}.Encoder(t.Context(), quant.Spec{Type: "nf4"}, tensor.Info{})
	assert.ErrorIs(t, err, quant.ErrUnknown)
}

func TestNonFinite(t *testing.T) {
	nan, inf := float32(math.NaN()), float32(math.Inf(-1))
	for _, c := range []struct {
		typ, want string
		dtype     tensor.DType
		value     float32
	}{
		{"mlx4", "NaN or infinity at element 9000", tensor.F32, nan},
		{"mlx8", "NaN or infinity at element 9000", tensor.BF16, inf},
		{"mlx-mxfp4", "NaN or infinity at element 9000", tensor.F16, inf},
		{"mlx-nvfp4", "NaN or infinity at element 9000", tensor.F32, nan},
		{"mlx4", "a group whose scale F32 cannot hold, as its values are too far apart, at element 8960", tensor.F32, -3e38},
	} {
		info, src := ramp(c.dtype, tensor.Shape{40, 256})
		one := make([]byte, c.dtype.Bits()/8)
		require.NoError(t, tensor.FromFloats(one, c.dtype, []float32{c.value}))
		copy(src[9000*len(one):], one)
		if c.value == -3e38 {
			binary.LittleEndian.PutUint32(src[4*9001:], math.Float32bits(3e38))
		}
		s := specOf(t, c.typ, 64)
		for _, units := range []int64{1, 4, 1 << 20} {
			_, err := encode(s, info, src, units)
			refused := (*quant.NonFiniteError)(nil)
			require.ErrorAs(t, err, &refused, c.want)
			assert.ErrorContains(t, err, c.want)
		}
		s.AllowNonFinite = true
		a, err := encode(s, info, src, 1)
		require.NoError(t, err)
		b, err := encode(s, info, src, 1<<20)
		require.NoError(t, err)
		assert.Equal(t, a, b)
	}
}

// valid is a weight of two rows in 4 bits with groups of 32, and a norm beside it.
func valid(t testing.TB) *memory {
	info, src := ramp(tensor.BF16, tensor.Shape{2, 64})
	m, err := encode(specOf(t, "mlx4", 32), info, src, 1)
	require.NoError(t, err)
	m.put("norm.weight", tensor.BF16, tensor.Shape{64}, make([]byte, 128))
	return m
}

// TestContradictions damages a weight, and what config.json says of it, in every way.
func TestContradictions(t *testing.T) {
	own := func(members string) func(*memory) {
		return func(m *memory) { m.JSON = []byte(`{"quantization": {` + members + `}}`) }
	}
	resized := func(name string, d tensor.DType, shape ...int64) func(*memory) {
		return func(m *memory) { m.put(name, d, shape, nil) }
	}
	const four = `"group_size": 32, "bits": 4`
	for want, damage := range map[string]func(*memory){
		`"m.scales" is missing`: func(m *memory) { m.Remove("m.scales") },
		`"m.biases" is missing`: func(m *memory) { m.Remove("m.biases") },
		`"m.weight" is missing`: func(m *memory) { m.Remove("m.weight") },
		`"m.scales" is BF16 [2, 1], expected BF16 [2, 2] for words [2, 8]`:           resized("m.scales", tensor.BF16, 2, 1),
		`"m.biases" is F16 [2, 2], expected BF16 [2, 2]`:                             resized("m.biases", tensor.F16, 2, 2),
		`"m.biases" is BF16 [4], expected BF16 [2, 2]`:                               resized("m.biases", tensor.BF16, 4),
		`"m.scales" is U8, expected F32, F16 or BF16`:                                resized("m.scales", tensor.U8, 2, 2),
		`found F32 [2, 64], expected U32 for mode affine`:                            resized("m.weight", tensor.F32, 2, 64),
		`its shape is [2, 7], expected rows of whole groups by mode affine, bits 4`:  resized("m.weight", tensor.U32, 2, 7),
		`its shape is [16], expected two dimensions`:                                 resized("m.weight", tensor.U32, 16),
		`its shape is [0, 8], expected at least one row`:                             resized("m.weight", tensor.U32, 0, 8),
		`its shape is [2, 0], expected rows of whole groups`:                         resized("m.weight", tensor.U32, 2, 0),
		`its shape is [2, 4611686018427387904], expected`:                            resized("m.weight", tensor.U32, 2, 1<<62),
		`shape [4611686018427387904, 64]: size overflows`:                            resized("m.weight", tensor.U32, 1<<62, 8),
		`is BF16 [2, 2], expected BF16 [2, 1]`:                                       own(`"group_size": 64, "bits": 4`),
		`is BF16 [2, 2], expected BF16 [2, 1] for words [2, 8] by mode affine, bits`: own(`"group_size": 32, "bits": 8`),
		`has mode "affine", bits 7, group_size 32, expected bits 1, 2, 3, 4, 5, 6 or 8 and group_size 32, 64 or 128`: own(
			`"group_size": 32, "bits": 7`),
		`has mode "affine", bits 0, group_size 32, expected`:  own(`"group_size": 32, "bits": 0`),
		`has mode "affine", bits 4, group_size 48, expected`:  own(`"group_size": 48, "bits": 4`),
		`has mode "affine", bits 4, group_size -32, expected`: own(`"group_size": -32, "bits": 4`),
		`has mode "mxfp4", bits 4, group_size 64, expected bits 4 and group_size 32`: own(
			`"group_size": 64, "bits": 4, "mode": "mxfp4"`),
		`"m.scales" is BF16 [2, 2], expected U8 [2, 2] for words [2, 8] by mode mxfp4`: own(four + `, "mode": "mxfp4"`),
		`as the quantization of config.json has false for the module`:                  own(four + `, "m": false`),
		`has "4" for the module, expected false or an object`:                          own(four + `, "m": 4`),
		`has "{\"bits\":\"4\"}" for the module`:                                        own(four + `, "m": {"bits": "4"}`),
		`has mode "fp3", expected affine, mxfp4, mxfp8 or nvfp4`:                       own(four + `, "m": {"mode": "fp3"}`),
		`expected BF16 [2, 1]`:                    own(four + `, "m": {}`), // 64 by default
		`has mode "nvfp4", bits 8, group_size 16`: own(four + `, "m": {"mode": "nvfp4", "bits": 8}`),
		`"m.biases" is there, expected none`: func(m *memory) {
			own(four + `, "mode": "mxfp4"`)(m)
			m.put("m.scales", tensor.U8, tensor.Shape{2, 2}, nil)
		},
		`"m.weight" is missing beside it`: func(m *memory) {
			own(four + `, "mode": "mxfp4"`)(m)
			m.put("m.scales", tensor.U8, tensor.Shape{2, 2}, nil)
			m.Remove("m.weight")
			m.Remove("m.biases")
		},
		`"m.global_scale" is there`: resized("m.global_scale", tensor.F32, 2),
		`its quantization has mode "affine", bits 4, group_size 32, and its quantization_config mode "affine", bits 8`: func(
			m *memory) {
			m.JSON = []byte(`{"quantization": {` + four + `}, "quantization_config": {"group_size": 32, "bits": 8}}`)
		},
		`module "m" has not the same in its quantization`: func(m *memory) {
			m.JSON = []byte(`{"quantization": {` + four + `}, "quantization_config": {` + four + `, "m": {"bits": 4, "group_size": 32}}}`)
		},
	} {
		m := valid(t)
		damage(m)
		_, err := mlx.Scheme{}.Find(t.Context(), m)
		require.ErrorIs(t, err, quant.ErrMalformed, want)
		assert.ErrorContains(t, err, want)
		assert.NotContains(t, err.Error(), "\n", want)
		if !strings.Contains(want, "its quantization") {
			assert.Contains(t, err.Error(), `tensor "m.`, want)
		}
	}
	m := valid(t)
	own(four + `, "norm": {"bits": 4}`)(m)
	_, err := mlx.Scheme{}.Find(t.Context(), m)
	assert.ErrorContains(t, err, `tensor "norm.weight": malformed quantised weight: found BF16 [64], expected U32`)
}

// TestReads says what is no contradiction.
func TestReads(t *testing.T) {
	const four = `"group_size": 32, "bits": 4`
	for config, want := range map[string]string{
		`{"quantization": {` + four + `}}`:                                                          "mlx4, block 32",
		`{"quantization_config": {` + four + `, "mode": "affine"}}`:                                 "mlx4, block 32",
		`{"quantization": {` + four + `}, "quantization_config": {` + four + `, "mode": "affine"}}`: "mlx4, block 32",
		`{"quantization": {` + four + `, "m": true, "other": {"bits": 7}, "note": "x"}}`:            "mlx4, block 32",
		`{"quantization": {"group_size": 64, "bits": 8, "m": {"group_size": 32}}}`:                  "mlx4, block 32",
		`{"quantization": {` + four + `, "m": {"bits":4, "group_size": 32}},
			"quantization_config": {"m": {"group_size": 32, "bits": 4}, ` + four + `}}`: "mlx4, block 32",
		// mlx-lm looks at its own first.
		`{"quantization": {` + four + `}, "quantization_config": {"quant_method": "fp8"}}`: "mlx4, block 32",
		// No config of MLX, or one of a mode that is not known: the tensors stand for themselves.
		``: "", `{}`: "", `{"quantization": 4, "quantization_config": null}`: "", `[`: "",
		`{"quantization_config": {` + four + `, "quant_method": "gptq"}}`: "",
		`{"quantization_config": {` + four + `, "desc_act": false}}`:      "",
		`{"quantization": {` + four + `, "mode": "fp3"}}`:                 "",
		`{"quantization": {"group_size": 32, "bits": "4"}}`:               "",
		`{"quantization": {"group_size": 32}}`:                            "",
	} {
		m := valid(t)
		m.JSON = []byte(config)
		found, err := mlx.Scheme{}.Find(t.Context(), m)
		require.NoError(t, err, config)
		if want == "" {
			assert.Empty(t, found, config)
			continue
		}
		require.Len(t, found, 1, config)
		assert.Equal(t, want, found[0].Spec().String(), config)
	}
}

// TestCompanionsAlone says that names that look like companions are tensors of their own where there is no quantised
// weight.
func TestCompanionsAlone(t *testing.T) {
	m := newMemory(0, `{"quantization": {"group_size": 32, "bits": 4}}`)
	for _, n := range []string{"a.scales", "b.biases", "weight", "scales", "c.bias", "c.weight"} {
		m.put(n, tensor.F32, tensor.Shape{1}, make([]byte, 4))
	}
	for _, config := range []string{string(m.JSON), `{"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}`} {
		m.JSON = []byte(config)
		found, err := mlx.Scheme{}.Find(t.Context(), m)
		require.NoError(t, err)
		assert.Empty(t, found)
	}
}

// TestConfig: what is written is read, for one layout and for several.
func TestConfig(t *testing.T) {
	var s mlx.Scheme
	key, object, err := s.Config([]quant.Assigned{
		{Name: "a.weight", Spec: specOf(t, "mlx8", 64)}, {Name: "b.weight", Spec: specOf(t, "mlx4", 32)},
		{Name: `"c.weight`, Spec: specOf(t, "mlx-nvfp4", 0)}, {Name: "d.weight", Spec: specOf(t, "mlx4", 32)},
	}, []string{"lm_head"})
	require.NoError(t, err)
	assert.Equal(t, "quantization", key)
	assert.Equal(t, `{"group_size": 32, "bits": 4, "mode": "affine", `+
		`"a": {"group_size": 64, "bits": 8, "mode": "affine"}, `+
		`"\"c": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}`, string(object))
	d, ok := s.Declaration(object)
	assert.True(t, ok)
	assert.True(t, d.Unsaid)
	for _, c := range []string{`{"quant_method": "bitsandbytes"}`, `{}`, `4`, `{"bits": 4, "group_size": 64, "mode": "fp3"}`,
		`{"bits": 4, "group_size": 64, "quant_method": "gptq"}`} {
		_, ok := s.Declaration([]byte(c))
		assert.False(t, ok, c)
	}
	_, _, err = s.Config(nil, nil)
	require.ErrorIs(t, err, quant.ErrUnsupported)
	_, _, err = s.Config([]quant.Assigned{{Name: "a.weight", Spec: quant.Spec{Type: "nf4"}}}, nil)
	require.ErrorIs(t, err, quant.ErrUnknown)
}

// FuzzFind reads whatever a config and shapes may be: no panic, and what is accepted can be decoded within its parts.
func FuzzFind(f *testing.F) {
	for _, c := range []string{
		string(valid(f).JSON), `{"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"bits": 3}}`,
		`{"quantization": {"group_size": 32, "bits": 4, "m": {"mode": "nvfp4"}}}`, `{"quantization": [[`, ``,
		`{"quantization_config": {"group_size": 32, "bits": 8, "mode": "mxfp8", "m": false}}`,
	} {
		f.Add(c, int64(2), int64(8), int64(2), uint8(0), uint8(3))
		f.Add(c, int64(1)<<61, int64(1)<<40, int64(-1), uint8(200), uint8(1))
		f.Add(c, int64(3), int64(16), int64(2), uint8(1), uint8(9))
	}
	dtypes := []tensor.DType{tensor.BF16, tensor.F16, tensor.F32, tensor.U8, tensor.U32, tensor.I8}
	f.Fuzz(func(t *testing.T, config string, rows, words, groups int64, scale, word uint8) {
		m := newMemory(0, config)
		for _, x := range []stored{
			{Info: tensor.Info{Name: "m.weight", DType: tensor.U32, Shape: tensor.Shape{rows, words}}},
			{Info: tensor.Info{Name: "m.scales", DType: dtypes[int(scale)%len(dtypes)], Shape: tensor.Shape{rows, groups}}},
			{Info: tensor.Info{Name: "m.biases", DType: dtypes[int(scale)%len(dtypes)], Shape: tensor.Shape{rows, groups}}},
		} {
			if x.Name == "m.biases" && word&1 == 0 {
				continue
			}
			size, err := x.Size()
			if err != nil {
				return // no file has it
			}
			var data []byte
			if size < 1<<16 {
				data = slices.Repeat([]byte{word}, int(size))
			}
			m.put(x.Name, x.DType, x.Shape, data)
		}
		found, err := mlx.Scheme{}.Find(t.Context(), m)
		if err != nil {
			if !errors.Is(err, quant.ErrMalformed) || strings.Contains(err.Error(), "\n") {
				t.Fatal(err)
			}
			return
		}
		for _, d := range found {
			if _, err := d.Info().Size(); err != nil {
				t.Fatal(err)
			}
			if d.Info().Count() < 1<<14 {
				decode(t, m, d, 3)
			}
		}
	})
}

func ExampleScheme_Config() {
	s, err := mlx.Scheme{}.Spec("mlx4", nil)
	if err != nil {
		panic(err)
	}
	key, object, err := mlx.Scheme{}.Config([]quant.Assigned{{Name: "model.layers.0.mlp.up_proj.weight", Spec: s}}, nil)
	fmt.Println(key, string(object), err)
	// Output: quantization {"group_size": 64, "bits": 4, "mode": "affine"} <nil>
}
