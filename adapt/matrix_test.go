package adapt

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/svd"
)

func random(rows, cols int, seed uint64) []float32 {
	r := rand.New(rand.NewPCG(seed, 0))
	x := make([]float32, rows*cols)
	for i := range x {
		x[i] = float32(r.NormFloat64())
	}
	return x
}

// TestComputedMatrices: matrices that are computed while they are read are what they say, whichever rows are read.
func TestComputedMatrices(t *testing.T) {
	const rows, cols, rank = 70, 33, 3
	x, y := random(rows, cols, 1), random(rows, cols, 2)
	b, a := kernels.MatOf(random(rows, rank, 3), rows, rank), kernels.MatOf(random(rank, cols, 4), rank, cols)
	less := minus(svd.Dense(x, rows, cols), svd.Dense(y, rows, cols))
	product := minusProduct(svd.Dense(x, rows, cols), b, a, 0.5)
	for _, span := range [][2]int{{0, rows}, {0, 1}, {17, 40}, {rows - 1, rows}} {
		got, changed := make([]float32, (span[1]-span[0])*cols), make([]float32, (span[1]-span[0])*cols)
		require.NoError(t, less.ReadRows(got, span[0], span[1]))
		require.NoError(t, product.ReadRows(changed, span[0], span[1]))
		for i := range got {
			at := span[0]*cols + i
			require.Equal(t, x[at]-y[at], got[i])
			want := float64(x[at])
			for k := range rank {
				want -= 0.5 * float64(b.Data[at/cols*rank+k]) * float64(a.Data[k*cols+at%cols])
			}
			require.InDelta(t, want, changed[i], 1e-5)
		}
	}
	var want float64
	for _, v := range x {
		want += float64(v) * float64(v)
	}
	got, err := energy(t.Context(), svd.Dense(x, rows, cols))
	require.NoError(t, err)
	require.InEpsilon(t, want, got, 1e-12)
}

// TestFactors: B·A is the decomposition times the factor, at its rank and at a larger one.
func TestFactors(t *testing.T) {
	const rows, cols, rank = 20, 12, 4
	x := random(rows, cols, 5)
	d, err := svd.Truncated(t.Context(), svd.Dense(x, rows, cols), svd.Options{Rank: rank})
	require.NoError(t, err)
	for _, wide := range []int{rank, rank + 3} {
		a, b := factors(d, wide, 2)
		require.Equal(t, []int{wide, cols, rows, wide}, []int{a.Rows, a.Cols, b.Rows, b.Cols})
		for i := range rows {
			for j := range cols {
				var want, got float64
				for q, s := range d.S {
					u, v := d.U.Data[i*d.U.RowStride+q*d.U.ColStride], d.V.Data[j*d.V.RowStride+q*d.V.ColStride]
					want += 2 * s * float64(u) * float64(v)
				}
				for q := range wide {
					got += float64(b.Data[i*wide+q]) * float64(a.Data[q*cols+j])
				}
				require.InDelta(t, want, got, 1e-5)
			}
		}
	}
	require.InDelta(t, d.Energy, heldEnergy(d)+cutEnergy(d), 1e-6*d.Energy)
}
