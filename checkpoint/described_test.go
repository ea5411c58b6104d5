package checkpoint_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// TestDescribed: what goes by headers works without files, and reading is an error.
func TestDescribed(t *testing.T) {
	config, err := models.ParseConfig([]byte(`{"architectures": ["LlamaForCausalLM"], "dtype": "float16"}`))
	require.NoError(t, err)
	c := checkpoint.Described("a model", config, []tensor.Info{
		{Name: "model.layers.0.mlp.up_proj.weight", DType: tensor.F16, Shape: tensor.Shape{4, 2}},
		{Name: "model.norm.weight", DType: tensor.F16, Shape: tensor.Shape{2}},
	})
	assert.True(t, c.Known)
	assert.Equal(t, tensor.F16, c.DType())
	assert.True(t, c.Weights[0].Role.Quantized)
	assert.False(t, c.Weights[1].Role.Quantized)
	assert.Empty(t, c.Files())
	assert.Empty(t, c.Metadata())
	assert.Empty(t, c.InnerFiles())

	p, err := c.Runtime("model.layers.0.mlp.up_proj.weight")
	require.NoError(t, err)
	assert.Equal(t, tensor.Shape{4, 2}, p.Shape)
	assert.EqualError(t, p.Matrix(0).ReadRows(make([]float32, 2), 0, 1),
		`a model: tensor "model.layers.0.mlp.up_proj.weight": bytes 0 to 4 asked for, it has 0`)
	require.NoError(t, c.Close())
}
