package pipeline_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/storage/storagetest"
	"github.com/lorakit/lorakit/tensor"
)

// TestPlanOfStreamedIsAValue carries out a plan that was saved and read back, with metadata of all types that it may
// have.
func TestPlanOfStreamedIsAValue(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src.toy")
	writeToy(t, src, toyHeader{Tensors: []toyTensor{{tensor.Info{Name: "w", DType: tensor.U8, Shape: tensor.Shape{3}}, 0}},
		Metadata: []toyPair{
			{"z.first", "string", []byte(`"text"`)}, {"count", "uint32", []byte("4294967295")},
			{"rope", "float32", []byte("0.1")}, {"flag", "bool", []byte("true")},
			{"tokens", "[]string", []byte(`["<s>", "a\"b", ""]`)}, {"none", "[]string", []byte(`[]`)},
			{"scores", "[]float32", []byte("[1, -0.5]")}, {"big", "int64", []byte("-9007199254740993")},
		}})
	oo := withZipped(t, zipped{version: "7"})
	require.NoError(t, oo.Formats.Register(toyFormat{}))
	c := openWith(t, oo, src)
	dst := filepath.Join(dir, "dst.zpd")
	p, err := pipeline.NewPlan(t.Context(), pipeline.Plain(c), dst, pipeline.Options{Quantize: "keep"})
	require.NoError(t, err)
	b, err := json.Marshal(p)
	require.NoError(t, err)
	assert.Contains(t, string(b), `"size":-1`)
	assert.Contains(t, string(b), `"versions":{"format zipped":"7"}`)
	var again pipeline.Plan
	require.NoError(t, json.Unmarshal(b, &again))
	assert.Equal(t, p.Digest(), again.Digest())
	_, err = pipeline.Run(t.Context(), &again, pipeline.Plain(c), dst, pipeline.RunOptions{})
	require.NoError(t, err)
	assert.Equal(t, c.Metadata(), openWith(t, oo, dst).Metadata())

	for says, m := range map[string]pipeline.Metadatum{
		`metadata "x": found the type "complex64", expected one that metadata have`: {Name: "x", Type: "complex64"},
		`metadata "x": found 2 values of one bool`: {Name: "x", Type: "bool",
			Values: []string{"true", "false"}},
		`metadata "x": strconv.ParseInt`: {Name: "x", Type: "[]int8", Values: []string{"1", "128"}},
	} {
		again.Metadata = []pipeline.Metadatum{m}
		_, err = pipeline.Run(t.Context(), &again, pipeline.Plain(c), filepath.Join(dir, "no.zpd"), pipeline.RunOptions{})
		require.ErrorIs(t, err, pipeline.ErrOtherPlan)
		require.ErrorContains(t, err, says)
	}
}

// TestMetadataOfAllTypes go through a plan as they are.
func TestMetadataOfAllTypes(t *testing.T) {
	m := formats.Metadata{
		{Name: "a", Value: int8(-8)}, {Name: "b", Value: int16(-16)}, {Name: "c", Value: int32(-32)},
		{Name: "d", Value: int64(math.MinInt64)}, {Name: "e", Value: uint8(8)}, {Name: "f", Value: uint16(16)},
		{Name: "g", Value: uint32(32)}, {Name: "h", Value: uint64(math.MaxUint64)}, {Name: "i", Value: float32(0.1)},
		{Name: "j", Value: math.Inf(-1)}, {Name: "k", Value: true}, {Name: "l", Value: "text\n"},
		{Name: "m", Value: []int8{1, -1}}, {Name: "n", Value: []int16{2}}, {Name: "o", Value: []int32{}},
		{Name: "p", Value: []int64{math.MaxInt64}}, {Name: "q", Value: []uint8{1, 2}}, {Name: "r", Value: []uint16{3}},
		{Name: "s", Value: []uint32{4}}, {Name: "t", Value: []uint64{math.MaxUint64}},
		{Name: "u", Value: []float32{float32(math.Inf(1)), 1e-45}}, {Name: "v", Value: []float64{0.1, 5e-324}},
		{Name: "w", Value: []bool{false, true}}, {Name: "x", Value: []string{"", "a,b", "\u00e9"}},
	}
	require.NoError(t, m.Check())
	got, err := pipeline.MetadataRoundTrip(m)
	require.NoError(t, err)
	assert.Equal(t, m, got)
}

// hungry is a format for which the host needs memory.
type hungry struct {
	zipped
	bytes int64
	most  *atomic.Int64
}

func (h hungry) Memory(streams int) int64 {
	h.most.Store(max(h.most.Load(), int64(streams)))
	return h.bytes
}

