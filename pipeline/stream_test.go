package pipeline_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/storage/storagetest"
	"github.com/lorakit/lorakit/tensor"
)

// toZipped is what most tests of streamed shards ask for.
var toZipped = pipeline.Options{To: "zipped", Quantize: "nf4", Params: block64double, MaxShardSize: 300_000}

// planZipped opens a source and makes a plan of it.
func planZipped(t testing.TB, z zipped, src, dst string, o pipeline.Options) (*pipeline.Merged, *pipeline.Plan) {
	m := pipeline.Plain(openWith(t, withZipped(t, z), src))
	p, err := pipeline.NewPlan(t.Context(), m, dst, o)
	require.NoError(t, err)
	return m, p
}

// TestStreamed converts to a format that writes its files itself, and back: nothing is lost, and neither threads nor
// memory change a byte.
func TestStreamed(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	writeModel(t, src)
	m, p := planZipped(t, zipped{}, src, filepath.Join(dir, "dst"), toZipped)
	require.Greater(t, len(p.Shards), 5)
	assert.Equal(t, len(p.Shards), p.StreamedShards())
	var tensors, most int64
	for _, s := range p.Shards {
		assert.EqualValues(t, formats.UnknownSize, s.Size)
		var bytes int64
		for _, j := range s.Jobs {
			for _, o := range j.Outputs {
				n, err := o.Size()
				require.NoError(t, err)
				bytes += n
			}
		}
		tensors += bytes
		most = max(most, bytes)
	}
	assert.Equal(t, tensors, p.OutputBytes())
	assert.Equal(t, most, p.ScratchBytes())

	want := ""
	for i, ro := range []pipeline.RunOptions{{Threads: 1}, {Threads: 2}, {Threads: 3}, {Threads: 4},
		{Threads: 2, Memory: 64 << 20}} {
		log := &zippedLog{}
		m, p := planZipped(t, zipped{log: log}, src, filepath.Join(dir, "dst"), toZipped)
		dst := filepath.Join(dir, "made", string(rune('a'+i)))
		r, err := pipeline.Run(t.Context(), p, m, dst, ro)
		require.NoError(t, err)
		if want == "" {
			want = digest(t, dst)
		}
		assert.Equal(t, want, digest(t, dst), "%+v", ro)
		assert.NoDirExists(t, dst+".partial")
		assert.Equal(t, map[string]int{"created": len(p.Shards), "finished": len(p.Shards)}, log.calls)
		assert.Equal(t, 1, log.most, "one shard at a time")
		var bytes int64
		for _, f := range directory(t, dst) {
			info, err := os.Stat(filepath.Join(dst, f))
			require.NoError(t, err)
			bytes += info.Size()
		}
		assert.Equal(t, bytes, r.Written, "what was written is the result, and no scratch file")
	}

	ref := filepath.Join(dir, "ref")
	_, err := convert(t.Context(), src, ref, nf4, pipeline.RunOptions{})
	require.NoError(t, err)
	oo := withZipped(t, zipped{})
	made := filepath.Join(dir, "made", "a")
	d, err := checkpoint.Compare(t.Context(), openWith(t, oo, ref), openWith(t, oo, made))
	require.NoError(t, err)
	assert.Zero(t, d.MaxAbs)
	assert.Empty(t, append(d.Missing, d.Extra...))
	back := filepath.Join(dir, "back")
	convertWith(t, oo, made, back, pipeline.Options{To: "safetensors", Quantize: "keep", MaxShardSize: nf4.MaxShardSize})
	assert.Equal(t, digest(t, ref), digest(t, back))

	single := filepath.Join(dir, "one.zpd")
	_, err = pipeline.Run(t.Context(), must(pipeline.NewPlan(t.Context(), m, single, toZipped))(t), m, single,
		pipeline.RunOptions{})
	require.NoError(t, err)
	d, err = checkpoint.Compare(t.Context(), openWith(t, oo, ref), openWith(t, oo, single))
	require.NoError(t, err)
	assert.Zero(t, d.MaxAbs)
}

