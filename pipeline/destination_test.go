package pipeline_test

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/pipeline"
	_ "github.com/lorakit/lorakit/quant/bnb"
	"github.com/lorakit/lorakit/tensor"
)

func TestDestination(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	before := digest(t, src)
	ctx := context.Background()

	t.Run("exists", func(t *testing.T) {
		dst := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dst, "old"), nil, 0o666))
		_, err := convert(ctx, src, dst, nf4, pipeline.RunOptions{})
		require.ErrorIs(t, err, pipeline.ErrExists)
		_, err = convert(ctx, src, dst, nf4, pipeline.RunOptions{Resume: true})
		require.ErrorIs(t, err, pipeline.ErrExists, "it is not what the plan makes")
		assert.FileExists(t, filepath.Join(dst, "old"))
		_, err = convert(ctx, src, dst, nf4, pipeline.RunOptions{Force: true})
		require.NoError(t, err)
		assert.NoFileExists(t, filepath.Join(dst, "old"))
		assert.NoDirExists(t, dst+".partial")
	})
	t.Run("a failed run leaves the old one", func(t *testing.T) {
		dst := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dst, "old"), nil, 0o666))
		cancelled, cancel := context.WithCancel(ctx)
		cancel()
		_, err := convert(cancelled, src, dst, nf4, pipeline.RunOptions{Force: true})
		require.Error(t, err)
		assert.FileExists(t, filepath.Join(dst, "old"))
	})
	t.Run("source", func(t *testing.T) {
		link := filepath.Join(t.TempDir(), "link")
		require.NoError(t, os.Symlink(src, link))
		for _, dst := range []string{src, src + "/.", filepath.Join(src, "sub"), filepath.Join(src, "a", "b"),
			filepath.Dir(src), link, filepath.Join(link, "sub")} {
			_, err := convert(ctx, src, dst, nf4, pipeline.RunOptions{Force: true})
			require.ErrorIs(t, err, pipeline.ErrRefused, dst)
		}
	})
	t.Run("none", func(t *testing.T) {
		t.Chdir(t.TempDir())
		_, err := convert(ctx, src, "", nf4, pipeline.RunOptions{Force: true})
		require.ErrorIs(t, err, pipeline.ErrRefused)
		require.ErrorContains(t, err, "the destination is empty")
	})
	t.Run("a socket", func(t *testing.T) {
		t.Chdir(t.TempDir())
		l, err := net.Listen("unix", "dst")
		require.NoError(t, err)
		defer l.Close()
		require.NoError(t, os.Symlink("dst", "link"))
		for _, dst := range []string{"dst", "link"} {
			_, err = convert(ctx, src, dst, nf4, pipeline.RunOptions{Force: true})
			require.ErrorIs(t, err, pipeline.ErrRefused)
			require.ErrorContains(t, err, "a socket, which is never replaced")
		}
		info, err := os.Lstat("dst")
		require.NoError(t, err)
		assert.Equal(t, os.ModeSocket, info.Mode().Type())
	})
	t.Run("a stage that is no folder", func(t *testing.T) {
		dst := filepath.Join(t.TempDir(), "dst")
		require.NoError(t, os.Symlink("nowhere", dst+".partial"))
		_, err := convert(ctx, src, dst, nf4, pipeline.RunOptions{})
		require.ErrorIs(t, err, pipeline.ErrExists)
		require.ErrorContains(t, err, "is no stage of lorakit: it is no folder")
		require.NoError(t, os.Remove(dst+".partial"))
		require.NoError(t, os.WriteFile(dst+".partial", nil, 0o666))
		_, err = convert(ctx, src, dst, nf4, pipeline.RunOptions{})
		require.ErrorContains(t, err, "it is no folder")
		assert.FileExists(t, dst+".partial")
	})
	t.Run("a stage of somebody else", func(t *testing.T) {
		dst := filepath.Join(t.TempDir(), "dst")
		require.NoError(t, os.Mkdir(dst+".partial", 0o777))
		mine := filepath.Join(dst+".partial", "thesis.txt")
		require.NoError(t, os.WriteFile(mine, nil, 0o666))
		_, err := convert(ctx, src, dst, nf4, pipeline.RunOptions{})
		require.ErrorIs(t, err, pipeline.ErrExists)
		assert.FileExists(t, mine)
	})
	t.Run("carried along", func(t *testing.T) {
		dst := filepath.Join(t.TempDir(), "a", "dst")
		_, err := convert(ctx, src, dst, nf4, pipeline.RunOptions{})
		require.NoError(t, err)
		assert.FileExists(t, filepath.Join(dst, "LICENSE"))
	})
	assert.Equal(t, before, digest(t, src), "the source is never changed")
}

