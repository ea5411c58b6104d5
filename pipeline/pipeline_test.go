package pipeline_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
	_ "github.com/lorakit/lorakit/quant/bnb"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

func TestMain(m *testing.M) {
	// The clock of regular expressions runs on until the last of them would have had its time.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/dlclark/regexp2/v2.runClock"))
}

// fill writes the bytes of a tensor of n elements.
type fill func(n int64) []byte

func bf16(r *rand.Rand) fill {
	return func(n int64) []byte {
		b := make([]byte, 0, 2*n)
		for range n {
			b = binary.LittleEndian.AppendUint16(b, uint16(math.Float32bits(float32(r.NormFloat64()*0.02))>>16))
		}
		return b
	}
}

func f32(r *rand.Rand) fill {
	return func(n int64) []byte {
		b := make([]byte, 0, 4*n)
		for range n {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(r.NormFloat64()*0.02)))
		}
		return b
	}
}

// stored is a tensor for writeFile.
type stored struct {
	name  string
	dtype tensor.DType
	shape tensor.Shape
	fill  fill
}

// writeFile writes a safetensors file.
func writeFile(t testing.TB, path string, tensors ...stored) {
	t.Helper()
	infos := make([]tensor.Info, len(tensors))
	for i, x := range tensors {
		infos[i] = tensor.Info{Name: x.name, DType: x.dtype, Shape: x.shape}
	}
	f, err := formats.Default.Lookup("safetensors")
	require.NoError(t, err)
	l, err := f.Layout(context.Background(), infos, formats.Options{SingleFile: filepath.Base(path)})
	require.NoError(t, err)
	b := make([]byte, l.Shards[0].Size)
	copy(b, l.Shards[0].Header)
	for i, k := range l.Shards[0].Tensors {
		copy(b[l.Shards[0].Offsets[i]:], tensors[k].fill(infos[k].Count()))
	}
	require.NoError(t, os.WriteFile(path, b, 0o666))
}

// writeModel writes a folder of six shards with linears of awkward sizes, and one without an architecture that is
// known.
func writeModel(t testing.TB, dir string) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	require.NoError(t, os.Mkdir(dir, 0o777))
	weightMap := map[string]string{}
	for i := range 6 {
		file := fmt.Sprintf("model-%05d-of-00006.safetensors", i+1)
		layer := fmt.Sprintf("layers.%d.", i)
		tensors := []stored{
			{layer + "up.weight", tensor.BF16, tensor.Shape{700, 1009}, bf16(r)},
			{layer + "down.weight", tensor.F32, tensor.Shape{333, int64(101 + i)}, f32(r)},
			{layer + "norm.weight", tensor.BF16, tensor.Shape{1009}, bf16(r)},
		}
		writeFile(t, filepath.Join(dir, file), tensors...)
		for _, x := range tensors {
			weightMap[x.name] = file
		}
	}
	index, err := json.Marshal(map[string]any{"metadata": map[string]any{}, "weight_map": weightMap},
		json.Deterministic(true))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "model.safetensors.index.json"), index, 0o666))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"),
		[]byte(`{"model_type": "none_such", "torch_dtype": "bfloat16"}`), 0o666))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "LICENSE"), []byte("as you like"), 0o666))
}

// nf4 is what most tests ask for.
var nf4 = pipeline.Options{Quantize: "nf4", Params: block64double, MaxShardSize: 300_000}

func convert(ctx context.Context, src, dst string, o pipeline.Options, ro pipeline.RunOptions) (pipeline.Result,
	error) {
	c, err := checkpoint.Open(context.Background(), src)
	if err != nil {
		return pipeline.Result{}, err
	}
	defer c.Close()
	p, err := pipeline.NewPlan(ctx, pipeline.Plain(c), dst, o)
	if err != nil {
		return pipeline.Result{}, err
	}
	return pipeline.Run(ctx, p, pipeline.Plain(c), dst, ro)
}

// digest identifies a folder or file: names and bytes.
func digest(t testing.TB, path string) string {
	t.Helper()
	h := sha256.New()
	require.NoError(t, filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(path, p)
		fmt.Fprintln(h, rel)
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(h, f)
		return err
	}))
	return fmt.Sprintf("%x", h.Sum(nil))
}