func TestMemoryOfAFormat(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	writeModel(t, src)
	h := hungry{bytes: 300 << 20, most: new(atomic.Int64)}
	m := pipeline.Plain(openWith(t, withZipped(t, h), src))
	p, err := pipeline.NewPlan(t.Context(), m, dst, toZipped)
	require.NoError(t, err)
	_, err = pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{})
	require.ErrorIs(t, err, pipeline.ErrMemory)
	assert.EqualValues(t, 1, h.most.Load(), "one file at a time")
	var least int64
	_, scanErr := fmt.Sscanf(hint.Of(err)[0].Value, "%dMiB", &least)
	require.NoError(t, scanErr)
	_, err = pipeline.Run(t.Context(), p, m, dst, pipeline.RunOptions{Memory: (least + 4) << 20})
	require.NoError(t, err, "what was said to do does")

	// As a source each worker reads of it.
	h.bytes = 0
	m = pipeline.Plain(openWith(t, withZipped(t, h), dst))
	back := filepath.Join(dir, "back")
	p, err = pipeline.NewPlan(t.Context(), m, back, pipeline.Options{To: "safetensors", Quantize: "none"})
	require.NoError(t, err)
	_, err = pipeline.Run(t.Context(), p, m, back, pipeline.RunOptions{Threads: 3})
	require.NoError(t, err)
	assert.EqualValues(t, 6, h.most.Load())
}

// versionedToy is the toy scheme in a version.
type versionedToy struct{ toyScheme }

func (versionedToy) Version() string { return "t2" }

// TestVersions says whose version is part of a plan: of the formats on both sides, and of the schemes that have a part
// in it.
func TestVersions(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	writeToyModel(t, src)
	oo := withZipped(t, zipped{version: "7"})
	oo.Schemes = new(quant.Registry)
	require.NoError(t, oo.Schemes.Register(versionedToy{}))
	plan := func(src string, o pipeline.Options) *pipeline.Plan {
		p, err := pipeline.NewPlan(t.Context(), pipeline.Plain(openWith(t, oo, src)), filepath.Join(dir, "dst"), o)
		require.NoError(t, err)
		return p
	}
	zip, toy := "format zipped", "scheme toy"
	t4 := pipeline.Options{To: "zipped", Quantize: "t4"}
	assert.Nil(t, plan(src, pipeline.Options{Quantize: "keep"}).Versions)
	assert.Equal(t, map[string]string{zip: "7", toy: "t2"}, plan(src, t4).Versions)
	assert.Equal(t, map[string]string{zip: "7"}, plan(src, pipeline.Options{To: "zipped", Quantize: "keep"}).Versions)
	made := filepath.Join(dir, "made")
	convertWith(t, oo, src, made, t4)
	assert.Equal(t, map[string]string{zip: "7", toy: "t2"},
		plan(made, pipeline.Options{To: "safetensors", Quantize: "none"}).Versions)
	assert.Equal(t, map[string]string{zip: "7"}, plan(made, pipeline.Options{Quantize: "keep"}).Versions, "it is copied")

	one := plan(src, t4).Digest()
	oo = withZipped(t, zipped{version: "8"})
	oo.Schemes = new(quant.Registry)
	require.NoError(t, oo.Schemes.Register(versionedToy{}))
	assert.NotEqual(t, one, plan(src, t4).Digest())
	b, err := json.Marshal(plan(src, pipeline.Options{Quantize: "keep"}))
	require.NoError(t, err)
	assert.NotContains(t, string(b), "versions")
	assert.NotContains(t, string(b), `"metadata"`)
}

// misplaced is a format whose Layout is not what it may be.
type misplaced struct {
	zipped
	change func(s *formats.Shard)
}

func (m misplaced) Layout(ctx context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	l, err := m.zipped.Layout(ctx, tensors, o)
	m.change(&l.Shards[0])
	return l, err
}

// notAStreamer is a format that has no Create.
type notAStreamer struct{ formats.Format }

