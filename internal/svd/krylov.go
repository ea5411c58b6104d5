package svd

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/lorakit/lorakit/internal/kernels"
	"gonum.org/v1/gonum/mat"
)

// krylov is a growing orthonormal basis X of cols x width, and Y = M·X.
//
// A step forms Y = M·X and Z = Mᵀ·Y of one block in a single pass over the tiles;
// Z, made orthonormal to all there is, is the next block. The best approximation
// of M within the basis follows from the SVD of Y alone, without reading M again
// and without squaring it (Rayleigh-Ritz).
type krylov struct {
	src    *source
	random *rand.Rand
	x, y   []kernels.Mat
	energy float64 // of the matrix as it is, unscaled; known after the first pass
	known  bool
}

func newKrylov(src *source, seed uint64) *krylov {
	return &krylov{src: src, random: rand.New(rand.NewPCG(seed, 0x6c6f72616b6974))}
}

// width is how many columns the basis has.
func (k *krylov) width() int {
	n := 0
	for _, x := range k.x {
		n += x.Cols
	}
	return n
}

// expand adds a random block, orthonormal to the basis, and its images under
// MᵀM, (MᵀM)², … to the power of iterations. It adds fewer where there are no more.
func (k *krylov) expand(ctx context.Context, block, iterations int) error {
	next := kernels.NewMat(k.src.cols, block)
	for i := range next.Data {
		next.Data[i] = float32(k.random.NormFloat64())
	}
	for i := 0; i <= iterations; i++ {
		var err error
		if next, _, err = orthonormal(next, k.x); err != nil {
			return fmt.Errorf("svd: matrix of %d x %d: %w", k.src.rows, k.src.cols, err)
		}
		if next.Cols == 0 {
			return nil
		}
		y, z, err := k.pass(ctx, next, i < iterations)
		if err != nil || k.energy == 0 {
			return err
		}
		k.x, k.y = append(k.x, next), append(k.y, y)
		next = z
	}
	return nil
}

// pass reads the matrix once and returns M·x and, if asked, Mᵀ·M·x. The first pass
// adds up the energy, and starts again with a scale if the numbers are so large or
// small that their squares leave float32.
func (k *krylov) pass(ctx context.Context, x kernels.Mat, gram bool) (y, z kernels.Mat, err error) {
	for {
		y = kernels.NewMat(k.src.rows, x.Cols)
		if gram {
			z = kernels.NewMat(k.src.cols, x.Cols)
		}
		sum := 0.0
		err = k.src.tiles(ctx, func(tile kernels.Mat, lo int) error {
			if !k.known {
				e, err := energy(tile, lo)
				if err != nil {
					return err
				}
				sum += e
			}
			part := y.Slice(lo, lo+tile.Rows, 0, y.Cols)
			kernels.MulAdd(part, tile, x)
			if gram {
				kernels.MulAdd(z, tile.T(), part)
			}
			return nil
		})
		if err != nil || k.known {
			return y, z, err
		}
		k.energy, k.known = sum, true
		if sum == 0 {
			return y, z, nil
		}
		if _, e := math.Frexp(math.Sqrt(sum)); e < -30 || e > 30 {
			k.src.exponent = -e
			continue
		}
		return y, z, nil
	}
}

// ritz returns the best approximation of the matrix within the basis, keep values
// of it, and makes their vectors the basis.
func (k *krylov) ritz(keep int) (*Decomposition, error) {
	if k.energy == 0 {
		return &Decomposition{U: kernels.NewMat(k.src.rows, 0), V: kernels.NewMat(k.src.cols, 0)}, nil
	}
	x, y := beside(k.x), beside(k.y)
	q, r, err := orthonormal(y, nil)
	if err == nil && q.Cols == 0 {
		err = errors.New("its products with the basis are all zero")
	}
	if err != nil {
		return nil, fmt.Errorf("svd: matrix of %d x %d: %w", k.src.rows, k.src.cols, err)
	}
	left, s, right, err := decompose(r)
	if err != nil {
		return nil, fmt.Errorf("svd: matrix of %d x %d: %w", k.src.rows, k.src.cols, err)
	}
	n := nonzero(s[:min(keep, len(s))], 0x1p-23)
	d := &Decomposition{
		U: times(q, left.Slice(0, left.RawMatrix().Rows, 0, n)),
		V: times(x, right.Slice(0, right.RawMatrix().Rows, 0, n)),
		S: s[:n], Energy: k.energy,
	}
	fixSigns(d.U, d.V)
	k.x, k.y = []kernels.Mat{clone(d.V)}, []kernels.Mat{clone(d.U)}
	scaled := k.y[0]
	for i := range scaled.Rows {
		for j, v := range scaled.Data[i*n : (i+1)*n] {
			scaled.Data[i*n+j] = float32(float64(v) * s[j])
		}
	}
	d.S = make([]float64, n)
	for i := range d.S {
		d.S[i] = math.Ldexp(s[i], -k.src.exponent)
	}
	return d, nil
}

// decompose is the full SVD of a small matrix, in float64.
func decompose(a mat.Matrix) (u *mat.Dense, s []float64, v *mat.Dense, err error) {
	var f mat.SVD
	if !f.Factorize(a, mat.SVDThin) {
		rows, cols := a.Dims()
		return nil, nil, nil, fmt.Errorf("the SVD of a core of %d x %d did not converge", rows, cols)
	}
	u, v = new(mat.Dense), new(mat.Dense)
	f.UTo(u)
	f.VTo(v)
	return u, f.Values(nil), v, nil
}

// nonzero counts the leading values above epsilon times the first.
func nonzero(s []float64, epsilon float64) int {
	n := 0
	for n < len(s) && s[n] > epsilon*s[0] {
		n++
	}
	return n
}
