package lorakit_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/formatstest"
	"github.com/lorakit/lorakit/formats/gguf"
	"github.com/lorakit/lorakit/tensor"
)

// ggufModel is a GGUF file in memory, to be spoiled.
type ggufModel struct {
	keys    formats.Metadata
	tensors []tensor.Info
	data    [][]byte
}

// folderForGGUF is a model of transformers with its tokenizer, by the name that the fixtures have for its kind.
func folderForGGUF(t testing.TB, kind string) string {
	dir := t.TempDir()
	for _, from := range []string{"tokenizers", "gguf-models"} { // the config of the latter is the whole one
		entries, err := os.ReadDir(filepath.Join("fixtures", from, kind))
		require.NoError(t, err)
		for _, e := range entries {
			b, err := os.ReadFile(filepath.Join("fixtures", from, kind, e.Name()))
			require.NoError(t, err)
			if e.Name() != "keys.json" && e.Name() != "expected.json" {
				require.NoError(t, os.WriteFile(filepath.Join(dir, e.Name()), b, 0o666))
			}
		}
	}
	return dir
}

// newGGUF is what Convert makes of a model of transformers.
func newGGUF(t testing.TB, kind string) ggufModel {
	path := filepath.Join(t.TempDir(), "model.gguf")
	_, err := lorakit.Convert(t.Context(), folderForGGUF(t, kind), path, lorakit.ConvertOptions{})
	require.NoError(t, err)
	c, err := formatstest.Open(gguf.Format{}, path)
	require.NoError(t, err)
	defer c.Close()
	m := ggufModel{keys: c.Metadata()}
	for _, s := range c.Tensors() {
		b := make([]byte, s.Bytes)
		_, err := s.ReadAt(b, 0)
		require.NoError(t, err)
		m.tensors, m.data = append(m.tensors, s.Info), append(m.data, b)
	}
	return m
}

// set gives a key another value; nil drops it.
func (m *ggufModel) set(name string, v any) {
	m.keys = slices.DeleteFunc(slices.Clone(m.keys), func(p formats.Pair) bool { return p.Name == name })
	if v != nil {
		m.keys = append(m.keys, formats.Pair{Name: name, Value: v})
	}
}

// without drops the tensors whose names have a part.
func (m *ggufModel) without(part string) {
	var n ggufModel
	for i, s := range m.tensors {
		if !strings.Contains(s.Name, part) {
			n.tensors, n.data = append(n.tensors, s), append(n.data, m.data[i])
		}
	}
	m.tensors, m.data = n.tensors, n.data
}

// reshape gives a tensor another shape, and values of 0.
func (m *ggufModel) reshape(t *testing.T, name string, shape ...int64) {
	i := slices.IndexFunc(m.tensors, func(s tensor.Info) bool { return s.Name == name })
	m.tensors, m.data = slices.Clone(m.tensors), slices.Clone(m.data)
	m.tensors[i].Shape = shape
	size, err := m.tensors[i].Size()
	require.NoError(t, err)
	m.data[i] = make([]byte, size)
}

// bytes is the file.
func (m *ggufModel) bytes(t testing.TB) []byte {
	l, err := gguf.Format{}.Layout(t.Context(), m.tensors, formats.Options{Metadata: m.keys, SingleFile: "m.gguf"})
	require.NoError(t, err)
	b := make([]byte, l.Shards[0].Size)
	for k, i := range l.Shards[0].Tensors {
		copy(b[l.Shards[0].Offsets[k]:], m.data[i])
	}
	pieces, err := l.Shards[0].Sealed(nil)
	require.NoError(t, err)
	for _, p := range pieces {
		copy(b[p.Offset:], p.Bytes)
	}
	return b
}

// isRefused holds an error against what is promised of those for a file that is wrong: one line, with the file and what
// is wrong in it, and nothing that is left behind.
func isRefused(t *testing.T, err error, path, dst string, says ...string) {
	t.Helper()
	if !assert.Error(t, err, "%v", says) {
		return
	}
	assert.NotContains(t, err.Error(), "\n")
	for _, s := range append(says, filepath.Base(path)) {
		assert.ErrorContains(t, err, s)
	}
	entries, err := os.ReadDir(filepath.Dir(dst))
	require.NoError(t, err)
	for _, e := range entries {
		assert.False(t, strings.HasPrefix(e.Name(), filepath.Base(dst)), "%s is left", e.Name())
	}
}