func TestSameBytesForAnyThreadsAndMemory(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	for name, o := range map[string]pipeline.Options{
		"nf4": nf4,
		"fp4 single": {Quantize: "fp4", Params: quant.Params{{Name: "block_size", Value: int64(4096)}},
			MaxShardSize: 1 << 40},
		"int8": {Quantize: "int8", MaxShardSize: 300_000},
		"cast": {Quantize: "keep", DType: tensor.F16, MaxShardSize: 300_000},
	} {
		t.Run(name, func(t *testing.T) {
			want := ""
			for _, ro := range []pipeline.RunOptions{{}, {Threads: 1}, {Threads: 7}, {Memory: 64 << 20, Threads: 2},
				{Memory: 2 << 30}} {
				dst := filepath.Join(t.TempDir(), "dst")
				_, err := convert(context.Background(), src, dst, o, ro)
				require.NoError(t, err)
				got := digest(t, dst)
				if want == "" {
					want = got
				}
				require.Equal(t, want, got, "%+v", ro)
			}
		})
	}
}

func TestTooLittleMemorySaysTheLeast(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	dst := filepath.Join(t.TempDir(), "dst")
	_, err := convert(context.Background(), src, dst, nf4, pipeline.RunOptions{Memory: 1 << 20})
	require.ErrorIs(t, err, pipeline.ErrMemory)
	var least int64
	hints := hint.Of(err)
	require.Len(t, hints, 1)
	require.Equal(t, "Memory", hints[0].Option)
	_, scanErr := fmt.Sscanf(hints[0].Value, "%dMiB", &least)
	require.NoError(t, scanErr, err)
	assert.NoDirExists(t, dst+".partial")
	_, err = convert(context.Background(), src, dst, nf4, pipeline.RunOptions{Memory: (least + 4) << 20})
	require.NoError(t, err, "what was said to do does")
}

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

func TestNotFinite(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "a.safetensors")
	r := rand.New(rand.NewPCG(5, 6))
	spoilt := func(at int64, bits uint16) fill {
		return func(n int64) []byte {
			b := bf16(r)(n)
			binary.LittleEndian.PutUint16(b[2*at:], bits)
			return b
		}
	}
	for _, typ := range []string{"nf4", "fp4", "int8"} {
		for _, bits := range []uint16{0x7fc0, 0xff81, 0x7f80, 0xff80} {
			writeFile(t, src, stored{"a.weight", tensor.BF16, tensor.Shape{600, 700}, spoilt(555*700+13, bits)})
			dst := filepath.Join(dir, "b.safetensors")
			o := pipeline.Options{Quantize: typ, Params: block64double, Include: []string{"*"}}
			_, err := convert(context.Background(), src, dst, o, pipeline.RunOptions{})
			var bad *quant.NonFiniteError
			require.ErrorAs(t, err, &bad, "%s %x", typ, bits)
			assert.EqualValues(t, 555*700+13, bad.Index)
			assert.Contains(t, err.Error(), `tensor "a.weight"`)
			assert.Contains(t, err.Error(), "[555, 13]")
			assert.NoFileExists(t, dst)
			o.AllowNonFinite = true
			_, err = convert(context.Background(), src, dst, o, pipeline.RunOptions{})
			require.NoError(t, err)
			require.NoError(t, os.Remove(dst))
		}
	}
	writeFile(t, src, stored{"a.weight", tensor.BF16, tensor.Shape{8, 8}, spoilt(9, 0x4780)}) // 65536: no float16
	_, err := convert(context.Background(), src, filepath.Join(dir, "b.safetensors"),
		pipeline.Options{Quantize: "int8", Include: []string{"*"}}, pipeline.RunOptions{})
	require.ErrorContains(t, err, "65504")
}

