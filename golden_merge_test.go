package lorakit_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/tensor"
)

// peftMerge is a merge that PEFT has made: its file is NAME.merged-DTYPE.safetensors.
type peftMerge struct {
	base     string
	adapters []lorakit.Adapter
	file     string
	dtypes   []string
	modules  []string // run-time names, of a single adapter
}

// peftMerges reads them from the fixtures' results.
func peftMerges(t *testing.T) map[string]peftMerge {
	t.Helper()
	var results struct {
		Adapters map[string]struct {
			Base    string
			Merged  []string
			SameAs  string `json:"same_as"`
			Modules map[string]any
		}
		Several map[string]struct {
			Base     string
			Adapters [][2]any
			Merged   []string
		}
	}
	b, err := os.ReadFile(filepath.Join(adapterFixtures, "results.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &results))
	all := map[string]peftMerge{}
	for name, x := range results.Adapters {
		m := peftMerge{x.Base, []lorakit.Adapter{{Path: filepath.Join(adapterFixtures, name)}}, name, x.Merged,
			slices.Sorted(maps.Keys(x.Modules))}
		if x.SameAs != "" {
			m.file, m.dtypes = x.SameAs, results.Adapters[x.SameAs].Merged
		}
		if len(m.dtypes) > 0 {
			all[name] = m
		}
	}
	for name, x := range results.Several {
		m := peftMerge{base: x.Base, file: name, dtypes: x.Merged}
		for _, a := range x.Adapters {
			m.adapters = append(m.adapters, lorakit.Adapter{Path: filepath.Join(adapterFixtures, a[0].(string)),
				Weight: a[1].(float64)})
		}
		all[name] = m
	}
	require.Greater(t, len(all), 90)
	return all
}

// TestGoldenMerge holds merges against PEFT's: the names, types, shapes and values of all tensors. In bfloat16 both
// round a sum in float32 once, so that only sums on the edge between two numbers may differ, by one step.
func TestGoldenMerge(t *testing.T) {
	t.Parallel()
	for name, m := range peftMerges(t) {
		for _, dtype := range m.dtypes {
			t.Run(name+"/"+dtype, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				o := lorakit.ConvertOptions{DType: dtype}
				if strings.HasSuffix(m.base, "-nf4") {
					o.Quantize = "none"
				}
				asPEFT(t, m, dtype, dir, o)
			})
		}
	}
}

var casts sync.Map

// cast is a base as o makes it, without an adapter.
func cast(t *testing.T, base string, o lorakit.ConvertOptions) map[string]entry {
	t.Helper()
	key := base + " " + o.DType
	if have, ok := casts.Load(key); ok {
		return have.(map[string]entry)
	}
	out := filepath.Join(t.TempDir(), "plain")
	_, err := lorakit.Convert(t.Context(), baseOf(base), out, o)
	require.NoError(t, err)
	tensors := load(t, out)
	casts.Store(key, tensors)
	return tensors
}

// asPEFT merges m in dir and holds all tensors of the result against PEFT's.
func asPEFT(t *testing.T, m peftMerge, dtype, dir string, o lorakit.ConvertOptions) {
	t.Helper()
	out := filepath.Join(dir, "out")
	_, err := lorakit.Merge(t.Context(), baseOf(m.base), m.adapters, out, o)
	require.NoError(t, err)

	base, got := cast(t, m.base, o), load(t, out)
	changed := load(t, filepath.Join(adapterFixtures, m.file+".merged-"+dtype+".safetensors"))
	want := maps.Clone(base)
	maps.Copy(want, changed)
	require.NotEmpty(t, changed)
	require.Equal(t, names(want), names(got))
	for k, w := range want {
		g := got[k]
		require.Equal(t, w.DType, g.DType, k)
		require.Equal(t, w.Shape, g.Shape, k)
		if _, ok := changed[k]; !ok {
			require.Equal(t, w.data, g.data, "%s is not adapted", k)
			continue
		}
		switch w.DType {
		case tensor.F32:
			nearlyFloat32(t, k, w.data, g.data)
		case tensor.BF16:
			nearlyBFloat16(t, k, w.data, g.data, base[k].data, roundsDelta(m.file, k))
		case tensor.I64:
			require.Equal(t, w.data, g.data, k)
		default:
			t.Fatalf("%s is of type %s", k, w.DType)
		}
	}
}

// roundsDelta reports whether PEFT rounds the delta of a tensor to 16 bits before it adds it: that of embeddings, of
// parameters without a module of their own (experts and their router), and of an adapter in 16 bits.
func roundsDelta(adapter, name string) bool {
	return adapter == "llama/half" || strings.Contains(name, "embed") || strings.Contains(name, ".experts.") ||
		strings.HasSuffix(name, ".mlp.gate.weight")
}

// nearlyFloat32 allows for another order of the sums.
func nearlyFloat32(t *testing.T, name string, want, got []byte) {
	t.Helper()
	largest, apart := 0.0, 0.0
	for i := 0; i < len(want); i += 4 {
		w, g := float64(math.Float32frombits(binary.LittleEndian.Uint32(want[i:]))),
			float64(math.Float32frombits(binary.LittleEndian.Uint32(got[i:])))
		require.False(t, math.IsNaN(g), name)
		largest, apart = max(largest, math.Abs(w)), max(apart, math.Abs(w-g))
	}
	require.LessOrEqual(t, apart, 2e-6*largest, name)
}

// nearlyBFloat16 allows one element in a thousand to be one step away. Where PEFT has rounded the delta, each may be
// off by that and a step.
func nearlyBFloat16(t *testing.T, name string, want, got, base []byte, rounded bool) {
	t.Helper()
	value := func(b []byte, i int) float64 {
		return float64(math.Float32frombits(uint32(binary.LittleEndian.Uint16(b[i:])) << 16))
	}
	step := func(b []byte, i int) int { // numbers of the same order as the values
		u := int(binary.LittleEndian.Uint16(b[i:]))
		if u&0x8000 != 0 {
			return -(u & 0x7fff)
		}
		return u
	}
	off := 0
	for i := 0; i < len(want); i += 2 {
		w, g := value(want, i), value(got, i)
		require.False(t, math.IsNaN(g), name)
		if rounded {
			require.Len(t, base, len(want), name)
			limit := max(math.Abs(w), math.Abs(g))/128 + math.Abs(w-value(base, i))/256
			require.LessOrEqual(t, math.Abs(w-g), limit, "%s: element %d", name, i/2)
			continue
		}
		if d := step(want, i) - step(got, i); d != 0 {
			require.LessOrEqual(t, max(d, -d), 1, "%s: element %d is %g, expected %g", name, i/2, g, w)
			off++
		}
	}
	require.LessOrEqual(t, off, len(want)/2/1000, name)
}

// folder reads all files of a folder.
func folder(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		files[strings.TrimPrefix(path, dir)] = string(b)
		return err
	}))
	require.NotEmpty(t, files)
	return files
}