// converted makes a result in NF4, and returns what it was made from and with.
func converted(t *testing.T) (*checkpoint.Checkpoint, *pipeline.Plan, string) {
	t.Helper()
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	c, err := checkpoint.Open(context.Background(), src)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	dst := filepath.Join(t.TempDir(), "dst")
	p, err := pipeline.NewPlan(context.Background(), pipeline.Plain(c), dst, nf4)
	require.NoError(t, err)
	_, err = pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{})
	require.NoError(t, err)
	return c, p, dst
}

func TestSourceThatChanges(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "a.safetensors"), filepath.Join(dir, "b.safetensors")
	r := rand.New(rand.NewPCG(3, 4))
	for name, o := range map[string]pipeline.Options{"read": {Quantize: "nf4", Params: block64, Include: []string{"*"}},
		"copied": {Quantize: "keep"}} {
		t.Run(name, func(t *testing.T) {
			writeFile(t, src, stored{"w", tensor.BF16, tensor.Shape{1000, 1000}, bf16(r)})
			c, err := checkpoint.Open(context.Background(), src)
			require.NoError(t, err)
			defer c.Close()
			p, err := pipeline.NewPlan(context.Background(), pipeline.Plain(c), dst, o)
			require.NoError(t, err)
			require.NoError(t, os.Truncate(src, 1_000_000))
			_, err = pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{})
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			assert.Contains(t, err.Error(), `a.safetensors: tensor "w"`)
			assert.NoFileExists(t, dst)
			assert.NoDirExists(t, dst+".partial")
		})
	}
	t.Run("touched", func(t *testing.T) {
		writeFile(t, src, stored{"w", tensor.BF16, tensor.Shape{10, 10}, bf16(r)})
		c, err := checkpoint.Open(context.Background(), src)
		require.NoError(t, err)
		defer c.Close()
		p, err := pipeline.NewPlan(context.Background(), pipeline.Plain(c), dst, pipeline.Options{Quantize: "keep"})
		require.NoError(t, err)
		writeFile(t, src, stored{"w", tensor.BF16, tensor.Shape{10, 10}, bf16(r)})
		_, err = pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{})
		require.ErrorContains(t, err, "changed while it was read")
		assert.NoFileExists(t, dst)
	})
}

// TestOldDestinationIsNoResult has a run killed just after it has swapped DST, which is then moved away: what stands
// in the stage is the old DST.
func TestOldDestinationIsNoResult(t *testing.T) {
	c, p, dst := converted(t)
	want := digest(t, dst)

	out := filepath.Join(dst+".partial", "out")
	require.NoError(t, os.Mkdir(dst+".partial", 0o777))
	require.NoError(t, os.Rename(dst, out))
	for _, s := range p.Shards { // as long as the right one, and wrong
		require.NoError(t, os.WriteFile(filepath.Join(out, s.Name), make([]byte, s.Size), 0o666))
	}
	require.NoError(t, os.WriteFile(filepath.Join(dst+".partial", "plan.json"),
		[]byte(`{"plan":"`+p.Digest()+`","result":"1.000000000"}`), 0o666))
	r, err := pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{Resume: true})
	require.NoError(t, err)
	assert.Zero(t, r.Resumed)
	assert.Equal(t, want, digest(t, dst))
}

// TestIndexAsSource names the index in place of the folder: its shards are watched all the same.
func TestIndexAsSource(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	c, err := checkpoint.Open(context.Background(), filepath.Join(src, "model.safetensors.index.json"))
	require.NoError(t, err)
	defer c.Close()
	dst := filepath.Join(t.TempDir(), "dst")
	p, err := pipeline.NewPlan(context.Background(), pipeline.Plain(c), dst, pipeline.Options{Quantize: "keep"})
	require.NoError(t, err)
	require.Len(t, p.Inputs, 7)
	later := time.Now().Add(time.Hour)
	require.NoError(t, os.Chtimes(filepath.Join(src, "model-00003-of-00006.safetensors"), later, later))
	_, err = pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{})
	require.ErrorContains(t, err, "model-00003-of-00006.safetensors: it changed while it was read")
}

