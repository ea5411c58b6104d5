package lora

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

// Tiled is a matrix whose elements are those of a smaller one, Left·Right: element (i, j) is that in row Row.At(i)
// and column Col.At(j) of it. Where one of both has no tensor, it stands for the identity, and the other is the
// smaller matrix.
type Tiled struct {
	Left, Right Matrix
	Row, Col    Tiling
}

// Tiling says which of a number of places stands at i.
type Tiling struct{ First, Each int64 }

// At returns (First + i) / Each modulo n.
func (t Tiling) At(i, n int64) int64 { return (t.First + i) / t.Each % n }

// from is the tiling from i on.
func (t Tiling) from(i int64) Tiling {
	t.First += i
	return t
}

// Transposed returns the transposed matrix.
func (t Tiled) Transposed() Tiled {
	return Tiled{t.Right.Transposed(), t.Left.Transposed(), t.Col, t.Row}
}

// window are the factors of what lies from a row and a column on.
func window(list []Tiled, row, col int64) []Tiled {
	var out []Tiled
	for _, t := range list {
		t.Row, t.Col = t.Row.from(row), t.Col.from(col)
		out = append(out, t)
	}
	return out
}

// Transposed are the factors of a transposed element-wise product.
func Transposed(list []Tiled) []Tiled {
	var out []Tiled
	for _, t := range list {
		out = append(out, t.Transposed())
	}
	return out
}

// TiledValues is a Tiled with its factors in memory.
type TiledValues struct {
	Tiled
	left, right kernels.Mat // one that stands for the identity has no data
}

// Load reads the factors.
func (t Tiled) Load(read func(Matrix) (kernels.Mat, error)) (*TiledValues, error) {
	v := &TiledValues{Tiled: t}
	var err error
	if t.Left.T != nil {
		if v.left, err = read(t.Left); err != nil {
			return nil, err
		}
	}
	if t.Right.T != nil {
		v.right, err = read(t.Right)
	}
	return v, err
}

// Fill makes the rows [r0, r1) and columns [c0, c1) of the matrix, by rows. row is room for a row of Left·Right.
func (t *TiledValues) Fill(dst, row []float32, r0, r1, c0, c1 int64) {
	if len(dst) == 0 {
		return
	}
	rows, cols := t.Left.Rows, t.Right.Cols
	if r, c := t.Row, t.Col; t.left.Data != nil && t.right.Data != nil && r.Each == 1 && c.Each == 1 &&
		r.First+r1 <= rows && c.First+c1 <= cols {
		clear(dst)
		kernels.MulAdd(kernels.MatOf(dst, int(r1-r0), int(c1-c0)),
			t.left.Slice(int(r.First+r0), int(r.First+r1), 0, t.left.Cols),
			t.right.Slice(0, t.right.Rows, int(c.First+c0), int(c.First+c1)))
		return
	}
	row = row[:cols]
	have := int64(-1)
	for i := r0; i < r1; i++ {
		if at := t.Row.At(i, rows); at != have {
			t.row(row, int(at))
			have = at
		}
		spread(dst[(i-r0)*(c1-c0):(i-r0+1)*(c1-c0)], row, t.Col, c0)
	}
}

// row makes a row of Left·Right.
func (t *TiledValues) row(dst []float32, at int) {
	one := t.left
	switch {
	case t.left.Data == nil:
		one = t.right
	case t.right.Data != nil:
		clear(dst)
		kernels.MulAdd(kernels.MatOf(dst, 1, len(dst)), t.left.Slice(at, at+1, 0, t.left.Cols), t.right)
		return
	}
	for j := range dst {
		dst[j] = one.Data[at*one.RowStride+j*one.ColStride]
	}
}

// spread fills dst with the elements of row that stand in the columns from c0 on.
func spread(dst, row []float32, c Tiling, c0 int64) {
	at := int(c.At(c0, int64(len(row))))
	if c.Each == 1 {
		for len(dst) > 0 {
			dst, at = dst[copy(dst, row[at:]):], 0
		}
		return
	}
	n := int(c.Each - (c.First+c0)%c.Each) // what is left of the first one
	for len(dst) > 0 {
		n = min(n, len(dst))
		for k := range dst[:n] {
			dst[k] = row[at]
		}
		if dst, at, n = dst[n:], at+1, int(c.Each); at == len(row) {
			at = 0
		}
	}
}

// hadamard is a module whose delta (rows x cols) is the element-wise product of two. It is B·A too, which is large,
// and only made for what knows no other form: column (p, q) of B is the product of the columns p and q of both Lefts,
// and so are the rows of A. Where the rank of that is more than a matrix has, one of B and A is the delta and the
// other the identity.
func hadamard(name string, like *formats.Tensor, first, second Tiled, rows, cols int64) (*Module, error) {
	if _, err := elements(rows, cols); err != nil {
		return nil, err
	}
	rank, err := elements(first.Left.Cols, second.Left.Cols)
	if err != nil {
		return nil, err
	}
	list := []Tiled{first, second}
	made := func(c computed, rows, cols int64) Matrix { return matrixOf(computedTensor(like, c, rows, cols)) }
	m := &Module{Name: name, Param: "weight", Hadamard: list, Reshaped: true}
	switch {
	case rank < min(rows, cols):
		m.B = made(func() ([]float32, error) { return khatriRao(list, rows, rank) }, rows, rank)
		m.A = made(func() ([]float32, error) { return khatriRao(Transposed(list), cols, rank) }, cols, rank).Transposed()
	case cols <= rows:
		rank = cols
		m.B = made(func() ([]float32, error) { return dense(list, rows, cols) }, rows, cols)
		m.A = made(func() ([]float32, error) { return identity(cols) }, cols, cols)
	default:
		rank = rows
		m.B = made(func() ([]float32, error) { return identity(rows) }, rows, rows)
		m.A = made(func() ([]float32, error) { return dense(list, rows, cols) }, rows, cols)
	}
	m.Rank = int(rank)
	return m, nil
}