// mostMemory is what may be allocated in all until a file of some KiB is refused.
const mostMemory = 32 << 20

// A GGUF file that is no model, or one that contradicts itself, is refused by all that make a model of it.
func TestGGUFModelsAreRefused(t *testing.T) {
	llama, bpe, mixtral := newGGUF(t, "llama"), newGGUF(t, "llama3"), newGGUF(t, "mixtral")
	adapter := lorakit.Adapter{Path: filepath.Join("fixtures", "adapters", "llama", "attention")}
	set := func(name string, v any) func(*ggufModel) { return func(m *ggufModel) { m.set(name, v) } }
	without := func(part string) func(*ggufModel) { return func(m *ggufModel) { m.without(part) } }
	for _, c := range []struct {
		model ggufModel
		spoil func(m *ggufModel)
		says  []string
		merge bool // refused by Merge as well, which wants no tokenizer
	}{
		{llama, set("general.architecture", "mamba"),
			[]string{"general.architecture", `"mamba"`, "llama, olmo2"}, true},
		{llama, set("general.architecture", uint32(1)), []string{"general.architecture", "uint32"}, true},
		{llama, set("general.type", "mmproj"), []string{"general.type", "mmproj"}, true},
		{llama, set("llama.block_count", uint32(math.MaxUint32)), []string{"blk.2."}, true},
		{llama, set("llama.attention.head_count", uint32(0)), []string{"attn_q", "llama.attention.head_count"}, true},
		{llama, set("llama.attention.head_count_kv", []int32{2, 0}),
			[]string{"llama.attention.head_count_kv"}, true},
		{llama, set("llama.embedding_length", uint32(1<<31)), []string{"weight", "2147483648"}, true},
		{llama, set("llama.attention.layer_norm_rms_epsilon", float32(math.NaN())),
			[]string{"llama.attention.layer_norm_rms_epsilon", "NaN"}, true},
		{llama, without("blk.1.attn_k"), []string{"blk.1.attn_k.weight"}, true},
		{llama, without("."), []string{"token_embd.weight"}, true},
		{llama, func(m *ggufModel) { m.reshape(t, "blk.0.attn_norm.weight", 31) },
			[]string{"blk.0.attn_norm.weight", "[31]"}, true},
		{mixtral, set("llama.expert_count", uint32(5)), []string{"exps", "stack of 5"}, true},
		{llama, set("tokenizer.ggml.tokens", make([]string, 400)),
			[]string{"tokenizer.ggml.tokens", "400", "320"}, true},
		{llama, set("tokenizer.ggml.bos_token_id", uint32(320)),
			[]string{"tokenizer.ggml.bos_token_id", "320"}, true},
		{llama, set("tokenizer.ggml.eot_token_id", uint32(99999)),
			[]string{"tokenizer.ggml.eot_token_id", "99999"}, false},
		{llama, set("tokenizer.ggml.model", "t5"), []string{"tokenizer.ggml.model", `"t5"`}, false},
		{llama, set("tokenizer.ggml.model", uint32(5)), []string{"tokenizer.ggml.model", "uint32"}, false},
		{llama, set("tokenizer.ggml.model", nil), []string{"tokenizer.ggml.model"}, false},
		{llama, set("tokenizer.ggml.scores", []float32{1}), []string{"tokenizer.ggml.scores", "320"}, false},
		{llama, set("tokenizer.ggml.token_type", make([]int32, 319)),
			[]string{"tokenizer.ggml.token_type", "319"}, false},
		{llama, set("tokenizer.chat_template", "\xff"), []string{"chat_template", "UTF-8"}, false},
		{bpe, set("tokenizer.ggml.merges", []string{"ab"}), []string{"tokenizer.ggml.merges", `"ab"`}, false},
		{bpe, set("tokenizer.ggml.merges", []string{"qq zz"}),
			[]string{"tokenizer.ggml.merges", `"qq"`}, false},
		{bpe, set("tokenizer.ggml.pre", "bogus\n"), []string{"tokenizer.ggml.pre", `"bogus\n"`}, false},
	} {
		dir := t.TempDir()
		path, dst := filepath.Join(dir, "m.gguf"), filepath.Join(dir, "out")
		c.spoil(&c.model)
		require.NoError(t, os.WriteFile(path, c.model.bytes(t), 0o666))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := lorakit.Convert(t.Context(), path, dst, lorakit.ConvertOptions{})
		runtime.ReadMemStats(&after)
		isRefused(t, err, path, dst, c.says...)
		assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(mostMemory), c.says)
		if c.merge {
			_, err = lorakit.Merge(t.Context(), path, []lorakit.Adapter{adapter}, dst, lorakit.ConvertOptions{})
			isRefused(t, err, path, dst, c.says...)
		}
	}
}

