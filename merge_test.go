package lorakit_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/tensor"
)

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

// A merge has the same bytes whatever the threads and the memory. It runs alone: the memory that is allowed is that of
// the process, with what other tests hold.
func TestMergeSameBytes(t *testing.T) {
	for _, name := range kinds {
		for _, quantize := range []string{"keep", "nf4"} {
			t.Run(name+"/"+quantize, func(t *testing.T) {
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