func TestLayoutsOfStreamsAreChecked(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	writeModel(t, src)
	for says, change := range map[string]func(s *formats.Shard){
		`tensor "layers.0.norm.weight": found it at byte 134533, expected it at 134532`: func(s *formats.Shard) {
			s.Offsets[1]++
		},
		`tensor "layers.0.down.weight": found it at byte 134532, expected it at 0, after the one before`: func(s *formats.Shard) {
			s.Offsets[0] = s.Offsets[1]
		},
		"found it at byte -8":                    func(s *formats.Shard) { s.Offsets[0] = -8 },
		"found a header or pieces":               func(s *formats.Shard) { s.Header = []byte("x") },
		"found a size of -2":                     func(s *formats.Shard) { s.Size = -2 },
		`"a/b": found a file of unknown size in`: func(s *formats.Shard) { s.Name = "a/b" },
		`found the shard "../x", expected one`:   func(s *formats.Shard) { s.Name = "../x" },
		`found the shard "", expected one`:       func(s *formats.Shard) { s.Name = "" },
	} {
		c := openWith(t, withZipped(t, misplaced{change: change}), src)
		_, err := pipeline.NewPlan(t.Context(), pipeline.Plain(c), filepath.Join(dir, "dst"),
			pipeline.Options{To: "zipped", Quantize: "keep"})
		require.ErrorIs(t, err, formats.ErrMalformed, says)
		assert.ErrorContains(t, err, "format zipped: ")
		assert.ErrorContains(t, err, says)
	}
	c := openWith(t, withZipped(t, notAStreamer{zipped{}}), src)
	_, err := pipeline.NewPlan(t.Context(), pipeline.Plain(c), filepath.Join(dir, "dst"),
		pipeline.Options{To: "zipped", Quantize: "keep"})
	require.ErrorIs(t, err, formats.ErrMalformed)
	assert.ErrorContains(t, err, "found no size of it, expected one of a format that writes no files")
}

// TestStreamedOrder: a format gets the tensors in the order of its Layout, empty ones among them.
func TestStreamedOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	dir := t.TempDir()
	src := filepath.Join(dir, "a.safetensors")
	writeFile(t, src, stored{"a", tensor.BF16, tensor.Shape{0}, bf16(r)},
		stored{"b", tensor.BF16, tensor.Shape{3}, bf16(r)}, stored{"c", tensor.BF16, tensor.Shape{0, 2}, bf16(r)},
		stored{"d", tensor.F32, tensor.Shape{}, f32(r)}, stored{"e", tensor.F32, tensor.Shape{0}, f32(r)})
	oo := withZipped(t, zipped{})
	for i, o := range []pipeline.Options{{Quantize: "keep"}, {Quantize: "keep", DType: tensor.F32}} {
		dst := filepath.Join(dir, fmt.Sprint(i, ".zpd"))
		convertWith(t, oo, src, dst, o)
		c := openWith(t, oo, dst)
		var names []string
		for _, w := range c.Weights {
			names = append(names, w.Name)
		}
		source := openWith(t, oo, src)
		var want []string
		for _, w := range source.Weights {
			want = append(want, w.Name)
		}
		assert.Equal(t, want, names)
		d, err := checkpoint.Compare(t.Context(), source, c)
		require.NoError(t, err)
		assert.Zero(t, d.MaxAbs)
	}
	// No tensors at all.
	none := filepath.Join(dir, "none.safetensors")
	writeFile(t, none)
	convertWith(t, oo, none, filepath.Join(dir, "none.zpd"), pipeline.Options{Quantize: "keep"})
	assert.Empty(t, openWith(t, oo, filepath.Join(dir, "none.zpd")).Weights)
}

// TestWeightsOfAFormatStay: what a format says is its own file of weights is not carried along.
func TestWeightsOfAFormatStay(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	writeModel(t, src)
	write(t, filepath.Join(src, "weights.elsewhere"), "x")
	write(t, filepath.Join(src, "notes.elsewhere"), "x")
	p := convertWith(t, withZipped(t, zipped{}), src, dst, pipeline.Options{Quantize: "keep"})
	assert.NoFileExists(t, filepath.Join(dst, "weights.elsewhere"))
	assert.FileExists(t, filepath.Join(dst, "notes.elsewhere"))
	assert.Contains(t, p.Notices, `not carried along: "weights.elsewhere"`)
}

