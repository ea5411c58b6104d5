package adapt

import (
	"context"
	"math"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/svd"
)

// Matrices that are computed of others while they are read, by rows. Each is for one goroutine at a time.

// difference is a matrix less another of its shape.
type difference struct {
	checkpoint.Rows
	less checkpoint.Rows

	rows []float32 // of less
}

func minus(m, less checkpoint.Rows) *difference { return &difference{Rows: m, less: less} }

// ReadRows fills dst with the rows from lo to hi.
func (d *difference) ReadRows(dst []float32, lo, hi int) error {
	if err := d.Rows.ReadRows(dst, lo, hi); err != nil {
		return err
	}
	if cap(d.rows) < len(dst) {
		d.rows = make([]float32, len(dst))
	}
	rows := d.rows[:len(dst)]
	if err := d.less.ReadRows(rows, lo, hi); err != nil {
		return err
	}
	for i, v := range rows {
		dst[i] -= v
	}
	return nil
}

// withProduct is a matrix and the product b·a of thin factors.
type withProduct struct {
	checkpoint.Rows
	b, a kernels.Mat
}

// minusProduct is m less scale times b·a.
func minusProduct(m checkpoint.Rows, b, a kernels.Mat, scale float64) withProduct {
	scaled := kernels.NewMat(b.Rows, b.Cols)
	for i, v := range b.Data {
		scaled.Data[i] = float32(-scale * float64(v))
	}
	return withProduct{m, scaled, a}
}

// ReadRows fills dst with the rows from lo to hi.
func (p withProduct) ReadRows(dst []float32, lo, hi int) error {
	if err := p.Rows.ReadRows(dst, lo, hi); err != nil {
		return err
	}
	kernels.MulAdd(kernels.MatOf(dst, hi-lo, p.a.Cols), p.b.Slice(lo, hi, 0, p.b.Cols), p.a)
	return nil
}

// energy is the sum of the squares of all elements.
func energy(ctx context.Context, m checkpoint.Rows) (float64, error) {
	rows, cols := m.Dims()
	step := max(1, (256<<10)/max(cols, 1))
	x := make([]float32, min(step, rows)*cols)
	var sum float64
	for lo := 0; lo < rows; lo += step {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		hi := min(lo+step, rows)
		if err := m.ReadRows(x[:(hi-lo)*cols], lo, hi); err != nil {
			return 0, err
		}
		for i := range hi - lo {
			sum += kernels.SquaredNorm(x[i*cols : (i+1)*cols])
		}
	}
	return sum, nil
}

// factors makes A (rank, in) and B (out, rank) of a decomposition times a factor: the root of each singular value goes
// to either side. Where there are fewer values than the rank, zeros follow them.
func factors(d *svd.Decomposition, rank int, factor float64) (a, b kernels.Mat) {
	a, b = kernels.NewMat(rank, d.V.Rows), kernels.NewMat(d.U.Rows, rank)
	for q, v := range d.S {
		root := float32(math.Sqrt(v * factor))
		for i := range b.Rows {
			b.Data[i*rank+q] = d.U.Data[i*d.U.RowStride+q*d.U.ColStride] * root
		}
		for i := range a.Cols {
			a.Data[q*a.Cols+i] = d.V.Data[i*d.V.RowStride+q*d.V.ColStride] * root
		}
	}
	return a, b
}

// heldEnergy is the squared norm of what a decomposition has kept.
func heldEnergy(d *svd.Decomposition) float64 {
	var sum float64
	for _, v := range d.S {
		sum += float64(v * v)
	}
	return sum
}

// cutEnergy is the squared norm of what it has cut off.
func cutEnergy(d *svd.Decomposition) float64 { return max(0, d.Energy-heldEnergy(d)) }
