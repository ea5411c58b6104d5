package kernels

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels/race"
)

// Mat is a float32 matrix in memory: element (i, j) is Data[i*RowStride+j*ColStride].
type Mat struct {
	Data                 []float32
	Rows, Cols           int
	RowStride, ColStride int
}

// NewMat returns a matrix of zeros, stored by rows.
func NewMat(rows, cols int) Mat { return MatOf(make([]float32, rows*cols), rows, cols) }

// MatOf returns the matrix that data holds by rows. It panics unless data has rows*cols elements.
func MatOf(data []float32, rows, cols int) Mat {
	if rows < 0 || cols < 0 || cols == 0 && len(data) > 0 || cols > 0 && (len(data)%cols != 0 || len(data)/cols != rows) {
		panic(fmt.Sprintf("kernels: %d elements for a matrix of %d x %d", len(data), rows, cols))
	}
	return Mat{Data: data, Rows: rows, Cols: cols, RowStride: cols, ColStride: 1}
}

// T returns the transpose, in the same memory.
func (m Mat) T() Mat {
	return Mat{Data: m.Data, Rows: m.Cols, Cols: m.Rows, RowStride: m.ColStride, ColStride: m.RowStride}
}

// Slice returns the rows from r0 to before r1 and the columns from c0 to before c1, in the same memory.
func (m Mat) Slice(r0, r1, c0, c1 int) Mat {
	if r0 < 0 || r1 < r0 || m.Rows < r1 || c0 < 0 || c1 < c0 || m.Cols < c1 {
		panic(fmt.Sprintf("kernels: rows %d to %d and columns %d to %d of a matrix of %d x %d", r0, r1, c0, c1, m.Rows,
			m.Cols))
	}
	part := Mat{Rows: r1 - r0, Cols: c1 - c0, RowStride: m.RowStride, ColStride: m.ColStride}
	if part.Rows > 0 && part.Cols > 0 {
		first := r0*m.RowStride + c0*m.ColStride
		part.Data = m.Data[first : first+part.extent()]
	}
	return part
}

// at returns element (i, j).
func (m Mat) at(i, j int) float32 { return m.Data[i*m.RowStride+j*m.ColStride] }

// extent is the number of elements from the first to the last, both counted, of a matrix that has any.
func (m Mat) extent() int { return (m.Rows-1)*m.RowStride + (m.Cols-1)*m.ColStride + 1 }

// check panics unless all elements lie in Data.
func (m Mat) check() {
	fits := m.Rows >= 0 && m.Cols >= 0
	if fits && m.Rows > 0 && m.Cols > 0 {
		last := len(m.Data) - 1
		fits = last >= 0 && m.RowStride >= 0 && m.ColStride >= 0 &&
			(m.Rows == 1 || m.RowStride <= last/(m.Rows-1)) && (m.Cols == 1 || m.ColStride <= last/(m.Cols-1)) &&
			m.extent() <= len(m.Data)
	}
	if !fits {
		panic(fmt.Sprintf("kernels: %d elements for a matrix of %d x %d with strides %d and %d", len(m.Data), m.Rows, m.Cols,
			m.RowStride, m.ColStride))
	}
}

// row returns the elements of a row whose ColStride is 1.
func (m Mat) row(i int) []float32 { return m.Data[i*m.RowStride:][:m.Cols] }

// each calls f for slices that hold all elements, and nothing that lies between them.
func (m Mat) each(f func(s []float32)) {
	if m.ColStride != 1 {
		m = m.T()
	}
	for i := range m.Rows {
		if m.ColStride == 1 {
			f(m.row(i))
			continue
		}
		for j := range m.Cols {
			f(m.Data[i*m.RowStride+j*m.ColStride:][:1])
		}
	}
}

// MulAdd adds the product a·b to c: to every element c[i][j] the products a[i][k]·b[k][j] for k = 0, 1, … in this
// order, each by a fused multiply-add that rounds once to float32. A NaN that comes out has one pattern.
//
// The rows of c are contiguous (a ColStride of 1), do not overlap each other, and lie outside of a and b, which may
// have any strides.
func MulAdd(c, a, b Mat) { active.MulAdd(c, a, b) }

// MulAdd is the function MulAdd by this set.
func (s *Set) MulAdd(c, a, b Mat) {
	b.check()
	checkProduct(c, a, b.Rows, b.Cols)
	if c.Rows == 0 || c.Cols == 0 || a.Cols == 0 {
		return
	}
	if race.Enabled {
		a.each(race.ReadSlice[float32])
		b.each(race.ReadSlice[float32])
		c.each(race.WriteSlice[float32])
	}
	if s.tiles == nil {
		mulAdd(c, a, b)
		return
	}
	s.tiles.mulAdd(c, a, b)
}

// checkProduct panics unless c can take the product of a and a matrix of rows and columns.
func checkProduct(c, a Mat, rows, cols int) {
	c.check()
	a.check()
	if a.Rows != c.Rows || a.Cols != rows || cols != c.Cols {
		panic(fmt.Sprintf("kernels: a product of %d x %d and %d x %d into %d x %d", a.Rows, a.Cols, rows, cols, c.Rows,
			c.Cols))
	}
	if c.Cols > 1 && c.ColStride != 1 || c.Rows > 1 && c.RowStride < c.Cols {
		panic(fmt.Sprintf("kernels: a product into strides %d and %d, of %d columns", c.RowStride, c.ColStride, c.Cols))
	}
}

// mulAdd is the twin of tiles.mulAdd: the plain rule, a row of b at a time in pieces that stay in the cache for all
// rows of c.
func mulAdd(c, a, b Mat) {
	var piece [256]float32
	for j := 0; j < c.Cols; j += len(piece) {
		n := min(len(piece), c.Cols-j)
		for k := range a.Cols {
			y := piece[:n]
			for i := range y {
				y[i] = b.at(k, j+i)
			}
			for i := range c.Rows {
				x, out := a.at(i, k), c.Data[i*c.RowStride+j:][:len(y)]
				for l, z := range out {
					sum := float64(x)*float64(y[l]) + float64(z)
					if doubtful(sum) {
						sum = odd(x, y[l], z)
					}
					out[l] = number(float32(sum))
				}
			}
		}
	}
}

// doubtful reports whether a sum that was rounded to float64 must not simply be rounded again to float32: where it is
// in the middle between two of them, or below the least normal one, under which the middles are others.
func doubtful(sum float64) bool {
	b := math.Float64bits(sum)
	return b<<35 == 1<<63 || b<<1 < (1023-126)<<53
}

// odd returns x*y + z rounded to odd: where the float64 is not exact, its last bit is set, so that a second rounding
// knows on which side of a middle the exact sum lies. The product of two float32 is exact.
func odd(x, y, z float32) float64 {
	p, q := float64(x)*float64(y), float64(z)
	sum := p + q
	t := sum - p
	missing := (p - (sum - t)) + (q - t)
	b := math.Float64bits(sum)
	switch {
	case b&1 != 0:
	case missing > 0 && sum > 0 || missing < 0 && sum < 0:
		sum = math.Float64frombits(b + 1)
	case missing > 0 || missing < 0:
		sum = math.Float64frombits(b - 1)
	}
	return sum
}
