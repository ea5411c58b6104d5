package pipeline

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// AdapterWriter writes an adapter, tensor by tensor: none is held in
// memory. What is written appears at its destination by Finish, whole, or not
// at all.
type AdapterWriter struct {
	stage   *stage
	force   bool
	spool   *os.File
	offset  int64
	tensors []formats.Tensor
	modules []string
}

// NewAdapterWriter begins a PEFT folder at dst, which must not exist unless force is set, and
// lies apart from src.
func NewAdapterWriter(src, dst string, force bool) (*AdapterWriter, error) {
	return newAdapterWriter(src, dst, false, force)
}

func newAdapterWriter(src, dst string, single, force bool) (*AdapterWriter, error) {
	dst, err := filepath.Abs(dst)
	if err != nil {
		return nil, err
	}
	if err := CheckDestination(src, dst, RunOptions{Force: force}); err != nil {
		return nil, err
	}
	s, err := openStage(dst, "adapter", single, false)
	if err != nil {
		return nil, err
	}
	w := &AdapterWriter{stage: s, force: force}
	if w.spool, err = os.CreateTemp(s.dir, scratchPattern); err != nil {
		return nil, errors.Join(err, s.remove())
	}
	return w, nil
}

// WriteAdapter writes an adapter of any dialect to dst, apart from src, in the types that its tensors
// have, or cast to a type.
func WriteAdapter(ctx context.Context, e *lora.Encoded, src, dst string, cast tensor.DType, force bool) error {
	format, name, err := adapterFile(e, dst)
	if err != nil {
		return err
	}
	w, err := newAdapterWriter(src, dst, e.File == "", force)
	if err != nil {
		return err
	}
	defer w.Abort()
	return w.writeAs(ctx, format, name, e, cast)
}

func (w *AdapterWriter) write(ctx context.Context, e *lora.Encoded, cast tensor.DType) error {
	format, name, err := adapterFile(e, w.stage.dst)
	if err != nil {
		return err
	}
	return w.writeAs(ctx, format, name, e, cast)
}

func (w *AdapterWriter) writeAs(ctx context.Context, format formats.Format, name string, e *lora.Encoded, cast tensor.DType) error {
	var values lora.Writer
	for _, o := range e.Tensors {
		if ctx.Err() != nil {
			return ErrInterrupted
		}
		to := o.DType
		if cast != 0 && to.Float() {
			to = cast
		}
		if err := w.output(&values, o, to); err != nil {
			return err
		}
	}
	return w.finish(ctx, format, name, e.Metadata, e.Config)
}

// adapterFile says in which format, and under which name, the tensors of an adapter are written.
func adapterFile(e *lora.Encoded, dst string) (formats.Format, string, error) {
	format, err := formats.Lookup(e.Format)
	if err != nil {
		return nil, "", err
	}
	byName, single := formats.ForExtension(dst)
	switch {
	case e.File != "" && single:
		return nil, "", fmt.Errorf("%s: %w: a %s adapter is a folder, and this is the name of a file", dst, ErrRefused, e.Dialect)
	case e.File != "":
		return format, e.File, nil
	case !single:
		return nil, "", fmt.Errorf("%s: %w: a %s adapter is one file, expected a name that ends in %s", dst, ErrRefused, e.Dialect, strings.Join(format.Extensions(), ", "))
	case byName.Name() != e.Format:
		return nil, "", fmt.Errorf("%s: %w: a %s adapter is a %s file, expected a name that ends in %s", dst, ErrRefused, e.Dialect, e.Format, strings.Join(format.Extensions(), ", "))
	}
	return format, filepath.Base(dst), nil
}

// output writes a tensor in a type.
func (w *AdapterWriter) output(values *lora.Writer, o lora.Output, to tensor.DType) error {
	info := o.Info
	info.DType = to
	if t := o.Stored(); t != nil {
		return w.copied(info, t)
	}
	v, err := values.Values(o)
	if err != nil {
		return err
	}
	b := make([]byte, int64(len(v))*to.Bits()/8)
	if err := fromFloats(b, to, v); err != nil {
		return fmt.Errorf("tensor %s: %w", tensor.Quote(o.Name), err)
	}
	return w.spooled(info, b)
}

