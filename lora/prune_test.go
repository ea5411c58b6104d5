package lora

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"gonum.org/v1/gonum/mat"

	_ "github.com/lorakit/lorakit/formats/safetensors" // registers the container
	"github.com/lorakit/lorakit/internal/kernels"
)

func TestPrune(t *testing.T) {
	// Of equals the first are kept, whatever their signs.
	v := []float32{1, -2, 2, 0, -1, 2}
	prune(v, 0.34) // two of six
	require.Equal(t, []float32{0, -2, 2, 0, 0, 0}, v)
	v = []float32{1, -2, 2, 0, -1, 2}
	prune(v, 0.7) // four
	require.Equal(t, []float32{1, -2, 2, 0, 0, 2}, v)
	v = []float32{1, 2}
	prune(v, 0.1) // none
	require.Equal(t, []float32{0, 0}, v)

	// Against a sort, with values that share their upper bits.
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		n := 1 + random.IntN(300)
		v, order := make([]float32, n), make([]int, n)
		for i := range v {
			v[i], order[i] = math.Float32frombits(0x3f800000|random.Uint32()&0x8000_0003|random.Uint32N(2)<<20), i
		}
		density := random.Float64()
		want := make([]float32, n)
		slices.SortStableFunc(order, func(i, j int) int {
			x, y := math.Abs(float64(v[i])), math.Abs(float64(v[j]))
			switch {
			case x > y:
				return -1
			case x < y:
				return 1
			}
			return 0
		})
		for _, i := range order[:int(density*float64(n))] {
			want[i] = v[i]
		}
		prune(v, density)
		require.Equal(t, want, v)
	}
}

// What is dropped depends on the seed, the adapter, the module and the factor; what is kept is rescaled.
func TestDrop(t *testing.T) {
	draw := func(seed uint64, adapter int, name, factor string) []float32 {
		v := make([]float32, 20000)
		for i := range v {
			v[i] = 3
		}
		o := CombineOptions{Type: "dare_linear", Density: 0.25, Seed: seed}
		o.sparsify(v, adapter, name, factor)
		return v
	}
	first, kept := draw(1, 0, "m", "A"), 0
	for _, v := range first {
		if v != 0 {
			require.Equal(t, float32(12), v)
			kept++
		}
	}
	require.InDelta(t, 5000, kept, 400) // more than six standard deviations
	require.Equal(t, first, draw(1, 0, "m", "A"))
	for _, other := range [][]float32{draw(2, 0, "m", "A"), draw(1, 1, "m", "A"), draw(1, 0, "n", "A"),
		draw(1, 0, "m", "B")} {
		require.NotEqual(t, first, other)
	}

	// A module is the same without the others.
	m, n := [2]kernels.Mat{filled(1, 2, 6), filled(2, 5, 2)}, [2]kernels.Mat{filled(3, 2, 6), filled(4, 5, 2)}
	for _, kind := range []string{"dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"} {
		o := CombineOptions{Type: kind, Density: 0.5, Seed: 7}
		list := func(modules map[string][2]kernels.Mat) []Weighted {
			return []Weighted{plain(t, "one", 1, 2, modules), plain(t, "two", 1, 2, modules)}
		}
		both, alone := collect(t, list(map[string][2]kernels.Mat{"m": m, "n": n}), o),
			collect(t, list(map[string][2]kernels.Mat{"n": n}), o)
		require.Equal(t, alone["n"], both["n"], kind)
	}
}

// PEFT decomposes what pruning leaves exactly, and so do we, to float32, also where values at the cut are
// close together: a delta of rank 4 leaves four large ones and a flat tail.
func TestPrunedDeltasAreDecomposedAsByLAPACK(t *testing.T) {
	for _, c := range []struct{ rows, cols, rank int }{{192, 448, 5}, {560, 600, 5}} {
		r := rand.New(rand.NewPCG(1, 2))
		factor := func(rows, cols int) kernels.Mat {
			m := kernels.NewMat(rows, cols)
			for i := range m.Data {
				m.Data[i] = float32(r.NormFloat64())
			}
			return m
		}
		o := CombineOptions{Type: "magnitude_prune_svd", Density: 0.37}
		list := []contribution{
			{adapter: 0, weight: -0.5, scaling: 2, scale: -1, a: factor(4, c.cols), b: factor(c.rows, 4)},
		}
		sum, err := o.deltas(t.Context(), "m", list)
		require.NoError(t, err)
		whole := mat.NewDense(c.rows, c.cols, nil)
		for i, v := range sum {
			whole.Set(i/c.cols, i%c.cols, float64(v))
		}
		var exact mat.SVD
		require.True(t, exact.Factorize(whole, mat.SVDThin))
		var u, v, want mat.Dense
		exact.UTo(&u)
		exact.VTo(&v)
		k := c.rank
		want.Product(u.Slice(0, c.rows, 0, k), mat.NewDiagDense(k, exact.Values(nil)[:k]), v.Slice(0, c.cols, 0, k).T())
		got, err := o.combine(t.Context(), "m", list, k)
		require.NoError(t, err)
		near(t, want.RawMatrix().Data, product(got), 1e-5, "leading part")
	}
}
