package lorakit_test

import (
	"context"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

const adapterFixtures = "fixtures/adapters"

// baseOf is the folder of a base of the fixtures.
func baseOf(name string) string {
	if p := filepath.Join(adapterFixtures, "bases", name); exists(p) {
		return p
	}
	return filepath.Join("fixtures", name)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// opened is the container at a path.
func opened(t *testing.T, path string) formats.Container {
	t.Helper()
	dir, name, err := storage.Resolve(path, storage.Options{})
	require.NoError(t, err)
	c, err := formats.Default.Open(context.Background(), dir, name)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// numbers reads all tensors of a checkpoint as float32.
func numbers(t *testing.T, path string) map[string][]float32 {
	t.Helper()
	c := opened(t, path)
	out := map[string][]float32{}
	for _, x := range c.Tensors() {
		if !x.DType.Integer() {
			v, err := lora.Floats(&x)
			require.NoError(t, err)
			out[x.Name] = v
		}
	}
	return out
}

// shapes of the tensors of a file.
func shapes(t *testing.T, path string) map[string]tensor.Shape {
	t.Helper()
	c := opened(t, path)
	out := map[string]tensor.Shape{}
	for _, x := range c.Tensors() {
		out[x.Name] = x.Shape
	}
	return out
}

// product is b·a in float64.
func product(a, b []float32, in int) []float64 {
	r := len(a) / in
	out := make([]float64, len(b)/r*in)
	for i := range len(b) / r {
		for k := range r {
			for j := range in {
				out[i*in+j] += float64(b[i*r+k]) * float64(a[k*in+j])
			}
		}
	}
	return out
}

// TestCombineAsPEFT compares B·A of what PEFT combines, but for the types that drop values by its own random numbers.
func TestCombineAsPEFT(t *testing.T) {
	var results struct {
		Combined map[string]struct {
			Adapters     [][2]any
			Type         string `json:"combination_type"`
			Density      float64
			MajoritySign string   `json:"majority_sign_method"`
			Rank         int      `json:"svd_rank"`
			Clamp        *float64 `json:"svd_clamp"`
		}
	}
	b, err := os.ReadFile(filepath.Join(adapterFixtures, "results.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &results))
	compared := 0
	for name, x := range results.Combined {
		if strings.HasPrefix(x.Type, "dare") || x.Clamp != nil {
			continue
		}
		t.Run(name, func(t *testing.T) {
			var list []lorakit.Adapter
			for _, a := range x.Adapters {
				list = append(list, lorakit.Adapter{Path: filepath.Join(adapterFixtures, a[0].(string)), Weight: a[1].(float64)})
			}
			out := filepath.Join(t.TempDir(), "out")
			_, err := lorakit.Combine(t.Context(), out, list,
				lorakit.CombineOptions{Type: x.Type, Density: x.Density, MajoritySign: x.MajoritySign, Rank: x.Rank})
			require.NoError(t, err)
			got := numbers(t, filepath.Join(out, "adapter_model.safetensors"))
			want := numbers(t, filepath.Join(adapterFixtures, "combined", name+".safetensors"))
			for k := range got { // what replaces parts of the base goes with it
				if !strings.Contains(k, ".lora_") {
					delete(got, k)
				}
			}
			require.Equal(t, slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got)))
			shape := shapes(t, filepath.Join(out, "adapter_model.safetensors"))
			for k := range want {
				a, b := strings.CutSuffix(k, "A.weight")
				if !b {
					continue
				}
				r, in := int(shape[k][0]), 1
				for _, d := range shape[k][1:] {
					in *= int(d)
				}
				w, g := product(want[k], want[a+"B.weight"], in), product(got[k], got[a+"B.weight"], in)
				require.Len(t, g, len(w))
				require.Len(t, got[k], r*in)
				var apart, all float64
				for i := range w {
					apart += (w[i] - g[i]) * (w[i] - g[i])
					all += w[i] * w[i]
				}
				require.LessOrEqual(t, apart, 1e-9*all, k)
			}
		})
		compared++
	}
	require.Greater(t, compared, 15)
}

// mergedNumbers are the weights of a base with adapters.
func mergedNumbers(t *testing.T, base string, adapters ...lorakit.Adapter) map[string][]float32 {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	_, err := lorakit.Merge(t.Context(), baseOf(base), adapters, out, lorakit.ConvertOptions{DType: "f32"})
	require.NoError(t, err)
	return numbers(t, out)
}

// sameNumbers allows for an SVD and another order of sums.
func sameNumbers(t *testing.T, want, got map[string][]float32) {
	t.Helper()
	require.Equal(t, slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got)))
	for k := range want {
		require.Len(t, got[k], len(want[k]), k)
		var apart, all float64
		for i, w := range want[k] {
			apart += float64(w-got[k][i]) * float64(w-got[k][i])
			all += float64(w) * float64(w)
		}
		require.LessOrEqual(t, apart, 1e-11*all, k)
	}
}

// A combination that keeps whole deltas, merged, is what merging its adapters is: of stacks of experts, convolutions
// and embeddings too.
func TestCombineIsMerge(t *testing.T) {
	t.Parallel()
	for _, x := range []struct{ base, one, two string }{
		{"llama", "llama/attention", "llama/rslora"},
		{"llama", "llama/embedding-head", "llama/attention"},
		{"tiny-qwen3", "tiny-qwen3/tied-both-ensured", "tiny-qwen3/tied-both-ensured"},
		{"tiny-qwen3", "tiny-qwen3/tied-embedding-ensured", "tiny-qwen3/attention"},
		{"tiny-gpt2", "tiny-gpt2/attention", "tiny-gpt2/attention-b"},
		{"tiny-mixtral", "tiny-mixtral/experts", "tiny-mixtral/all-linear"},
		{"tiny-mixtral", "tiny-mixtral/per-expert", "tiny-mixtral/experts"},
		{"qwen3-moe", "qwen3-moe/experts", "qwen3-moe/down-only"},
		{"resnet", "resnet/convolutions-b", "resnet/convolutions-b"},
	} {
		t.Run(x.one+" and "+x.two, func(t *testing.T) {
			t.Parallel()
			path := func(name string) string { return filepath.Join(adapterFixtures, name) }
			list := []lorakit.Adapter{{Path: path(x.one), Weight: 0.7}, {Path: path(x.two), Weight: -0.4}}
			both := filepath.Join(t.TempDir(), "both")
			_, err := lorakit.Combine(t.Context(), both, list, lorakit.CombineOptions{Type: "cat"})
			require.NoError(t, err)
			sameNumbers(t, mergedNumbers(t, x.base, list...), mergedNumbers(t, x.base, lorakit.Adapter{Path: both}))
		})
	}
}

// An adapter of its own energy and more of rank keeps its function: parts without a rank go along.
func TestResizeKeeps(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"llama/attention", "llama/dora", "llama/tokens", "llama/saved-head", "llama/grown",
		"llama/embedding-head",
		"tiny-gpt2/attention", "tiny-mixtral/experts", "qwen3-moe/all-linear", "resnet/convolutions",
		"tiny-qwen3/tied-embedding-ensured"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			base, _, _ := strings.Cut(name, "/")
			a := lorakit.Adapter{Path: filepath.Join(adapterFixtures, name)}
			out := filepath.Join(t.TempDir(), "out")
			_, err := lorakit.Resize(t.Context(), a, out, lorakit.ResizeOptions{Energy: 1})
			require.NoError(t, err)
			sameNumbers(t, mergedNumbers(t, base, a), mergedNumbers(t, base, lorakit.Adapter{Path: out}))
		})
	}
}

