package lora

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	_ "github.com/lorakit/lorakit/formats/safetensors" // registers the container
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

const fixtures = "../fixtures/adapters"

// combination is a case that PEFT has computed.
type combination struct {
	Adapters     [][2]any
	Type         string `json:"combination_type"`
	Density      float64
	MajoritySign string   `json:"majority_sign_method"`
	Rank         int      `json:"svd_rank"`
	Clamp        *float64 `json:"svd_clamp"`
}

func (c combination) options() CombineOptions {
	return CombineOptions{Type: c.Type, Density: c.Density, MajoritySign: c.MajoritySign, Rank: c.Rank}
}

func combinations(t *testing.T) map[string]combination {
	t.Helper()
	var results struct{ Combined map[string]combination }
	b, err := os.ReadFile(filepath.Join(fixtures, "results.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &results))
	return results.Combined
}

func open(t *testing.T, name string, weight float64) Weighted {
	t.Helper()
	a, err := Open(filepath.Join(fixtures, name), OpenOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { a.Close() })
	return Weighted{a, weight}
}

func (c combination) open(t *testing.T) []Weighted {
	t.Helper()
	var list []Weighted
	for _, a := range c.Adapters {
		list = append(list, open(t, a[0].(string), a[1].(float64)))
	}
	return list
}

func collect(t *testing.T, list []Weighted, o CombineOptions) map[string]Trained {
	t.Helper()
	out := map[string]Trained{}
	var names []string
	require.NoError(t, Combine(t.Context(), list, o, func(m Trained) error {
		require.NotContains(t, out, m.Name)
		require.Equal(t, m.Rank, m.A.Rows)
		require.Equal(t, m.Rank, m.B.Cols)
		out[m.Name], names = m, append(names, m.Name)
		return nil
	}))
	require.True(t, slices.IsSorted(names))
	return out
}

// stored reads the tensors of a safetensors file.
func stored(t *testing.T, path string) map[string]*formats.Tensor {
	t.Helper()
	dir, name, err := storage.Resolve(path, storage.Options{})
	require.NoError(t, err)
	c, err := formats.Default.Open(t.Context(), dir, name)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	out := map[string]*formats.Tensor{}
	for _, x := range c.Tensors() {
		out[x.Name] = &x
	}
	return out
}

// wanted reads the modules of a combination that PEFT has saved.
func wanted(t *testing.T, name string) map[string]Trained {
	t.Helper()
	tensors := stored(t, filepath.Join(fixtures, "combined", name+".safetensors"))
	out := map[string]Trained{}
	for key, x := range tensors {
		module, part, _ := split(key)
		v, err := Floats(x)
		require.NoError(t, err)
		m := out[module]
		mat := kernels.MatOf(v, int(x.Shape[0]), len(v)/int(x.Shape[0]))
		switch part {
		case roleA, roleEmbeddingA:
			m.A, m.Rank = mat, mat.Rows
			switch {
			case part == roleEmbeddingA:
				m.Form = Embedding
			case len(x.Shape) > 2:
				m.Form = Conv
			}
		case roleB, roleEmbeddingB:
			m.B = mat
		default:
			require.Fail(t, "unexpected tensor", key)
		}
		out[module] = m
	}
	return out
}

// product is b·a in float64.
func product(m Trained) []float64 {
	out := make([]float64, m.B.Rows*m.A.Cols)
	for i := range m.B.Rows {
		for k := range m.A.Rows {
			for j := range m.A.Cols {
				out[i*m.A.Cols+j] += float64(m.B.Data[i*m.B.Cols+k]) * float64(m.A.Data[k*m.A.Cols+j])
			}
		}
	}
	return out
}

func near(t *testing.T, want, got []float64, tolerance float64, what string) {
	t.Helper()
	require.Len(t, got, len(want), what)
	var apart, all float64
	for i, w := range want {
		apart += (w - got[i]) * (w - got[i])
		all += w * w
	}
	require.Positive(t, all, what)
	require.LessOrEqual(t, math.Sqrt(apart/all), tolerance, what)
}

func widen(v []float32) []float64 {
	out := make([]float64, len(v))
	for i, x := range v {
		out[i] = float64(x)
	}
	return out
}

// Every combination of PEFT's that draws no random numbers: the factors themselves, or what they make where they come
// from a decomposition.
func TestCombineAsPEFT(t *testing.T) {
	compared := map[string]bool{}
	for name, c := range combinations(t) {
		if strings.HasPrefix(c.Type, "dare") || c.Clamp != nil {
			continue
		}
		t.Run(name, func(t *testing.T) {
			want, got := wanted(t, name), collect(t, c.open(t), c.options())
			require.ElementsMatch(t, slices.Collect(maps.Keys(want)), slices.Collect(maps.Keys(got)))
			for module, w := range want {
				g := got[module]
				require.Equal(t, w.Form, g.Form, module)
				near(t, product(w), product(g), 5e-6, module)
				if len(c.Adapters) > 1 && strings.HasSuffix(c.Type, "svd") || c.Type == "cat" && w.Rank != g.Rank {
					continue // signs are free; PEFT fills a smaller rank with zeros
				}
				near(t, widen(w.A.Data), widen(g.A.Data), 1e-6, module)
				near(t, widen(w.B.Data), widen(g.B.Data), 1e-6, module)
			}
		})
		compared[c.Type] = true
	}
	require.Len(t, compared, len(CombineTypes())-4, "all but the dare types")
}

// With the masks that PEFT drew, the dare types are PEFT's.
func TestMixAsPEFTWithItsMasks(t *testing.T) {
	compared := map[string]bool{}
	for name, c := range combinations(t) {
		if !strings.HasPrefix(c.Type, "dare") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			adapters, o := c.open(t), c.options()
			masks := stored(t, filepath.Join(fixtures, "combined", name+".masks.safetensors"))
			sources, err := o.sources(adapters)
			require.NoError(t, err)
			masked := func(v []float32, key string) []float32 {
				require.Contains(t, masks, key)
				mask := make([]byte, masks[key].Bytes)
				_, err := masks[key].ReadAt(mask, 0)
				require.NoError(t, err)
				require.Len(t, mask, len(v))
				for i, keep := range mask {
					v[i] = v[i] * float32(keep) / float32(c.Density)
				}
				return v
			}
			for module, w := range wanted(t, name) {
				var as, bs, deltas [][]float32
				var wa, wb, weights []float64
				for _, s := range sources[module] {
					a, b, err := new(Writer).factors(adapters[s.adapter].Adapter, s.module)
					require.NoError(t, err)
					at := func(side string) string { return module + "." + side + "." + string(rune('0'+s.adapter)) }
					weight := adapters[s.adapter].Weight
					root := math.Sqrt(math.Abs(weight * s.module.Scaling))
					if o.dense() {
						d := kernels.NewMat(b.Rows, a.Cols)
						kernels.MulAdd(d, b, a)
						for i := range d.Data {
							d.Data[i] *= float32(s.module.Scaling)
						}
						deltas, weights = append(deltas, masked(d.Data, at("delta"))), append(weights, weight)
						continue
					}
					as, bs = append(as, masked(a.Data, at("lora_A"))), append(bs, masked(b.Data, at("lora_B")))
					wa, wb = append(wa, math.Copysign(root, weight)), append(wb, root)
				}
				if !o.dense() {
					near(t, widen(w.A.Data), widen(o.mix(as, wa)), 1e-6, module)
					near(t, widen(w.B.Data), widen(o.mix(bs, wb)), 1e-6, module)
					continue
				}
				// PEFT has saved the projection of the mixed delta on B's column space.
				near(t, product(w), projected(w, o.mix(deltas, weights)), 1e-5, module)
			}
		})
		compared[c.Type] = true
	}
	require.Len(t, compared, 4)
}

