package lora

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

// Matrix is a view of a tensor of an adapter: element (i, j) is number Offset + i*RowStride + j*ColStride of the
// tensor. With no tensor all elements are 1.
type Matrix struct {
	T                            *formats.Tensor
	Offset, RowStride, ColStride int64
	Rows, Cols                   int64
}

// matrixOf views a tensor, which lies by rows, as a matrix of its first dimension.
func matrixOf(t *formats.Tensor) Matrix {
	rows, cols := int64(1), int64(1)
	if len(t.Shape) > 0 {
		rows = t.Shape[0]
		for _, d := range t.Shape[1:] {
			cols *= d
		}
	}
	return Matrix{T: t, RowStride: cols, ColStride: 1, Rows: rows, Cols: cols}
}

// String gives the size, as in "8 x 64".
func (m Matrix) String() string { return fmt.Sprintf("%d x %d", m.Rows, m.Cols) }

// Transposed returns the transposed view.
func (m Matrix) Transposed() Matrix {
	m.RowStride, m.ColStride = m.ColStride, m.RowStride
	m.Rows, m.Cols = m.Cols, m.Rows
	return m
}

// rows views the rows from lo to before hi.
func (m Matrix) rows(lo, hi int64) Matrix {
	m.Offset += lo * m.RowStride
	m.Rows = hi - lo
	return m
}

// cols views the columns from lo to before hi.
func (m Matrix) cols(lo, hi int64) Matrix { return m.Transposed().rows(lo, hi).Transposed() }

// plain reports whether the view is all of its tensor, by rows.
func (m Matrix) plain() bool {
	return m.T != nil && m.Offset == 0 && m.ColStride == 1 && m.RowStride == m.Cols && m.Rows*m.Cols == m.T.Count()
}

// Read reads the tensor whole and views it.
func (m Matrix) Read() (kernels.Mat, error) {
	v, err := Floats(m.T)
	if err != nil {
		return kernels.Mat{}, err
	}
	return m.of(v), nil
}

// of views the values of the tensor.
func (m Matrix) of(v []float32) kernels.Mat {
	return kernels.Mat{Data: v[min(m.Offset, int64(len(v))):], Rows: int(m.Rows), Cols: int(m.Cols),
		RowStride: int(m.RowStride), ColStride: int(m.ColStride)}
}

// computed is the data of a tensor that is made of others each time it is read: Floats asks for all of it at once.
type computed func() ([]float32, error)