// An adapter that was extracted with all of the energy leads from the base to the tuned checkpoint:
// experts, routers, embeddings and what is tied to them among it.
func TestExtractIsDifference(t *testing.T) {
	t.Parallel()
	for name, left := range map[string]int{
		"llama/attention": 0, "llama/embedding-head": 0, "tiny-gpt2/attention": 0, "phi3/fused": 0, "tiny-gemma3/language": 0,
		"tiny-mixtral/experts": 0, "tiny-mixtral/all-linear": 0,
		"qwen3-moe/experts": 0, "qwen3-moe/down-only": 0, "qwen3-moe/gate-up-only": 0, "tiny-qwen3/tied-both-ensured": 0,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			base, _, _ := strings.Cut(name, "/")
			dir := t.TempDir()
			tuned, plain, out := filepath.Join(dir, "tuned"), filepath.Join(dir, "plain"), filepath.Join(dir, "adapter")
			o := lorakit.ConvertOptions{DType: "f32"}
			_, err := lorakit.Convert(t.Context(), baseOf(base), plain, o)
			require.NoError(t, err)
			_, err = lorakit.Merge(t.Context(), baseOf(base), []lorakit.Adapter{{Path: filepath.Join(adapterFixtures, name)}},
				tuned, o)
			require.NoError(t, err)
			r, err := lorakit.Extract(t.Context(), plain, tuned, out, lorakit.ExtractOptions{Energy: 1})
			require.NoError(t, err)
			require.Len(t, r.LeftOut, left)
			require.InDelta(t, 1, r.Explained, 1e-5)
			again := filepath.Join(dir, "again")
			_, err = lorakit.Merge(t.Context(), plain, []lorakit.Adapter{{Path: out}}, again,
				lorakit.ConvertOptions{MinKept: -1})
			require.NoError(t, err)
			sameNumbers(t, numbers(t, tuned), numbers(t, again))
		})
	}
}