// projected is m·AᵀA for the orthonormal rows of a module's A.
func projected(w Trained, m []float32) []float64 {
	cols := w.A.Cols
	onto := Trained{Rank: w.Rank, A: w.A, B: kernels.NewMat(w.B.Rows, w.Rank)}
	for i := range w.B.Rows {
		for k := range w.Rank {
			var dot float64
			for j := range cols {
				dot += float64(m[i*cols+j]) * float64(w.A.Data[k*cols+j])
			}
			onto.B.Data[i*w.Rank+k] = float32(dot)
		}
	}
	return product(onto)
}

// plain makes an adapter in memory, of one rank and alpha.
func plain(t *testing.T, path string, weight, scaling float64, modules map[string][2]kernels.Mat) Weighted {
	t.Helper()
	a := &Adapter{Path: path}
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		ab := modules[name]
		a.Modules = append(a.Modules, &Module{Name: name, Param: "weight", Rank: ab[0].Rows, Scaling: scaling,
			A: matrixOf(inMemory(t, name+".A", ab[0])), B: matrixOf(inMemory(t, name+".B", ab[1]))})
	}
	return Weighted{a, weight}
}

func inMemory(t *testing.T, name string, m kernels.Mat) *formats.Tensor {
	t.Helper()
	raw := make([]byte, 4*len(m.Data))
	for i, v := range m.Data {
		bits := math.Float32bits(v)
		raw[4*i], raw[4*i+1], raw[4*i+2], raw[4*i+3] = byte(bits), byte(bits>>8), byte(bits>>16), byte(bits>>24)
	}
	return &formats.Tensor{Info: tensor.Info{Name: name, DType: tensor.F32,
		Shape: tensor.Shape{int64(m.Rows), int64(m.Cols)}}, File: "memory", Data: strings.NewReader(string(raw)),
		Bytes: int64(len(raw))}
}