// must returns what a call has returned, unless that is an error.
func must[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		require.NoError(t, err)
		return v
	}
}

// directory lists the names in a folder.
func directory(t testing.TB, dir string) []string {
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// noted is what the stage of a run has in shards.json of a file.
func noted(t testing.TB, path string) pipeline.Streamed {
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return pipeline.Streamed{Name: filepath.Base(path), Size: int64(len(b)), SHA256: fmt.Sprintf("%x", sha256.Sum256(b))}
}

// zippedStage makes the stage of dst with the first shards of ref finished and noted.
func zippedStage(t testing.TB, dst, ref string, p *pipeline.Plan, done int) {
	out := filepath.Join(dst+".partial", "out")
	require.NoError(t, os.RemoveAll(dst+".partial"))
	require.NoError(t, os.MkdirAll(out, 0o777))
	write(t, filepath.Join(dst+".partial", "plan.json"), `{"plan":"`+p.Digest()+`"}`)
	var list []pipeline.Streamed
	for _, s := range p.Shards[:done] {
		b, err := os.ReadFile(filepath.Join(ref, s.Name))
		require.NoError(t, err)
		write(t, filepath.Join(out, s.Name), string(b))
		list = append(list, noted(t, filepath.Join(ref, s.Name)))
	}
	writeNotes(t, dst, list)
}

func writeNotes(t testing.TB, dst string, list []pipeline.Streamed) {
	b, err := json.Marshal(map[string]any{"shards": list})
	require.NoError(t, err)
	write(t, filepath.Join(dst+".partial", "shards.json"), string(b))
}

func write(t testing.TB, path, content string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o777))
	require.NoError(t, os.WriteFile(path, []byte(content), 0o666))
}