func TestWhatCannotBeQuantised(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "a.safetensors"), filepath.Join(dir, "b.safetensors")
	r := rand.New(rand.NewPCG(7, 8))
	bytesOf := func(width int64) fill { return func(n int64) []byte { return make([]byte, n*width) } }
	all := pipeline.Options{Quantize: "nf4", Params: block64double, Include: []string{"*"}}

	t.Run("integers and nothing stay", func(t *testing.T) {
		writeFile(t, src,
			stored{"w", tensor.F32, tensor.Shape{3, 5, 7}, f32(r)},
			stored{"scalar", tensor.F32, tensor.Shape{}, f32(r)},
			stored{"ids", tensor.I64, tensor.Shape{4}, bytesOf(8)},
			stored{"none", tensor.BF16, tensor.Shape{0, 5}, bytesOf(2)})
		_, err := convert(context.Background(), src, dst, all, pipeline.RunOptions{})
		require.NoError(t, err)
		c, err := checkpoint.Open(context.Background(), dst)
		require.NoError(t, err)
		defer c.Close()
		how := map[string]string{}
		for _, w := range c.Weights {
			how[w.Name] = fmt.Sprint(w.DType, w.Shape, w.Decoder != nil)
		}
		assert.Equal(t, map[string]string{"w": "F32 [3, 5, 7] true", "scalar": "F32 [] true", "ids": "I64 [4] false",
			"none": "BF16 [0, 5] false"}, how)
	})
	t.Run("other floats are refused", func(t *testing.T) {
		writeFile(t, src, stored{"w", tensor.F8E4M3, tensor.Shape{8, 8}, bytesOf(1)})
		_, err := convert(context.Background(), src, dst, all, pipeline.RunOptions{Force: true})
		require.ErrorIs(t, err, quant.ErrUnsupported)
		assert.Contains(t, err.Error(), "F8_E4M3")
	})
	t.Run("a glob that matches nothing", func(t *testing.T) {
		o := all
		o.Include = []string{"w", "x.*"}
		_, err := convert(context.Background(), src, dst, o, pipeline.RunOptions{Force: true})
		require.ErrorContains(t, err, `"x.*" matches none`)
	})
}

// TestHuge quantises a tensor of more than 2^31 elements, three-dimensional, from a sparse file, in less memory than
// its absmax take.
func TestHuge(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "a.safetensors"), filepath.Join(dir, "b.safetensors")
	shape := tensor.Shape{3, 1 << 14, 1<<16/3*2 + 7}
	info := tensor.Info{Name: "w", DType: tensor.BF16, Shape: shape}
	n := info.Count()
	require.Greater(t, n, int64(1)<<31)
	f, err := formats.Default.Lookup("safetensors")
	require.NoError(t, err)
	l, err := f.Layout(context.Background(), []tensor.Info{info}, formats.Options{SingleFile: "a.safetensors"})
	require.NoError(t, err)
	file, err := os.Create(src)
	require.NoError(t, err)
	_, err = file.Write(l.Shards[0].Header)
	require.NoError(t, err)
	require.NoError(t, file.Truncate(l.Shards[0].Size))
	last := []byte{0x00, 0xc0, 0x80, 0x3f, 0x00, 0x40} // -2, 1, 2
	_, err = file.WriteAt(last, l.Shards[0].Size-int64(len(last)))
	require.NoError(t, err)
	require.NoError(t, file.Close())

	_, err = convert(context.Background(), src, dst,
		pipeline.Options{Quantize: "nf4", Params: block64double, Include: []string{"*"}},
		pipeline.RunOptions{Memory: 96 << 20})
	require.NoError(t, err)
	c, err := checkpoint.Open(context.Background(), dst)
	require.NoError(t, err)
	defer c.Close()
	require.Len(t, c.Weights, 1)
	w := c.Weights[0]
	assert.Equal(t, shape, w.Shape)
	codes := w.Parts[0]
	assert.Equal(t, (n+1)/2, codes.Bytes)
	tail := make([]byte, 3)
	_, err = codes.Data.ReadAt(tail, codes.Offset+codes.Bytes-3)
	require.NoError(t, err)
	// n is even: -2, 1, 2 over an absmax of 2 are -1, 0.5, 1.
	assert.Equal(t, []byte{0x77, 0x70, 0xcf}, tail)
	assert.Zero(t, n%2)
	assert.NoDirExists(t, dst+".partial")
}

