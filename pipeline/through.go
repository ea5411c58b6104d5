package pipeline

import (
	"bytes"
	"fmt"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// decoded finds the decoder of the parts and makes a weight of them.
func decoded(like *Weight, typ string, parts []formats.Tensor) (*Weight, error) {
	scheme, err := quant.ForType(typ)
	if err != nil {
		return nil, err
	}
	raw, names := newRawTensors(parts)
	d, err := scheme.Find(names, raw, like.DType)
	if err != nil {
		return nil, err
	}
	if len(d) != 1 {
		return nil, fmt.Errorf("%w: the quantised form of %s is not read back", quant.ErrMalformed, tensor.Quote(like.Name))
	}
	w := *like
	w.Decoder, w.Values, w.Parts = d[0], d[0].Values(), nil
	w.Shape = d[0].Info().Shape
	for _, name := range d[0].Parts() {
		w.Parts = append(w.Parts, parts[raw.byName[name]])
	}
	return &w, nil
}

// through replaces a job's weight by what is left of it once quantised.
func through(s *scratch, j *jobRun) error {
	low, err := quantizedAndBack(s, j.weight, *j.Through)
	if err != nil {
		return err
	}
	low.merge = &merging{j.weight.merge.Change, low}
	j.weight = low
	return nil
}

// quantizedAndBack returns a weight as it is once it has been quantised. The quantised form is
// held in memory.
func quantizedAndBack(s *scratch, w *Weight, spec quant.Spec) (*Weight, error) {
	scheme, err := quant.ForType(spec.Type)
	if err != nil {
		return nil, err
	}
	flip := (&Job{Encode: &spec}).flips(w)
	info := tensor.Info{Name: w.Name, DType: w.Values, Shape: w.Shape}
	if flip {
		info.Shape = transposed(w.Shape)
	}
	e, err := scheme.Encoder(spec, info)
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
	var held *carry // nil where nothing outlives a tile
	if all := e.Carry(0, n); all > 0 {
		held = &carry{floats: make([]float32, all)}
	}
	step := max(largestTile/e.Unit()*e.Unit()/4, e.Unit())
	for lo := int64(0); lo < n; lo += step {
		hi := min(lo+step, n)
		values, err := w.read(s, lo, hi, flip)
		if err != nil {
			return nil, err
		}
		var views [][]byte
		for _, x := range e.Tiles(nil, lo, hi) {
			views = append(views, bufs[x.Part][x.Offset:x.Offset+x.Length])
		}
		if err := e.Encode(views, held.tile(s, lo/e.Unit(), e.Carry(lo, hi)), lo, hi, values); err != nil {
			return nil, err
		}
	}
	if err := e.Finish(held, func(part int, off int64, p []byte) error { copy(bufs[part][off:], p); return nil }); err != nil {
		return nil, err
	}
	low, err := decoded(w, spec.Type, parts)
	if err != nil {
		return nil, err
	}
	if low.Transposed = flip; flip {
		low.Shape = w.Shape
	}
	return low, nil
}

// Quantized returns a weight as it is once it has gone through the quantisation and
// back.
func Quantized(w *Weight, spec quant.Spec) (*Weight, error) {
	low, err := quantizedAndBack(&scratch{compute: make(chan struct{}, 1)}, w, spec)
	if err != nil {
		return nil, w.failed(err)
	}
	return low, nil
}
