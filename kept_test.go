package lorakit_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/pipeline"
)

// A merge of another tool that has left out one expert of many: the stack's own share is far above what is
// asked for.
func TestVerifyNamesAnExpertThatIsLost(t *testing.T) {
	t.Parallel()
	base, merged := baseOf("qwen3-moe"), filepath.Join(t.TempDir(), "merged")
	adapters := []lorakit.Adapter{{Path: filepath.Join(adapterFixtures, "qwen3-moe/experts")}}
	_, err := lorakit.Merge(t.Context(), base, adapters, merged, lorakit.ConvertOptions{})
	require.NoError(t, err)
	v, err := lorakit.VerifyMerge(t.Context(), merged, base, adapters, lorakit.ReadOptions{})
	require.NoError(t, err)
	require.Empty(t, v.Short(0.5))

	for _, projection := range []string{"down_proj", "gate_proj"} {
		file := filepath.Join(merged, "model.safetensors")
		tensors := load(t, merged)
		name := "model.layers.0.mlp.experts.2." + projection + ".weight"
		require.Contains(t, tensors, name)
		whole := tensors[name]
		tensors[name] = load(t, base)[name]
		writeTensors(t, file, tensors)
		v, err = lorakit.VerifyMerge(t.Context(), merged, base, adapters, lorakit.ReadOptions{})
		require.NoError(t, err)
		short := v.Short(0.5)
		require.Len(t, short, 1)
		require.Greater(t, short[0].Kept, 0.5)
		lowest, kept := short[0].Lowest()
		require.Equal(t, short[0].Name+", expert 2", lowest)
		require.Zero(t, kept)
		tensors[name] = whole
		writeTensors(t, file, tensors)
	}
}

// An infinite share is not one of all that there is.
func TestMergeThatOverflowsIsRefused(t *testing.T) {
	t.Parallel()
	at := t.TempDir()
	adapters := []lorakit.Adapter{{Path: filepath.Join(adapterFixtures, "llama/attention"), Weight: 1e9}}
	_, err := lorakit.Merge(t.Context(), baseOf("llama"), adapters, filepath.Join(at, "out"),
		lorakit.ConvertOptions{DType: "f16"})
	require.ErrorIs(t, err, pipeline.ErrLost)
	require.ErrorContains(t, err, "is not a number")
	left, err := os.ReadDir(at)
	require.NoError(t, err)
	require.Empty(t, left)

	r, err := lorakit.Merge(t.Context(), baseOf("llama"), adapters, filepath.Join(at, "out"),
		lorakit.ConvertOptions{DType: "f16", MinKept: -1})
	require.NoError(t, err)
	require.False(t, r.Adapters[0].Modules[0].Finite())
}
