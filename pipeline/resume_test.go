package pipeline_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/pipeline"
	_ "github.com/lorakit/lorakit/quant/bnb"
	"github.com/lorakit/lorakit/tensor"
)

// TestResume interrupts a run after each of its shards and goes on.
func TestResume(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	ref := filepath.Join(t.TempDir(), "dst")
	_, err := convert(context.Background(), src, ref, nf4, pipeline.RunOptions{})
	require.NoError(t, err)
	want := digest(t, ref)

	c, err := checkpoint.Open(context.Background(), src)
	require.NoError(t, err)
	defer c.Close()
	dst := filepath.Join(t.TempDir(), "dst")
	p, err := pipeline.NewPlan(context.Background(), pipeline.Plain(c), dst, nf4)
	require.NoError(t, err)
	require.Greater(t, len(p.Shards), 5)

	// A stage as a killed run leaves it: some shards finished, one begun.
	for done := range len(p.Shards) + 1 {
		stage(t, dst, ref, p, done)
		r, err := pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{Resume: true})
		require.NoError(t, err)
		assert.Equal(t, done, r.Resumed)
		assert.Equal(t, want, digest(t, dst))
		assert.NoDirExists(t, dst+".partial")
		require.NoError(t, os.RemoveAll(dst))
	}

	t.Run("without --resume starts over", func(t *testing.T) {
		stage(t, dst, ref, p, 3)
		r, err := pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{})
		require.NoError(t, err)
		assert.Zero(t, r.Resumed)
		assert.Equal(t, want, digest(t, dst))
	})
	t.Run("complete", func(t *testing.T) {
		r, err := pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{Resume: true})
		require.NoError(t, err)
		assert.True(t, r.Complete)
		require.NoError(t, os.RemoveAll(dst))
	})
	t.Run("another plan", func(t *testing.T) {
		stage(t, dst, ref, p, 3)
		other := nf4
		other.Params = block64
		_, err := convert(context.Background(), src, dst, other, pipeline.RunOptions{Resume: true})
		require.ErrorIs(t, err, pipeline.ErrOtherPlan)
		assert.NoDirExists(t, dst)
		assert.DirExists(t, dst+".partial", "what could be gone on with is still there")
	})
}

// stage makes the stage of dst with the first shards of ref finished.
func stage(t *testing.T, dst, ref string, p *pipeline.Plan, done int) {
	t.Helper()
	out := filepath.Join(dst+".partial", "out")
	require.NoError(t, os.RemoveAll(dst+".partial"))
	require.NoError(t, os.MkdirAll(out, 0o777))
	require.NoError(t, os.WriteFile(filepath.Join(dst+".partial", "plan.json"), []byte(`{"plan":"`+p.Digest()+`"}`),
		0o666))
	for i, s := range p.Shards {
		b, err := os.ReadFile(filepath.Join(ref, s.Name))
		require.NoError(t, err)
		switch {
		case i < done:
			require.NoError(t, os.WriteFile(filepath.Join(out, s.Name), b, 0o666))
		case i == done:
			require.NoError(t, os.WriteFile(filepath.Join(out, s.Name+".part"), b[:len(b)/2], 0o666))
		}
	}
}

func TestInterrupted(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	dst := filepath.Join(t.TempDir(), "dst")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := convert(ctx, src, dst, nf4, pipeline.RunOptions{})
	require.ErrorIs(t, err, pipeline.ErrInterrupted)
	assert.NoDirExists(t, dst)
	assert.NoDirExists(t, dst+".partial", "nothing was finished")
}

func TestPublishedStageIsTidied(t *testing.T) {
	c, p, dst := converted(t)
	want := digest(t, dst)

	// Killed between the swap that --force makes and the removal of the old DST.
	info, err := os.Stat(dst)
	require.NoError(t, err)
	marker, err := json.Marshal(map[string]any{"plan": p.Digest(),
		"result": fmt.Sprintf("%d.%09d", info.ModTime().Unix(), info.ModTime().Nanosecond())})
	require.NoError(t, err)
	old := filepath.Join(dst+".partial", "out")
	require.NoError(t, os.MkdirAll(old, 0o777))
	require.NoError(t, os.WriteFile(filepath.Join(old, "old.bin"), nil, 0o666))
	require.NoError(t, os.WriteFile(filepath.Join(dst+".partial", "plan.json"), marker, 0o666))
	r, err := pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{Resume: true, Force: true})
	require.NoError(t, err)
	assert.True(t, r.Complete)
	assert.Equal(t, want, digest(t, dst))
	assert.NoDirExists(t, dst+".partial")
}

