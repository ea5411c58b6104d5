package pipeline_test

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/bnb"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// withToy has the toy format and scheme besides safetensors and bitsandbytes. The default registries know nothing of
// it.
func withToy(t testing.TB, toy formats.Format) checkpoint.OpenOptions {
	r, schemes := new(formats.Registry), new(quant.Registry)
	require.NoError(t, schemes.Register(bnb.Scheme{}))
	require.NoError(t, schemes.Register(toyScheme{}))
	require.NoError(t, r.Register(safetensors.Format{}))
	require.NoError(t, r.Register(toy))
	return checkpoint.OpenOptions{Formats: r, Schemes: schemes}
}

// openWith opens a path.
func openWith(t testing.TB, o checkpoint.OpenOptions, path string) *checkpoint.Checkpoint {
	dir, name, err := storage.Resolve(path, storage.Options{})
	require.NoError(t, err)
	c, err := checkpoint.OpenIn(context.Background(), dir, name, o)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// convertWith opens a path, plans, runs, and returns what the plan has to say.
func convertWith(t testing.TB, oo checkpoint.OpenOptions, src, dst string, o pipeline.Options) *pipeline.Plan {
	c := openWith(t, oo, src)
	p, err := pipeline.NewPlan(context.Background(), pipeline.Plain(c), dst, o)
	require.NoError(t, err)
	_, err = pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{})
	require.NoError(t, err)
	return p
}

const tokenizer = `{"version": "1.0", "model": {"vocab": {"a": 0}}}`

// writeToyModel writes a folder of safetensors of a model that is not known, with a tokenizer.
func writeToyModel(t testing.TB, dir string) {
	r := rand.New(rand.NewPCG(3, 4))
	require.NoError(t, os.Mkdir(dir, 0o777))
	writeFile(t, filepath.Join(dir, "model.safetensors"),
		stored{"layers.0.up.weight", tensor.BF16, tensor.Shape{700, 1012}, bf16(r)},
		stored{"layers.0.norm.weight", tensor.F32, tensor.Shape{1009}, f32(r)},
		stored{"layers.1.up.weight", tensor.F32, tensor.Shape{333, 100}, f32(r)})
	for name, content := range map[string]string{"config.json": `{"model_type": "none_such", "hidden": 7}`,
		"tokenizer.json": tokenizer, "LICENSE": "as you like"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o666))
	}
}

var t4 = pipeline.Options{Quantize: "t4", MaxShardSize: 500_000}

