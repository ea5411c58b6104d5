package lorakit_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// TestMergeBeside holds the merge of an adapter with the weights that LLaVA's script has left beside it against that of
// LLaVA's loader, and the same adapter as one file of PEFT's.
func TestMergeBeside(t *testing.T) {
	t.Parallel()
	adapter := lorakit.Adapter{Path: filepath.Join(adapterFixtures, "beside", "llava")}
	m := peftMerge{base: "llama", adapters: []lorakit.Adapter{adapter}, file: "beside/llava"}
	asPEFT(t, m, "f32", t.TempDir(), lorakit.ConvertOptions{DType: "f32"})

	one := filepath.Join(t.TempDir(), "one")
	c, err := lorakit.ConvertAdapter(t.Context(), adapter, one, lorakit.AdapterOptions{})
	require.NoError(t, err)
	require.Len(t, c.Notices, 1)
	require.Contains(t, c.Notices[0], "non_lora_trainables.bin")
	m.adapters[0].Path = one
	asPEFT(t, m, "f32", t.TempDir(), lorakit.ConvertOptions{DType: "f32"})

	_, err = lorakit.ConvertAdapter(t.Context(), adapter, filepath.Join(t.TempDir(), "a.safetensors"),
		lorakit.AdapterOptions{To: "kohya"})
	require.ErrorContains(t, err, "a replaced weight has no place in a kohya adapter")
}

// TestMergeIntoOwnFolder merges an adapter that lies in the folder of its base onto that base, and not onto another.
func TestMergeIntoOwnFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	base, out := filepath.Join(adapterFixtures, "bases", "llama"), filepath.Join(t.TempDir(), "out")
	for _, from := range []string{base, filepath.Join(adapterFixtures, "llama", "attention")} {
		require.NoError(t, os.CopyFS(dir, os.DirFS(from)))
	}
	adapters := []lorakit.Adapter{{Path: dir}}
	r, err := lorakit.Merge(t.Context(), dir, adapters, out, lorakit.ConvertOptions{})
	require.NoError(t, err)
	require.Contains(t, r.Notices[0], "model.safetensors holds a model, which is no part of the adapter")
	_, err = lorakit.Merge(t.Context(), base, adapters, filepath.Join(t.TempDir(), "other"), lorakit.ConvertOptions{})
	require.ErrorIs(t, err, lorakit.ErrUnsupported)
	require.ErrorContains(t, err, "model.safetensors")
}