// ReadAt makes the numbers and returns a part of their bytes.
func (c computed) ReadAt(p []byte, off int64) (int, error) {
	v, err := c()
	if err != nil {
		return 0, err
	}
	b := make([]byte, 0, 4*len(v))
	for _, f := range v {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(f))
	}
	n := copy(p, b[min(max(off, 0), int64(len(b))):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// computedTensor is a tensor in float32 that is made of others when it is read. It is named after one of them, for
// messages.
func computedTensor(like *formats.Tensor, values computed, shape ...int64) *formats.Tensor {
	t := &formats.Tensor{Info: tensor.Info{Name: like.Name, DType: tensor.F32, Shape: shape}, File: like.File,
		Data: values}
	t.Bytes = 4 * t.Count()
	return t
}

// Floats reads a tensor of an adapter whole, as float32. A NaN or an infinity in it is an error.
func Floats(t *formats.Tensor) ([]float32, error) {
	if c, ok := t.Data.(computed); ok {
		v, err := c()
		if err == nil {
			err = checkFinite(t, v, 0)
		}
		return v, err
	}
	if !t.DType.Float() && t.DType != tensor.F64 {
		return nil, fmt.Errorf("%s: tensor %s: %w", t.File, tensor.Quote(t.Name), wrongType(t))
	}
	out := make([]float32, t.Count())
	return out, ReadFloats(out, t)
}

// ReadFloats is Floats for a tensor as it is stored, into a slice of as many elements.
func ReadFloats(out []float32, t *formats.Tensor) error {
	if !t.DType.Float() && t.DType != tensor.F64 {
		return fmt.Errorf("%s: tensor %s: %w", t.File, tensor.Quote(t.Name), wrongType(t))
	}
	const piece = 64 << 10
	width := t.DType.Bits() / 8
	raw, b := make([]byte, min(piece, t.Count())*width), make([]byte, 4*min(piece, t.Count()))
	for lo := int64(0); lo < int64(len(out)); lo += piece {
		part := out[lo:min(lo+piece, int64(len(out)))]
		n := int64(len(part))
		if _, err := t.ReadAt(raw[:n*width], lo*width); err != nil {
			return err
		}
		if err := tensor.Convert(b[:4*n], tensor.F32, raw[:n*width], t.DType); err != nil {
			return err
		}
		for i := range part {
			part[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
		}
		if err := checkFinite(t, part, lo); err != nil {
			return err
		}
	}
	return nil
}

func wrongType(t *formats.Tensor) error {
	return fmt.Errorf("%w: its type is %s, expected F32, F16, BF16 or F64", ErrMalformed, t.DType)
}

// checkFinite refuses a NaN or an infinity among the elements of t from number lo on.
func checkFinite(t *formats.Tensor, v []float32, lo int64) error {
	for i, f := range v {
		if f-f != 0 {
			return fmt.Errorf("%s: tensor %s: %w: element %d is %v, expected finite numbers", t.File, tensor.Quote(t.Name),
				ErrMalformed, lo+int64(i), f)
		}
	}
	return nil
}

// reader reads matrices and keeps the tensors that they view for the next one: those of many experts view the same.
type reader struct {
	have map[*formats.Tensor][]float32
	held int // elements of them
}

// mostKept is how many elements of tensors a reader keeps.
const mostKept = 8 << 20

func (r *reader) matrix(m Matrix) (kernels.Mat, error) {
	v, ok := r.have[m.T]
	if !ok {
		var err error
		if v, err = Floats(m.T); err != nil {
			return kernels.Mat{}, err
		}
		if r.have == nil || r.held+len(v) > mostKept {
			r.have, r.held = map[*formats.Tensor][]float32{}, 0
		}
		r.have[m.T] = v
		r.held += len(v)
	}
	return m.of(v), nil
}

// equal reports whether two matrices in memory are.
func equal(x, y kernels.Mat) bool {
	if x.Rows != y.Rows || x.Cols != y.Cols {
		return false
	}
	for i := range x.Rows {
		for j := range x.Cols {
			if x.Data[i*x.RowStride+j*x.ColStride] != y.Data[i*y.RowStride+j*y.ColStride] {
				return false
			}
		}
	}
	return true
}

// scaled is a matrix times a factor.
func scaled(m Matrix, by float64) Matrix {
	if by == 1 {
		return m
	}
	return matrixOf(computedTensor(m.T, func() ([]float32, error) {
		var w Writer
		return w.Values(Output{Info: m.T.Info, From: m, Scale: by})
	}, m.Rows, m.Cols))
}

// padded is a matrix with rows of zeros below.
func padded(m Matrix, rows int64) Matrix {
	if m.Rows == rows {
		return m
	}
	return matrixOf(computedTensor(m.T, func() ([]float32, error) {
		v := make([]float32, rows*m.Cols)
		x, err := m.Read()
		if err != nil {
			return nil, err
		}
		for i := range x.Rows {
			for j := range x.Cols {
				v[i*x.Cols+j] = x.Data[i*x.RowStride+j*x.ColStride]
			}
		}
		return v, nil
	}, rows, m.Cols))
}

// sameBytes reports whether two tensors are the same.
func sameBytes(x, y *formats.Tensor) (bool, error) {
	if !slices.Equal(x.Shape, y.Shape) || x.DType != y.DType {
		return false, nil
	}
	const step = 1 << 20
	p, q := make([]byte, step), make([]byte, step)
	for off := int64(0); off < x.Bytes; off += step {
		n := min(step, x.Bytes-off)
		if _, err := x.ReadAt(p[:n], off); err != nil {
			return false, err
		}
		if _, err := y.ReadAt(q[:n], off); err != nil {
			return false, err
		}
		if !bytes.Equal(p[:n], q[:n]) {
			return false, nil
		}
	}
	return true, nil
}