func sameFolder(t *testing.T, want, got string) {
	t.Helper()
	w, g := folder(t, want), folder(t, got)
	require.Equal(t, slices.Sorted(maps.Keys(w)), slices.Sorted(maps.Keys(g)))
	for name := range w {
		require.True(t, w[name] == g[name], "%s differs", name)
	}
}

// kinds are one adapter of every kind of delta.
var kinds = []string{
	"llama/attention", "llama/dora", "llama/embedding-head", "llama/saved-head", "llama/tokens", "llama/grown",
	"phi3/fused",
	"qwen2/lora-bias", "qwen3-moe/experts", "tiny-mixtral/per-expert", "tiny-gpt2/attention", "tiny-gpt2/dora",
	"tiny-qwen3/tied-embedding", "resnet/dora",
}

// A merge has the same bytes whatever the threads and the memory.
func TestMergeSameBytes(t *testing.T) {
	t.Parallel()
	for _, name := range kinds {
		for _, quantize := range []string{"keep", "nf4"} {
			t.Run(name+"/"+quantize, func(t *testing.T) {
				t.Parallel()
				m := peftMerges(t)[name]
				if strings.HasPrefix(name, "resnet") && quantize != "keep" {
					quantize = "none"
				}
				first := ""
				for _, threads := range []int{1, 2} {
					for _, memory := range []int64{64 << 20, 256 << 20} {
						out := filepath.Join(t.TempDir(), "out")
						o := lorakit.ConvertOptions{Quantize: quantize, Threads: threads, Memory: memory, MinKept: -1}
						_, err := lorakit.Merge(t.Context(), baseOf(m.base), m.adapters, out, o)
						require.NoError(t, err)
						if first == "" {
							first = out
						}
						sameFolder(t, first, out)
					}
				}
			})
		}
	}
}