// TestResumeStreamed goes on with what kills leave at each stage: each number of finished shards, and each step between
// two of them.
func TestResumeStreamed(t *testing.T) {
	dir := t.TempDir()
	src, ref, dst := filepath.Join(dir, "src"), filepath.Join(dir, "ref"), filepath.Join(dir, "dst")
	writeModel(t, src)
	m, p := planZipped(t, zipped{}, src, dst, toZipped)
	_, err := pipeline.Run(t.Context(), p, m, ref, pipeline.RunOptions{})
	require.NoError(t, err)
	want := digest(t, ref)
	resume := func(t *testing.T, resumed int) {
		t.Helper()
		r, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{Resume: true})
		require.NoError(t, err)
		assert.Equal(t, resumed, r.Resumed)
		assert.Equal(t, want, digest(t, dst))
		assert.ElementsMatch(t, []string{"dst", "ref", "src"}, directory(t, dir))
		require.NoError(t, os.RemoveAll(dst))
	}
	for done := range len(p.Shards) + 1 {
		zippedStage(t, dst, ref, p, done)
		resume(t, done)
	}

	const at = 2 // shards that are finished, and the place of the next
	next, before := p.Shards[at].Name, p.Shards[at-1].Name
	partial := func(names ...string) string { return filepath.Join(append([]string{dst + ".partial"}, names...)...) }
	whole, err := os.ReadFile(filepath.Join(ref, next))
	require.NoError(t, err)
	for name, c := range map[string]struct {
		leave   func(t *testing.T)
		resumed int
	}{
		"the format was writing": {func(t *testing.T) {
			write(t, partial("stream", next+".part"), "half of it")
			write(t, partial("stream", "its own", "notes"), "x")
			require.NoError(t, os.Symlink(ref, partial("stream", "link")))
			write(t, partial("scratch-123.lorakit"), "tensors")
		}, at},
		"it was complete": {func(t *testing.T) { write(t, partial("stream", next+".part"), string(whole)) }, at},
		"it was being noted": {func(t *testing.T) {
			write(t, partial("stream", next+".part"), string(whole))
			write(t, partial("shards.json.part"), `{"shards": [{"na`)
		}, at},
		"it was noted": {func(t *testing.T) {
			write(t, partial("stream", next+".part"), string(whole))
			writeNotes(t, dst, []pipeline.Streamed{noted(t, filepath.Join(ref, p.Shards[0].Name)),
				noted(t, filepath.Join(ref, before)), noted(t, filepath.Join(ref, next))})
		}, at},
		"a file that is not noted": {func(t *testing.T) { write(t, partial("out", next), string(whole)) }, at},
		"one of another content": {func(t *testing.T) {
			b, err := os.ReadFile(partial("out", before))
			require.NoError(t, err)
			b[len(b)/2] ^= 1
			write(t, partial("out", before), string(b))
		}, at - 1},
		"one that is shorter": {func(t *testing.T) { require.NoError(t, os.Truncate(partial("out", before), 9)) }, at - 1},
		"a link to the same": {func(t *testing.T) {
			require.NoError(t, os.Remove(partial("out", before)))
			require.NoError(t, os.Symlink(filepath.Join(ref, before), partial("out", before)))
		}, at - 1},
		"a folder": {func(t *testing.T) {
			require.NoError(t, os.Remove(partial("out", before)))
			require.NoError(t, os.Mkdir(partial("out", before), 0o777))
		}, -1},
		"notes that are cut off": {func(t *testing.T) {
			require.NoError(t, os.Truncate(partial("shards.json"), 40))
		}, 0},
		"notes of kept shares that are not asked for": {func(t *testing.T) {
			n := noted(t, filepath.Join(ref, before))
			n.Kept = [][]string{{"1", "1"}}
			writeNotes(t, dst, []pipeline.Streamed{n})
		}, 0},
		"no notes": {func(t *testing.T) { require.NoError(t, os.Remove(partial("shards.json"))) }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			zippedStage(t, dst, ref, p, at)
			c.leave(t)
			if c.resumed < 0 { // a rename cannot replace it, and it is nothing that a run leaves
				_, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{Resume: true})
				require.Error(t, err)
				assert.NoDirExists(t, dst)
				return
			}
			resume(t, c.resumed)
		})
	}
	t.Run("without --resume starts over", func(t *testing.T) {
		zippedStage(t, dst, ref, p, at)
		write(t, partial("stream", next+".part"), "half of it")
		r, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{})
		require.NoError(t, err)
		assert.Zero(t, r.Resumed)
		assert.Equal(t, want, digest(t, dst))
		require.NoError(t, os.RemoveAll(dst))
	})
	t.Run("another version of the format", func(t *testing.T) {
		zippedStage(t, dst, ref, p, at)
		m, p := planZipped(t, zipped{version: "2"}, src, dst, toZipped)
		_, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{Resume: true})
		require.ErrorIs(t, err, pipeline.ErrOtherPlan)
		assert.FileExists(t, partial("shards.json"))
	})
	for name, leave := range map[string]func(){
		"a link stream": func() { require.NoError(t, os.Symlink(ref, partial("stream"))) },
		"a file stream": func() { write(t, partial("stream"), "thesis") },
		"a folder of the name of the notes": func() {
			require.NoError(t, os.Remove(partial("shards.json")))
			write(t, partial("shards.json", "thesis"), "x")
		},
	} {
		t.Run(name, func(t *testing.T) {
			zippedStage(t, dst, ref, p, at)
			leave()
			_, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{Resume: true})
			require.ErrorIs(t, err, pipeline.ErrExists)
			require.ErrorContains(t, err, "is no stage of lorakit")
			assert.Equal(t, want, digest(t, ref))
		})
	}
}

