package lorakit_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
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

// content is that of all files below a folder, by their names in it.
func content(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			var b []byte
			b, err = os.ReadFile(path)
			all[strings.TrimPrefix(path, dir)] = string(b)
		}
		return err
	}))
	return all
}

// MLX's adapter of an embedding changes a head that is tied to it as well, so they stay one matrix; PEFT's
// changes the embedding alone. A conversion says so.
func TestTiedEmbeddingOfMLX(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	peft := filepath.Join("fixtures", "adapters", "tiny-qwen3", "tied-embedding")
	base, mlx := filepath.Join("fixtures", "tiny-qwen3-f32"), filepath.Join(dir, "mlx")
	r, err := lorakit.ConvertAdapter(ctx, lorakit.Adapter{Path: peft}, mlx, lorakit.AdapterOptions{To: "mlx"})
	require.NoError(t, err)
	require.Len(t, r.Notices, 1)
	require.Contains(t, r.Notices[0], "an mlx adapter changes the head too, a peft adapter the embedding alone")
	for path, tied := range map[string]bool{peft: false, mlx: true} {
		out := filepath.Join(t.TempDir(), "merged")
		_, err := lorakit.Merge(ctx, base, []lorakit.Adapter{{Path: path}}, out, lorakit.ConvertOptions{})
		require.NoError(t, err)
		config, err := os.ReadFile(filepath.Join(out, "config.json"))
		require.NoError(t, err)
		require.Equal(t, tied, !strings.Contains(string(config), `"tie_word_embeddings": false`), path)
	}
}

func TestCombineIsInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a := lorakit.Adapter{Path: filepath.Join("fixtures", "adapters", "llama", "attention")}
	dir := t.TempDir()
	_, err := lorakit.Combine(ctx, filepath.Join(dir, "out"), []lorakit.Adapter{a, a}, lorakit.CombineOptions{Type: "cat"})
	require.ErrorIs(t, err, lorakit.ErrInterrupted)
	_, err = lorakit.Resize(ctx, a, filepath.Join(dir, "out"), lorakit.ResizeOptions{Rank: 1})
	require.ErrorIs(t, err, lorakit.ErrInterrupted)
	require.Empty(t, content(t, dir))
}

// Adapters of every dialect can be combined and resized, to the delta that the merges of the adapters give.
func TestCombineDialects(t *testing.T) {
	ctx, dialects := t.Context(), filepath.Join("fixtures", "adapters", "dialects")
	base := filepath.Join("fixtures", "adapters", "bases", "llama")
	for _, a := range []lorakit.Adapter{{Path: filepath.Join(dialects, "kohya-llama.safetensors")},
		{Path: filepath.Join(dialects, "mlx-llama")}, {Path: filepath.Join(dialects, "loralib-llama.pt"), Alpha: 8}} {
		dir := t.TempDir()
		merged := func(name string, list ...lorakit.Adapter) string {
			out := filepath.Join(dir, name)
			_, err := lorakit.Merge(ctx, base, list, out, lorakit.ConvertOptions{DType: "f32"})
			require.NoError(t, err, a.Path)
			return out
		}
		half := a
		half.Weight = 0.5
		sum, resized := filepath.Join(dir, "sum"), filepath.Join(dir, "resized")
		_, err := lorakit.Combine(ctx, sum, []lorakit.Adapter{a, half}, lorakit.CombineOptions{Type: "cat"})
		require.NoError(t, err, a.Path)
		_, err = lorakit.Resize(ctx, a, resized, lorakit.ResizeOptions{Energy: 1})
		require.NoError(t, err, a.Path)
		for _, pair := range [][2]string{{merged("both", a, half), merged("of sum", lorakit.Adapter{Path: sum})},
			{merged("one", a), merged("of resized", lorakit.Adapter{Path: resized})}} {
			d, err := lorakit.Diff(ctx, pair[0], pair[1], lorakit.ReadOptions{})
			require.NoError(t, err)
			require.Empty(t, d.Missing)
			require.Empty(t, d.Extra)
			require.Less(t, d.MaxAbs, 1e-4, a.Path)
		}
	}
}
