package lorakit_test

import (
	"encoding/binary"
	"encoding/json"
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