// TestCompleteStreamed makes what is there again, beside it, and compares digests.
func TestCompleteStreamed(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "made", "dst")
	writeModel(t, src)
	log := &zippedLog{}
	m, p := planZipped(t, zipped{log: log}, src, dst, toZipped)
	run := func(z zipped, ctx context.Context) (pipeline.Result, error) {
		m, p := planZipped(t, z, src, dst, toZipped)
		return pipeline.Run(ctx, p, m, dst, pipeline.RunOptions{Resume: true})
	}
	_, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{})
	require.NoError(t, err)
	want := digest(t, dst)
	r, err := run(zipped{log: log}, t.Context())
	require.NoError(t, err)
	assert.True(t, r.Complete)
	assert.Equal(t, 2*len(p.Shards), log.calls["finished"])
	check := func(t *testing.T) {
		t.Helper()
		assert.Equal(t, []string{"dst"}, directory(t, filepath.Dir(dst)), "nothing is left beside it")
	}
	check(t)
	assert.Equal(t, want, digest(t, dst))

	name := filepath.Join(dst, p.Shards[1].Name)
	good, err := os.ReadFile(name)
	require.NoError(t, err)
	bad := slices.Clone(good)
	bad[len(bad)/2] ^= 4
	for says, change := range map[string]func(){
		"has other content": func() { write(t, name, string(bad)) },
		"has another size":  func() { write(t, name, string(good[:len(good)-1])) },
		"is missing":        func() { require.NoError(t, os.Remove(name)) },
	} {
		change()
		_, err = run(zipped{}, t.Context())
		require.ErrorIs(t, err, pipeline.ErrExists)
		require.ErrorContains(t, err, `"`+p.Shards[1].Name+`" `+says)
		check(t)
		write(t, name, string(good))
	}
	t.Run("interrupted", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		_, err := run(zipped{onWrite: func(ctx context.Context, _ string, i int, _ int64) error {
			if i > 0 {
				cancel()
				<-ctx.Done()
			}
			return ctx.Err()
		}}, ctx)
		require.ErrorIs(t, err, pipeline.ErrInterrupted)
		check(t)
	})
	t.Run("failed", func(t *testing.T) {
		_, err := run(zipped{onFinish: func(context.Context, string, int64) (int64, error) {
			return 0, errors.New("it cannot be")
		}}, t.Context())
		require.ErrorContains(t, err, `"`+p.Shards[0].Name+`": format zipped: it cannot be`)
		check(t)
	})
	assert.Equal(t, want, digest(t, dst))
	t.Run("one file", func(t *testing.T) {
		one := filepath.Join(filepath.Dir(dst), "one.zpd")
		for complete := range 2 {
			m, p := planZipped(t, zipped{}, src, one, toZipped)
			r, err := pipeline.Run(t.Context(), p, m, one, pipeline.RunOptions{Resume: true})
			require.NoError(t, err)
			assert.Equal(t, complete == 1, r.Complete)
		}
		assert.Equal(t, []string{"dst", "one.zpd"}, directory(t, filepath.Dir(dst)))
	})
}

