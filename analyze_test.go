package lorakit_test

import (
	"context"
	"encoding/json"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/tensor"
)

// wantedSpectrum is what numpy says of a matrix.
type wantedSpectrum struct {
	Norm          float64
	WeightNorm    float64   `json:"weight_norm"`
	Values        []float64 `json:"singular_values"`
	EffectiveRank float64   `json:"effective_rank"`
	StableRank    float64   `json:"stable_rank"`
	Needed        []int
	NF4           *struct {
		RelativeError float64 `json:"relative_error"`
		Kept          map[int]float64
	}
}

func readGolden(t *testing.T, name string, into any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("fixtures/analyze", name))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, into))
}

// sameSpectrum compares to the tolerance, of the largest value.
func sameSpectrum(t *testing.T, w wantedSpectrum, m lorakit.AnalyzedModule, tolerance float64) {
	t.Helper()
	require.NotNil(t, m.SpectrumFigures)
	require.NotNil(t, m.Norm)
	assert.True(t, m.Complete)
	assert.InEpsilon(t, w.Norm, *m.Norm, tolerance)
	if w.WeightNorm > 0 {
		assert.InEpsilon(t, w.WeightNorm, m.WeightNorm, tolerance)
		assert.InEpsilon(t, w.Norm/w.WeightNorm, m.RelativeNorm, tolerance)
	}
	// What numpy leaves out is noise.
	require.GreaterOrEqual(t, len(m.Values), len(w.Values))
	for i, v := range m.Values {
		if i < len(w.Values) {
			assert.InDelta(t, w.Values[i], v, tolerance*w.Values[0], "value %d", i)
		} else {
			assert.Less(t, v, 1e-6*w.Values[0])
		}
	}
	assert.InEpsilon(t, w.EffectiveRank, m.EffectiveRank, 10*tolerance)
	assert.InEpsilon(t, w.StableRank, m.StableRank, 10*tolerance)
	var needed []int
	for i, n := range m.Needed {
		needed = append(needed, n.Rank)
		assert.InDelta(t, []float64{0.5, 0.9, 0.95, 0.99}[i], n.Share, 0)
	}
	assert.Equal(t, w.Needed, needed)
	var sum, last float64
	for _, k := range m.Kept {
		assert.Greater(t, k.Share, last)
		last = k.Share
	}
	assert.InDelta(t, 1, last, 1e-6)
	for _, v := range w.Values[:min(2, len(w.Values))] {
		sum += v * v
	}
	if len(m.Kept) > 1 {
		assert.Equal(t, 2, m.Kept[1].Rank)
		assert.InDelta(t, sum/(w.Norm*w.Norm), m.Kept[1].Share, 10*tolerance)
	}
}

func TestAnalyzeAdapterAsNumpy(t *testing.T) {
	var golden map[string]map[string]wantedSpectrum
	readGolden(t, "adapters.json", &golden)
	require.NotEmpty(t, golden)
	for name, modules := range golden {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(adapterFixtures, name)
			r, err := lorakit.Analyze(t.Context(), path, "", lorakit.AnalyzeOptions{})
			require.NoError(t, err)
			assert.Equal(t, "adapter", r.Of)
			inspected, err := lorakit.InspectAdapter(t.Context(), lorakit.Adapter{Path: path}, lorakit.ReadOptions{})
			require.NoError(t, err)
			found := 0
			var energy, shown float64
			for _, m := range inspected.Modules {
				if m.A != nil { // a stack of experts in one
					shown += *m.Norm * *m.Norm
				}
			}
			for _, m := range r.Modules {
				if m.SpectrumFigures == nil {
					assert.Contains(t, []string{"bias", "replace", "rows"}, m.Form)
					assert.Positive(t, *m.Norm)
					continue
				}
				found++
				w, ok := modules[m.Name]
				require.True(t, ok, m.Name)
				sameSpectrum(t, w, m, 1e-6)
				assert.Equal(t, m.Rank, m.Kept[len(m.Kept)-1].Rank)
				energy += w.Norm * w.Norm
			}
			assert.Len(t, modules, found)
			assert.InEpsilon(t, math.Sqrt(energy), r.Norm, 1e-6)
			assert.InEpsilon(t, math.Sqrt(shown), r.Norm, 1e-6)
		})
	}
}