// spooled takes up the bytes of a tensor.
func (w *AdapterWriter) spooled(info tensor.Info, b []byte) error {
	if _, err := w.spool.WriteAt(b, w.offset); err != nil {
		return err
	}
	w.tensors = append(w.tensors, formats.Tensor{Info: info, Data: w.spool, Offset: w.offset, Bytes: int64(len(b))})
	w.offset += int64(len(b))
	return nil
}

// Abort removes what has been written, as far as it can. It does nothing after Finish.
func (w *AdapterWriter) Abort() {
	if w.stage == nil {
		return
	}
	w.spool.Close()
	if w.stage.remove() == nil {
		w.stage.removeParents()
	}
	w.stage = nil
}

// Add writes a module.
func (w *AdapterWriter) Add(t lora.Trained) error {
	w.modules = append(w.modules, t.Name)
	for _, p := range lora.PEFTTensors(t) {
		m := p.Values
		b := make([]byte, 0, 4*m.Rows*m.Cols)
		for i := range m.Rows {
			for j := range m.Cols {
				b = binary.LittleEndian.AppendUint32(b, math.Float32bits(m.Data[i*m.RowStride+j*m.ColStride]))
			}
		}
		if err := w.spooled(p.Info, b); err != nil {
			return err
		}
	}
	return nil
}

// Spool keeps the factors of a module that was computed until the adapter is written.
func (w *AdapterWriter) Spool(t lora.Trained) (*lora.Module, error) {
	var at [2]*formats.Tensor
	for i, m := range []kernels.Mat{t.A, t.B} {
		b := make([]byte, 0, 4*m.Rows*m.Cols)
		for i := range m.Rows {
			for j := range m.Cols {
				b = binary.LittleEndian.AppendUint32(b, math.Float32bits(m.Data[i*m.RowStride+j*m.ColStride]))
			}
		}
		if _, err := w.spool.WriteAt(b, w.offset); err != nil {
			return nil, err
		}
		at[i] = &formats.Tensor{Info: tensor.Info{Name: t.Name, DType: tensor.F32, Shape: tensor.Shape{int64(m.Rows), int64(m.Cols)}}, File: w.spool.Name(), Data: w.spool, Offset: w.offset, Bytes: int64(len(b))}
		w.offset += int64(len(b))
	}
	return t.Module(at[0], at[1]), nil
}

// Write writes an adapter, as PEFT has it, and publishes it.
func (w *AdapterWriter) Write(ctx context.Context, a *lora.Adapter) error {
	e, err := a.Encode(lora.EncodeOptions{To: lora.PEFT})
	if err != nil {
		return err
	}
	return w.write(ctx, e, 0)
}

// Copy writes a tensor as it is, under another name. A NaN or an infinity in it is an error.
func (w *AdapterWriter) Copy(name string, t *formats.Tensor) error {
	info := t.Info
	info.Name = name
	return w.copied(info, t)
}

// copied writes the values of a tensor, in the type of info, in pieces.
func (w *AdapterWriter) copied(info tensor.Info, t *formats.Tensor) error {
	const piece = 256 << 10 // elements, of which bytes and bits are whole
	from, to, n := t.DType.Bits(), info.DType.Bits(), t.Count()
	b, x, cast := make([]byte, min(piece, n)*from/8+1), make([]float32, min(piece, n)), make([]byte, min(piece, n)*to/8+1)
	out := formats.Tensor{Info: info, Data: w.spool, Offset: w.offset, Bytes: (n*to + 7) / 8}
	if info.DType == t.DType {
		out.Bytes = t.Bytes
	}
	for lo := int64(0); lo < n; lo += piece {
		k := min(piece, n-lo)
		raw := b[:min(t.Bytes-lo*from/8, (k*from+7)/8)]
		if err := readPart(t, raw, lo*from/8); err != nil {
			return err
		}
		if t.DType.Float() || t.DType == tensor.F64 {
			if err := toFloats(x[:k], raw, t.DType); err != nil {
				return err
			}
			for i, f := range x[:k] {
				if !finite(f) {
					return fmt.Errorf("%s: tensor %s: %w: element %d is %v, expected finite numbers", t.File, tensor.Quote(t.Name), lora.ErrMalformed, lo+int64(i), f)
				}
			}
			if info.DType != t.DType {
				raw = cast[:k*to/8]
				if err := fromFloats(raw, info.DType, x[:k]); err != nil {
					return err
				}
			}
		}
		if _, err := w.spool.WriteAt(raw, w.offset+lo*to/8); err != nil {
			return err
		}
	}
	w.tensors = append(w.tensors, out)
	w.offset += out.Bytes
	return nil
}

