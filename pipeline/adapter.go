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

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// AdapterWriter writes an adapter: what is computed of it is spooled, module by module, and nothing is held in
// memory. It appears at its destination by Write, whole, or not at all.
type AdapterWriter struct {
	stage   *stage
	force   bool
	spool   *os.File
	offset  int64
	tensors []formats.Tensor
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

// Dir is the folder that becomes the adapter's, for what is put beside it.
func (w *AdapterWriter) Dir() string { return w.stage.out() }

// WriteAdapter writes an adapter of any dialect to dst, apart from src, in the types that its tensors
// have, or cast to a type.
func WriteAdapter(ctx context.Context, e *lora.Encoded, src, dst string, cast tensor.DType, force bool) error {
	if _, _, err := adapterFile(e, dst); err != nil {
		return err
	}
	w, err := newAdapterWriter(src, dst, e.File == "", force)
	if err != nil {
		return err
	}
	defer w.Abort()
	return w.write(ctx, e, cast)
}

// Write writes an adapter in the types that its tensors have, and publishes it.
func (w *AdapterWriter) Write(ctx context.Context, e *lora.Encoded) error { return w.write(ctx, e, 0) }

func (w *AdapterWriter) write(ctx context.Context, e *lora.Encoded, cast tensor.DType) error {
	format, name, err := adapterFile(e, w.stage.dst)
	if err != nil {
		return err
	}
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
	return w.finish(ctx, format, name, e)
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
		return nil, "", fmt.Errorf("%s: %w: a %s adapter is a folder, and this is the name of a file; lorakit convert --to kohya or loralib makes a file of one", dst, ErrRefused, e.Dialect)
	case e.File != "":
		return format, e.File, nil
	case !single:
		return nil, "", fmt.Errorf("%s: %w: a %s adapter is one file, expected a name that ends in %s; --to peft or mlx makes a folder", dst, ErrRefused, e.Dialect, strings.Join(format.Extensions(), ", "))
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
		if t.Data == w.spool && t.DType == to {
			w.tensors = append(w.tensors, formats.Tensor{Info: info, Data: w.spool, Offset: t.Offset, Bytes: t.Bytes})
			return nil
		}
		return w.copied(info, t)
	}
	v, err := values.Values(o)
	if err != nil {
		return err
	}
	b := make([]byte, int64(len(v))*to.Bits()/8)
	if err := tensor.FromFloats(b, to, v); err != nil {
		return fmt.Errorf("tensor %s: %w", tensor.Quote(o.Name), err)
	}
	t, err := w.spooled(info, b)
	w.tensors = append(w.tensors, t)
	return err
}

// spooled takes up the bytes of a tensor.
func (w *AdapterWriter) spooled(info tensor.Info, b []byte) (formats.Tensor, error) {
	t := formats.Tensor{Info: info, File: w.spool.Name(), Data: w.spool, Offset: w.offset, Bytes: int64(len(b))}
	if _, err := w.spool.WriteAt(b, w.offset); err != nil {
		return t, err
	}
	w.offset += t.Bytes
	return t, nil
}

// Spool keeps the factors of a module that was computed until the adapter is written. A NaN or an infinity in them
// is an error.
func (w *AdapterWriter) Spool(t lora.Trained) (*lora.Module, error) {
	var at [2]formats.Tensor
	for i, m := range []kernels.Mat{t.A, t.B} {
		b := make([]byte, 0, 4*m.Rows*m.Cols)
		for i := range m.Rows {
			for j := range m.Cols {
				v := m.Data[i*m.RowStride+j*m.ColStride]
				if !finite(v) {
					return nil, fmt.Errorf("module %s: a factor of it came out as %v at (%d, %d), expected finite numbers", tensor.Quote(t.Name), v, i, j)
				}
				b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
			}
		}
		var err error
		if at[i], err = w.spooled(tensor.Info{Name: t.Name, DType: tensor.F32, Shape: tensor.Shape{int64(m.Rows), int64(m.Cols)}}, b); err != nil {
			return nil, err
		}
	}
	return t.Module(&at[0], &at[1]), nil
}

// Abort removes what has been written, as far as it can. It does nothing after Write.
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
		if err := checkpoint.ReadPart(t, raw, lo*from/8); err != nil {
			return err
		}
		if t.DType.Float() || t.DType == tensor.F64 {
			if err := tensor.ToFloats(x[:k], raw, t.DType); err != nil {
				return err
			}
			for i, f := range x[:k] {
				if !finite(f) {
					return fmt.Errorf("%s: tensor %s: %w: element %d is %v, expected finite numbers", t.File, tensor.Quote(t.Name), lora.ErrMalformed, lo+int64(i), f)
				}
			}
			if info.DType != t.DType {
				raw = cast[:k*to/8]
				if err := tensor.FromFloats(raw, info.DType, x[:k]); err != nil {
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

// finish lays the tensors out, writes the config and publishes the adapter.
func (w *AdapterWriter) finish(ctx context.Context, f formats.Format, name string, e *lora.Encoded) error {
	infos := make([]tensor.Info, len(w.tensors))
	for i, t := range w.tensors {
		infos[i] = t.Info
	}
	layout, err := f.Layout(infos, formats.Options{SingleFile: name, Metadata: e.Metadata})
	if err != nil {
		return err
	}
	for _, sh := range layout.Shards {
		if err := w.shard(ctx, sh); err != nil {
			return err
		}
	}
	if e.Config != nil {
		if err := writeFile(filepath.Join(w.stage.out(), "adapter_config.json"), e.Config); err != nil {
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
