package formats_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

func TestLayOutStreams(t *testing.T) {
	infos := []tensor.Info{
		{Name: "a", DType: tensor.F32, Shape: tensor.Shape{10}},
		{Name: "b", DType: tensor.U8, Shape: tensor.Shape{0}},
		{Name: "c", DType: tensor.BF16, Shape: tensor.Shape{7}},
		{Name: "d", DType: tensor.U8, Shape: tensor.Shape{100}},
		{Name: "e", DType: tensor.U8, Shape: tensor.Shape{3}},
	}
	naming := formats.Naming{Stem: "model", Extension: ".weights.h5"}
	l, err := formats.LayOutStreams(infos, formats.Options{MaxShardSize: 60}, naming)
	require.NoError(t, err)
	// As huggingface_hub splits them: what is too large stands before the shard that was being filled.
	assert.Equal(t, []formats.Shard{
		{Name: "model-00001-of-00002.weights.h5", Size: formats.UnknownSize, Tensors: []int{3}, Offsets: []int64{0}},
		{Name: "model-00002-of-00002.weights.h5", Size: formats.UnknownSize, Tensors: []int{0, 1, 2, 4},
			Offsets: []int64{0, 40, 40, 54}},
	}, l.Shards)
	require.Len(t, l.Extra, 1)
	assert.Equal(t, "model.weights.h5.index.json", l.Extra[0].Name)
	assert.Contains(t, string(l.Extra[0].Data), `"total_size": 157`)
	assert.Contains(t, string(l.Extra[0].Data), `"d": "model-00001-of-00002.weights.h5"`)

	l, err = formats.LayOutStreams(infos, formats.Options{MaxShardSize: 60, SingleFile: "x.h5"}, naming)
	require.NoError(t, err)
	require.Len(t, l.Shards, 1)
	assert.Equal(t, "x.h5", l.Shards[0].Name)
	assert.Equal(t, []int64{0, 40, 40, 54, 154}, l.Shards[0].Offsets)
	assert.Empty(t, l.Extra)

	_, err = formats.LayOutStreams(infos, formats.Options{Files: []formats.File{{Name: "config.json"}}}, naming)
	assert.ErrorIs(t, err, formats.ErrUnsupported)
	assert.ErrorContains(t, err, `"config.json": found a file to be put into the weights' own`)
	_, err = formats.LayOutStreams(append(infos, infos[0]), formats.Options{}, naming)
	assert.ErrorContains(t, err, `tensor "a": found it twice`)
}

// own is a format that knows the names of its own files.
type own struct{ named }

func (own) IsWeights(name string) bool { return name == "weights.own" }

func TestWeightsOfAFormat(t *testing.T) {
	r := new(formats.Registry)
	require.NoError(t, r.Register(own{named{name: "own"}}))
	require.NoError(t, r.Register(named{name: "other"}))
	for name, want := range map[string]bool{"weights.own": true, "model.safetensors": true, "notes.own": false,
		"tokenizer.json": false} {
		assert.Equal(t, want, r.IsWeights(name), name)
	}
	assert.False(t, formats.IsWeights("weights.own"))
}