func TestGlobCrossesDots(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "a.safetensors")
	r := rand.New(rand.NewPCG(9, 9))
	names := []string{"model.layers.0.up.weight", "model.layers.10.up.weight", "model.layers.1.down.weight", "up"}
	var all []stored
	for _, n := range names {
		all = append(all, stored{n, tensor.F32, tensor.Shape{4, 4}, f32(r)})
	}
	writeFile(t, src, all...)
	for glob, want := range map[string][]string{
		"*":                      names,
		"*.up.weight":            names[:2],
		"model.layers.?.*":       {names[0], names[2]},
		"*up*":                   {names[0], names[1], names[3]},
		"model.layers.0.up.weig": nil,
		"*1*.weight":             names[1:3],
	} {
		c, err := checkpoint.Open(context.Background(), src)
		require.NoError(t, err)
		p, err := pipeline.NewPlan(context.Background(), pipeline.Plain(c), "x.safetensors",
			pipeline.Options{Quantize: "nf4", Params: block64, Include: []string{glob}})
		c.Close()
		if want == nil {
			require.Error(t, err)
			continue
		}
		require.NoError(t, err)
		var got []string
		for _, j := range p.Shards[0].Jobs {
			if j.Encode != nil {
				got = append(got, j.Weight)
			}
		}
		assert.ElementsMatch(t, want, got, glob)
	}
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

func TestConfigThatIsNoFile(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	config := filepath.Join(src, "config.json")
	require.NoError(t, os.Remove(config))
	require.NoError(t, os.Mkdir(config, 0o777))
	_, err := checkpoint.Open(context.Background(), src)
	require.ErrorIs(t, err, storage.ErrNotRegular)
}

// TestForeignScheme leaves weights alone that are stored as something that is not read here.
func TestForeignScheme(t *testing.T) {
	src, dst := filepath.Join(t.TempDir(), "src"), filepath.Join(t.TempDir(), "dst")
	writeModel(t, src)
	for config, says := range map[string]string{
		`{"quantization_config": {"quant_method": "gptq"}}`: `stored as "gptq", expected`,
		// As mlx-lm writes it, and its older versions.
		`{"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}}`: "stored as MLX's affine quantisation of 4 bits, expected",
		`{"quantization": {"group_size": 32, "bits": 8, "mode": "affine", "lm_head": false}}`:                   "stored as MLX's affine quantisation of 8 bits, expected",
		`{"quantization_config": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}`:                               `stored as MLX's "mxfp4" quantisation of 4 bits, expected`,
		`{"quantization_config": {}}`: "stored as a scheme that its quantization_config does " +
			"not name, expected",
		`{"quantization_config": {"group_size": 1, "bits": "4"}}`: "stored as a scheme that its quantization_config does " +
			"not name, expected",
	} {
		require.NoError(t, os.WriteFile(filepath.Join(src, "config.json"), []byte(config), 0o666))
		for _, o := range []pipeline.Options{{Quantize: "nf4", Params: block64}, {Quantize: "none"},
			{Quantize: "keep", DType: tensor.BF16}} {
			_, err := convert(context.Background(), src, dst, o, pipeline.RunOptions{})
			require.ErrorIs(t, err, pipeline.ErrRefused, config)
			assert.ErrorContains(t, err, says)
			assert.ErrorContains(t, err, "bitsandbytes")
		}
	}
	_, err := convert(context.Background(), src, dst, pipeline.Options{Quantize: "keep"}, pipeline.RunOptions{})
	require.NoError(t, err)
}

// TestSkipListIsNeverNullByChance quantises everything there is: a null list would leave the loader to its own choice.
func TestSkipListIsNeverNullByChance(t *testing.T) {
	src, dst := filepath.Join(t.TempDir(), "src"), filepath.Join(t.TempDir(), "dst")
	writeModel(t, src)
	o := nf4
	o.Include = []string{"*.weight"}
	_, err := convert(context.Background(), src, dst, o, pipeline.RunOptions{})
	require.NoError(t, err)
	b, err := os.ReadFile(filepath.Join(dst, "config.json"))
	require.NoError(t, err)
	assert.Contains(t, string(b), `"llm_int8_skip_modules": []`)
}