// TestStreamedFaults has a format fail, or leave something else than it was to.
func TestStreamedFaults(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	clay := errors.New("clay")
	finish := func(do func(path string, size int64) (int64, error)) zipped {
		return zipped{onFinish: func(_ context.Context, path string, size int64) (int64, error) { return do(path, size) }}
	}
	for name, c := range map[string]struct {
		format zipped
		says   string
		kind   error
	}{
		"Create fails": {zipped{onCreate: func(context.Context, string) error { return clay }}, "format zipped: clay", clay},
		"Write fails": {zipped{onWrite: func(_ context.Context, _ string, i int, _ int64) error {
			if i == 1 {
				return clay
			}
			return nil
		}}, `format zipped: tensor "layers.0.up.weight.absmax": clay`, clay},
		"Finish fails": {finish(func(string, int64) (int64, error) { return 0, clay }), "format zipped: clay", clay},
		"two files": {finish(func(path string, size int64) (int64, error) {
			return size, os.WriteFile(path+".lock", nil, 0o666)
		}), `.part.lock" beside the file that it was to write, expected no other: malformed`, formats.ErrMalformed},
		"another name": {finish(func(path string, size int64) (int64, error) {
			return size, os.Rename(path, path+"2")
		}), `.part2" beside the file that it was to write`, formats.ErrMalformed},
		"no file": {finish(func(path string, size int64) (int64, error) { return size, os.Remove(path) }),
			"found no file where it was to write one", formats.ErrMalformed},
		"a link": {finish(func(path string, size int64) (int64, error) {
			away := filepath.Join(t.TempDir(), "away")
			return size, errors.Join(os.Rename(path, away), os.Symlink(away, path))
		}), "found a link where it was to write a file", formats.ErrMalformed},
		"another name for it": {finish(func(path string, size int64) (int64, error) {
			return size, os.Link(path, filepath.Join(t.TempDir(), "away"))
		}), "found a file that has another name too", formats.ErrMalformed},
		"a folder": {finish(func(path string, size int64) (int64, error) {
			return size, errors.Join(os.Remove(path), os.Mkdir(path, 0o777))
		}), "found something else (d---------)", formats.ErrMalformed},
		"too small": {finish(func(path string, size int64) (int64, error) { return size, os.Truncate(path, size-1) }),
			"bytes, expected ", formats.ErrMalformed},
		"no size": {finish(func(string, int64) (int64, error) { return -1, nil }), "expected -1 as it says",
			formats.ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			dst := filepath.Join(t.TempDir(), "dst")
			c.format.log = &zippedLog{}
			m, p := planZipped(t, c.format, src, dst, toZipped)
			_, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{})
			require.ErrorIs(t, err, c.kind)
			require.ErrorContains(t, err, c.says)
			assert.ErrorContains(t, err, p.Shards[0].Name)
			assert.NotContains(t, err.Error(), "\n")
			assert.Empty(t, directory(t, filepath.Dir(dst)), "nothing was finished")
			assert.Zero(t, c.format.log.open)
			assert.Equal(t, c.format.log.calls["created"], c.format.log.calls["aborted"])
		})
	}
	t.Run("a file put into the result", func(t *testing.T) { // where a format has no business
		dst := filepath.Join(t.TempDir(), "dst")
		m, p := planZipped(t, finish(func(path string, size int64) (int64, error) {
			return size, os.WriteFile(filepath.Join(path, "..", "..", "out", "evil.txt"), nil, 0o666)
		}), src, dst, toZipped)
		_, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{})
		require.ErrorIs(t, err, formats.ErrMalformed)
		require.ErrorContains(t, err, `found "evil.txt", expected only what was written there`)
		assert.NoDirExists(t, dst)
	})
	if runtime.GOOS == "windows" {
		return // it says otherwise that a disk is full
	}
	// A full disk, when a shard is finished: what there is stays, and is gone on with.
	for name, full := range map[string]error{"full": &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC},
		"other": clay} {
		t.Run(name, func(t *testing.T) {
			dst := filepath.Join(t.TempDir(), "dst")
			files := 0
			m, p := planZipped(t, zipped{onCreate: func(context.Context, string) error {
				if files++; files == 3 {
					return full
				}
				return nil
			}}, src, dst, toZipped)
			_, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{})
			require.ErrorIs(t, err, full)
			if full == clay {
				assert.Empty(t, directory(t, filepath.Dir(dst)))
				return
			}
			require.ErrorContains(t, err, fmt.Sprintf("2 of %d shards are finished", len(p.Shards)))
			assert.Equal(t, []string{"out", "plan.json", "shards.json"}, directory(t, dst+".partial"))
			r, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{Resume: true})
			require.NoError(t, err)
			assert.Equal(t, 2, r.Resumed)
		})
	}
}