// TestAdapterStreamed writes an adapter in a format that writes its files itself.
func TestAdapterStreamed(t *testing.T) {
	formats.Register(zipped{})
	a, err := lora.Open("../fixtures/adapters/llama/rslora", lora.OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	e, err := a.Encode(lora.EncodeOptions{})
	require.NoError(t, err)
	dir := t.TempDir()
	ref, dst := filepath.Join(dir, "ref"), filepath.Join(dir, "dst")
	require.NoError(t, pipeline.WriteAdapter(t.Context(), e, "", ref, 0, false))
	e.Format, e.File = "zipped", "adapter_model.zpd"
	require.NoError(t, pipeline.WriteAdapter(t.Context(), e, "", dst, 0, false))
	assert.Equal(t, []string{"adapter_config.json", "adapter_model.zpd"}, directory(t, dst))
	assert.Equal(t, []string{"dst", "ref"}, directory(t, dir))
	oo := withZipped(t, zipped{})
	d, err := checkpoint.Compare(t.Context(), openWith(t, oo, filepath.Join(ref, "adapter_model.safetensors")),
		openWith(t, oo, filepath.Join(dst, "adapter_model.zpd")))
	require.NoError(t, err)
	assert.Zero(t, d.MaxAbs)
	assert.NotEmpty(t, d.Tensors)
	assert.Empty(t, append(d.Missing, d.Extra...))
	// By an extension it is refused: the dialects are files of their own formats.
	e, err = a.Encode(lora.EncodeOptions{To: lora.Kohya})
	require.NoError(t, err)
	err = pipeline.WriteAdapter(t.Context(), e, "", filepath.Join(dir, "x.zpd"), 0, false)
	require.ErrorIs(t, err, pipeline.ErrRefused)
	assert.ErrorContains(t, err, "a kohya adapter is a safetensors file")
}

// ranged is a folder whose files are best read in long ranges.
type ranged struct {
	storagetest.Memory
	calls *atomic.Int64
	bad   string
}

func (r ranged) Open(ctx context.Context, name string) (storage.File, error) {
	f, err := r.Memory.Open(ctx, name)
	return rangedFile{f, r}, err
}

type rangedFile struct {
	storage.File
	ranged
}

func (f rangedFile) ReadRange(off, n int64, use func(p []byte, at int64) error) error {
	f.calls.Add(1)
	b := make([]byte, n)
	if _, err := f.ReadAt(b, off); err != nil {
		return err
	}
	for at := int64(0); at < n; {
		p := b[at:min(at+100_000, n)]
		next := at + int64(len(p))
		switch {
		case f.bad == "gap" && at > 0:
			at++
		case f.bad == "long" && next == n:
			p = append(p[:len(p):len(p)], 0)
		case f.bad == "short" && next == n:
			return nil
		case f.bad == "fails" && at > 0:
			return errors.New("the other side is gone")
		}
		if err := use(p, at); err != nil {
			return err
		}
		at = next
	}
	return nil
}

// TestLongRanges copies what another process has: one call a range, to each place that it may go to.
func TestLongRanges(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	src := filepath.Join(t.TempDir(), "a.safetensors")
	writeFile(t, src, stored{"a", tensor.BF16, tensor.Shape{300, 1000}, bf16(r)},
		stored{"b", tensor.BF16, tensor.Shape{9 << 20}, func(n int64) []byte { return make([]byte, 2*n) }})
	b, err := os.ReadFile(src)
	require.NoError(t, err)
	for _, name := range []string{"dst.safetensors", "dst.zpd"} {
		dst := filepath.Join(t.TempDir(), name)
		for _, resume := range []bool{false, true} { // the second is a comparison
			folder := ranged{Memory: storagetest.Memory{"a.safetensors": b}, calls: new(atomic.Int64)}
			c, err := checkpoint.OpenIn(t.Context(), folder, "a.safetensors", withZipped(t, zipped{}))
			require.NoError(t, err)
			p, err := pipeline.NewPlan(t.Context(), pipeline.Plain(c), dst, pipeline.Options{Quantize: "keep"})
			require.NoError(t, err)
			res, err := pipeline.Run(t.Context(), p, pipeline.Plain(c), dst, pipeline.RunOptions{Resume: resume})
			require.NoError(t, err)
			assert.Equal(t, resume, res.Complete)
			assert.EqualValues(t, 3, folder.calls.Load(), "18 MiB are two pieces of work")
			require.NoError(t, c.Close())
		}
		oo := withZipped(t, zipped{})
		d, err := checkpoint.Compare(t.Context(), openWith(t, oo, src), openWith(t, oo, dst))
		require.NoError(t, err)
		assert.Zero(t, d.MaxAbs)
		assert.Empty(t, append(d.Missing, d.Extra...))
	}
	for bad, says := range map[string]string{
		"gap":   "found bytes 100001 to 200001 of a range of ", // of either tensor, whichever is read first
		"long":  "of a range of ",
		"short": "unexpected EOF",
		"fails": "the other side is gone",
	} {
		folder := ranged{Memory: storagetest.Memory{"a.safetensors": b}, calls: new(atomic.Int64), bad: bad}
		c, err := checkpoint.OpenIn(t.Context(), folder, "a.safetensors", withZipped(t, zipped{}))
		require.NoError(t, err)
		dst := filepath.Join(t.TempDir(), "dst.safetensors")
		p, err := pipeline.NewPlan(t.Context(), pipeline.Plain(c), dst, pipeline.Options{Quantize: "keep"})
		require.NoError(t, err)
		_, err = pipeline.Run(t.Context(), p, pipeline.Plain(c), dst, pipeline.RunOptions{Threads: 1})
		require.ErrorContains(t, err, says)
		assert.ErrorContains(t, err, "a.safetensors: tensor ")
		assert.NoFileExists(t, dst)
		require.NoError(t, c.Close())
	}
}