// Merging and quantising in one pass is merging, then quantising.
func TestMergeQuantizedAtOnce(t *testing.T) {
	t.Parallel()
	for _, name := range kinds {
		if strings.HasPrefix(name, "resnet") { // has no linear weight to quantise but its head
			continue
		}
		for _, o := range []lorakit.ConvertOptions{
			{Quantize: "nf4"}, {Quantize: "nf4", DoubleQuant: true, DType: "f32"}, {Quantize: "int8"},
			{Quantize: "fp4", PerExpert: true},
		} {
			t.Run(fmt.Sprint(name, "/", o.Quantize, o.DType), func(t *testing.T) {
				t.Parallel()
				m := peftMerges(t)[name]
				o.MinKept = -1
				dir := t.TempDir()
				once, plain, twice := filepath.Join(dir, "once"), filepath.Join(dir, "plain"), filepath.Join(dir, "twice")
				_, err := lorakit.Merge(t.Context(), baseOf(m.base), m.adapters, once, o)
				require.NoError(t, err)
				_, err = lorakit.Merge(t.Context(), baseOf(m.base), m.adapters, plain, lorakit.ConvertOptions{DType: o.DType})
				require.NoError(t, err)
				_, err = lorakit.Convert(t.Context(), plain, twice, o)
				require.NoError(t, err)
				sameFolder(t, twice, once)
			})
		}
	}
}

// A merge onto a quantised base is one onto what the base decodes to.
func TestMergeOntoQuantized(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"llama/attention", "llama/dora", "tiny-gpt2/attention", "tiny-gpt2/dora", "phi3/fused",
		"qwen3-moe/all-linear"} {
		for _, base := range []lorakit.ConvertOptions{{Quantize: "int8"}, {Quantize: "nf4"},
			{Quantize: "nf4", DoubleQuant: true}, {Quantize: "nf4", PerExpert: true}} {
			t.Run(fmt.Sprint(name, "/", base.Quantize, base.DoubleQuant, base.PerExpert), func(t *testing.T) {
				t.Parallel()
				m := peftMerges(t)[name]
				dir := t.TempDir()
				low, plain, want, got := filepath.Join(dir, "low"), filepath.Join(dir, "plain"), filepath.Join(dir, "want"),
					filepath.Join(dir, "got")
				_, err := lorakit.Convert(t.Context(), baseOf(m.base), low, base)
				require.NoError(t, err)
				none := lorakit.ConvertOptions{Quantize: "none", DType: "f32"}
				_, err = lorakit.Convert(t.Context(), low, plain, none)
				require.NoError(t, err)
				_, err = lorakit.Merge(t.Context(), plain, m.adapters, want, none)
				require.NoError(t, err)
				_, err = lorakit.Merge(t.Context(), low, m.adapters, got, none)
				require.NoError(t, err)
				w, g := load(t, want), load(t, got)
				require.Equal(t, names(w), names(g))
				for k := range w {
					require.Equal(t, w[k].DType, g[k].DType, k)
					require.True(t, string(w[k].data) == string(g[k].data), k)
				}
			})
		}
	}
}