// TestCancelStreamed ends a run while the format is at work: in Create, in Write, in Finish, of the first shard and of
// a later one.
func TestCancelStreamed(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	for _, file := range []int{1, 3} {
		for _, in := range []string{"Create", "Write", "Finish"} {
			t.Run(fmt.Sprint(in, file), func(t *testing.T) {
				dst := filepath.Join(t.TempDir(), "dst")
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				files := 0
				wait := func(at string, ctx context.Context) error {
					if at != in || files != file {
						return nil
					}
					cancel()
					<-ctx.Done()
					return ctx.Err()
				}
				log := &zippedLog{}
				m, p := planZipped(t, zipped{log: log,
					onCreate: func(ctx context.Context, _ string) error { files++; return wait("Create", ctx) },
					onWrite:  func(ctx context.Context, _ string, _ int, _ int64) error { return wait("Write", ctx) },
					onFinish: func(ctx context.Context, _ string, n int64) (int64, error) { return n, wait("Finish", ctx) },
				}, src, dst, toZipped)
				_, err := pipeline.Run(ctx, p, m, dst, pipeline.RunOptions{})
				require.ErrorIs(t, err, pipeline.ErrInterrupted)
				assert.Zero(t, log.open)
				assert.NoDirExists(t, dst)
				if file == 1 {
					assert.Empty(t, directory(t, filepath.Dir(dst)))
					return
				}
				assert.Equal(t, []string{"out", "plan.json", "shards.json"}, directory(t, dst+".partial"))
				assert.Len(t, directory(t, filepath.Join(dst+".partial", "out")), file-1)
			})
		}
	}
}

// TestStreamedOverlaps: the first tensor is sent while the last one cannot be read yet.
func TestStreamedOverlaps(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	src := filepath.Join(t.TempDir(), "a.safetensors")
	writeFile(t, src, stored{"a", tensor.BF16, tensor.Shape{500, 1000}, bf16(r)},
		stored{"b", tensor.BF16, tensor.Shape{700, 1000}, bf16(r)})
	b, err := os.ReadFile(src)
	require.NoError(t, err)
	written := make(chan struct{})
	once := sync.OnceFunc(func() { close(written) })
	z := zipped{onWrite: func(context.Context, string, int, int64) error { once(); return nil }}
	for _, o := range []pipeline.Options{{Quantize: "keep"}, {Quantize: "keep", DType: tensor.F32}} {
		folder := hooked{Memory: storagetest.Memory{"a.safetensors": b}, hook: func(off int64, _ int) error {
			if off < int64(len(b)-700*1000*2) {
				return nil
			}
			select {
			case <-written:
				return nil
			case <-time.After(10 * time.Second):
				return errors.New("nothing was written before the last tensor was read")
			}
		}}
		c, err := checkpoint.OpenIn(t.Context(), folder, "a.safetensors", withZipped(t, z))
		require.NoError(t, err)
		dst := filepath.Join(t.TempDir(), "a.zpd")
		p, err := pipeline.NewPlan(t.Context(), pipeline.Plain(c), dst, o)
		require.NoError(t, err)
		_, err = pipeline.Run(t.Context(), p, pipeline.Plain(c), dst, pipeline.RunOptions{Threads: 2})
		require.NoError(t, err)
		require.NoError(t, c.Close())
	}
}

// hooked is a folder that calls a hook before each read.
type hooked struct {
	storagetest.Memory
	hook func(off int64, n int) error
}

func (h hooked) Open(ctx context.Context, name string) (storage.File, error) {
	f, err := h.Memory.Open(ctx, name)
	return hookedFile{f, h.hook}, err
}

type hookedFile struct {
	storage.File
	hook func(off int64, n int) error
}

func (f hookedFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.hook(off, len(p)); err != nil {
		return 0, err
	}
	return f.File.ReadAt(p, off)
}

