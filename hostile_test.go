package lorakit_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// What a run reads is never replaced by what it writes.
func TestSourcesAreSpared(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	base, adapter := filepath.Join(dir, "base"), filepath.Join(dir, "adapters", "a")
	other := filepath.Join(dir, "adapters", "b")
	llama := filepath.Join("fixtures", "adapters", "llama", "attention")
	require.NoError(t, os.CopyFS(base, os.DirFS(filepath.Join("fixtures", "adapters", "bases", "llama"))))
	require.NoError(t, os.CopyFS(adapter, os.DirFS(llama)))
	require.NoError(t, os.CopyFS(other, os.DirFS(llama)))
	before := content(t, dir)
	two := []lorakit.Adapter{{Path: adapter}, {Path: other}}
	for _, out := range []string{other, filepath.Join(dir, "adapters")} {
		_, err := lorakit.Combine(ctx, out, two, lorakit.CombineOptions{Type: "cat", Force: true})
		require.ErrorIs(t, err, lorakit.ErrRefused)
		_, err = lorakit.Merge(ctx, base, two, out, lorakit.ConvertOptions{Force: true})
		require.ErrorIs(t, err, lorakit.ErrRefused)
	}
	tuned := filepath.Join(dir, "tuned")
	_, err := lorakit.Merge(ctx, base, two[:1], tuned, lorakit.ConvertOptions{})
	require.NoError(t, err)
	_, err = lorakit.Extract(ctx, base, tuned, tuned, lorakit.ExtractOptions{Rank: 1, Force: true})
	require.ErrorIs(t, err, lorakit.ErrRefused)
	require.NoError(t, os.RemoveAll(tuned))
	require.Equal(t, before, content(t, dir))
}

// content is that of all files below a folder.
func content(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			var b []byte
			b, err = os.ReadFile(path)
			all[path] = string(b)
		}
		return err
	}))
	return all
}