// Every module that an adapter has is in the report, and in float32 nothing is lost.
func TestMergeKept(t *testing.T) {
	t.Parallel()
	for name, m := range peftMerges(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := lorakit.ConvertOptions{DType: "f32", Quantize: "none"}
			r, err := lorakit.Merge(t.Context(), baseOf(m.base), m.adapters, filepath.Join(t.TempDir(), "out"), o)
			require.NoError(t, err)
			require.Len(t, r.Adapters, len(m.adapters))
			for i, a := range r.Adapters {
				require.Equal(t, m.adapters[i].Path, a.Path)
				require.InDelta(t, 1, a.Kept, 1e-3)
				require.NotEmpty(t, a.Modules)
				require.Empty(t, a.Unused)
				var have []string
				for _, k := range a.Modules {
					require.InDelta(t, 1, k.Kept, 1e-2, k.Name)
					have = append(have, k.Name)
				}
				if strings.HasSuffix(name, "/per-expert") { // each expert is named, as in the base's file
					require.Len(t, have, len(load(t, filepath.Join(a.Path, "adapter_model.safetensors")))/2)
					continue
				}
				for _, want := range m.modules {
					if want == "lm_head" && strings.HasSuffix(name, "-ensured") {
						continue // the embedding's matrix
					}
					require.Contains(t, have, strings.TrimSuffix(want, ".weight"))
				}
			}
		})
	}
}

// writeTensors writes a safetensors file.
func writeTensors(t *testing.T, path string, tensors map[string]entry) {
	t.Helper()
	header := map[string]any{}
	var data []byte
	for _, name := range slices.Sorted(maps.Keys(tensors)) {
		x := tensors[name]
		header[name] = map[string]any{"dtype": x.DType.String(), "shape": append([]int64{}, x.Shape...),
			"data_offsets": []int{len(data), len(data) + len(x.data)}}
		data = append(data, x.data...)
	}
	h, err := json.Marshal(header)
	require.NoError(t, err)
	b := append(binary.LittleEndian.AppendUint64(nil, uint64(len(h))), h...)
	require.NoError(t, os.WriteFile(path, append(b, data...), 0o644))
}

// badAdapter is a fixture's adapter with something wrong.
type badAdapter struct {
	name    string
	adapter string // of the fixtures
	base    string // where not that of the adapter
	config  map[string]any
	change  func(tensors map[string]entry)
	says    []string
	kind    error
}

const qProj = "base_model.model.model.layers.0.self_attn.q_proj."

// ones is a tensor in float32.
func ones(shape ...int64) entry {
	n := int64(1)
	for _, d := range shape {
		n *= d
	}
	var b []byte
	for range n {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(1))
	}
	return entry{tensor.Info{DType: tensor.F32, Shape: shape}, b}
}

func put(key string, e entry) func(map[string]entry) {
	return func(m map[string]entry) { m[key] = e }
}

func drop(key string) func(map[string]entry) {
	return func(m map[string]entry) { delete(m, key) }
}

func rename(from, to string) func(map[string]entry) {
	return func(m map[string]entry) {
		for _, k := range slices.Collect(maps.Keys(m)) {
			if n := strings.ReplaceAll(k, from, to); n != k {
				m[n] = m[k]
				delete(m, k)
			}
		}
	}
}

func badValue(key string, bits uint32) func(map[string]entry) {
	return func(m map[string]entry) {
		e := m[key]
		e.data = slices.Clone(e.data)
		binary.LittleEndian.PutUint32(e.data[8:], bits)
		m[key] = e
	}
}