// What no model can be made of is another type of GGUF all the same: llama.cpp may know it.
func TestUnknownGGUFIsQuantized(t *testing.T) {
	llama := newGGUF(t, "llama")
	for what, spoil := range map[string]func(m *ggufModel){
		"architecture": func(m *ggufModel) { m.set("general.architecture", "mamba") },
		"part":         func(m *ggufModel) { m.set("general.type", "mmproj") },
		"keys": func(m *ggufModel) {
			for _, p := range m.keys {
				if strings.HasPrefix(p.Name, "llama.") {
					m.set(p.Name, nil)
				}
			}
		},
		"vocabulary": func(m *ggufModel) { m.without(".") },
	} {
		m, dir := llama, t.TempDir()
		spoil(&m)
		path, dst := filepath.Join(dir, "m.gguf"), filepath.Join(dir, "out.gguf")
		require.NoError(t, os.WriteFile(path, m.bytes(t), 0o666))
		r, err := lorakit.Convert(t.Context(), path, dst, lorakit.ConvertOptions{Quantize: "q4_0"})
		require.NoError(t, err, what)
		require.Len(t, m.tensors, r.Tensors)
		if len(m.tensors) > 0 {
			require.Positive(t, r.Quantized, what)
		}
	}
}

// A file that ends early, or whose front is not to be believed, is refused by every command.
func TestGGUFBytesAreRefused(t *testing.T) {
	llama := newGGUF(t, "llama")
	whole := llama.bytes(t)
	at := func(offset int, n uint64) []byte {
		b := bytes.Clone(whole)
		binary.LittleEndian.PutUint64(b[offset:], n)
		return b
	}
	length := bytes.Index(whole, []byte("tokenizer.ggml.tokens")) + len("tokenizer.ggml.tokens") + 8
	for says, b := range map[string][]byte{
		"it is empty":                   {},
		`found "GGML" at its beginning`: append([]byte("GGML"), whole[4:]...),
		"found version 1":               append([]byte("GGUF\x01\x00\x00\x00"), whole[8:]...),
		"a count of -1 tensors":         at(8, math.MaxUint64),
		"a count of 1099511627776 keys": at(16, 1<<40),
		`key "tokenizer.ggml.tokens": found an array of 4611686018427387904 values`: at(length, 1<<62),
		`key "tokenizer.ggml.tokens": found`:                                        whole[:2000],
		`bytes of data up to the end of the file`:                                   whole[:len(whole)-2000],
	} {
		dir := t.TempDir()
		path, dst := filepath.Join(dir, "m.gguf"), filepath.Join(dir, "out")
		require.NoError(t, os.WriteFile(path, b, 0o666))
		for name, run := range map[string]func() error{
			"inspect": func() error {
				_, err := lorakit.Inspect(t.Context(), path, lorakit.ReadOptions{})
				return err
			},
			"convert": func() error {
				_, err := lorakit.Convert(t.Context(), path, dst, lorakit.ConvertOptions{})
				return err
			},
			"quantize": func() error {
				_, err := lorakit.Convert(t.Context(), path, dst+".gguf", lorakit.ConvertOptions{Quantize: "q4_0"})
				return err
			},
			"verify": func() error {
				_, err := lorakit.Verify(t.Context(), path, lorakit.ReadOptions{})
				return err
			},
			"diff": func() error {
				_, err := lorakit.Diff(t.Context(), path, path, lorakit.ReadOptions{})
				return err
			},
			"merge": func() error {
				a := lorakit.Adapter{Path: filepath.Join("fixtures", "adapters", "llama", "attention")}
				_, err := lorakit.Merge(t.Context(), path, []lorakit.Adapter{a}, dst, lorakit.ConvertOptions{})
				return err
			},
		} {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err := run()
			runtime.ReadMemStats(&after)
			isRefused(t, err, path, dst, says)
			assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(mostMemory), "%s %s", name, says)
		}
	}
}

