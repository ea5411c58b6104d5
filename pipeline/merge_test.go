package pipeline_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/tensor"
)

// TestResumeMerge goes on with a merge after each of its shards: to the same bytes, and to the same kept shares, those
// of the shards that were finished before included.
func TestResumeMerge(t *testing.T) {
	const fixtures = "../fixtures/adapters/"
	for name, o := range map[string]pipeline.Options{
		"attention":            {Quantize: "keep", MaxShardSize: 4 << 10},
		"dora":                 {Quantize: "nf4", Params: block64double, MaxShardSize: 4 << 10},
		"rslora":               {Quantize: "nf4", Params: block64double, RoundTrip: roundTripNF4, MaxShardSize: 4 << 10},
		"../others/llama-loha": {Quantize: "nf4", Params: block64double, RoundTrip: roundTripNF4, MaxShardSize: 4 << 10},
		"../others/llama-lokr": {Quantize: "keep", MaxShardSize: 4 << 10},
		"../others/llama-ia3":  {Quantize: "nf4", Params: block64double, MaxShardSize: 4 << 10},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := lora.Open(fixtures+"llama/"+name, lora.OpenOptions{})
			require.NoError(t, err)
			defer a.Close()
			c, err := checkpoint.Open(context.Background(), llama)
			require.NoError(t, err)
			defer c.Close()
			m, err := pipeline.Merge(context.Background(), c, []lora.Weighted{{Adapter: a, Weight: 1}})
			require.NoError(t, err)
			ref, dst := filepath.Join(t.TempDir(), "ref"), filepath.Join(t.TempDir(), "dst")
			p, err := pipeline.NewPlan(context.Background(), m, dst, o)
			require.NoError(t, err)
			require.Greater(t, len(p.Shards), 5)
			whole, err := pipeline.Run(context.Background(), p, m, ref, pipeline.RunOptions{})
			require.NoError(t, err)
			require.NotEmpty(t, whole.Adapters[0].Modules)
			for done := range len(p.Shards) + 1 {
				stage(t, dst, ref, p, done)
				r, err := pipeline.Run(context.Background(), p, m, dst, pipeline.RunOptions{Resume: true})
				require.NoError(t, err)
				require.Equal(t, done, r.Resumed)
				require.Equal(t, digest(t, ref), digest(t, dst))
				require.Equal(t, whole.Adapters, r.Adapters)
				require.NoError(t, os.RemoveAll(dst))
			}
		})
	}
}

// TestMergeOntoWhatIsNotRead: a base in another tool's scheme, or in 8-bit floats, is refused by what it is.
func TestMergeOntoWhatIsNotRead(t *testing.T) {
	a, err := lora.Open("../fixtures/adapters/llama/rslora", lora.OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	c, err := checkpoint.Open(context.Background(), llama)
	require.NoError(t, err)
	defer c.Close()
	gptq, float8 := *c, *c
	config := *c.Config
	config.Quantization = []byte(`{"quant_method": "gptq", "bits": 4}`)
	gptq.Config = &config
	_, err = pipeline.Merge(context.Background(), &gptq, []lora.Weighted{{Adapter: a, Weight: 1}})
	require.ErrorIs(t, err, pipeline.ErrRefused)
	assert.ErrorContains(t, err, `stored as "gptq"`)

	float8.Weights = nil
	for _, w := range c.Weights {
		n := *w
		n.DType, n.Values = tensor.F8E4M3, tensor.F8E4M3
		float8.Weights = append(float8.Weights, &n)
	}
	_, err = pipeline.Merge(context.Background(), &float8, []lora.Weighted{{Adapter: a, Weight: 1}})
	require.ErrorIs(t, err, pipeline.ErrRefused)
	assert.ErrorContains(t, err, "F8_E4M3")
	assert.ErrorContains(t, err, "_proj.weight")
}
