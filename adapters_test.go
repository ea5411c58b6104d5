package lorakit_test

import (
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

// numbers reads all tensors of a checkpoint as float32.
func numbers(t *testing.T, path string) map[string][]float32 {
	t.Helper()
	f, err := formats.Detect(path)
	require.NoError(t, err)
	c, err := f.Open(path)
	require.NoError(t, err)
	defer c.Close()
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
	f, err := formats.Detect(path)
	require.NoError(t, err)
	c, err := f.Open(path)
	require.NoError(t, err)
	defer c.Close()
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

// TestCombineAsPEFT compares B·A of what PEFT combines, but for the types that drop values
// by its own random numbers.
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
		if strings.HasPrefix(x.Type, "dare") || x.Clamp != nil || strings.HasPrefix(name, "resnet/") {
			continue // convolutions are refused, which bad input tests
		}
		t.Run(name, func(t *testing.T) {
			var list []lorakit.Adapter
			for _, a := range x.Adapters {
				list = append(list, lorakit.Adapter{Path: filepath.Join(adapterFixtures, a[0].(string)), Weight: a[1].(float64)})
			}
			out := filepath.Join(t.TempDir(), "out")
			_, err := lorakit.Combine(t.Context(), out, list, lorakit.CombineOptions{Type: x.Type, Density: x.Density, MajoritySign: x.MajoritySign, Rank: x.Rank})
			require.NoError(t, err)
			got := numbers(t, filepath.Join(out, "adapter_model.safetensors"))
			want := numbers(t, filepath.Join(adapterFixtures, "combined", name+".safetensors"))
			for k := range got { // the base's own matrices go with it
				if strings.Contains(k, ".base_layer.") {
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
				r, in := int(shape[k][0]), int(shape[k][1])
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