var badAdapters = []badAdapter{
	{name: "another base, other shapes", adapter: "llama/attention", base: "llama-64",
		says: []string{"self_attn.", "lora_A 4 x 32", "do not fit", ", 64]"}, kind: lora.ErrBase},
	{name: "another base, other modules", adapter: "tiny-gpt2/attention", base: "llama",
		says: []string{"h.0.attn.c_attn", "no such module", "nearest"}, kind: lora.ErrBase},
	{name: "a misspelt module", adapter: "llama/attention",
		change: rename("layers.1.self_attn.q_proj", "layers.1.self_attn.q_prj"),
		says:   []string{"q_prj", `the nearest is "model.layers.1.self_attn.q_proj"`}, kind: lora.ErrBase},
	{name: "a layer too many", adapter: "llama/attention", change: rename("layers.1.", "layers.7."),
		says: []string{"layers.7", "nearest"}, kind: lora.ErrBase},
	{name: "a tensor that nothing takes", adapter: "llama/attention",
		change: put("base_model.model.model.layers.0.self_attn.spare.weight", ones(3)),
		says:   []string{"self_attn.spare", "no such module"}, kind: lora.ErrBase},
	{name: "a part of LoRA that is not known", adapter: "llama/attention", change: put(qProj+"lora_C.weight", ones(4, 4)),
		says: []string{qProj + "lora_C.weight", "adapter_model.safetensors"}, kind: lora.ErrUnsupported},
	{name: "a diagonal beside A and B", adapter: "llama/attention", change: put(qProj+"lora_diag.weight", ones(4)),
		says: []string{"lora_diag"}, kind: lora.ErrUnsupported},
	{name: "a rank that is not the config's", adapter: "llama/attention", config: map[string]any{"r": 3},
		says: []string{"rank", "3", "adapter_config.json"}, kind: lora.ErrMalformed},
	{name: "a rank that is not the pattern's", adapter: "llama/attention",
		config: map[string]any{"rank_pattern": map[string]any{"q_proj": 2}}, says: []string{"q_proj", "rank", "2"},
		kind: lora.ErrMalformed},
	{name: "ranks of A and B that differ", adapter: "llama/attention", change: put(qProj+"lora_A.weight", ones(3, 32)),
		says: []string{"q_proj", "[3, 32]", "ranks differ"}, kind: lora.ErrMalformed},
	{name: "another peft_type", adapter: "llama/attention", config: map[string]any{"peft_type": "OTHER"},
		says: []string{"OTHER", "adapter_config.json", "known are LORA"}, kind: lora.ErrUnsupported},
	{name: "no peft_type", adapter: "llama/attention", config: map[string]any{"peft_type": nil},
		says: []string{"peft_type", "known are LORA"}, kind: lora.ErrUnsupported},
	{name: "NaN in A", adapter: "llama/attention", change: badValue(qProj+"lora_A.weight", 0x7fc00000),
		says: []string{"q_proj", "lora_A", "NaN"}, kind: lora.ErrMalformed},
	{name: "infinity in B", adapter: "llama/attention", change: badValue(qProj+"lora_B.weight", 0x7f800000),
		says: []string{"q_proj", "lora_B", "Inf"}, kind: lora.ErrMalformed},
	{name: "NaN in a magnitude", adapter: "llama/dora", change: badValue(qProj+"lora_magnitude_vector", 0x7fc00000),
		says: []string{"q_proj.lora_magnitude_vector", "NaN"}, kind: lora.ErrMalformed},
	{name: "a regular expression that runs away", adapter: "llama/attention",
		config: map[string]any{"rank_pattern": map[string]any{`(\w+\.?)+!`: 2}},
		says:   []string{"takes too long", "self_attn"}, kind: lora.ErrMalformed},
	{name: "a regular expression that is none", adapter: "llama/attention",
		config: map[string]any{"alpha_pattern": map[string]any{`q_(proj`: 2}}, says: []string{"alpha_pattern", "q_(proj"},
		kind: lora.ErrMalformed},
	{name: "no B", adapter: "llama/attention", change: drop(qProj + "lora_B.weight"),
		says: []string{"q_proj", "only one of lora_A and lora_B"}, kind: lora.ErrMalformed},
	{name: "no A", adapter: "llama/attention", change: drop(qProj + "lora_A.weight"),
		says: []string{"q_proj", "only one of lora_A and lora_B"}, kind: lora.ErrMalformed},
	{name: "a magnitude of the wrong length", adapter: "llama/dora", change: put(qProj+"lora_magnitude_vector", ones(7)),
		says: []string{"q_proj", "7", "32"}, kind: lora.ErrMalformed},
	{name: "no magnitude", adapter: "llama/dora", change: drop(qProj + "lora_magnitude_vector"),
		says: []string{"q_proj", "lora_magnitude_vector", "use_dora"}, kind: lora.ErrMalformed},
	{name: "a magnitude without use_dora", adapter: "llama/dora", config: map[string]any{"use_dora": false},
		says: []string{"lora_magnitude_vector", "use_dora"}, kind: lora.ErrMalformed},
	{name: "a bias without lora_bias", adapter: "qwen2/lora-bias", config: map[string]any{"lora_bias": false},
		says: []string{"lora_B.bias", "lora_bias"}, kind: lora.ErrMalformed},
	{name: "a bias of the wrong length", adapter: "qwen2/lora-bias", change: put(qProj+"lora_B.bias", ones(5)),
		says: []string{"q_proj", "5", "32"}, kind: lora.ErrBase},
	{name: "a new value of another shape", adapter: "llama-score/score",
		change: put("base_model.model.score.weight", ones(3, 5)), says: []string{"score", "[3, 5]", "[3, 32]"},
		kind: lora.ErrBase},
	{name: "two names for one tensor", adapter: "llama/attention", change: put(qProj+"lora_A.default.weight", ones(4, 32)),
		says: []string{"lora_A", "says the same"}, kind: lora.ErrMalformed},
	{name: "integers", adapter: "llama/attention", change: func(m map[string]entry) {
		e := m[qProj+"lora_A.weight"]
		e.DType = tensor.I32
		m[qProj+"lora_A.weight"] = e
	}, says: []string{"lora_A", "I32", "expected"}, kind: lora.ErrMalformed},
	{name: "a replaced module without a new value", adapter: "llama/attention",
		config: map[string]any{"modules_to_save": []string{"score", "lm_head"}}, says: []string{"lm_head", "modules_to_save"},
		kind: lora.ErrMalformed},
	{name: "tokens without values", adapter: "llama/attention",
		config: map[string]any{"trainable_token_indices": []int{1, 5}},
		says:   []string{"trainable_token_indices", "trainable_tokens_delta"}, kind: lora.ErrMalformed},
	{name: "tokens past the vocabulary", adapter: "llama/tokens",
		config: map[string]any{"trainable_token_indices": []int{1, 5, 1000000}}, says: []string{"1000000", "embed_tokens"},
		kind: lora.ErrBase},
	{name: "the same token twice", adapter: "llama/tokens",
		config: map[string]any{"trainable_token_indices": []int{1, 5, 5}}, says: []string{"5"}, kind: lora.ErrMalformed},
	{name: "too few tokens", adapter: "llama/tokens", config: map[string]any{"trainable_token_indices": []int{1}},
		says: []string{"trainable_tokens_delta", "1 indices"}, kind: lora.ErrMalformed},
	{name: "experts of another number", adapter: "qwen3-moe/experts", change: func(m map[string]entry) {
		for k := range m {
			if strings.Contains(k, "experts") && strings.HasSuffix(k, "lora_A.weight") {
				m[k] = ones(7, m[k].Shape[1])
			}
			if strings.Contains(k, "experts") && strings.HasSuffix(k, "lora_B.weight") {
				m[k] = ones(m[k].Shape[0], 7)
			}
		}
	}, says: []string{"experts", "7 x "}, kind: lora.ErrBase},
	{name: "a start that is part of the base", adapter: "llama/init-pissa", says: []string{"init_lora_weights", "pissa"},
		kind: lora.ErrUnsupported},
	{name: "NaN in a new value", adapter: "llama-score/score",
		change: badValue("base_model.model.score.weight", 0x7fc00000),
		says:   []string{"score.weight", "NaN", "expected finite"}, kind: lora.ErrMalformed},
	{name: "an alpha that float32 cannot hold", adapter: "llama/attention", config: map[string]any{"lora_alpha": 1e300},
		says: []string{"self_attn", "float32 cannot hold"}, kind: lora.ErrMalformed},
	{name: "an alpha that is null", adapter: "llama/attention", config: map[string]any{"lora_alpha": nil},
		says: []string{"lora_alpha", "expected a number"}, kind: lora.ErrMalformed},
	{name: "no bias", adapter: "qwen2/lora-bias", change: drop(qProj + "lora_B.bias"),
		says: []string{"q_proj", "lora_B.bias", "lora_bias is true"}, kind: lora.ErrMalformed},
	{name: "a pattern of two lines", adapter: "llama/attention",
		config: map[string]any{"rank_pattern": map[string]any{"(\nq": 2}},
		says:   []string{"rank_pattern", "regular expression"}, kind: lora.ErrMalformed},
	{name: "no tensors", adapter: "llama/attention", change: func(m map[string]entry) { clear(m) },
		says: []string{"no tensors"}, kind: lora.ErrMalformed},
}