// Modules lists what has been added.
func (w *AdapterWriter) Modules() []string { return w.modules }

// Finish lays the tensors out, writes the config and publishes the folder.
func (w *AdapterWriter) Finish(ctx context.Context, config []byte) error {
	f, err := formats.Lookup("safetensors")
	if err != nil {
		return err
	}
	return w.finish(ctx, f, lora.AdapterFile, map[string]string{"format": "pt"}, config)
}

func (w *AdapterWriter) finish(ctx context.Context, f formats.Format, name string, metadata map[string]string, config []byte) error {
	infos := make([]tensor.Info, len(w.tensors))
	for i, t := range w.tensors {
		infos[i] = t.Info
	}
	layout, err := f.Layout(infos, formats.Options{SingleFile: name, Metadata: metadata})
	if err != nil {
		return err
	}
	for _, sh := range layout.Shards {
		if err := w.shard(ctx, sh); err != nil {
			return err
		}
	}
	if config != nil {
		if err := writeFile(filepath.Join(w.stage.out(), "adapter_config.json"), config); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return ErrInterrupted
	}
	w.spool.Close()
	if err := w.stage.publish(w.force); err != nil {
		return err
	}
	s := w.stage
	w.stage = nil
	return errors.Join(storage.SyncDir(filepath.Dir(s.dst)), s.remove())
}

func (w *AdapterWriter) shard(ctx context.Context, sh formats.Shard) error {
	out, err := os.OpenFile(filepath.Join(w.stage.out(), sh.Name), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o666)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := storage.Preallocate(out, sh.Size); err != nil {
		return err
	}
	for at, b := range sh.All() {
		if _, err := out.WriteAt(b, at); err != nil {
			return err
		}
	}
	for k, i := range sh.Tensors {
		if ctx.Err() != nil {
			return ErrInterrupted
		}
		t := w.tensors[i]
		if err := storage.CopyRange(out, sh.Offsets[k], w.spool, t.Offset, t.Bytes); err != nil {
			return err
		}
	}
	if err := sh.Seal(out); err != nil {
		return err
	}
	return errors.Join(out.Sync(), out.Close())
}

// Matrix reads a weight as a matrix of float32, by rows: of the shape that its
// parameter has at run time, (out, in), so Conv1D is turned round.
type Matrix struct {
	w          *Weight
	s          scratch
	flip       bool
	first      int64 // element of w
	rows, cols int
	less       *Matrix // is subtracted
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

// NewMatrixAt reads a part of w: a matrix that begins at an element and lies by rows, such as one
// expert of a stack.
func NewMatrixAt(w *Weight, first int64, rows, cols int) *Matrix {
	return &Matrix{w: w, s: scratch{compute: make(chan struct{}, 1)}, first: first, rows: rows, cols: cols}
}

// Minus reads the difference of two weights of one shape.
func (m *Matrix) Minus(less *Matrix) *Matrix {
	n := *m
	n.less = less
	return &n
}

// Dims returns rows and columns.
func (m *Matrix) Dims() (rows, cols int) { return m.rows, m.cols }

// ReadRows fills dst with the rows from lo to hi.
func (m *Matrix) ReadRows(dst []float32, lo, hi int) error {
	values, err := m.w.read(&m.s, m.first+int64(lo*m.cols), m.first+int64(hi*m.cols), m.flip)
	if err != nil {
		return m.w.failed(err)
	}
	if err := toFloats(dst, values, m.w.Values); err != nil {
		return m.w.failed(err)
	}
	if m.less == nil {
		return nil
	}
	other := floats(&m.s.merge.x, len(dst))
	if err := m.less.ReadRows(other, lo, hi); err != nil {
		return err
	}
	for i, v := range other {
		dst[i] -= v
	}
	return nil
}

// Energy is the sum of the squares of all elements.
func (m *Matrix) Energy() (float64, error) {
	rows, cols := m.Dims()
	step := max(1, (256<<10)/max(cols, 1))
	x := make([]float32, min(step, rows)*cols)
	var sum float64
	for lo := 0; lo < rows; lo += step {
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