func TestAnalyzeChangeAsNumpy(t *testing.T) {
	var golden map[string]struct {
		Modules map[string]wantedSpectrum
		Others  map[string]float64
	}
	readGolden(t, "changes.json", &golden)
	for name, paths := range map[string][2]string{
		"rounded": {"tiny-llama-f32", "tiny-llama"},
		"conv1d":  {"tiny-gpt2-f32", "tiny-gpt2"},
		"nf4":     {"tiny-llama", "expected/tiny-llama/nf4-dq"},
	} {
		t.Run(name, func(t *testing.T) {
			w := golden[name]
			require.NotEmpty(t, w.Modules)
			r, err := lorakit.Analyze(t.Context(), filepath.Join("fixtures", paths[0]), filepath.Join("fixtures", paths[1]),
				lorakit.AnalyzeOptions{})
			require.NoError(t, err)
			assert.Equal(t, "change", r.Of)
			compared := 0
			for _, m := range r.Modules {
				x, ok := w.Modules[m.Name]
				if !ok {
					assert.Zero(t, *m.Norm, m.Name)
					assert.Empty(t, m.Values)
					assert.Empty(t, m.Kept)
					continue
				}
				compared++
				sameSpectrum(t, x, m, 1e-6)
			}
			assert.Len(t, w.Modules, compared)
			others := map[string]float64{}
			for _, o := range r.Others {
				others[o.Name] = o.RelativeNorm
			}
			assert.Equal(t, slices.Sorted(maps.Keys(w.Others)), slices.Sorted(maps.Keys(others)))
			for k, v := range w.Others {
				assert.InEpsilon(t, v, others[k], 1e-9, k)
			}
		})
	}
}

func TestAnalyzeWeightsAsNumpy(t *testing.T) {
	var golden map[string]map[string]wantedSpectrum
	readGolden(t, "weights.json", &golden)
	for name, path := range map[string]string{"llama": "tiny-llama", "gpt2": "tiny-gpt2"} {
		t.Run(name, func(t *testing.T) {
			r, err := lorakit.Analyze(t.Context(), filepath.Join("fixtures", path), "", lorakit.AnalyzeOptions{})
			require.NoError(t, err)
			assert.Equal(t, "weights", r.Of)
			require.Len(t, r.Modules, len(golden[name]))
			for _, m := range r.Modules {
				w := golden[name][m.Name]
				sameSpectrum(t, w, m, 1e-6)
				require.NotNil(t, m.NF4)
				if w.NF4 == nil {
					continue
				}
				// bitsandbytes' lookup of the statistics is coarse in a few places.
				assert.InEpsilon(t, w.NF4.RelativeError, m.NF4.RelativeError, 1e-3, m.Name)
				compared := 0
				for _, k := range m.NF4.Kept {
					if share, ok := w.NF4.Kept[k.Rank]; ok {
						compared++
						assert.InDelta(t, share, k.Share, 2e-3, "%s by %d", m.Name, k.Rank)
					}
				}
				assert.GreaterOrEqual(t, compared, 2)
			}
		})
	}
	// What is quantised has no second error to foretell.
	r, err := lorakit.Analyze(t.Context(), "fixtures/expected/tiny-llama/nf4-dq", "", lorakit.AnalyzeOptions{})
	require.NoError(t, err)
	for _, m := range r.Modules {
		assert.Equal(t, m.Name == "lm_head", m.NF4 != nil, m.Name)
	}
	// Experts are taken one by one.
	r, err = lorakit.Analyze(t.Context(), "fixtures/tiny-mixtral", "", lorakit.AnalyzeOptions{})
	require.NoError(t, err)
	assert.Empty(t, r.LeftOut)
	experts := 0
	for _, m := range r.Modules {
		if strings.Contains(m.Name, ".experts.") {
			experts++
			assert.Nil(t, m.NF4)
			assert.Positive(t, m.EffectiveRank)
		}
	}
	assert.Equal(t, 24, experts)
}

// cosines is column q of the discrete cosine transform of n elements, which is orthonormal.
func cosines(n, q int) []float64 {
	x := make([]float64, n)
	for i := range x {
		x[i] = math.Sqrt(2/float64(n)) * math.Cos(math.Pi*(float64(i)+0.5)*float64(q)/float64(n))
	}
	return x
}