// TestEncodingOfAContainer quantises into blocks that only one container has, reads them by the scheme that knows
// them, copies them as they are, and dequantises them where another container has no place for them.
func TestEncodingOfAContainer(t *testing.T) {
	dir := t.TempDir()
	src, toy := filepath.Join(dir, "src"), filepath.Join(dir, "toy")
	writeToyModel(t, src)
	o := t4
	o.To = "toy"
	p := convertWith(t, withToy(t, toyFormat{}), src, toy, o)
	assert.Equal(t, 2, p.Quantized)
	require.Len(t, p.Shards, 2)
	c := openWith(t, withToy(t, toyFormat{}), toy)
	encoded := map[string]bool{}
	for _, w := range c.Weights {
		encoded[w.Name] = w.Decoder != nil
		if w.Decoder != nil {
			assert.Equal(t, "t4", w.Decoder.Spec().String())
			assert.Equal(t, w.Count()*2, w.StoredBytes())
			assert.Equal(t, tensor.F32, w.DType)
			assert.Equal(t, toyT4, w.Parts[0].Encoding)
		}
	}
	assert.Equal(t, map[string]bool{"layers.0.up.weight": true, "layers.0.norm.weight": false, "layers.1.up.weight": true},
		encoded)
	d, err := checkpoint.Compare(t.Context(), openWith(t, withToy(t, toyFormat{}), src), c)
	require.NoError(t, err)
	assert.Greater(t, d.MaxAbs, 0.0)
	assert.Less(t, d.RelRMS, 0.01)
	v, err := checkpoint.Verify(t.Context(), c)
	require.NoError(t, err)
	assert.Empty(t, v.Problems)

	// Kept as they are: the same bytes.
	again := filepath.Join(dir, "again")
	kept := pipeline.Options{Quantize: "keep", MaxShardSize: o.MaxShardSize}
	p = convertWith(t, withToy(t, toyFormat{}), toy, again, kept)
	for _, s := range p.Shards {
		for _, j := range s.Jobs {
			assert.True(t, j.Copy, j.Weight)
		}
	}
	assert.Equal(t, digest(t, toy), digest(t, again))

	// Dequantised where they have no place, with a word.
	plain := filepath.Join(dir, "plain")
	p = convertWith(t, withToy(t, toyFormat{}), toy, plain, pipeline.Options{Quantize: "keep", To: "safetensors"})
	assert.Contains(t, p.Notices, "dequantised: 2 weights")
	d, err = checkpoint.Compare(t.Context(), c, openWith(t, checkpoint.OpenOptions{}, plain))
	require.NoError(t, err)
	assert.Zero(t, d.MaxAbs)

	// One that no scheme knows can only be copied, to a container that has a place for it.
	x := toyHeader{Tensors: []toyTensor{{tensor.Info{Name: "w", Shape: tensor.Shape{2, 4},
		Encoding: tensor.Encoding{Name: "t5", Elements: 4, Bytes: 1}}, 0}}}
	unknown := filepath.Join(dir, "x.toy")
	writeToy(t, unknown, x)
	c = openWith(t, withToy(t, toyFormat{}), unknown)
	assert.Equal(t, "t5", c.Weights[0].Type())
	for says, o := range map[string]pipeline.Options{
		`it is stored as "t5", which no scheme that is known reads`: {Quantize: "none", To: "safetensors"},
		`found the encoding "t5", expected a dtype`:                 {Quantize: "keep", To: "safetensors"},
	} {
		_, err := pipeline.NewPlan(t.Context(), pipeline.Plain(c), filepath.Join(dir, "no"), o)
		assert.ErrorContains(t, err, says)
	}
	v, err = checkpoint.Verify(t.Context(), c)
	require.NoError(t, err)
	assert.Empty(t, v.Problems)
}

// writeToy writes a file of the toy format whose data is zeros.
func writeToy(t testing.TB, path string, h toyHeader) {
	b, err := toyBytes(h)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, append(b, make([]byte, 1024)...), 0o666))
}

// TestMetadataKeepTheirTypes goes from a container with types to one of its kind, in the same order, and to one that
// has texts alone.
func TestMetadataKeepTheirTypes(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src.toy")
	h := toyHeader{Tensors: []toyTensor{{tensor.Info{Name: "w", DType: tensor.U8, Shape: tensor.Shape{3}}, 0}},
		Metadata: []toyPair{
			{"z.first", "string", []byte(`"text"`)}, {"count", "uint32", []byte("4294967295")},
			{"rope", "float32", []byte("0.1")},
			{"flag", "bool", []byte("true")}, {"tokens", "[]string", []byte(`["<s>", "a\"b"]`)},
			{"scores", "[]float32", []byte("[1, -0.5]")}, {"big", "int64", []byte("-9007199254740993")},
		}}
	writeToy(t, src, h)
	c := openWith(t, withToy(t, toyFormat{}), src)
	want := formats.Metadata{
		{Name: "z.first", Value: "text"}, {Name: "count", Value: uint32(4294967295)}, {Name: "rope", Value: float32(0.1)},
		{Name: "flag", Value: true},
		{Name: "tokens", Value: []string{"<s>", `a"b`}}, {Name: "scores", Value: []float32{1, -0.5}},
		{Name: "big", Value: int64(-9007199254740993)},
	}
	assert.Equal(t, want, c.Metadata())
	convertWith(t, withToy(t, toyFormat{}), src, filepath.Join(dir, "out.toy"), pipeline.Options{Quantize: "keep"})
	assert.Equal(t, want, openWith(t, withToy(t, toyFormat{}), filepath.Join(dir, "out.toy")).Metadata())
	convertWith(t, withToy(t, toyFormat{}), src, filepath.Join(dir, "out.safetensors"), pipeline.Options{Quantize: "keep"})
	assert.Equal(t, formats.Texts(map[string]string{
		"z.first": "text", "count": "4294967295", "rope": "0.1", "flag": "true", "tokens": `["<s>", "a\"b"]`,
		"scores": "[1, -0.5]", "big": "-9007199254740993",
	}), openWith(t, checkpoint.OpenOptions{}, filepath.Join(dir, "out.safetensors")).Metadata())

	h.Metadata = append(h.Metadata, h.Metadata[0])
	writeToy(t, src, h)
	d, name, err := storage.Resolve(src, storage.Options{})
	require.NoError(t, err)
	_, err = checkpoint.OpenIn(t.Context(), d, name, withToy(t, toyFormat{}))
	assert.ErrorContains(t, err, `metadata "z.first": found it twice`)
}