// TestStageOfSomebody says what a folder named DST.partial is taken for.
func TestStageOfSomebody(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	for name, files := range map[string]map[string]string{
		"a file":              {"thesis.txt": ""},
		"out without a plan":  {"out/thesis.txt": ""},
		"another plan.json":   {"plan.json": `{"plans": "great"}`, "out/thesis.txt": ""},
		"an empty plan.json":  {"plan.json": "", "out/thesis.txt": ""},
		"a long plan.json":    {"plan.json": `{"plan": "` + strings.Repeat("x", 600) + `"}`},
		"scratch of somebody": {"scratch": ""},
	} {
		t.Run(name, func(t *testing.T) {
			dst := filepath.Join(t.TempDir(), "dst")
			for f, content := range files {
				path := filepath.Join(dst+".partial", f)
				require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o777))
				require.NoError(t, os.WriteFile(path, []byte(content), 0o666))
			}
			before := digest(t, dst+".partial")
			for _, resume := range []bool{false, true} {
				_, err := convert(context.Background(), src, dst, nf4, pipeline.RunOptions{Resume: resume})
				require.ErrorIs(t, err, pipeline.ErrExists)
				assert.Equal(t, before, digest(t, dst+".partial"))
			}
		})
	}
	t.Run("the source is in it", func(t *testing.T) {
		for _, in := range []string{"dst.partial", "dst.partial/out"} {
			dir := t.TempDir()
			from := filepath.Join(dir, in)
			require.NoError(t, os.MkdirAll(filepath.Dir(from), 0o777))
			writeModel(t, from)
			before := digest(t, dir)
			_, err := convert(context.Background(), from, filepath.Join(dir, "dst"), nf4, pipeline.RunOptions{})
			require.ErrorIs(t, err, pipeline.ErrRefused)
			assert.Equal(t, before, digest(t, dir))
		}
	})
	t.Run("an old destination on its way out", func(t *testing.T) {
		// Killed between the two renames that replace DST where it cannot be swapped.
		dst := filepath.Join(t.TempDir(), "dst")
		old := filepath.Join(dst+".partial", "old")
		require.NoError(t, os.MkdirAll(old, 0o777))
		require.NoError(t, os.WriteFile(filepath.Join(old, "precious"), nil, 0o666))
		require.NoError(t, os.WriteFile(filepath.Join(dst+".partial", "plan.json"), []byte(`{"plan":"x"}`), 0o666))
		_, err := convert(context.Background(), src, dst, nf4, pipeline.RunOptions{})
		require.ErrorIs(t, err, pipeline.ErrExists)
		assert.FileExists(t, filepath.Join(dst, "precious"), "it is put back before anything else")
	})
}

// TestResumeOfAnotherSource has a destination that was made from other weights of the same shapes.
func TestResumeOfAnotherSource(t *testing.T) {
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(11, 12))
	a, b, dst := filepath.Join(dir, "a.safetensors"), filepath.Join(dir, "b.safetensors"),
		filepath.Join(dir, "dst.safetensors")
	for _, path := range []string{a, b} {
		writeFile(t, path, stored{"w.weight", tensor.BF16, tensor.Shape{70, 70}, bf16(r)})
	}
	for _, o := range []pipeline.Options{{Quantize: "keep"},
		{Quantize: "nf4", Params: block64double, Include: []string{"*"}}} {
		_, err := convert(context.Background(), a, dst, o, pipeline.RunOptions{Force: true})
		require.NoError(t, err)
		res, err := convert(context.Background(), a, dst, o, pipeline.RunOptions{Resume: true})
		require.NoError(t, err)
		assert.True(t, res.Complete)
		_, err = convert(context.Background(), b, dst, o, pipeline.RunOptions{Resume: true})
		require.ErrorIs(t, err, pipeline.ErrExists)
		res, err = convert(context.Background(), b, dst, o, pipeline.RunOptions{Resume: true, Force: true})
		require.NoError(t, err)
		assert.False(t, res.Complete)
	}
}