func init() {
	for field, v := range map[string]any{
		"alora_invocation_tokens": []int{1, 2}, "use_qalora": true, "velora_config": map[string]any{"rank": 1},
		"monteclora_config": map[string]any{"n": 1},
		"use_bdlora":        true, "arrow_config": map[string]any{"top_k": 1}, "kasa_config": map[string]any{"k": 1},
		"layer_replication": [][2]int{{0, 2}},
	} {
		badAdapters = append(badAdapters, badAdapter{name: field, adapter: "llama/attention",
			config: map[string]any{field: v},
			says:   []string{field, "adapter_config.json", "changes what the adapter computes"}, kind: lora.ErrUnsupported})
	}
}

// TestMergeBadAdapter merges adapters that cannot be: the error is one line that names what is wrong, and nothing is
// left where the result was to be.
func TestMergeBadAdapter(t *testing.T) {
	t.Parallel()
	for _, x := range badAdapters {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			source, dir := filepath.Join(adapterFixtures, x.adapter), filepath.Join(t.TempDir(), "adapter")
			require.NoError(t, os.Mkdir(dir, 0o755))
			b, err := os.ReadFile(filepath.Join(source, "adapter_config.json"))
			require.NoError(t, err)
			config := map[string]any{}
			require.NoError(t, json.Unmarshal(b, &config))
			maps.Copy(config, x.config)
			b, err = json.Marshal(config)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, "adapter_config.json"), b, 0o644))
			tensors := load(t, filepath.Join(source, "adapter_model.safetensors"))
			if x.change != nil {
				before := maps.Clone(tensors)
				x.change(tensors)
				require.NotEqual(t, before, tensors, "the case changes something")
			}
			writeTensors(t, filepath.Join(dir, "adapter_model.safetensors"), tensors)
			if x.base == "" {
				x.base = strings.Split(x.adapter, "/")[0]
			}
			for _, o := range []lorakit.ConvertOptions{{}, {Quantize: "nf4", MinKept: -1}} {
				at := t.TempDir()
				_, err = lorakit.Merge(t.Context(), baseOf(x.base), []lorakit.Adapter{{Path: dir}}, filepath.Join(at, "out"), o)
				require.Error(t, err)
				for _, s := range append(x.says, filepath.Base(dir)) {
					require.ErrorContains(t, err, s)
				}
				require.NotContains(t, err.Error(), "\n")
				if x.kind != nil {
					require.ErrorIs(t, err, x.kind)
				}
				left, err := os.ReadDir(at)
				require.NoError(t, err)
				require.Empty(t, left)
			}
		})
	}
}

