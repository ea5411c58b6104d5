package pipeline

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/tensor"
)

// AdapterWriter writes an adapter: what is computed of it is spooled, module by module, and nothing is held in
// memory. Write then makes a plan of it, which is carried out as that of a checkpoint is: the adapter appears at its
// destination whole, or not at all.
type AdapterWriter struct {
	stage  *stage
	spool  *os.File
	offset int64
}

// NewAdapterWriter begins an adapter at dst, one file where dst has the name of one, which must not exist unless force
// is set, and lies apart from src.
func NewAdapterWriter(src, dst string, force bool) (*AdapterWriter, error) {
	_, single := formats.Default.ForExtension(dst)
	return newAdapterWriter(src, dst, single, force)
}

func newAdapterWriter(src, dst string, single, force bool) (*AdapterWriter, error) {
	dst, err := absolute(dst)
	if err != nil {
		return nil, err
	}
	if err := CheckDestination(src, dst, RunOptions{Force: force}); err != nil {
		return nil, err
	}
	s, err := openStage(dst, "adapter", single, false, force)
	if err != nil {
		return nil, err
	}
	w := &AdapterWriter{stage: s}
	if w.spool, err = os.CreateTemp(s.dir, scratchPattern); err != nil {
		return nil, errors.Join(err, s.Abort(false))
	}
	return w, nil
}

// Dir is the folder that becomes the adapter's, for what is put beside it.
func (w *AdapterWriter) Dir() string { return w.stage.out() }

// WriteAdapter writes an adapter of any dialect to dst, apart from src, in the types that its tensors have, or cast to
// a type.
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
	m := &Merged{Base: &checkpoint.Checkpoint{Path: e.Dialect, Formats: formats.Default}}
	var jobs []Job
	var values lora.Writer
	for _, o := range e.Tensors {
		if ctx.Err() != nil {
			return ErrInterrupted
		}
		weight, err := w.weight(&values, o)
		if err != nil {
			return err
		}
		to := o.DType
		switch {
		case o.As.Name != "":
			to = o.As.DType
		case cast != 0 && to.Float():
			to = cast
		}
		job := Job{Weight: o.Name, DType: to, Finite: true, Outputs: []Output{{Info: o.Info}}}
		job.Outputs[0].DType, job.Outputs[0].Encoding = to, o.As.Encoding
		job.Copy = !weight.DType.Numeric() || weight.DType == to && weight.Parts[0].Data == w.spool // numbers are looked at
		m.Weights = append(m.Weights, &Weight{Weight: weight})
		jobs = append(jobs, job)
	}
	p := &Plan{Version: planVersion, SingleFile: w.stage.single}
	if err := p.place(ctx, format, jobs, formats.Options{SingleFile: name, Metadata: e.Metadata}); err != nil {
		return err
	}
	if e.Config != nil {
		p.Files = append(p.Files, formats.File{Name: "adapter_config.json", Data: e.Config})
	}
	o := RunOptions{Threads: runtime.GOMAXPROCS(0), Memory: DefaultMemory}
	r := &run{plan: p, from: m, opts: o, compute: make(chan struct{}, o.Threads),
		remarks: map[string][]string{}}
	if err := r.prepare(ctx); err != nil {
		return err
	}
	r.spooled, r.beforePublish = true, w.spool.Close // a file that is open cannot be removed on Windows
	s := w.stage
	w.stage = nil // from here on the run removes it
	_, err = r.into(ctx, s, time.Now())
	return err
}

// weight is the weight that holds the values of an output as they are; what has to be computed is spooled.
func (w *AdapterWriter) weight(values *lora.Writer, o lora.Output) (*checkpoint.Weight, error) {
	t := o.Stored()
	if blocks := o.As.Encoding; t == nil || blocks != (tensor.Encoding{}) {
		v, err := values.Values(o)
		if err != nil {
			return nil, err
		}
		info := tensor.Info{Name: o.Name, DType: tensor.F32, Shape: o.Shape}
		b := make([]byte, 4*len(v))
		if blocks != (tensor.Encoding{}) {
			info.DType, info.Encoding = 0, blocks
			b, err = inBlocks(v, blocks)
		} else {
			err = tensor.FromFloats(b, tensor.F32, v)
		}
		if err != nil {
			return nil, fmt.Errorf("tensor %s: %w", tensor.Quote(o.Name), err)
		}
		at, err := w.spooled(info, b)
		if err != nil {
			return nil, err
		}
		t = &at
	}
	info := o.Info
	info.DType, info.Encoding = t.DType, t.Encoding
	return &checkpoint.Weight{Info: info, Values: t.DType, Parts: []formats.Tensor{*t}}, nil
}

// inBlocks quantises the values of a factor, which are in memory as they are.
func inBlocks(v []float32, blocks tensor.Encoding) ([]byte, error) {
	typ, err := ggml.Parse(blocks.Name)
	if err != nil {
		return nil, err
	}
	b := make([]byte, len(v)/typ.Elements()*typ.Bytes())
	if bad := typ.Quantize(b, v); bad >= 0 {
		return nil, fmt.Errorf("found %v in a block of %v at element %d, expected numbers whose scale float16 holds", v[bad],
			typ, bad)
	}
	return b, nil
}

// adapterFile says in which format, and under which name, the tensors of an adapter are written.
func adapterFile(e *lora.Encoded, dst string) (formats.Format, string, error) {
	format, err := formats.Default.Lookup(e.Format)
	if err != nil {
		return nil, "", err
	}
	byName, single := formats.Default.ForExtension(dst)
	switch {
	case e.File != "" && single:
		err := fmt.Errorf("%s: %w: a %s adapter is a folder, and this is the name of a file", dst, ErrRefused, e.Dialect)
		return nil, "", hint.With(err, hint.Hint{
			Function: "Convert", Option: "To",
			Value:  strings.Join([]string{lora.Kohya, lora.Diffusers, lora.LoRALib}, ", ") + " or " + lora.GGUF,
			Effect: "makes a file of one",
		})
	case e.File != "":
		return format, e.File, nil
	case !single:
		err := fmt.Errorf("%s: %w: a %s adapter is one file, expected a name that ends in %s",
			dst, ErrRefused, e.Dialect, strings.Join(format.Extensions(), ", "))
		return nil, "", hint.With(err, hint.Hint{Option: "To", Value: lora.PEFT + " or " + lora.MLX,
			Effect: "makes a folder"})
	case byName.Name() != e.Format:
		return nil, "", fmt.Errorf("%s: %w: a %s adapter is a %s file, expected a name that ends in %s", dst, ErrRefused,
			e.Dialect, e.Format, strings.Join(format.Extensions(), ", "))
	}
	return format, filepath.Base(dst), nil
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
					return nil, fmt.Errorf("module %s: a factor of it came out as %v at (%d, %d), expected finite numbers",
						tensor.Quote(t.Name), v, i, j)
				}
				b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
			}
		}
		var err error
		if at[i], err = w.spooled(tensor.Info{Name: t.Name, DType: tensor.F32,
			Shape: tensor.Shape{int64(m.Rows), int64(m.Cols)}}, b); err != nil {
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
	_ = w.stage.Abort(false) // as far as it can be done
	w.stage = nil
}