func filled(seed uint64, rows, cols int) kernels.Mat {
	random, m := rand.New(rand.NewPCG(seed, 1)), kernels.NewMat(rows, cols)
	for i := range m.Data {
		m.Data[i] = float32(random.NormFloat64())
	}
	return m
}

// Worked by hand: signs are elected on A and B apart and without weights, which then divide by how many agree; equals
// and zeros count as PEFT counts them.
func TestTiesByHand(t *testing.T) {
	row := func(v ...float32) kernels.Mat { return kernels.MatOf(v, 1, len(v)) }
	col := func(v ...float32) kernels.Mat { return kernels.MatOf(v, len(v), 1) }
	list := []Weighted{
		plain(t, "one", 4, 1, map[string][2]kernels.Mat{"m": {row(3, -1, 2, 0), col(1, -2)}}),
		plain(t, "two", -1, 9, map[string][2]kernels.Mat{"m": {row(-1, -1, -2, 0), col(-3, -4)}}),
	}
	for sign, want := range map[string][2][]float32{
		// A weighs 2 and -3, B 2 and 3. Sums of A: 2, -2, 0 (taken as +), 0.
		"total": {{6, (-2 + 3) / 2.0, 4, 0}, {-9, (-4 - 12) / 2.0}},
		// Counts of A: 0 (taken as +), -2, 0, 0; of B: 0 (taken as +), -2.
		"frequency": {{6, (-2 + 3) / 2.0, 4, 0}, {2, (-4 - 12) / 2.0}},
	} {
		got := collect(t, list, CombineOptions{Type: "ties", Density: 1, MajoritySign: sign})["m"]
		require.Equal(t, want[0], got.A.Data, sign)
		require.Equal(t, want[1], got.B.Data, sign)
	}
}

// A zero weight takes part as in PEFT: it adds nothing.
func TestCombineZeroWeight(t *testing.T) {
	m, n := [2]kernels.Mat{filled(1, 2, 6), filled(2, 5, 2)}, [2]kernels.Mat{filled(3, 2, 6), filled(4, 5, 2)}
	list := []Weighted{plain(t, "one", 0.5, 2, map[string][2]kernels.Mat{"m": m}),
		plain(t, "two", 0, 2, map[string][2]kernels.Mat{"m": n})}
	for _, kind := range []string{"linear", "cat", "svd"} {
		near(t, product(Trained{A: m[0], B: m[1]}), product(collect(t, list, CombineOptions{Type: kind})["m"]), 1e-6, kind)
	}
}

