package checkpoint

import (
	"bytes"
	"context"
	"fmt"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Decoded returns a weight like w whose values are read from parts, the stored tensors of one weight that the scheme
// has quantised by a spec.
func Decoded(
	ctx context.Context, w *Weight, scheme quant.Scheme, spec quant.Spec, parts []formats.Tensor,
) (*Weight, error) {
	// Some schemes say in config.json alone how a weight is to be read.
	key, object, err := scheme.Config([]quant.Assigned{{Name: w.Name, Spec: spec}}, nil)
	if err != nil {
		return nil, err
	}
	config, err := json.Marshal(map[string]jsontext.Value{key: object})
	if err != nil {
		return nil, err
	}
	s := newStored(parts, w.DType, config)
	d, err := scheme.Find(ctx, s)
	if err != nil {
		return nil, err
	}
	if len(d) != 1 {
		return nil, fmt.Errorf("%w: the quantised form of %s is not read back", quant.ErrMalformed, tensor.Quote(w.Name))
	}
	like := *w
	like.decodedBy(d[0], s)
	like.Name, like.DType = w.Name, w.DType
	return &like, nil
}

// Quantized returns a weight as it is once it has gone through a quantisation and back. The quantised form is held in
// memory.
func Quantized(ctx context.Context, w *Weight, spec quant.Spec) (*Weight, error) {
	scheme, err := quant.ForType(spec.Type)
	if err != nil {
		return nil, err
	}
	low, err := new(Reader).Quantized(ctx, w, scheme, spec)
	if err != nil {
		return nil, w.Failed(err)
	}
	return low, nil
}

// Quantized is the function of that name with the memory of r.
func (r *Reader) Quantized(
	ctx context.Context, w *Weight, scheme quant.Scheme, spec quant.Spec,
) (*Weight, error) {
	flip := w.Flips()
	info := tensor.Info{Name: w.Name, DType: w.Values, Shape: w.Shape}
	if flip {
		info.Shape = w.Shape.Transposed()
	}
	e, err := scheme.Encoder(ctx, spec, info)
	if err != nil {
		return nil, err
	}
	bufs := make([][]byte, len(e.Outputs()))
	parts := make([]formats.Tensor, len(bufs))
	for i, o := range e.Outputs() {
		size, err := o.Size()
		if err != nil {
			return nil, err
		}
		bufs[i] = make([]byte, size)
		parts[i] = formats.Tensor{Info: o, File: w.Parts[0].File, Data: bytes.NewReader(bufs[i]), Bytes: size}
	}
	n := w.Count()
	tiles := func(use func(lo, hi int64, values []byte) error) error {
		const most = 128 << 10 // elements of a tile
		step := max(most/e.Unit()*e.Unit(), e.Unit())
		for lo := int64(0); lo < n; lo += step {
			if err := ctx.Err(); err != nil {
				return err
			}
			hi := min(lo+step, n)
			values, err := r.Read(w, lo, hi, flip)
			if err == nil {
				err = use(lo, hi, values)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	if m, ok := e.(quant.Measured); ok {
		numbers := make([]float32, m.Statistics())
		err := tiles(func(lo, hi int64, values []byte) error { return m.Measure(numbers, lo, hi, values) })
		if err == nil {
			err = m.Begin(numbers)
		}
		if err != nil {
			return nil, err
		}
	}
	kept := make(floats, e.Deferred(0, n)) // what outlives a tile
	err = tiles(func(lo, hi int64, values []byte) error {
		var views [][]byte
		for _, x := range e.Tiles(nil, lo, hi) {
			views = append(views, bufs[x.Part][x.Offset:x.Offset+x.Length])
		}
		var deferred []float32
		if m := e.Deferred(lo, hi); m > 0 {
			deferred = kept[e.Deferred(0, lo):][:m]
		}
		return e.Encode(views, deferred, lo, hi, values)
	})
	if err != nil {
		return nil, err
	}
	write := func(part int, off int64, p []byte) error { copy(bufs[part][off:], p); return nil }
	if err := e.Finish(kept, write); err != nil {
		return nil, err
	}
	low, err := Decoded(ctx, w, scheme, spec, parts)
	if err != nil {
		return nil, err
	}
	if low.Transposed = flip; flip {
		low.Shape = w.Shape
	}
	return low, nil
}

// Flips reports whether the values of w are turned round before they are quantised, as transformers does with Conv1D.
func (w *Weight) Flips() bool { return w.Role.Kind == models.Conv1D && len(w.Shape) == 2 }

// floats are the numbers that an encoder keeps from its tiles.
type floats []float32

// ReadFloats fills dst with the numbers from index i on.
func (f floats) ReadFloats(dst []float32, i int64) error {
	copy(dst, f[i:])
	return nil
}