// A folder whose files do not fit together becomes no GGUF file.
func TestFoldersAreRefusedForGGUF(t *testing.T) {
	edit := func(name string, change func(map[string]any)) func(dir string) {
		return func(dir string) {
			b, err := os.ReadFile(filepath.Join(dir, name))
			require.NoError(t, err)
			var all map[string]any
			require.NoError(t, json.Unmarshal(b, &all))
			change(all)
			b, err = json.Marshal(all)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, name), b, 0o666))
		}
	}
	member := func(name string, v any) func(dir string) {
		return edit("config.json", func(c map[string]any) { c[name] = v })
	}
	file := func(name, content string) func(dir string) {
		return func(dir string) { require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o666)) }
	}
	nested := func(depth int) map[string]any {
		p := map[string]any{"type": "ByteLevel"}
		for range depth {
			p = map[string]any{"type": "Sequence", "pretokenizers": []any{p}}
		}
		return p
	}
	for _, c := range []struct {
		kind  string
		spoil func(dir string)
		says  []string
	}{
		{"llama", member("num_hidden_layers", 1_000_000_000), []string{"blk.2."}},
		{"llama", member("num_hidden_layers", -1), []string{"config.json", "num_hidden_layers"}},
		{"llama", member("num_hidden_layers", nil), []string{"config.json", "num_hidden_layers"}},
		{"llama", member("num_attention_heads", 0), []string{"config.json", "num_attention_heads"}},
		{"llama", member("num_attention_heads", "4"), []string{"config.json", "num_attention_heads"}},
		{"llama", member("hidden_size", 1<<31), []string{"config.json", "2147483648"}},
		{"llama", member("intermediate_size", 0), []string{"config.json", "ffn_"}},
		{"gemma3", member("num_attention_heads", 1<<31), []string{"config.json", "attn_"}},
		{"llama", member("architectures", []string{"MambaForCausalLM"}), []string{"MambaForCausalLM", "LlamaForCausalLM"}},
		{"llama3", member("vocab_size", 1<<31-1), []string{"vocab_size", "2147483647"}},
		{"llama", file("config.json", `{"architectures":["LlamaForCausalLM"],"hidden_size":NaN}`),
			[]string{"config.json"}},
		{"llama", file("tokenizer.model", "\x0a\xff\xff\xff\xff\x0f"), []string{"tokenizer.model", "byte 0"}},
		{"llama", file("tokenizer.model", "version https://git-lfs.github.com/spec/v1\n"), []string{"tokenizer.model"}},
		{"llama", file("tokenizer_config.json", "{"), []string{"tokenizer_config.json", "byte 1"}},
		{"llama3", file("tokenizer.json", "[1]"), []string{"tokenizer.json", "an array"}},
		{"llama3", file("tokenizer.json", strings.Repeat(`{"a":`, 20_000)), []string{"tokenizer.json", "depth"}},
		{"llama3", edit("tokenizer.json", func(c map[string]any) { c["pre_tokenizer"] = nested(1000) }),
			[]string{"tokenizer.json", "pre_tokenizer"}},
		{"llama3", edit("tokenizer.json", func(c map[string]any) { c["added_tokens"] = 5 }),
			[]string{"tokenizer.json", "a number", `"/added_tokens"`}},
		{"llama3", edit("tokenizer.json", func(c map[string]any) {
			list := c["added_tokens"].([]any)
			c["added_tokens"] = append(list, map[string]any{"id": 1 << 31, "content": "zz", "special": true})
		}), []string{"tokenizer.json", `"zz"`, "2147483648"}},
		{"llama3", edit("tokenizer.json", func(c map[string]any) {
			c["model"].(map[string]any)["vocab"] = map[string]any{"a": -1}
		}), []string{"tokenizer.json", `"a"`, "-1"}},
	} {
		dir := folderForGGUF(t, c.kind)
		c.spoil(dir)
		dst := filepath.Join(t.TempDir(), "out.gguf")
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := lorakit.Convert(t.Context(), dir, dst, lorakit.ConvertOptions{})
		runtime.ReadMemStats(&after)
		isRefused(t, err, dir, dst, c.says...)
		if err != nil {
			assert.NotContains(t, err.Error(), " Go ")
		}
		assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(mostMemory), c.says)
	}
}
