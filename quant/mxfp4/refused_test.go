package mxfp4_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/mxfp4"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

// TestRefused changes a checkpoint so that it contradicts itself. Without a config.json that has the scheme the same
// tensors are others'.
func TestRefused(t *testing.T) {
	const blocks, scales = "e.gate_up_proj_blocks", "e.gate_up_proj_scales"
	for name, c := range map[string]struct {
		remove string
		add    tensor.Info
		want   string
	}{
		"no scales":      {scales, tensor.Info{}, `"e.gate_up_proj_scales" is missing`},
		"no blocks":      {blocks, tensor.Info{}, `"e.gate_up_proj_blocks" is missing`},
		"empty scales":   {"", tensor.Info{Name: scales, DType: tensor.U8, Shape: tensor.Shape{3, 70, 0}}, "scales"},
		"other scales":   {"", tensor.Info{Name: scales, DType: tensor.U8, Shape: tensor.Shape{3, 6, 70}}, "[3, 6, 70], expected U8 [3, 70, 6]"},
		"scales of I8":   {"", tensor.Info{Name: scales, DType: tensor.I8, Shape: tensor.Shape{3, 70, 6}}, "I8"},
		"other blocks":   {"", tensor.Info{Name: blocks, DType: tensor.U8, Shape: tensor.Shape{3, 70, 6, 17}}, "the last of 16"},
		"three of them":  {"", tensor.Info{Name: blocks, DType: tensor.U8, Shape: tensor.Shape{3, 70, 96}}, "four dimensions"},
		"empty blocks":   {"", tensor.Info{Name: blocks, DType: tensor.U8, Shape: tensor.Shape{0, 70, 6, 16}}, "four dimensions"},
		"blocks of BF16": {"", tensor.Info{Name: blocks, DType: tensor.BF16, Shape: tensor.Shape{3, 70, 6, 16}}, "BF16"},
	} {
		t.Run(name, func(t *testing.T) {
			s := quanttest.Open(t, "../../fixtures/compressed/gpt-oss.safetensors").Clone()
			s.Remove(c.remove)
			if c.add.Name != "" {
				size, err := c.add.Size()
				require.NoError(t, err)
				s.Add(c.add, make([]byte, size))
			}
			_, err := mxfp4.Scheme{}.Find(context.Background(), s)
			require.ErrorIs(t, err, quant.ErrMalformed)
			require.ErrorContains(t, err, `tensor "e.gate_up_proj_`)
			require.ErrorContains(t, err, c.want)
			s.JSON = nil
			found, err := mxfp4.Scheme{}.Find(context.Background(), s)
			require.NoError(t, err)
			require.Empty(t, found)
		})
	}
}

// TestInputs: what a weight is decoded from is some blocks of every row, for each expert that has a part in it.
func TestInputs(t *testing.T) {
	const rows, blocks = 70, 6
	s := &quanttest.Stored{Infos: []tensor.Info{
		{Name: "p_blocks", DType: tensor.U8, Shape: tensor.Shape{3, rows, blocks, 16}},
		{Name: "p_scales", DType: tensor.U8, Shape: tensor.Shape{3, rows, blocks}},
	}}
	found, err := mxfp4.Scheme{}.Find(context.Background(), s)
	require.NoError(t, err)
	require.Len(t, found, 1)
	d := found[0]
	require.Equal(t, tensor.Shape{3, blocks * 32, rows}, d.Info().Shape)
	require.Equal(t, int64(32*rows), d.Unit())
	const codes = rows * blocks * 16
	require.Equal(t, []quant.Range{
		{Part: 0, Offset: 4 * 16, Length: 2 * 16, Stride: blocks * 16, Count: rows},
		{Part: 1, Offset: 4, Length: 2, Stride: blocks, Count: rows},
		{Part: 0, Offset: codes, Length: blocks * 16, Stride: blocks * 16, Count: rows},
		{Part: 1, Offset: codes / 16, Length: blocks, Stride: blocks, Count: rows},
		{Part: 0, Offset: 2 * codes, Length: 16, Stride: blocks * 16, Count: rows},
		{Part: 1, Offset: 2 * codes / 16, Length: 1, Stride: blocks, Count: rows},
	}, d.Inputs(nil, 4*d.Unit(), 13*d.Unit()))
	require.Empty(t, d.Inputs(nil, d.Unit(), d.Unit()))
}

// TestReadOnly refuses to write.
func TestReadOnly(t *testing.T) {
	s := mxfp4.Scheme{}
	spec, err := s.Spec("mxfp4-blocks", nil)
	require.NoError(t, err)
	info := tensor.Info{Name: "p", DType: tensor.BF16, Shape: tensor.Shape{2, 32, 8}}
	_, err = s.Encoder(context.Background(), spec, info)
	require.ErrorIs(t, err, quant.ErrUnsupported)
	_, err = s.Spec("mxfp4", nil)
	require.ErrorIs(t, err, quant.ErrUnknown)
}