// TestAnalyzeLeadingValues has a matrix too large for all values, of which they are known.
func TestAnalyzeLeadingValues(t *testing.T) {
	const rows, cols, rank, most = 1100, 1030, 20, 8
	w := make([]float64, rows*cols)
	values := make([]float64, rank)
	var energy float64
	for q := range rank {
		values[q] = 10 / float64(q+1)
		energy += values[q] * values[q]
		u, v := cosines(rows, q+1), cosines(cols, q+1)
		for i := range rows {
			for j := range cols {
				w[i*cols+j] += values[q] * u[i] * v[j]
			}
		}
	}
	change := entry{tensor.Info{DType: tensor.F32, Shape: tensor.Shape{rows, cols}}, nil}
	for _, x := range w {
		change.data = appendFloat(change.data, float32(x))
	}
	base := change
	base.data = make([]byte, len(change.data))
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.safetensors"), filepath.Join(dir, "b.safetensors")
	const key = "model.layers.0.self_attn.q_proj.weight"
	writeTensors(t, a, map[string]entry{key: base})
	writeTensors(t, b, map[string]entry{key: change})
	r, err := lorakit.Analyze(t.Context(), a, b, lorakit.AnalyzeOptions{Rank: most})
	require.NoError(t, err)
	require.Len(t, r.Modules, 1)
	m := r.Modules[0]
	assert.False(t, m.Complete)
	assert.False(t, r.Kinds[0].Complete)
	require.Len(t, m.Values, most)
	for i, v := range m.Values {
		assert.InEpsilon(t, values[i], v, 1e-3)
	}
	assert.InEpsilon(t, math.Sqrt(energy), *m.Norm, 1e-5)
	assert.Equal(t, most, m.Kept[len(m.Kept)-1].Rank)
	var kept float64
	for _, v := range values[:most] {
		kept += v * v / energy
	}
	assert.InDelta(t, kept, m.Kept[len(m.Kept)-1].Share, 1e-4)
	// 99 % is beyond them
	assert.Equal(t, []lorakit.RankShare{{Rank: 1, Share: 0.5}, {Rank: 5, Share: 0.9}, {Rank: 8, Share: 0.95}}, m.Needed)
	// of a base of zeros
	assert.InDelta(t, math.MaxFloat64, m.RelativeNorm, 0)

	// With room for all there are no others.
	r, err = lorakit.Analyze(t.Context(), a, b, lorakit.AnalyzeOptions{Rank: 2 * rank})
	require.NoError(t, err)
	m = r.Modules[0]
	require.GreaterOrEqual(t, len(m.Values), rank)
	for i, v := range values {
		assert.InEpsilon(t, v, m.Values[i], 1e-4)
	}
}

func appendFloat(b []byte, x float32) []byte {
	u := math.Float32bits(x)
	return append(b, byte(u), byte(u>>8), byte(u>>16), byte(u>>24))
}

// TestAnalyzeSameForAnyThreads: also the page.
func TestAnalyzeSameForAnyThreads(t *testing.T) {
	dir := t.TempDir()
	for _, paths := range [][2]string{
		{filepath.Join(adapterFixtures, "llama/patterns"), ""},
		{"fixtures/tiny-llama", ""},
		{"fixtures/tiny-gpt2-f32", "fixtures/tiny-gpt2"},
	} {
		var first *lorakit.Analysis
		var page []byte
		for _, threads := range []int{1, 2, 7} {
			file := filepath.Join(dir, "page.html")
			r, err := lorakit.Analyze(t.Context(), paths[0], paths[1],
				lorakit.AnalyzeOptions{Threads: threads, HTML: file, Force: true})
			require.NoError(t, err)
			b, err := os.ReadFile(file)
			require.NoError(t, err)
			if first == nil {
				first, page = r, b
			}
			assert.Equal(t, first, r)
			assert.Equal(t, page, b)
		}
	}
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, left, 1)
}

func TestAnalyzeKinds(t *testing.T) {
	kinds := func(path string) map[string]int {
		r, err := lorakit.Analyze(t.Context(), path, "", lorakit.AnalyzeOptions{})
		require.NoError(t, err)
		found := map[string]int{}
		for _, k := range r.Kinds {
			found[k.Kind] = k.Modules
		}
		return found
	}
	assert.Equal(t, map[string]int{"c_attn": 2, "attn.c_proj": 2, "c_fc": 2, "mlp.c_proj": 2}, kinds("fixtures/tiny-gpt2"))
	assert.Equal(t, map[string]int{"embedder.convolution": 1, "layer.*.convolution": 6, "shortcut.convolution": 2},
		kinds(filepath.Join(adapterFixtures, "resnet/convolutions")))

	r, err := lorakit.Analyze(t.Context(), filepath.Join(adapterFixtures, "llama/attention"), "", lorakit.AnalyzeOptions{})
	require.NoError(t, err)
	for _, k := range r.Kinds {
		var norm, effective, two float64
		for _, m := range r.Modules {
			if m.Kind == k.Kind {
				norm += *m.Norm / 2
				effective += m.EffectiveRank / 2
				two += m.Kept[1].Share / 2
				assert.Contains(t, m.Name, map[int]string{0: ".0.", 1: ".1."}[m.Layer])
			}
		}
		assert.InDelta(t, norm, k.Norm, 1e-12)
		assert.InDelta(t, effective, k.EffectiveRank, 1e-12)
		assert.InDelta(t, two, k.Kept[1].Share, 1e-12)
	}
}

