package svd

import (
	"fmt"
	"math"
	"testing"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/stretchr/testify/require"
	"gonum.org/v1/gonum/mat"
)

func TestSymmetricIsLAPACKs(t *testing.T) {
	for name, a := range map[string]*mat.Dense{
		"one":      mat.NewDense(1, 1, []float64{3}),
		"identity": identity(7),
		"zeros":    mat.NewDense(5, 5, nil),
		"pairs": gram(kernels.MatOf([]float32{1, 0, 0, 0, 0, 1, 1, 0, 0, -1, 1, 0, 0, 0, 0, 1}, 4, 4),
			kernels.MatOf([]float32{1, 0, 0, 0, 0, 1, 1, 0, 0, -1, 1, 0, 0, 0, 0, 1}, 4, 4)),
		"random":   gram(kernels.MatOf(gaussian(1, 90*70, 1), 90, 70), kernels.MatOf(gaussian(1, 90*70, 1), 90, 70)),
		"low rank": gram(kernels.MatOf(gaussian(1, 5*70, 1), 5, 70), kernels.MatOf(gaussian(1, 5*70, 1), 5, 70)),
	} {
		n := a.RawMatrix().Rows
		t.Run(fmt.Sprint(name, n), func(t *testing.T) {
			tri := tridiagonalize(a, n)
			s, ok := tri.values()
			require.True(t, ok)
			var f mat.EigenSym
			require.True(t, f.Factorize(mat.NewSymDense(n, append([]float64(nil), a.RawMatrix().Data...)), false))
			want := f.Values(nil)
			for i := range s {
				require.InDelta(t, want[n-1-i], s[i], 1e-12*max(1, s[0]))
			}
			v := tri.vectors(s)
			for i := range n {
				for j := range n {
					e := 0.0
					if i == j {
						e = 1
					}
					require.InDelta(t, e, dot(v.RawRowView(i), v.RawRowView(j)), 1e-12)
				}
				var av mat.VecDense
				av.MulVec(a, v.RowView(i))
				for j := range n {
					require.LessOrEqual(t, math.Abs(av.AtVec(j)-s[i]*v.At(i, j)), 1e-11*max(1, s[0]))
				}
			}
		})
	}
}

func BenchmarkSymmetric(b *testing.B) {
	for _, n := range []int{32, 64, 128, 256} {
		x := kernels.MatOf(gaussian(1, 500*n, 1), 500, n)
		a := gram(x, x)
		b.Run(fmt.Sprint("tri ", n), func(b *testing.B) {
			for b.Loop() {
				tridiagonalize(a, n)
			}
		})
		b.Run(fmt.Sprint("values ", n), func(b *testing.B) {
			t := tridiagonalize(a, n)
			for b.Loop() {
				t.values()
			}
		})
		b.Run(fmt.Sprint("vectors ", n), func(b *testing.B) {
			t := tridiagonalize(a, n)
			s, _ := t.values()
			for b.Loop() {
				t.vectors(s[:16])
			}
		})
	}
}
