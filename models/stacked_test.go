package models_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// TestStacked: stacks of mlx-lm are what the experts are that it joins, whatever these are called in a file.
func TestStacked(t *testing.T) {
	for _, c := range []struct{ class, block, up, param string }{
		{"Qwen3MoeForCausalLM", "model.layers.0.mlp", "up_proj", "model.layers.0.mlp.experts.gate_up_proj"},
		{"MixtralForCausalLM", "model.layers.0.block_sparse_moe", "up_proj", "model.layers.0.mlp.experts.gate_up_proj"},
		{"DeepseekV3ForCausalLM", "model.layers.3.mlp", "up_proj", "model.layers.3.mlp.experts.gate_up_proj"},
		{"GraniteMoeForCausalLM", "model.layers.0.block_sparse_moe", "up_proj",
			"model.layers.0.block_sparse_moe.experts.gate_up_proj"},
		{"Lfm2MoeForCausalLM", "model.layers.3.feed_forward", "up_proj", "model.layers.3.feed_forward.experts.gate_up_proj"},
		{"Qwen3VLMoeForConditionalGeneration", "model.language_model.layers.0.mlp", "up_proj",
			"model.language_model.layers.0.mlp.experts.gate_up_proj"},
		{"NemotronHForCausalLM", "backbone.layers.0.mixer", "fc1", ""}, // without a gate
		{"MixtralForCausalLM", "model.layers.0.block_sparse_moe", "fc1", "unknown"},
		{"LlamaForCausalLM", "model.layers.0.mlp", "up_proj", "unknown"},
		{"GptOssForCausalLM", "model.layers.0.mlp", "up_proj", "unknown"}, // whose stacks lie the other way round
	} {
		config, err := models.ParseConfig([]byte(`{"architectures": ["` + c.class + `"], "hidden_size": 64}`))
		require.NoError(t, err)
		m, known := models.Load(config)
		require.True(t, known)
		name := c.block + ".switch_mlp." + c.up + ".weight"
		got := m.Tensor(name, tensor.Shape{8, 32, 64})
		assert.Equal(t, models.Expert, got.Kind, name)
		assert.False(t, got.Quantized)
		require.Len(t, got.Runtime, 1)
		if c.param == "unknown" {
			assert.False(t, got.Known, c.class)
			assert.Empty(t, got.Program)
			assert.True(t, got.Runtime[0].Whole())
			continue
		}
		assert.True(t, got.Known, c.class)
		assert.Equal(t, "mlx-lm", got.Program)
		shape, fits := got.Runtime[0].Shape(tensor.Shape{8, 32, 64})
		require.True(t, fits)
		if c.param == "" {
			assert.True(t, got.Runtime[0].Whole())
			assert.Equal(t, tensor.Shape{8, 32, 64}, shape)
			continue
		}
		assert.Equal(t, models.Slice{Param: c.param, Expert: -1, Dim: 1, Part: 1, Parts: 2, FileParts: 1}, got.Runtime[0])
		assert.Equal(t, tensor.Shape{8, 64, 64}, shape)
		down := m.Tensor(c.block+".switch_mlp.down_proj.weight", tensor.Shape{8, 64, 32})
		assert.True(t, down.Runtime[0].Whole(), down)
		assert.False(t, m.Tensor(name, tensor.Shape{32, 64}).Known) // no stack
	}
}