// TestOddNames converts what has names and times that no calendar or alphabet has.
func TestOddNames(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	odd := filepath.Join(src, "notes.txt")
	require.NoError(t, os.WriteFile(odd, []byte("x"), 0o666))
	require.NoError(t, os.WriteFile(filepath.Join(src, `back\slash`), nil, 0o666))
	require.NoError(t, os.Symlink("nowhere", filepath.Join(src, "dangling")))
	require.NoError(t, os.Symlink("loop", filepath.Join(src, "loop")))
	require.NoError(t, os.Mkdir(filepath.Join(src, "2_Dense"), 0o777))
	require.NoError(t, os.WriteFile(filepath.Join(src, "2_Dense", "model.safetensors"), []byte("part"), 0o666))
	require.NoError(t, os.Mkdir(filepath.Join(src, "onnx"), 0o777))
	require.NoError(t, os.WriteFile(filepath.Join(src, "onnx", "model.onnx"), []byte("export"), 0o666))
	require.NoError(t, os.WriteFile(filepath.Join(src, "pytorch_model.bin"), []byte("other form"), 0o666))
	far := time.Unix(1<<33, 0)
	require.NoError(t, os.Chtimes(odd, far, far))
	dst := filepath.Join(t.TempDir(), "dst")
	_, err := convert(context.Background(), src, dst, pipeline.Options{Quantize: "keep"}, pipeline.RunOptions{})
	require.NoError(t, err)
	assert.FileExists(t, filepath.Join(dst, "notes.txt"))
	assert.FileExists(t, filepath.Join(dst, "2_Dense", "model.safetensors"))
	assert.NoFileExists(t, filepath.Join(dst, "onnx", "model.onnx"))
	assert.NoFileExists(t, filepath.Join(dst, "pytorch_model.bin"))
	assert.NoFileExists(t, filepath.Join(dst, "dangling"))

	one := filepath.Join(t.TempDir(), "a.safetensors")
	writeFile(t, one, stored{"w", tensor.BF16, tensor.Shape{2, 2}, bf16(rand.New(rand.NewPCG(1, 1)))})
	_, err = convert(context.Background(), one, filepath.Join(t.TempDir(), "x\xff.safetensors"),
		pipeline.Options{Quantize: "keep"}, pipeline.RunOptions{})
	require.NoError(t, err)
}

// TestPatternsAsNames converts to where names are patterns to some: none is taken for one, and what another run has in
// its stage is left alone.
func TestPatternsAsNames(t *testing.T) {
	dir := t.TempDir()
	src, other := filepath.Join(dir, "src"), filepath.Join(dir, "other.partial", "scratch-1.lorakit")
	writeModel(t, src)
	require.NoError(t, os.Mkdir(filepath.Dir(other), 0o777))
	require.NoError(t, os.WriteFile(other, nil, 0o666))
	names := []string{"[", "a[b", "[a-z]", "{x}", "~"}
	if runtime.GOOS != "windows" { // which has no such names
		names = append(names, "[a-z]*", "*", "oth*r")
	}
	for _, name := range names {
		dst := filepath.Join(dir, name)
		_, err := convert(t.Context(), src, dst, nf4, pipeline.RunOptions{})
		require.NoError(t, err, name)
		assert.DirExists(t, dst)
		assert.NoDirExists(t, dst+".partial")
		assert.FileExists(t, other, name)
		// A stage that a killed run has left.
		require.NoError(t, os.Mkdir(dst+".partial", 0o777))
		require.NoError(t, os.WriteFile(filepath.Join(dst+".partial", "plan.json"), nil, 0o666))
		require.NoError(t, os.RemoveAll(dst))
		_, err = convert(t.Context(), src, dst, nf4, pipeline.RunOptions{})
		require.NoError(t, err, name)
	}
}