// TestAnalyzeNeedsBase has a stack of experts of which the file does not tell what it is for.
func TestAnalyzeNeedsBase(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "adapter_config.json"), []byte(`{"peft_type": "LORA", "r": 2, "lora_alpha": 4,
		"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}`), 0o644))
	const layer = "base_model.model.model.layers.3."
	writeTensors(t, filepath.Join(dir, "adapter_model.safetensors"), map[string]entry{
		layer + "mlp.experts.lora_A.weight":      ones(8, 6),
		layer + "mlp.experts.lora_B.weight":      ones(10, 8),
		layer + "self_attn.q_proj.lora_A.weight": ones(2, 3),
		layer + "self_attn.q_proj.lora_B.weight": ones(5, 2),
	})
	r, err := lorakit.Analyze(t.Context(), dir, "", lorakit.AnalyzeOptions{})
	require.NoError(t, err)
	inspected, err := lorakit.InspectAdapter(t.Context(), lorakit.Adapter{Path: dir}, lorakit.ReadOptions{})
	require.NoError(t, err)
	require.Len(t, r.Modules, 2)
	m, i := r.Modules[0], inspected.Modules[0]
	assert.True(t, m.NeedsBase)
	assert.Nil(t, m.Norm)
	assert.Nil(t, m.SpectrumFigures)
	assert.Equal(t, 3, m.Layer)
	assert.True(t, i.NeedsBase)
	assert.Nil(t, i.Norm)
	assert.Equal(t, tensor.Shape{8, 6}, i.A)
	assert.Equal(t, tensor.Shape{10, 8}, i.B)
	assert.InDelta(t, 4*math.Sqrt(15), *r.Modules[1].Norm, 1e-9) // scaling 2, all elements 2
	assert.InDelta(t, 1, r.Modules[1].EffectiveRank, 1e-9)
}

// TestAnalyzeDialects: what an adapter is does not depend on whose file it is in.
func TestAnalyzeDialects(t *testing.T) {
	for file, same := range map[string]struct {
		as    string
		alpha float64
	}{"mlx-llama": {"llama/attention", 0}, "loralib-llama.pt": {"llama/attention", 8},
		"kohya-llama.safetensors": {"llama/patterns", 0}} {
		t.Run(file, func(t *testing.T) {
			path := filepath.Join(adapterFixtures, "dialects", file)
			want, err := lorakit.Analyze(t.Context(), filepath.Join(adapterFixtures, same.as), "", lorakit.AnalyzeOptions{})
			require.NoError(t, err)
			got, err := lorakit.Analyze(t.Context(), path, "", lorakit.AnalyzeOptions{Alpha: same.alpha})
			require.NoError(t, err)
			require.Len(t, got.Modules, len(want.Modules))
			for i, m := range got.Modules {
				w := want.Modules[i]
				assert.Equal(t, w.Name, m.Name)
				assert.Equal(t, w.Shape, m.Shape)
				assert.InEpsilon(t, *w.Norm, *m.Norm, 1e-6)
				assert.InEpsilon(t, w.EffectiveRank, m.EffectiveRank, 1e-6)
			}
			r, err := lorakit.InspectAdapter(t.Context(), lorakit.Adapter{Path: path, Alpha: same.alpha}, lorakit.ReadOptions{})
			require.NoError(t, err)
			assert.Contains(t, file, r.Dialect)
			assert.Equal(t, 4, r.Rank)
			assert.InDelta(t, 8, r.Alpha, 0)
			plain, err := lorakit.InspectAdapter(t.Context(), lorakit.Adapter{Path: filepath.Join(adapterFixtures, same.as)},
				lorakit.ReadOptions{})
			require.NoError(t, err)
			assert.Equal(t, plain.Trained, r.Trained)
			assert.Len(t, r.Patterns, len(plain.Patterns))
		})
	}
	_, err := lorakit.InspectAdapter(t.Context(),
		lorakit.Adapter{Path: filepath.Join(adapterFixtures, "dialects/loralib-llama.pt")}, lorakit.ReadOptions{})
	require.ErrorIs(t, err, lorakit.ErrUnsupported)
	require.Equal(t, []lorakit.Hint{{Option: "Alpha", Effect: "gives it"}}, lorakit.Hints(err))
}