// A rank beyond what a matrix has is cut to it, whatever is asked for.
func TestCombineRankIsBounded(t *testing.T) {
	m := map[string][2]kernels.Mat{"m": {filled(1, 2, 6), filled(2, 5, 2)}}
	list := []Weighted{plain(t, "one", 1, 1, m), plain(t, "two", 1, 1, m)}
	for _, o := range []CombineOptions{{Type: "svd", Rank: 1 << 40}, {Type: "ties_svd", Rank: 1 << 40, Density: 1}} {
		got := collect(t, list, o)["m"]
		require.Equal(t, 5, got.Rank)
		require.Len(t, got.A.Data, 5*6)
	}
}

func TestCombineRefuses(t *testing.T) {
	mats := func(r, in, out int) [2]kernels.Mat { return [2]kernels.Mat{filled(1, r, in), filled(2, out, r)} }
	one := plain(t, "one", 1, 1, map[string][2]kernels.Mat{"m": mats(2, 6, 5)})
	with := func(path string, weight float64, change func(m *Module, a *Adapter)) Weighted {
		w := plain(t, path, weight, 1, map[string][2]kernels.Mat{"m": mats(2, 6, 5)})
		change(w.Modules[0], w.Adapter)
		return w
	}
	same := func(*Module, *Adapter) {}
	two := with("two", 1, same)
	linear := CombineOptions{Type: "linear"}
	for says, c := range map[string]struct {
		list []Weighted
		o    CombineOptions
		kind error
	}{
		"no adapter to combine": {nil, linear, ErrUnsupported},
		`type "slerp" of combination; known are linear`: {[]Weighted{one, two},
			CombineOptions{Type: "slerp"}, ErrUnsupported},
		"density 0 for ties": {[]Weighted{one, two},
			CombineOptions{Type: "ties"}, ErrUnsupported},
		"density 1.5 for dare_linear": {[]Weighted{one, two},
			CombineOptions{Type: "dare_linear", Density: 1.5}, ErrUnsupported},
		"density NaN for magnitude_prune_svd": {[]Weighted{one, two},
			CombineOptions{Type: "magnitude_prune_svd", Density: math.NaN()}, ErrUnsupported},
		"density 0.5 for cat, which prunes": {[]Weighted{one, two},
			CombineOptions{Type: "cat", Density: 0.5}, ErrUnsupported},
		`majority sign "all"`: {[]Weighted{one, two},
			CombineOptions{Type: "ties", Density: 0.5, MajoritySign: "all"}, ErrUnsupported},
		"a majority sign for svd": {[]Weighted{one, two},
			CombineOptions{Type: "svd", MajoritySign: "total"}, ErrUnsupported},
		"a rank for linear": {[]Weighted{one, two},
			CombineOptions{Type: "linear", Rank: 2}, ErrUnsupported},
		"rank -1, expected 1 or more": {[]Weighted{one, two},
			CombineOptions{Type: "svd", Rank: -1}, ErrUnsupported},
		"one: not supported: rank 2 for a single": {[]Weighted{one},
			CombineOptions{Type: "svd", Rank: 2}, ErrUnsupported},
		"two: not supported: weight NaN": {[]Weighted{one, with("two", math.NaN(), same)},
			linear, ErrUnsupported},
		"two: not supported: weight -Inf": {[]Weighted{one, with("two", math.Inf(-1), same)},
			linear, ErrUnsupported},
		`module "m": not supported: the combination has the value`: {[]Weighted{one, with("two", 1e300, same)},
			linear, ErrUnsupported},
		`two: module "m": not supported: its rank is 3 and that of one is`: {[]Weighted{one,
			plain(t, "two", 1, 1, map[string][2]kernels.Mat{"m": mats(3, 6, 5)})}, linear, ErrUnsupported},
		`two: module "m": another base: linear with lora_A 2 x 7`: {[]Weighted{one,
			plain(t, "two", 1, 1, map[string][2]kernels.Mat{"m": mats(2, 7, 5)})}, CombineOptions{Type: "svd"}, ErrBase},
		"DoRA cannot": {[]Weighted{one, with("two", 1, func(m *Module, _ *Adapter) { m.Magnitude = m.B.T })},
			linear, ErrUnsupported},
		"lora_bias cannot": {[]Weighted{one,
			with("two", 1, func(m *Module, _ *Adapter) { m.Form, m.A = Bias, Matrix{} })}, linear, ErrUnsupported},
		"no lora_A and lora_B": {[]Weighted{one,
			with("two", 1, func(m *Module, _ *Adapter) { m.Form, m.Base = Replace, true })}, linear, ErrUnsupported},
		"init_lora_weights is": {[]Weighted{one,
			with("two", 1, func(_ *Module, a *Adapter) { a.Config.Init = []byte(`"pissa"`) })}, linear, ErrUnsupported},
		"needs its whole delta of ": {[]Weighted{with("one", 1, huge), with("two", 1, huge)},
			CombineOptions{Type: "ties_svd", Density: 0.5}, ErrUnsupported},
	} {
		err := Combine(t.Context(), c.list, c.o, func(Trained) error { return nil })
		require.ErrorContains(t, err, says)
		require.ErrorIs(t, err, c.kind, says)
		require.NotContains(t, err.Error(), "\n")
	}
	// Less its start, what was taken out of the base is in it again.
	pissa := func(_ *Module, a *Adapter) { a.Config.Init = []byte(`"pissa"`) }
	for o, weight := range map[CombineOptions]float64{{Type: "cat"}: -1, {Type: "svd"}: -1, {Type: "linear"}: -1,
		{Type: "ties", Density: 1}: -1, {Type: "cat", Seed: 1}: -0.5} {
		err := Combine(t.Context(), []Weighted{with("one", 1, pissa), with("two", weight, same)}, o,
			func(Trained) error { return nil })
		if sums := o.Type == "cat" || o.Type == "svd"; sums && weight == -1 {
			require.NoError(t, err)
		} else {
			require.ErrorIs(t, err, ErrUnsupported, o)
		}
	}
	loftq := func(_ *Module, a *Adapter) { a.Config.Init = []byte(`"loftq"`) }
	require.ErrorContains(t, Combine(t.Context(), []Weighted{with("one", 1, loftq), with("two", -1, same)},
		CombineOptions{Type: "cat"}, nil), "in four bits")
	stopped, stop := context.WithCancel(t.Context())
	stop()
	require.ErrorIs(t, Combine(stopped, []Weighted{one, two}, linear, func(Trained) error { return nil }),
		context.Canceled)
	_, err := Resize(stopped, one.Adapter, 1, 0, func(Trained) error { return nil })
	require.ErrorIs(t, err, context.Canceled)
}

