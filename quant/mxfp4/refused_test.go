package mxfp4_test

import (
	"bytes"
	"context"
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/internal/minifloat"
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

// TestBands holds the units of large experts to whole parts of them.
func TestBands(t *testing.T) {
	for _, c := range [][3]int64{{5760, 90, 10}, {2880, 90, 18}, {70, 6, 6}, {1 << 22, 7, 1}, {64, 97, 97}} {
		s := &quanttest.Stored{Infos: []tensor.Info{
			{Name: "p_blocks", DType: tensor.U8, Shape: tensor.Shape{2, c[0], c[1], 16}},
			{Name: "p_scales", DType: tensor.U8, Shape: tensor.Shape{2, c[0], c[1]}},
		}}
		found, err := mxfp4.Scheme{}.Find(context.Background(), s)
		require.NoError(t, err)
		require.Len(t, found, 1)
		require.Equal(t, tensor.Shape{2, c[1] * 32, c[0]}, found[0].Info().Shape)
		require.Equal(t, c[2]*32*c[0], found[0].Unit())
	}
}

// TestApart reads experts that are too large to be read at once.
func TestApart(t *testing.T) {
	const rows, blocks = 1 << 20, 2
	s := &quanttest.Stored{Data: map[string][]byte{}}
	for name, shape := range map[string]tensor.Shape{"p_blocks": {1, rows, blocks, 16}, "p_scales": {1, rows, blocks}} {
		info := tensor.Info{Name: name, DType: tensor.U8, Shape: shape}
		s.Add(info, bytes.Repeat([]byte{127}, int(info.Count())))
	}
	for i := range s.Data["p_blocks"] {
		s.Data["p_blocks"][i] = byte(i>>5) | byte(i>>4)<<7 // the row and the block
	}
	found, err := mxfp4.Scheme{}.Find(context.Background(), s)
	require.NoError(t, err)
	d := found[0]
	require.Len(t, d.Inputs(nil, 0, d.Unit()), 2*rows)
	values, err := quanttest.Decode(s, d, 1)
	require.NoError(t, err)
	for _, at := range []struct{ row, element int }{{0, 0}, {5, 1}, {77, 33}, {rows - 1, 63}, {4242, 32}} {
		code := s.Data["p_blocks"][at.row*32+at.element/2]
		if at.element%2 == 1 {
			code >>= 4
		}
		i := 2 * (at.element*rows + at.row)
		got := math.Float32frombits(uint32(values[i])<<16 | uint32(values[i+1])<<24)
		require.Equal(t, minifloat.E2M1[code&15], got, at)
	}
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