func TestAnalyzeRefuses(t *testing.T) {
	adapter, llama := filepath.Join(adapterFixtures, "llama/attention"), filepath.Join(adapterFixtures, "bases/llama")
	dir := t.TempDir()
	nan := ones(64, 64)
	copy(nan.data[4*70:], []byte{0, 0, 0xc0, 0x7f})
	const q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
	write := func(name string, tensors map[string]entry) string {
		path := filepath.Join(dir, name+".safetensors")
		writeTensors(t, path, tensors)
		return path
	}
	whole := write("whole", map[string]entry{q: ones(64, 64), k: ones(64, 64)})
	ill := write("ill", map[string]entry{q: nan, k: ones(64, 64)})
	grown := write("grown", map[string]entry{q: ones(64, 65), k: ones(64, 64)})
	less := write("less", map[string]entry{q: ones(64, 64)})
	empty := write("empty", map[string]entry{q: ones(0, 64)})
	none := write("none", map[string]entry{"norm.weight": ones(64)})
	page := filepath.Join(dir, "there.html")
	require.NoError(t, os.WriteFile(page, nil, 0o644))
	for name, c := range map[string]struct {
		path, tuned string
		o           lorakit.AnalyzeOptions
		kind        error
		says        []string
	}{
		"an adapter as BASE": {adapter, llama, lorakit.AnalyzeOptions{}, lorakit.ErrRefused,
			[]string{adapter, "it is an adapter"}},
		"an adapter as TUNED": {llama, adapter, lorakit.AnalyzeOptions{}, lorakit.ErrRefused,
			[]string{adapter, "it is an adapter"}},
		"NaN in BASE": {ill, whole, lorakit.AnalyzeOptions{}, nil, []string{ill, q, "not finite"}},
		"NaN in TUNED": {whole, ill, lorakit.AnalyzeOptions{}, nil,
			[]string{ill, q, "row 1, column 6", "not finite"}},
		"NaN alone": {ill, "", lorakit.AnalyzeOptions{}, nil, []string{ill, q, "not finite"}},
		"another shape": {whole, grown, lorakit.AnalyzeOptions{}, lorakit.ErrRefused,
			[]string{grown, q, "[64, 65]", "[64, 64]"}},
		"a tensor less": {whole, less, lorakit.AnalyzeOptions{}, lorakit.ErrRefused, []string{less, k}},
		"an empty matrix": {empty, "", lorakit.AnalyzeOptions{}, lorakit.ErrRefused,
			[]string{empty, q, "at least one element"}},
		"no linear layer": {none, "", lorakit.AnalyzeOptions{}, lorakit.ErrRefused, []string{none, "no linear layer"}},
		"a rank below 0":  {whole, "", lorakit.AnalyzeOptions{Rank: -1}, lorakit.ErrOption, []string{"-1"}},
		"a page that is there": {whole, "", lorakit.AnalyzeOptions{HTML: page}, lorakit.ErrExists,
			[]string{page, "already exists"}},
		"a page that is SRC": {whole, "", lorakit.AnalyzeOptions{HTML: whole, Force: true}, lorakit.ErrRefused,
			[]string{whole}},
		"a page in TUNED": {whole, llama, lorakit.AnalyzeOptions{HTML: filepath.Join(llama, "x.html")},
			lorakit.ErrRefused, []string{llama}},
		"a page in no folder": {whole, "", lorakit.AnalyzeOptions{HTML: filepath.Join(dir, "no", "x.html")},
			lorakit.ErrRefused, []string{"no folder"}},
		"a page for a folder": {whole, "", lorakit.AnalyzeOptions{HTML: t.TempDir(), Force: true}, lorakit.ErrRefused,
			[]string{"no file"}},
		"nothing there": {filepath.Join(dir, "nothing"), "", lorakit.AnalyzeOptions{}, os.ErrNotExist,
			[]string{"nothing"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := lorakit.Analyze(t.Context(), c.path, c.tuned, c.o)
			require.Error(t, err)
			if c.kind != nil {
				require.ErrorIs(t, err, c.kind)
			}
			for _, s := range c.says {
				assert.ErrorContains(t, err, s)
			}
			assert.NotContains(t, err.Error(), "\n")
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := lorakit.Analyze(ctx, whole, "", lorakit.AnalyzeOptions{})
	require.ErrorIs(t, err, lorakit.ErrInterrupted)

	// A tensor that only TUNED has is told.
	r, err := lorakit.Analyze(t.Context(), less, whole, lorakit.AnalyzeOptions{})
	require.NoError(t, err)
	require.Len(t, r.Others, 1)
	assert.True(t, r.Others[0].Added)
	assert.Equal(t, k, r.Others[0].Name)
}