// huge gives a module the shapes of a product that no machine holds; nothing reads it.
func huge(m *Module, _ *Adapter) {
	a, b := *m.A.T, *m.B.T
	a.Shape, b.Shape = tensor.Shape{2, 1 << 20}, tensor.Shape{1 << 20, 2}
	m.A, m.B = matrixOf(&a), matrixOf(&b)
}

// TestStackNames joins single experts: Mixtral's older names lead to those that it has at run time, and a block of
// Granite's keeps its own.
func TestStackNames(t *testing.T) {
	for proj, want := range map[string]string{"w2": "m.mlp.experts", "down_proj": "m.block_sparse_moe.experts"} {
		var modules []*Module
		for e := range 2 {
			modules = append(modules, &Module{Name: fmt.Sprintf("m.block_sparse_moe.experts.%d.%s", e, proj), Param: "weight",
				Rank: 2, Scaling: 1,
				A: matrixOf(&formats.Tensor{Info: tensor.Info{Shape: tensor.Shape{2, 4}}}),
				B: matrixOf(&formats.Tensor{Info: tensor.Info{Shape: tensor.Shape{6, 2}}})})
		}
		require.Equal(t, proj == "w2", (&Adapter{Modules: modules}).mixtral())
		list, _, err := new(Adapter).families(modules)
		require.NoError(t, err)
		stacks, err := list[0].fuse()
		require.NoError(t, err)
		require.Equal(t, want, stacks[0].Name)
	}
}
