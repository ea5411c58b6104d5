package pipeline_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/storage/storagetest"
)

// TestSourceInMemory makes of a checkpoint that has no path what is made of it on a disk: shards, what is copied,
// quantised and carried along, also when it is resumed.
func TestSourceInMemory(t *testing.T) {
	ctx, src := context.Background(), filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	require.NoError(t, os.Mkdir(filepath.Join(src, "extra"), 0o777))
	require.NoError(t, os.WriteFile(filepath.Join(src, "extra", "notes.txt"), []byte("notes"), 0o666))
	memory, err := storagetest.FromFS(os.DirFS(src), ".")
	require.NoError(t, err)
	require.Contains(t, memory, "extra/notes.txt")

	ref := filepath.Join(t.TempDir(), "ref")
	_, err = convert(ctx, src, ref, nf4, pipeline.RunOptions{})
	require.NoError(t, err)
	want := digest(t, ref)

	c, err := checkpoint.OpenIn(ctx, memory, "", checkpoint.OpenOptions{})
	require.NoError(t, err)
	defer c.Close()
	assert.Equal(t, "memory:", c.Path)
	dst := filepath.Join(t.TempDir(), "dst")
	p, err := pipeline.NewPlan(ctx, pipeline.Plain(c), dst, nf4)
	require.NoError(t, err)
	_, err = pipeline.Run(ctx, p, pipeline.Plain(c), dst, pipeline.RunOptions{})
	require.NoError(t, err)
	assert.Equal(t, want, digest(t, dst))

	resumed := filepath.Join(t.TempDir(), "dst")
	stage(t, resumed, ref, p, 3)
	r, err := pipeline.Run(ctx, p, pipeline.Plain(c), resumed, pipeline.RunOptions{Resume: true})
	require.NoError(t, err)
	assert.Equal(t, 3, r.Resumed)
	assert.Equal(t, want, digest(t, resumed))
	r, err = pipeline.Run(ctx, p, pipeline.Plain(c), dst, pipeline.RunOptions{Resume: true})
	require.NoError(t, err)
	assert.True(t, r.Complete)

	// Where a file is another than before, nothing is published.
	memory["LICENSE"] = []byte("as I like")
	_, err = pipeline.Run(ctx, p, pipeline.Plain(c), filepath.Join(t.TempDir(), "dst"), pipeline.RunOptions{})
	assert.ErrorContains(t, err, "memory:LICENSE: it changed while it was read")
}

// TestForeignConfig says what stands where config.json should be.
func TestForeignConfig(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	for content, says := range map[string]string{
		"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 700\n": "config.json: not a checkpoint: it is a " +
			"Git LFS pointer (oid sha256:00, 700 B): run git lfs pull",
		"<!doctype html><title>Not found</title>": `config.json: not a checkpoint: it is an HTML page ("Not found")`,
		"": "config.json: not a checkpoint: it is empty",
	} {
		require.NoError(t, os.WriteFile(filepath.Join(src, "config.json"), []byte(content), 0o666))
		_, err := checkpoint.Open(context.Background(), src)
		require.ErrorIs(t, err, formats.ErrForeign)
		require.ErrorContains(t, err, says)
	}
}

// TestMergeInMemory merges an adapter that has no path into a base that has none.
func TestMergeInMemory(t *testing.T) {
	const fixtures = "../fixtures/adapters/"
	ctx := context.Background()
	base, err := storagetest.FromFS(os.DirFS(fixtures+"."), "bases/llama")
	require.NoError(t, err)
	adapter, err := storagetest.FromFS(os.DirFS(fixtures+"."), "llama/attention")
	require.NoError(t, err)
	merged := func(c *checkpoint.Checkpoint, a *lora.Adapter) string {
		defer c.Close()
		defer a.Close()
		m, err := pipeline.Merge(ctx, c, []lora.Weighted{{Adapter: a, Weight: 1}})
		require.NoError(t, err)
		dst := filepath.Join(t.TempDir(), "dst")
		p, err := pipeline.NewPlan(ctx, m, dst, pipeline.Options{Quantize: "keep"})
		require.NoError(t, err)
		_, err = pipeline.Run(ctx, p, m, dst, pipeline.RunOptions{})
		require.NoError(t, err)
		return digest(t, dst)
	}
	c, err := checkpoint.Open(ctx, fixtures+"bases/llama")
	require.NoError(t, err)
	a, err := lora.Open(fixtures+"llama/attention", lora.OpenOptions{})
	require.NoError(t, err)
	want := merged(c, a)
	c, err = checkpoint.OpenIn(ctx, base, "", checkpoint.OpenOptions{})
	require.NoError(t, err)
	a, err = lora.OpenIn(ctx, adapter, "", lora.OpenOptions{})
	require.NoError(t, err)
	assert.Equal(t, want, merged(c, a))
}