// largestFactor bounds the elements of a plain matrix that stands for the small tensors of another method.
const largestFactor = 1 << 31

// room is a matrix of zeros, unless it is too large.
func room(rows, cols int64) ([]float32, error) {
	if cols > largestFactor/max(rows, 1) {
		return nil, fmt.Errorf("%w: a plain matrix of %d x %d that stands for smaller ones, expected at most %d elements",
			ErrUnsupported, rows, cols, largestFactor)
	}
	return make([]float32, rows*cols), nil
}

// khatriRao is, of the first n rows of two tiled matrices, the products of all columns of one Left with all of the
// other.
func khatriRao(list []Tiled, n, rank int64) ([]float32, error) {
	v, err := room(n, rank)
	if err != nil {
		return nil, err
	}
	var lefts [2]kernels.Mat
	for k, t := range list {
		if t.Left.T == nil {
			continue
		}
		if lefts[k], err = t.Left.Read(); err != nil {
			return nil, err
		}
	}
	at := func(k int, i, p int64) float32 {
		row := list[k].Row.At(i, list[k].Left.Rows)
		switch x := lefts[k]; {
		case x.Data != nil:
			return x.Data[row*int64(x.RowStride)+p*int64(x.ColStride)]
		case row == p:
			return 1
		}
		return 0
	}
	others := list[1].Left.Cols
	for i := range n {
		for p := range list[0].Left.Cols {
			f := at(0, i, p)
			for q := range others {
				v[i*rank+p*others+q] = f * at(1, i, q)
			}
		}
	}
	return v, nil
}

// dense is the element-wise product of two tiled matrices.
func dense(list []Tiled, rows, cols int64) ([]float32, error) {
	v, err := room(rows, cols)
	if err != nil {
		return nil, err
	}
	loaded, row, err := load(list)
	if err != nil {
		return nil, err
	}
	other := make([]float32, cols)
	for i := range rows {
		multiplied(v[i*cols:(i+1)*cols], other, row, loaded, i)
	}
	return v, nil
}

// load reads the factors of a product, with room for a row of each.
func load(list []Tiled) (loaded []*TiledValues, row []float32, err error) {
	for _, t := range list {
		v, err := t.Load(Matrix.Read)
		if err != nil {
			return nil, nil, err
		}
		loaded, row = append(loaded, v), make([]float32, max(int64(len(row)), t.Right.Cols))
	}
	return loaded, row, nil
}

// identity is the identity matrix.
func identity(n int64) ([]float32, error) {
	v, err := room(n, n)
	for i := int64(0); i < int64(len(v)); i += n + 1 {
		v[i] = 1
	}
	return v, err
}

// setScaling sets what a product is scaled by, whatever rank it has.
func (m *Module) setScaling(s float64) { m.Scaling, m.Alpha = s, s*float64(m.Rank) }

// setKernel sets the kernel of a convolution of Tucker's form. One whose second dimension is 1 may be that of a
// one-dimensional convolution too.
func (m *Module) setKernel(kernel tensor.Shape) {
	if kernel[1] != 1 {
		m.Form, m.Kernel = Conv, kernel
	}
}

const (
	// largestSpectrum is the largest rank of an element-wise product whose singular values are found.
	largestSpectrum = 512
	// largestNorm bounds the elements of one whose norm is found without them.
	largestNorm = 1 << 36
)

// kronecker reports whether the element-wise product is the Kronecker product of the two smaller matrices.
func (m *Module) kronecker() bool {
	if len(m.Hadamard) != 2 {
		return false
	}
	x, y, one := m.Hadamard[0], m.Hadamard[1], Tiling{Each: 1}
	return y.Row == one && y.Col == one && x.Row == Tiling{Each: y.Left.Rows} && x.Col == Tiling{Each: y.Right.Cols} &&
		m.B.Rows == x.Left.Rows*y.Left.Rows && m.A.Cols == x.Right.Cols*y.Right.Cols
}

// hadamardNorm is the Frobenius norm of a delta that is an element-wise product, by rows.
func (m *Module) hadamardNorm() (float64, error) {
	rows, cols := m.B.Rows, m.A.Cols
	if cols > largestNorm/rows {
		return 0, fmt.Errorf("%w: a delta of %d x %d, expected at most %d elements", ErrUnsupported, rows, cols,
			int64(largestNorm))
	}
	list, row, err := load(m.Hadamard)
	if err != nil {
		return 0, err
	}
	delta, other, sum := make([]float32, cols), make([]float32, cols), 0.0
	for i := range rows {
		multiplied(delta, other, row, list, i)
		sum += kernels.SquaredNorm(delta)
	}
	return math.Abs(m.Scaling) * math.Sqrt(sum), nil
}

// multiplied makes a row of an element-wise product; other and row are room.
func multiplied(delta, other, row []float32, list []*TiledValues, i int64) {
	cols := int64(len(delta))
	list[0].Fill(delta, row, i, i+1, 0, cols)
	for _, t := range list[1:] {
		t.Fill(other, row, i, i+1, 0, cols)
		for j, f := range other {
			delta[j] *= f
		}
	}
}