func TestCompareAtTheEnds(t *testing.T) {
	dir := t.TempDir()
	f64 := func(x ...float64) fill {
		return func(int64) []byte {
			var b []byte
			for _, v := range x {
				b = binary.LittleEndian.AppendUint64(b, math.Float64bits(v))
			}
			return b
		}
	}
	for _, c := range []struct {
		a, b   []float64
		rel    float64
		maxAbs float64
	}{
		{[]float64{1e200, -1e200}, []float64{2e200, -2e200}, 1, 1e200},
		{[]float64{1e-200, 0}, []float64{2e-200, 0}, 1, 1e-200},
		{[]float64{0, 0}, []float64{0, 0}, 0, 0},
		{[]float64{0, 0}, []float64{0, 1}, math.Inf(1), 1},
		{[]float64{math.NaN(), 3}, []float64{math.NaN(), 3}, 0, 0},
		{[]float64{math.NaN(), 3}, []float64{1, 3}, math.Inf(1), math.Inf(1)},
		{[]float64{math.Inf(1), 3}, []float64{math.Inf(1), 3}, 0, 0},
		{[]float64{3, 4}, []float64{3, 4.5}, 0.1, 0.5},
	} {
		var open []*checkpoint.Checkpoint
		for i, x := range [][]float64{c.a, c.b} {
			path := filepath.Join(dir, fmt.Sprint(i, ".safetensors"))
			writeFile(t, path, stored{"w", tensor.F64, tensor.Shape{2}, f64(x...)})
			k, err := checkpoint.Open(context.Background(), path)
			require.NoError(t, err)
			open = append(open, k)
		}
		r, err := checkpoint.Compare(context.Background(), open[0], open[1])
		require.NoError(t, err)
		for _, k := range open {
			k.Close()
		}
		for _, got := range []float64{r.RelRMS, r.Tensors[0].RelRMS} {
			if math.IsInf(c.rel, 1) {
				assert.Equal(t, c.rel, got, "%v", c)
			} else {
				assert.InDelta(t, c.rel, got, 1e-12, "%v", c)
			}
		}
		assert.Equal(t, c.maxAbs, r.MaxAbs)
	}
}

// TestManyRunsAtOnce has several runs write to one destination: one wins and its result is whole, the others are told
// so.
func TestManyRunsAtOnce(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	options := []pipeline.Options{nf4, {Quantize: "int8", MaxShardSize: 300_000}, {Quantize: "keep"}}
	clean := map[string]bool{}
	for _, o := range options {
		dst := filepath.Join(t.TempDir(), "dst")
		_, err := convert(context.Background(), src, dst, o, pipeline.RunOptions{})
		require.NoError(t, err)
		clean[digest(t, dst)] = true
	}
	for range 40 {
		dir := t.TempDir()
		dst := filepath.Join(dir, "dst")
		errs := make(chan error)
		const runs = 6
		for i := range runs {
			go func() {
				_, err := convert(context.Background(), src, dst, options[i%len(options)], pipeline.RunOptions{})
				errs <- err
			}()
		}
		won := 0
		for range runs {
			err := <-errs
			switch {
			case err == nil:
				won++
			default:
				assert.True(t, errors.Is(err, pipeline.ErrBusy) || errors.Is(err, pipeline.ErrExists), "%v", err)
			}
		}
		require.Equal(t, 1, won)
		require.True(t, clean[digest(t, dst)], "the result is whole")
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Len(t, entries, 1, "nothing is left over")
	}
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

// TestVeryManyTensors is refused before it takes the memory that it may not have.
func TestVeryManyTensors(t *testing.T) {
	src := filepath.Join(t.TempDir(), "a.safetensors")
	var all []stored
	for i := range 20_000 {
		all = append(all, stored{fmt.Sprintf("l.%d.up.weight", i), tensor.U8, tensor.Shape{1},
			func(int64) []byte { return []byte{1} }})
	}
	writeFile(t, src, all...)
	c, err := checkpoint.Open(context.Background(), src)
	require.NoError(t, err)
	defer c.Close()
	o := pipeline.Options{Quantize: "keep"}
	require.ErrorIs(t, pipeline.CheckMemory(pipeline.Plain(c), o, 50<<20), pipeline.ErrMemory)
	require.NoError(t, pipeline.CheckMemory(pipeline.Plain(c), o, 0))
	dst := filepath.Join(t.TempDir(), "b.safetensors")
	_, err = convert(context.Background(), src, dst, o, pipeline.RunOptions{Memory: 96 << 20})
	require.NoError(t, err)
}
