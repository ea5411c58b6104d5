package svd

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
	"gonum.org/v1/gonum/mat"
)

// Skinny matrices have as many rows as the big one and a few dozen columns. Their long loops are float32 products of
// the kernels; what is as small as the number of columns squared is float64.

// orthonormal returns q with orthonormal columns, orthogonal to each of the orthonormal bases, and, where there is no
// basis, r in z = q·r. Columns of z that depend on the others may be missing from q. z is overwritten. It is an error
// if rounding does not let it get there. once says that z has been made orthogonal to the bases before, as well as
// once can.
//
// It is the shifted Cholesky QR of Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
// ill-conditioned matrices", 2020: the Gram matrix, its Cholesky factor, a product, and again until it is the
// identity. Nearly all of the work is a product, which the kernels do ten times as fast as a Householder reflection in
// float64 is done; the shift keeps the factor from failing on dependent columns, and each round takes back a factor of
// a thousand of the condition.
func orthonormal(z kernels.Mat, bases []kernels.Mat, once bool) (q kernels.Mat, r *mat.Dense, err error) {
	n := z.Cols
	r = identity(n)
	const (
		rounds    = 8    // two or three do, unless columns depend on each other
		tolerance = 4e-6 // what float32 can hold
		weak      = 1e-3 // a pivot below it asks for the shift
	)
	project := !once
	for round := range rounds {
		if project {
			for _, b := range bases {
				c := gram(b, z)
				c.Scale(-1, c)
				kernels.MulAdd(z, b, small(c))
			}
		}
		g := gram(z, z)
		// Unit columns first: their lengths are the square of the spectrum.
		keep := make([]int, 0, n)
		for j := range z.Cols {
			if g.At(j, j) > 0 {
				keep = append(keep, j)
			}
		}
		n = len(keep)
		if n == 0 {
			return kernels.NewMat(z.Rows, 0), nil, nil
		}
		scale := make([]float64, n)
		unit := mat.NewDense(n, n, nil)
		pick := mat.NewDense(z.Cols, n, nil)
		for i, a := range keep {
			scale[i] = 1 / math.Sqrt(g.At(a, a))
			pick.Set(a, i, scale[i])
		}
		// Once takes the bulk, twice is enough unless it has taken the most of a column of unit length: what is left of that
		// is rounding.
		project = len(bases) > 0 && round == 0
		worst := 0.0
		for i, a := range keep {
			project = project || len(bases) > 0 && g.At(a, a) < 0.5
			for j, b := range keep {
				v := g.At(a, b) * scale[i] * scale[j]
				unit.Set(i, j, v)
				if i != j {
					worst = max(worst, math.Abs(v))
				} else {
					worst = max(worst, math.Abs(g.At(a, a)-1))
				}
			}
		}
		if worst < tolerance && !project {
			return z, r, nil
		}
		upper, ok := cholesky(unit, weak)
		if !ok {
			for i := range n {
				unit.Set(i, i, unit.At(i, i)+float64(1e-6*float64(n)))
			}
			upper, _ = cholesky(unit, 0)
		}
		inverse := inverseUpper(upper)
		var step mat.Dense
		step.Mul(pick, inverse)
		z = times(z, &step)

		// r = upper · diag(1/scale) · r, of the rows kept.
		scaled := mat.NewDense(n, r.RawMatrix().Cols, nil)
		for i, a := range keep {
			row := scaled.RawRowView(i)
			for j, v := range r.RawRowView(a) {
				row[j] = v / scale[i]
			}
		}
		var product mat.Dense
		product.Mul(upper, scaled)
		r = &product
	}
	return kernels.Mat{}, nil, fmt.Errorf("%d columns of %d elements did not become orthonormal", z.Cols, z.Rows)
}

// cholesky returns the upper factor of a symmetric matrix with a unit diagonal; ok is false where a pivot is not above
// least.
func cholesky(a *mat.Dense, least float64) (upper *mat.Dense, ok bool) {
	n := a.RawMatrix().Rows
	upper = mat.NewDense(n, n, nil)
	upper.Copy(a)
	ok = true
	for k := range n {
		row := upper.RawRowView(k)
		pivot := row[k]
		if !(pivot > least) {
			ok = false
			pivot = max(pivot, 0x1p-40)
		}
		root := math.Sqrt(pivot)
		for j := range row {
			switch {
			case j < k:
				row[j] = 0
			case j == k:
				row[j] = root
			default:
				row[j] /= root
			}
		}
		for i := k + 1; i < n; i++ {
			f, below := row[i], upper.RawRowView(i)
			for j := i; j < n; j++ {
				below[j] -= float64(f * row[j])
			}
		}
	}
	return upper, ok
}

