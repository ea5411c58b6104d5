package pipeline

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// Dir is the folder that becomes the adapter's, for what is put beside it.
func (w *AdapterWriter) Dir() string { return w.stage.out() }

// Rows is a matrix of float32 that is read by rows, as Matrix is.
type Rows interface {
	Dims() (rows, cols int)
	ReadRows(dst []float32, lo, hi int) error
}

// Computed returns a weight like w, the weight of a linear layer (out, in), whose
// values are read from m and rounded to w's type. It is for one goroutine at a time.
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
	c.Parts = []formats.Tensor{{Info: c.Info, File: w.Parts[0].File, Data: &computed{m: m, dtype: c.DType}, Bytes: bytes}}
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
	if off%int64(width) != 0 || len(p)%width != 0 || off < 0 || off+int64(len(p)) > int64(rows)*int64(cols)*int64(width) {
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
