package fp8_test

import (
	"context"
	"encoding/binary"
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/fp8"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

// TestRefused changes golden checkpoints so that they contradict themselves.
func TestRefused(t *testing.T) {
	replace, remove, shaped := quanttest.Replaced, quanttest.Removed, quanttest.Shaped
	for _, c := range []struct {
		name, file string
		change     func(*quanttest.Stored)
		want       []string
	}{
		{"no scales", "fp8-bf16", remove("a.weight_scale_inv"), []string{`"a.weight"`, `"a.weight_scale_inv" is missing`}},
		{"no codes", "fp8-bf16", remove("a.weight"), []string{`"a.weight_scale_inv"`, `"a.weight" is missing`}},
		{"fewer scales", "fp8-bf16", shaped("a.weight_scale_inv", tensor.F32, 3, 1), []string{`"a.weight"`, "weight_scale_inv", "[3, 1], expected [3, 2]"}},
		{"scales of the early", "fp8-early", shaped("a.weight_scale_inv", tensor.F32, 1, 3), []string{`"a.weight"`, "expected [2, 4]"}},
		{"scales of integers", "fp8-bf16", shaped("a.weight_scale_inv", tensor.I32, 3, 2), []string{`"a.weight"`, "is I32"}},
		{"plain codes", "fp8-bf16", shaped("a.weight", tensor.BF16, 48, 64), []string{`"a.weight"`, "BF16"}},
		{"codes of another kind", "fp8-bf16", shaped("a.weight", tensor.F8E4M3FNUZ, 48, 64), []string{`"a.weight"`, "F8_E4M3FNUZ"}},
		{"two kinds of scales", "fp8-bf16", shaped("a.scale", tensor.F32, 3, 2), []string{`"a.weight"`, `both "a.weight_scale_inv" and "a.scale"`}},
		{"no matrix", "fp8-bf16", shaped("a.weight", tensor.F8E4M3, 64), []string{`"a.weight"`, "two dimensions"}},
		{"no rows", "fp8-bf16", shaped("a.weight", tensor.F8E4M3, 0, 64), []string{`"a.weight"`, "not empty"}},
		{"block of zero", "fp8-bf16", replace("[16, 32]", "[0, 32]"), []string{"0 x 32"}},
		{"block below zero", "fp8-bf16", replace("[16, 32]", "[-16, 32]"), []string{"-16 x 32"}},
		{"huge block", "fp8-bf16", replace("[16, 32]", "[99999999999, 32]"), []string{"99999999999"}},
		{"one number", "fp8-bf16", replace("[16, 32]", "[16]"), []string{"weight_block_size", "two numbers"}},
		{"words", "fp8-bf16", replace("[16, 32]", `"16x32"`), []string{"weight_block_size"}},
		{"other block", "fp8-bf16", replace("[16, 32]", "[16, 64]"), []string{`"a.weight"`, "expected [3, 1]", "16x64"}},
		{"several scales of one", "fp8-whole", shaped("a.weight_scale_inv", tensor.F32, 20, 1), []string{`"a.weight"`, "expected [1, 1]"}},
		{"another format", "fp8-bf16", replace(`"quant_method"`, `"fmt": "e5m2", "quant_method"`), []string{"e5m2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			quanttest.Refused(t, fp8.Scheme{}, "../../fixtures/compressed/"+c.file+".safetensors", c.change, c.want...)
		})
	}
}

// TestUnsupported refuses what cannot be written, and specs that cannot be.
func TestUnsupported(t *testing.T) {
	s := fp8.Scheme{}
	encoder := func(typ string, p quant.Params, d tensor.DType, shape ...int64) error {
		spec, err := s.Spec(typ, p)
		if err == nil {
			_, err = s.Encoder(context.Background(), spec, tensor.Info{Name: "a", DType: d, Shape: shape})
		}
		return err
	}
	whole := quant.Params{{Name: "block", Value: "tensor"}}
	require.NoError(t, encoder("fp8", nil, tensor.F16, 3, 5, 7))
	require.NoError(t, encoder("fp8", whole, tensor.F16, 5, 7))
	require.ErrorContains(t, encoder("fp8", nil, tensor.I8, 5, 7), "its dtype is I8")
	require.ErrorContains(t, encoder("fp8", nil, tensor.F32, 5), "two dimensions")
	require.ErrorContains(t, encoder("fp8", nil, tensor.F32, 5, 0), "not empty")
	require.ErrorContains(t, encoder("fp8", whole, tensor.F32, 2, 5, 7), "with one scale")
	require.ErrorContains(t, encoder("fp8-e2m1", nil, tensor.F32, 5, 32), "read only")
	for _, p := range []quant.Param{{Name: "block", Value: "0x3"}, {Name: "block", Value: "whole"},
		{Name: "scale", Value: "I8"},
		{Name: "companion", Value: "x"}} {
		require.ErrorIs(t, encoder("fp8", quant.Params{p}, tensor.F32, 5, 7), quant.ErrParameter)
	}
	require.ErrorIs(t, encoder("fp9", nil, tensor.F32, 5, 7), quant.ErrUnknown)
	spec := func(p quant.Params) quant.Spec { x, err := s.Spec("fp8", p); require.NoError(t, err); return x }
	_, _, err := s.Config([]quant.Assigned{{Name: "a", Spec: spec(nil)}, {Name: "b", Spec: spec(whole)}}, nil)
	require.ErrorIs(t, err, quant.ErrUnsupported)
	require.ErrorContains(t, err, `"b"`)
}

// TestEarly writes blocks that end early: no element changes the codes of another block, and a notice tells.
func TestEarly(t *testing.T) {
	s := fp8.Scheme{}
	spec, err := s.Spec("fp8", quant.Params{{Name: "block", Value: "4x8"}})
	require.NoError(t, err)
	info := tensor.Info{Name: "a.weight", DType: tensor.F32, Shape: tensor.Shape{2, 6, 11}}
	values := make([]byte, 4*2*6*11)
	for i := range 2 * 6 * 11 {
		binary.LittleEndian.PutUint32(values[4*i:], math.Float32bits(float32(i%13-6)))
	}
	e, err := s.Encoder(context.Background(), spec, info)
	require.NoError(t, err)
	out, err := quanttest.Encode([]quanttest.Weight{{Encoder: e, Info: info, Data: values}}, 1)
	require.NoError(t, err)
	scales, ok := out.Lookup("a.weight_scale_inv")
	require.True(t, ok)
	require.Equal(t, tensor.Shape{2, 2, 2}, scales.Shape)
	require.Contains(t, e.(interface{ Notices() []string }).Notices()[0], "4x8 does not divide the shape")
	key, object, err := s.Config([]quant.Assigned{{Name: "a.weight", Spec: spec}}, []string{"lm_head"})
	require.NoError(t, err)
	out.JSON = []byte(`{"` + key + `": ` + string(object) + `}`)
	found, err := s.Find(context.Background(), out)
	require.NoError(t, err)
	require.Len(t, found, 1)
	require.Equal(t, info.Shape, found[0].Info().Shape)
	got, err := quanttest.Decode(out, found[0], 1)
	require.NoError(t, err)
	for i := range 2 * 6 * 11 {
		x := math.Float32frombits(binary.LittleEndian.Uint32(got[4*i:]))
		require.InDelta(t, float64(i%13-6), x, 0.26, i)
	}
	d, ok := s.Declaration(object)
	require.True(t, ok)
	require.True(t, d.Skips("lm_head"))
	require.False(t, d.Skips("a"))
}

// TestNonFinite refuses a NaN and an infinity, and says where; or writes them.
func TestNonFinite(t *testing.T) {
	s := fp8.Scheme{}
	for _, block := range []string{"2x16", "tensor"} {
		for _, bad := range []float32{float32(math.NaN()), float32(math.Inf(1))} {
			spec, err := s.Spec("fp8", quant.Params{{Name: "block", Value: block}})
			require.NoError(t, err)
			info := tensor.Info{Name: "a", DType: tensor.F32, Shape: tensor.Shape{5, 40}}
			values := make([]byte, 4*5*40)
			binary.LittleEndian.PutUint32(values[4*133:], math.Float32bits(bad))
			encode := func() error {
				e, err := s.Encoder(context.Background(), spec, info)
				require.NoError(t, err)
				_, err = quanttest.Encode([]quanttest.Weight{{Encoder: e, Info: info, Data: values}}, 2)
				return err
			}
			var found *quant.NonFiniteError
			require.ErrorAs(t, encode(), &found)
			require.Equal(t, int64(133), found.Index)
			spec.AllowNonFinite = true
			require.NoError(t, encode())
		}
	}
}

// TestLongRows refuses rows that cannot be decoded at once.
func TestLongRows(t *testing.T) {
	s := &quanttest.Stored{Infos: []tensor.Info{
		{Name: "m.weight", DType: tensor.F8E4M3, Shape: tensor.Shape{1, 1<<20 + 128}},
		{Name: "m.weight_scale_inv", DType: tensor.F32, Shape: tensor.Shape{1, 1<<13 + 1}},
	}}
	s.JSON = []byte(`{"quantization_config": {"quant_method": "fp8"}}`)
	_, err := fp8.Scheme{}.Find(context.Background(), s)
	require.ErrorIs(t, err, quant.ErrMalformed)
	require.ErrorContains(t, err, `tensor "m.weight"`)
	require.ErrorContains(t, err, "its rows have 1048704 elements, expected at most 1048576")
}