// inverseUpper returns the inverse of an upper triangle, row by row from the last.
func inverseUpper(upper *mat.Dense) *mat.Dense {
	n := upper.RawMatrix().Rows
	inverse := mat.NewDense(n, n, nil)
	for i := n - 1; i >= 0; i-- {
		u, row := upper.RawRowView(i), inverse.RawRowView(i)
		row[i] = 1
		for k := i + 1; k < n; k++ {
			for j, v := range inverse.RawRowView(k)[k:] {
				row[k+j] -= float64(u[k] * v)
			}
		}
		for j := i; j < n; j++ {
			row[j] /= u[i]
		}
	}
	return inverse
}

// gramRows is how many rows are summed up in float32 before float64 takes over.
const gramRows = 256

// gram returns aᵀ·b.
func gram(a, b kernels.Mat) *mat.Dense {
	sum := mat.NewDense(a.Cols, b.Cols, nil)
	total := sum.RawMatrix().Data
	part := kernels.NewMat(a.Cols, b.Cols)
	for lo := 0; lo < a.Rows; lo += gramRows {
		hi := min(lo+gramRows, a.Rows)
		clear(part.Data)
		kernels.MulAdd(part, a.Slice(lo, hi, 0, a.Cols).T(), b.Slice(lo, hi, 0, b.Cols))
		for i, v := range part.Data {
			total[i] += float64(v)
		}
	}
	return sum
}

// times returns a·b.
func times(a kernels.Mat, b mat.Matrix) kernels.Mat {
	_, cols := b.Dims()
	c := kernels.NewMat(a.Rows, cols)
	kernels.MulAdd(c, a, small(b))
	return c
}

// small rounds to float32.
func small(a mat.Matrix) kernels.Mat {
	n, cols := a.Dims()
	m := kernels.NewMat(n, cols)
	for i := range n {
		for j := range cols {
			m.Data[i*cols+j] = float32(a.At(i, j))
		}
	}
	return m
}

// wide is a in float64.
func wide(a kernels.Mat) *mat.Dense {
	d := mat.NewDense(a.Rows, a.Cols, nil)
	for i := range a.Rows {
		row := d.RawRowView(i)
		for j := range row {
			row[j] = float64(a.Data[i*a.RowStride+j*a.ColStride])
		}
	}
	return d
}

func identity(n int) *mat.Dense {
	d := mat.NewDense(n, n, nil)
	for i := range n {
		d.Set(i, i, 1)
	}
	return d
}

// columns is a copy of the columns of a from lo to hi.
func columns(a kernels.Mat, lo, hi int) kernels.Mat {
	c := kernels.NewMat(a.Rows, hi-lo)
	for i := range a.Rows {
		for j := lo; j < hi; j++ {
			c.Data[i*c.Cols+j-lo] = a.Data[i*a.RowStride+j*a.ColStride]
		}
	}
	return c
}

// paste copies a over the columns of dst from at on.
func paste(dst, a kernels.Mat, at int) {
	for i := range a.Rows {
		copy(dst.Data[i*dst.RowStride+at:][:a.Cols], a.Data[i*a.RowStride:])
	}
}

func clone(a kernels.Mat) kernels.Mat { return columns(a, 0, a.Cols) }

// fixSigns turns each pair of columns so that the largest entry of the left one is positive.
func fixSigns(u, v kernels.Mat) {
	for j := range u.Cols {
		var largest float32
		for i := range u.Rows {
			if x := u.Data[i*u.RowStride+j]; max(x, -x) > max(largest, -largest) {
				largest = x
			}
		}
		if largest < 0 {
			for i := range u.Rows {
				u.Data[i*u.RowStride+j] *= -1
			}
			for i := range v.Rows {
				v.Data[i*v.RowStride+j] *= -1
			}
		}
	}
}
