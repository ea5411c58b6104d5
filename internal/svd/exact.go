package svd

import (
	"context"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
	"gonum.org/v1/gonum/blas/blas64"
	"gonum.org/v1/gonum/lapack/lapack64"
	"gonum.org/v1/gonum/mat"
)

// full is the whole SVD of a matrix with at least one small side, read once. What a Krylov process has held of
// it may be scaled and on its side, so it begins with the matrix.
func full(ctx context.Context, m Matrix) (*Decomposition, error) {
	src, err := open(m)
	if err != nil {
		return nil, err
	}
	a := mat.NewDense(src.rows, src.cols, nil)
	total := 0.0
	err = src.tiles(ctx, func(tile kernels.Mat, lo int) error {
		e, err := energy(tile, lo)
		if err != nil {
			return err
		}
		total += e
		for i := range tile.Rows {
			row := a.RawRowView(lo + i)
			for j, v := range tile.Data[i*tile.Cols:][:tile.Cols] {
				row[j] = float64(v)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if total == 0 {
		return &Decomposition{U: kernels.NewMat(src.rows, 0), V: kernels.NewMat(src.cols, 0)}, nil
	}
	u, s, v, err := decompose(a)
	if err != nil {
		return nil, fmt.Errorf("svd: matrix of %d x %d: %w", src.rows, src.cols, err)
	}
	return assemble(u, s, v, total), nil
}

// assemble rounds a decomposition in float64 and leaves out what is zero in it.
func assemble(u *mat.Dense, s []float64, v *mat.Dense, total float64) *Decomposition {
	n := 0
	if len(s) > 0 && s[0] > 0 {
		n = nonzero(s, 0x1p-52*float64(len(s)))
	}
	d := &Decomposition{U: leading(u, n), V: leading(v, n), S: s[:n], Energy: total}
	fixSigns(d.U, d.V)
	return d
}

// leading rounds the first n columns.
func leading(a *mat.Dense, n int) kernels.Mat {
	rows, _ := a.Dims()
	if n == 0 {
		return kernels.NewMat(rows, 0)
	}
	return small(a.Slice(0, rows, 0, n))
}

// Product returns the SVD of left·right (rows x r times r x cols) from the factors alone: the QR of each, and the SVD
// of the small core between them, all in float64. r may be larger than a side. Errors are ErrShape and ErrNonFinite.
func Product(left, right kernels.Mat) (*Decomposition, error) {
	if left.Cols != right.Rows || left.Rows < 1 || left.Cols < 1 || right.Cols < 1 {
		return nil, fmt.Errorf("svd: product of %d x %d and %d x %d: %w, expected factors that fit",
			left.Rows, left.Cols, right.Rows, right.Cols, ErrShape)
	}
	for _, f := range []struct {
		name string
		m    kernels.Mat
	}{{"left", left}, {"right", right}} {
		if err := finite(f.m); err != nil {
			return nil, fmt.Errorf("svd: %s factor: %w", f.name, err)
		}
	}
	ql, rl := householder(wide(left))
	qr, rr := householder(wide(right.T()))
	var core mat.Dense
	core.Mul(rl, rr.T())
	u, s, v, err := decompose(&core)
	if err != nil {
		return nil, fmt.Errorf("svd: product of %d x %d and %d x %d: %w", left.Rows, left.Cols, right.Rows, right.Cols, err)
	}
	total := 0.0
	for _, x := range s {
		total += float64(x * x)
	}
	var lu, rv mat.Dense
	lu.Mul(ql, u)
	rv.Mul(qr, v)
	return assemble(&lu, s, &rv, total), nil
}

func finite(m kernels.Mat) error {
	for i := range m.Rows {
		for j := range m.Cols {
			if v := float64(m.Data[i*m.RowStride+j*m.ColStride]); math.IsNaN(v) || math.IsInf(v, 0) {
				return fmt.Errorf("%v in row %d, column %d: %w", v, i, j, ErrNonFinite)
			}
		}
	}
	return nil
}

// householder is the thin QR of a, with LAPACK's signs: q is rows x k and r is k x cols for k = min(rows, cols). a is
// overwritten.
func householder(a *mat.Dense) (q, r *mat.Dense) {
	rows, cols := a.Dims()
	k := min(rows, cols)
	raw := a.RawMatrix()
	tau := make([]float64, k)
	work := make([]float64, 1)
	lapack64.Geqrf(raw, tau, work, -1)
	work = make([]float64, int(work[0]))
	lapack64.Geqrf(raw, tau, work, len(work))
	r = mat.NewDense(k, cols, nil)
	for i := range k {
		copy(r.RawRowView(i)[i:], a.RawRowView(i)[i:])
	}
	q = mat.NewDense(rows, k, nil)
	q.Copy(a.Slice(0, rows, 0, k))
	qraw := q.RawMatrix()
	general := blas64.General{Rows: rows, Cols: k, Stride: qraw.Stride, Data: qraw.Data}
	work = make([]float64, 1)
	lapack64.Orgqr(general, tau, work, -1)
	work = make([]float64, int(work[0]))
	lapack64.Orgqr(general, tau, work, len(work))
	return q, r
}

// QR returns the first k columns of Q and the first k rows of R in the thin QR decomposition of m, with the signs of
// LAPACK, hence of torch.linalg.qr: q is rows x k, r is k x cols.
//
// The first k columns of Q depend on the first k columns of m alone, so only these take Householder reflections, in
// float64; then the rows of R are Qᵀ·m, summed up in float64 over tiles. m is read twice, and never held: memory is
// rows x k. Errors are those of Truncated.
func QR(ctx context.Context, m Matrix, k int) (q, r kernels.Mat, err error) {
	src, err := open(m)
	if err != nil {
		return q, r, err
	}
	if k < 1 || k > src.least() {
		return q, r, fmt.Errorf("svd: %d columns of the QR of a matrix of %d x %d: %w, expected 1 to %d", k, src.rows,
			src.cols, ErrRank, src.least())
	}
	panel := mat.NewDense(src.rows, k, nil)
	if err = src.tiles(ctx, func(tile kernels.Mat, lo int) error {
		if _, err := energy(tile, lo); err != nil {
			return err
		}
		for i := range tile.Rows {
			row := panel.RawRowView(lo + i)
			for j := range row {
				row[j] = float64(tile.Data[i*tile.Cols+j])
			}
		}
		return nil
	}); err != nil {
		return q, r, err
	}
	q64, corner := householder(panel)
	q = small(q64)
	sum := make([]float64, k*src.cols)
	part := kernels.NewMat(k, src.cols)
	if err = src.tiles(ctx, func(tile kernels.Mat, lo int) error {
		clear(part.Data)
		kernels.MulAdd(part, q.Slice(lo, lo+tile.Rows, 0, q.Cols).T(), tile)
		for i, v := range part.Data {
			sum[i] += float64(v)
		}
		return nil
	}); err != nil {
		return kernels.Mat{}, kernels.Mat{}, err
	}
	r = kernels.NewMat(k, src.cols)
	for i, v := range sum {
		r.Data[i] = float32(v)
	}
	for i := range k { // the triangle is known exactly
		for j, v := range corner.RawRowView(i) {
			r.Data[i*src.cols+j] = float32(v)
		}
	}
	return q, r, nil
}
