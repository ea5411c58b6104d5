package lorakit_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/checkpoint"
)

// estimated estimates a path, and returns the rows by method.
func estimated(t *testing.T, path string, o lorakit.EstimateOptions) (*lorakit.Estimation,
	map[string]lorakit.EstimatedMethod) {
	t.Helper()
	r, err := lorakit.Estimate(t.Context(), path, o)
	require.NoError(t, err)
	rows := map[string]lorakit.EstimatedMethod{}
	for _, m := range r.Rows {
		rows[m.Method] = m
	}
	return r, rows
}

// storedWithoutTables is what the weights of a checkpoint have in its files, without the tables that are the same for
// all weights, but with the mean that the state of a doubly quantised weight holds.
func storedWithoutTables(t *testing.T, path string, double bool) int64 {
	t.Helper()
	c, err := checkpoint.Open(context.Background(), path)
	require.NoError(t, err)
	defer c.Close()
	var n int64
	quantised := 0
	for _, w := range c.Weights {
		if w.Decoder != nil {
			quantised++
		}
		for _, p := range w.Parts {
			if !strings.HasSuffix(p.Name, "quant_map") && !strings.Contains(p.Name, "quant_state") {
				n += p.Bytes
			}
		}
	}
	require.Positive(t, quantised)
	if double {
		n += 4 * int64(quantised)
	}
	return n
}

// TestEstimateAsStored: the weights of the qlora rows are those that Convert writes.
func TestEstimateAsStored(t *testing.T) {
	for _, model := range []string{"tiny-llama", "tiny-gpt2", "tiny-gemma3", "tiny-mixtral", "tiny-qwen3-f16"} {
		path := filepath.Join("fixtures", model)
		r, rows := estimated(t, path, lorakit.EstimateOptions{Rank: 2})
		for method, double := range map[string]bool{"qlora": false, "qlora-dq": true} {
			dst := filepath.Join(t.TempDir(), method)
			_, err := lorakit.Convert(t.Context(), path, dst, lorakit.ConvertOptions{Quantize: "nf4", DoubleQuant: double})
			require.NoError(t, err)
			assert.Equal(t, storedWithoutTables(t, dst, double), rows[method].Weights-4*r.Trainable, "%s %s", model, method)

			// Of what is quantised already the same is counted.
			same, again := estimated(t, dst, lorakit.EstimateOptions{Rank: 2})
			assert.Equal(t, r.Parameters, same.Parameters, model)
			assert.Equal(t, rows["qlora"], again["qlora"], model)
			assert.Equal(t, rows["full"], again["full"], model)
		}
	}
}

// TestEstimateOfConfig: a config.json alone says what the checkpoint beside it does.
func TestEstimateOfConfig(t *testing.T) {
	for _, model := range []string{"tiny-llama", "tiny-gpt2", "tiny-mixtral", "tiny-qwen3"} {
		o := lorakit.EstimateOptions{Rank: 2, Tokens: 32, GPUs: 3}
		whole, _ := estimated(t, filepath.Join("fixtures", model), o)
		alone, _ := estimated(t, filepath.Join("fixtures", model, "config.json"), o)
		assert.Equal(t, whole, alone, model)
		assert.Positive(t, whole.MultiplyAdds.Recomputation)
		assert.Nil(t, whole.AssumedShape)
	}
}

// TestEstimateAsAttached: what is trained is what Attach makes.
func TestEstimateAsAttached(t *testing.T) {
	for model, target := range map[string]string{
		"tiny-llama": "attention", "tiny-gpt2": "c_attn,wte", "tiny-mixtral": "all-linear", "tiny-qwen3": `.*\.(up|down)_proj`,
	} {
		path := filepath.Join("fixtures", model)
		made, err := lorakit.Attach(t.Context(), path, filepath.Join(t.TempDir(), "adapter"),
			lorakit.AttachOptions{Rank: 3, Target: target})
		require.NoError(t, err)
		r, rows := estimated(t, path, lorakit.EstimateOptions{Rank: 3, Target: target, DType: "f32"})
		assert.Equal(t, made.Parameters, r.Trainable, model)
		assert.Equal(t, 4*r.Parameters+16*r.Trainable, rows["lora"].Total, model)
	}
}

func TestEstimateRefuses(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"not.json": "{", "bert.json": `{"architectures": ["BertModel"]}`} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	for want, path := range map[string]string{
		"not.json: config: ":                        filepath.Join(dir, "not.json"),
		"no training step for this architecture":    filepath.Join(dir, "bert.json"),
		"nothing.json: no such file or directory":   filepath.Join(dir, "nothing.json"),
		"the text's part alone is known":            "fixtures/tiny-gemma3/config.json",
		"it is an adapter, expected a checkpoint":   "fixtures/adapters/llama/attention",
		"bert: what grows with the tokens of a bat": "fixtures/adapters/bases/bert",
	} {
		_, err := lorakit.Estimate(t.Context(), path, lorakit.EstimateOptions{Tokens: 8})
		require.ErrorContains(t, err, want)
		assert.NotErrorIs(t, err, lorakit.ErrOption)
	}
	r, _ := estimated(t, "fixtures/adapters/bases/bert", lorakit.EstimateOptions{Rank: 2})
	assert.Positive(t, r.Parameters)
	assert.Zero(t, r.MultiplyAdds)
}
