package svd

import (
	"context"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// Matrix is read by whole rows.
type Matrix interface {
	Dims() (rows, cols int)
	// ReadRows fills dst, row after row, with the rows from lo to hi: (hi-lo)*cols elements. It is called from one
	// goroutine, several times for the same rows, which have to be the same each time.
	ReadRows(dst []float32, lo, hi int) error
}

// Dense is a matrix in memory, row after row. It panics where data has not rows*cols elements.
func Dense(data []float32, rows, cols int) Matrix {
	if rows < 0 || cols < 0 || (cols > 0 && rows != len(data)/cols) || rows*cols != len(data) {
		panic(fmt.Sprintf("svd: %d elements for a matrix of %d x %d", len(data), rows, cols))
	}
	return dense{data, rows, cols}
}

type dense struct {
	data       []float32
	rows, cols int
}

func (d dense) Dims() (rows, cols int) { return d.rows, d.cols }

func (d dense) ReadRows(dst []float32, lo, hi int) error {
	copy(dst, d.data[lo*d.cols:hi*d.cols])
	return nil
}

// A tile is about as large as a second-level cache, so that the second product with it comes from there; but the
// skinny factor of the first one is packed again for each tile, so a tile has not too few rows, and whole register
// tiles of them.
//
// A matrix of few elements is read once and held.
const (
	tileElements = 1 << 18
	tileRows     = 64
	registerRows = 8
	heldElements = 1 << 20
)

// source reads a matrix by tiles of rows.
type source struct {
	matrix     Matrix
	rows, cols int
	step       int // rows of a tile
	buffer     []float32
	// exponent scales what is read by a power of two, so that a square neither overflows float32 nor vanishes in it.
	exponent int
	// held is the whole matrix, scaled, where it is held; on its side if it was wide.
	held kernels.Mat
	side bool
}

// hold reads a matrix of few elements once and for all, and turns a wide one on its side, so that the basis is of the
// shorter vectors. It returns the energy.
func (s *source) hold(ctx context.Context) (total float64, err error) {
	all := kernels.NewMat(s.rows, s.cols)
	err = s.tiles(ctx, func(tile kernels.Mat, lo int) error {
		e, err := energy(tile, lo)
		total += e
		copy(all.Data[lo*s.cols:], tile.Data[:tile.Rows*s.cols])
		return err
	})
	if err != nil || total == 0 {
		return total, err
	}
	if s.exponent = scaling(total); s.exponent != 0 {
		scale(all.Data, s.exponent)
	}
	if s.side = s.rows < s.cols; s.side {
		all = all.T()
		s.rows, s.cols = s.cols, s.rows
		s.step = rowsOfTile(s.rows, s.cols)
	}
	s.held = all
	return total, nil
}

// scaling is the exponent of the power of two that brings numbers of this energy to where their squares are float32; 0
// where they are.
func scaling(energy float64) int {
	if _, e := math.Frexp(math.Sqrt(energy)); e < -30 || e > 30 {
		return -e
	}
	return 0
}

func scale(x []float32, exponent int) {
	factor := math.Ldexp(1, exponent)
	for i, v := range x {
		x[i] = float32(float64(v) * factor)
	}
}

func rowsOfTile(rows, cols int) int {
	return min(rows, max(tileRows, tileElements/cols/registerRows*registerRows))
}

func open(m Matrix) (*source, error) {
	rows, cols := m.Dims()
	if rows < 1 || cols < 1 {
		return nil, fmt.Errorf("svd: matrix of %d x %d: %w, expected at least one element", rows, cols, ErrShape)
	}
	if rows > math.MaxInt/16/cols {
		return nil, fmt.Errorf("svd: matrix of %d x %d: %w, too large", rows, cols, ErrShape)
	}
	return &source{matrix: m, rows: rows, cols: cols, step: rowsOfTile(rows, cols)}, nil
}

// least is the smaller side.
func (s *source) least() int { return min(s.rows, s.cols) }

// small tells whether LAPACK takes the whole matrix: a Krylov space of that width would be no smaller, or it costs
// little.
func (s *source) small(width int) bool { return width >= s.least() || s.rows*s.cols <= 1<<14 }

// read fills dst with rows.
func (s *source) read(dst []float32, lo, hi int) error {
	if err := s.matrix.ReadRows(dst, lo, hi); err != nil {
		return fmt.Errorf("svd: rows %d to %d: %w", lo, hi, err)
	}
	if s.exponent != 0 {
		scale(dst, s.exponent)
	}
	return nil
}

// tiles calls f for each tile, from the first row on.
func (s *source) tiles(ctx context.Context, f func(tile kernels.Mat, lo int) error) error {
	if s.held.Rows > 0 {
		for lo := 0; lo < s.rows; lo += s.step {
			if err := ctx.Err(); err != nil {
				return err
			}
			hi := min(lo+s.step, s.rows)
			if err := f(s.held.Slice(lo, hi, 0, s.cols), lo); err != nil {
				return err
			}
		}
		return nil
	}
	inMemory, _ := s.matrix.(dense)
	direct := inMemory.data != nil && s.exponent == 0 // a tile is never written to
	if s.buffer == nil && !direct {
		s.buffer = make([]float32, s.step*s.cols)
	}
	for lo := 0; lo < s.rows; lo += s.step {
		if err := ctx.Err(); err != nil {
			return err
		}
		hi := min(lo+s.step, s.rows)
		var data []float32
		if direct {
			data = inMemory.data[lo*s.cols : hi*s.cols]
		} else {
			data = s.buffer[:(hi-lo)*s.cols]
			if err := s.read(data, lo, hi); err != nil {
				return err
			}
		}
		tile := kernels.MatOf(data, hi-lo, s.cols)
		if err := f(tile, lo); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// energy returns the sum of squares of a tile that begins at row lo. A square of a float32 is exact in float64, and a
// row is summed in four lanes whatever the tile.
func energy(tile kernels.Mat, lo int) (float64, error) {
	total := 0.0
	for i := range tile.Rows {
		row := tile.Data[i*tile.RowStride:][:tile.Cols]
		rest := row
		var a, b, c, d float64
		for ; len(rest) >= 4; rest = rest[4:] {
			w, x, y, z := float64(rest[0]), float64(rest[1]), float64(rest[2]), float64(rest[3])
			a += w * w
			b += x * x
			c += y * y
			d += z * z
		}
		for _, v := range rest {
			a += float64(v) * float64(v)
		}
		sum := (a + b) + (c + d)
		if math.IsNaN(sum) || math.IsInf(sum, 0) { // finite float32 cannot get there
			for j, v := range row {
				if f := float64(v); math.IsNaN(f) || math.IsInf(f, 0) {
					return 0, fmt.Errorf("svd: %v in row %d, column %d: %w", v, lo+i, j, ErrNonFinite)
				}
			}
		}
		total += sum
	}
	return total, nil
}