// TestSmallFilesWithin has config.json and a tokenizer go into the files of a format that claims them, changed as they
// are beside weights, and come out of it where the format that is written has them beside its weights.
func TestSmallFilesWithin(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	writeToyModel(t, src)
	o := t4
	o.To = "toy"
	folder, single := filepath.Join(dir, "folder"), filepath.Join(dir, "single.toy")
	convertWith(t, withToy(t, toyFormat{}), src, folder, o)
	convertWith(t, withToy(t, toyFormat{}), src, single, o)
	entries, err := os.ReadDir(folder)
	require.NoError(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	assert.Equal(t, []string{"LICENSE", "model-00001-of-00002.toy", "model-00002-of-00002.toy", "model.toy.index.json",
		"toy.txt"}, names)

	for _, path := range []string{folder, single} {
		c := openWith(t, withToy(t, toyFormat{}), path)
		require.NotNil(t, c.Config, path)
		assert.Equal(t, "none_such", c.Config.ModelType)
		assert.Equal(t, `{"quant_method": "toy"}`, strings.Join(strings.Fields(string(c.Config.Quantization)), " "),
			"as it is edited for the result")

		out := filepath.Join(t.TempDir(), "out")
		convertWith(t, withToy(t, toyFormat{}), path, out, pipeline.Options{Quantize: "none", To: "safetensors"})
		config, err := os.ReadFile(filepath.Join(out, "config.json"))
		require.NoError(t, err)
		assert.Contains(t, string(config), `"hidden": 7`)
		assert.NotContains(t, string(config), "quant")
		b, err := os.ReadFile(filepath.Join(out, "tokenizer.json"))
		require.NoError(t, err)
		assert.Equal(t, tokenizer, string(b))
		assert.NoFileExists(t, filepath.Join(out, "model.toy.index.json"))
	}

	// What has been claimed is watched like all that is read.
	c := openWith(t, withToy(t, toyFormat{}), src)
	p, err := pipeline.NewPlan(t.Context(), pipeline.Plain(c), filepath.Join(dir, "late.toy"), o)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(src, "tokenizer.json"), []byte("{}"), 0o666))
	_, err = pipeline.Run(t.Context(), p, pipeline.Plain(c), filepath.Join(dir, "late.toy"), pipeline.RunOptions{})
	assert.ErrorContains(t, err, "tokenizer.json: it changed while it was read")
}

// TestRegistryIsAValue: what one checkpoint is opened with is unknown to another.
func TestRegistryIsAValue(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src.toy")
	writeToy(t, src, toyHeader{Tensors: []toyTensor{{tensor.Info{Name: "w", DType: tensor.U8, Shape: tensor.Shape{3}},
		0}}})
	_, err := checkpoint.Open(t.Context(), src)
	assert.ErrorIs(t, err, formats.ErrUnknown)
	c := openWith(t, withToy(t, toyFormat{}), src)
	assert.Equal(t, "toy", c.Format.Name())
	_, err = pipeline.NewPlan(t.Context(), pipeline.Plain(c), filepath.Join(dir, "out.pth"),
		pipeline.Options{Quantize: "keep"})
	assert.ErrorContains(t, err, "no format that is written has this extension; known are .safetensors, .toy")
	_, err = pipeline.NewPlan(t.Context(), pipeline.Plain(c), filepath.Join(dir, "out"),
		pipeline.Options{Quantize: "keep", To: "pytorch"})
	assert.ErrorContains(t, err, "known are safetensors, toy")
}
