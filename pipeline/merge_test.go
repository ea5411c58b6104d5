package pipeline_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
)

// TestResumeMerge goes on with a merge after each of its shards: to the same bytes, and to
// the same kept shares, those of the shards that were finished before included.
func TestResumeMerge(t *testing.T) {
	const fixtures = "../fixtures/adapters/"
	for name, o := range map[string]pipeline.Options{
		"attention":            {Quantize: "keep", MaxShardSize: 4 << 10},
		"dora":                 {Quantize: "nf4", Params: block64double, MaxShardSize: 4 << 10},
		"rslora":               {Quantize: "nf4", Params: block64double, Through: throughNF4, MaxShardSize: 4 << 10},
		"../others/llama-loha": {Quantize: "nf4", Params: block64double, Through: throughNF4, MaxShardSize: 4 << 10},
		"../others/llama-lokr": {Quantize: "keep", MaxShardSize: 4 << 10},
		"../others/llama-ia3":  {Quantize: "nf4", Params: block64double, MaxShardSize: 4 << 10},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := lora.Open(fixtures+"llama/"+name, lora.OpenOptions{})
			require.NoError(t, err)
			defer a.Close()
			c, err := checkpoint.Open(context.Background(), fixtures+"bases/llama")
			require.NoError(t, err)
			defer c.Close()
			m, err := pipeline.Merge(c, []lora.Weighted{{Adapter: a, Weight: 1}})
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