// TestMergeBaseInPieces takes a piece out of a stack of experts, or gives it another shape: a part of the delta would
// go nowhere.
func TestMergeBaseInPieces(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(map[string]entry){
		"missing": drop("model.layers.0.mlp.experts.1.down_proj.weight"),
		"turned": func(m map[string]entry) {
			e := m["model.layers.0.mlp.experts.1.down_proj.weight"]
			e.Shape = tensor.Shape{e.Shape[1] * 2, e.Shape[0] / 2}
			m["model.layers.0.mlp.experts.1.down_proj.weight"] = e
		},
		"flat": func(m map[string]entry) {
			for k, e := range m {
				if strings.Contains(k, "experts") && strings.HasSuffix(k, "down_proj.weight") {
					n, err := e.Shape.Count()
					if err != nil {
						panic(err) // it has been read from a file
					}
					e.Shape = tensor.Shape{n}
					m[k] = e
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			base, at := filepath.Join(t.TempDir(), "base"), t.TempDir()
			require.NoError(t, os.Mkdir(base, 0o755))
			b, err := os.ReadFile(filepath.Join(baseOf("qwen3-moe"), "config.json"))
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(base, "config.json"), b, 0o644))
			tensors := load(t, baseOf("qwen3-moe"))
			require.Contains(t, tensors, "model.layers.0.mlp.experts.1.down_proj.weight")
			change(tensors)
			writeTensors(t, filepath.Join(base, "model.safetensors"), tensors)
			_, err = lorakit.Merge(t.Context(), base,
				[]lorakit.Adapter{{Path: filepath.Join(adapterFixtures, "qwen3-moe/experts")}}, filepath.Join(at, "out"),
				lorakit.ConvertOptions{MinKept: -1})
			require.ErrorIs(t, err, lora.ErrBase)
			require.ErrorContains(t, err, "experts")
			left, err := os.ReadDir(at)
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

// TestMergeZeroNorm merges DoRA onto a row of zeros to which nothing is added.
func TestMergeZeroNorm(t *testing.T) {
	t.Parallel()
	base, adapter, at := filepath.Join(t.TempDir(), "base"), filepath.Join(t.TempDir(), "adapter"), t.TempDir()
	require.NoError(t, os.Mkdir(base, 0o755))
	require.NoError(t, os.Mkdir(adapter, 0o755))
	for from, to := range map[string]string{filepath.Join(baseOf("llama"), "config.json"): base,
		filepath.Join(adapterFixtures, "llama/dora/adapter_config.json"): adapter} {
		b, err := os.ReadFile(from)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(to, filepath.Base(from)), b, 0o644))
	}
	weights, parts := load(t, baseOf("llama")),
		load(t, filepath.Join(adapterFixtures, "llama/dora/adapter_model.safetensors"))
	for m, key := range map[*map[string]entry]string{&weights: "model.layers.0.self_attn.q_proj.weight",
		&parts: qProj + "lora_B.weight"} {
		e := (*m)[key]
		e.data = slices.Clone(e.data)
		clear(e.data[:len(e.data)/int(e.Shape[0])])
		(*m)[key] = e
	}
	writeTensors(t, filepath.Join(base, "model.safetensors"), weights)
	writeTensors(t, filepath.Join(adapter, "adapter_model.safetensors"), parts)
	_, err := lorakit.Merge(t.Context(), base, []lorakit.Adapter{{Path: adapter}}, filepath.Join(at, "out"),
		lorakit.ConvertOptions{MinKept: -1})
	require.ErrorIs(t, err, lora.ErrBase)
	require.ErrorContains(t, err, "q_proj")
	require.ErrorContains(t, err, "output 0")
	left, err := os.ReadDir(at)
	require.NoError(t, err)
	require.Empty(t, left)
}
