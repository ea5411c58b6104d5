package checkpoint

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// Rows is a matrix of float32 that is read by rows: one that a file holds, as Matrix, or one that is computed.
type Rows interface {
	Dims() (rows, cols int)
	// ReadRows fills dst with the rows from lo to hi.
	ReadRows(dst []float32, lo, hi int) error
}

// Matrix reads a weight as a matrix of float32, by rows: of the shape that its parameter has at run time, (out, in),
// so Conv1D is turned round.
type Matrix struct {
	w          *Weight
	r          Reader
	flip       bool
	first      int64 // element of w
	rows, cols int
}

// NewMatrix reads w, which has two dimensions.
func NewMatrix(w *Weight, flip bool) *Matrix {
	rows, cols := w.Shape[0], w.Shape[1]
	if flip {
		rows, cols = cols, rows
	}
	m := NewMatrixAt(w, 0, int(rows), int(cols))
	m.flip = flip
	return m
}

// NewMatrixAt reads a part of w: a matrix that begins at an element and lies by rows, such as one expert of a stack.
func NewMatrixAt(w *Weight, first int64, rows, cols int) *Matrix {
	return &Matrix{w: w, first: first, rows: rows, cols: cols}
}

// Dims returns rows and columns.
func (m *Matrix) Dims() (rows, cols int) { return m.rows, m.cols }

// ReadRows fills dst with the rows from lo to hi.
func (m *Matrix) ReadRows(dst []float32, lo, hi int) error {
	values, err := m.r.Read(m.w, m.first+int64(lo*m.cols), m.first+int64(hi*m.cols), m.flip)
	if err != nil {
		return m.w.Failed(err)
	}
	if err := tensor.ToFloats(dst, values, m.w.Values); err != nil {
		return m.w.Failed(err)
	}
	return nil
}

// Computed returns a weight like w, the weight of a linear layer (out, in), whose values are read from m and rounded
// to w's type. It is for one goroutine at a time.
func Computed(w *Weight, m Rows) *Weight {
	rows, cols := m.Dims()
	c := &Weight{Info: w.Info, Role: w.Role}
	c.Shape = tensor.Shape{int64(rows), int64(cols)}
	c.Role.Kind = models.Linear
	if c.DType == tensor.F64 {
		c.DType = tensor.F32 // what m is read in
	}
	c.Values = c.DType
	bytes := c.Count() * c.DType.Bits() / 8
	data := &computed{m: m, dtype: c.DType}
	c.Parts = []formats.Tensor{{Info: c.Info, File: w.Parts[0].File, Data: data, Bytes: bytes}}
	return c
}

// computed is the file of a computed weight.
type computed struct {
	m      Rows
	dtype  tensor.DType
	values []float32
	floats []byte
	cast   []byte
}

// ReadAt fills p from the element that begins at byte off, whole elements.
func (c *computed) ReadAt(p []byte, off int64) (int, error) {
	const most = 64 << 10 // elements at a time, or one row
	rows, cols := c.m.Dims()
	width := int(c.dtype.Bits() / 8)
	size := int64(rows) * int64(cols) * int64(width)
	if off%int64(width) != 0 || len(p)%width != 0 || off < 0 || off+int64(len(p)) > size {
		return 0, fmt.Errorf("bytes %d to %d of a computed matrix of %d x %d", off, off+int64(len(p)), rows, cols)
	}
	n := 0
	for n < len(p) {
		at := int(off/int64(width)) + n/width // the element
		lo := at / cols
		hi := min(lo+max(1, most/cols), (int(off/int64(width))+len(p)/width+cols-1)/cols)
		if k := (hi - lo) * cols; cap(c.values) < k {
			c.values, c.floats, c.cast = make([]float32, k), make([]byte, 4*k), make([]byte, width*k)
		}
		values := c.values[:(hi-lo)*cols]
		if err := c.m.ReadRows(values, lo, hi); err != nil {
			return n, err
		}
		for i, v := range values {
			binary.LittleEndian.PutUint32(c.floats[4*i:], math.Float32bits(v))
		}
		cast := c.cast[:width*len(values)]
		if err := tensor.Convert(cast, c.dtype, c.floats[:4*len(values)], tensor.F32); err != nil {
			return n, err
		}
		n += copy(p[n:], cast[width*(at-lo*cols):])
	}
	return n, nil
}