// TestResumeStreamedMerge interrupts a merge after each shard: what is kept of the adapter is known all the same.
func TestResumeStreamedMerge(t *testing.T) {
	for _, adapter := range []string{"rslora", "dora"} {
		o := pipeline.Options{To: "zipped", Quantize: "nf4", Params: block64double, MaxShardSize: 10 << 10}
		merged := func(z zipped) *pipeline.Merged {
			c := openWith(t, withZipped(t, z), llama)
			a, err := lora.Open("../fixtures/adapters/llama/"+adapter, lora.OpenOptions{})
			require.NoError(t, err)
			t.Cleanup(func() { a.Close() })
			m, err := pipeline.Merge(t.Context(), c, []lora.Weighted{{Adapter: a, Weight: 1}})
			require.NoError(t, err)
			return m
		}
		m := merged(zipped{})
		dst := filepath.Join(t.TempDir(), "dst")
		p, err := pipeline.NewPlan(t.Context(), m, dst, o)
		require.NoError(t, err)
		require.Greater(t, len(p.Shards), 3)
		ref, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{})
		require.NoError(t, err)
		require.NotEmpty(t, ref.Adapters[0].Modules)
		plain := o
		plain.To = "safetensors"
		_, other, _ := result(t, open(t, llama, "../fixtures/adapters/llama/"+adapter), plain, pipeline.RunOptions{})
		assert.Equal(t, other.Adapters, ref.Adapters)
		want := digest(t, dst)
		require.NoError(t, os.RemoveAll(dst))
		for stop := 2; stop <= len(p.Shards); stop++ {
			ctx, cancel := context.WithCancel(t.Context())
			files := 0
			again := merged(zipped{onCreate: func(context.Context, string) error {
				if files++; files == stop {
					cancel()
				}
				return nil
			}})
			_, err := pipeline.Run(ctx, p, again, dst, pipeline.RunOptions{})
			require.ErrorIs(t, err, pipeline.ErrInterrupted)
			r, err := pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{Resume: true})
			require.NoError(t, err)
			assert.Equal(t, stop-1, r.Resumed)
			assert.Equal(t, ref.Adapters, r.Adapters)
			assert.Equal(t, want, digest(t, dst))
			require.NoError(t, os.RemoveAll(dst))
		}
	}
}

// asZipped makes the test binary convert its source to a zipped destination, both named in it, so that tests can kill
// it.
const asZipped = "LORAKIT_TEST_AS_ZIPPED"

func asZippedMain() {
	args := strings.Split(os.Getenv(asZipped), "|")
	o, err := zippedRegistries(zipped{})
	if err == nil {
		err = func() error {
			dir, name, err := storage.Resolve(args[0], storage.Options{})
			if err != nil {
				return err
			}
			c, err := checkpoint.OpenIn(context.Background(), dir, name, o)
			if err != nil {
				return err
			}
			p, err := pipeline.NewPlan(context.Background(), pipeline.Plain(c), args[1], toZipped)
			if err != nil {
				return err
			}
			_, err = pipeline.Run(context.Background(), p, pipeline.Plain(c), args[1], pipeline.RunOptions{Resume: true})
			return err
		}()
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

// TestKillStreamed kills runs at random moments, some of them in the midst of going on: what is made in the end has the
// same bytes, and nothing is left.
func TestKillStreamed(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	child := func(dst string) *exec.Cmd {
		c := exec.Command(os.Args[0])
		c.Env = append(os.Environ(), asZipped+"="+src+"|"+dst)
		return c
	}
	ref := filepath.Join(t.TempDir(), "ref")
	start := time.Now()
	out, err := child(ref).CombinedOutput()
	require.NoError(t, err, "%s", out)
	took := time.Since(start)
	want := digest(t, ref)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	kills := 0
	for range 8 {
		dst := filepath.Join(t.TempDir(), "dst")
		for range 3 {
			c := child(dst)
			require.NoError(t, c.Start())
			time.Sleep(time.Duration(r.Int64N(int64(took))))
			require.NoError(t, c.Process.Kill())
			if c.Wait() != nil {
				kills++
			}
			if _, err := os.Stat(dst); err == nil {
				assert.Equal(t, want, digest(t, dst), "what is there is whole")
				break
			}
		}
		out, err := child(dst).CombinedOutput()
		require.NoError(t, err, "%s", out)
		assert.Equal(t, want, digest(t, dst))
		left := slices.DeleteFunc(directory(t, filepath.Dir(dst)), func(name string) bool {
			beside, _ := filepath.Match("scratch-*.lorakit", name) // of a comparison with what is there
			return beside
		})
		assert.Equal(t, []string{"dst"}, left)
	}
	t.Logf("%d kills", kills)
	assert.NotZero(t, kills)
}
