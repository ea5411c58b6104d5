package bnb

import (
	"fmt"
	"strings"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// The parts of an int8 weight M.weight, in the order in which Parts and Outputs list them.
const (
	partRows   = iota // M.weight: I8 (out, in)
	partSCB           // M.SCB: F32 (out), the largest magnitude of each row
	partFormat        // M.weight_format: U8 [], 0 for row-major
)

func int8Infos(module string, shape tensor.Shape) []tensor.Info {
	return []tensor.Info{
		partRows:   {Name: module + ".weight", DType: tensor.I8, Shape: shape},
		partSCB:    {Name: module + ".SCB", DType: tensor.F32, Shape: shape[:1]},
		partFormat: {Name: module + ".weight_format", DType: tensor.U8, Shape: tensor.Shape{}},
	}
}

// int8Reader decodes an int8 weight, any range of elements at a time.
type int8Reader struct {
	info  tensor.Info
	parts []tensor.Info
}

func openInt8(module string, s quant.Stored, dtype tensor.DType) (quant.Decoder, error) {
	t, _ := s.Lookup(module + ".weight")
	if len(t.Shape) != 2 {
		return nil, fmt.Errorf("%w: its shape is %v, expected two dimensions beside an SCB", quant.ErrMalformed, t.Shape)
	}
	if !dtype.Float() {
		dtype = tensor.F16 // what every weight is cast to before it becomes int8
	}
	w := &int8Reader{info: tensor.Info{Name: t.Name, DType: dtype, Shape: t.Shape}, parts: int8Infos(module, t.Shape)}
	for i, want := range w.parts[1:] {
		got, ok := s.Lookup(want.Name)
		if !ok && i+1 == partFormat { // older files lack it
			w.parts = w.parts[:partFormat]
			break
		}
		if !ok || got.DType != want.DType || got.Count() != want.Count() {
			return nil, fmt.Errorf("%w: %s is %v %v, expected %v %v", quant.ErrMalformed, tensor.Quote(want.Name), got.DType,
				got.Shape, want.DType, want.Shape)
		}
		w.parts[i+1].Shape = got.Shape
		if i+1 == partFormat {
			var order [1]byte
			if err := s.Read(want.Name, order[:], 0); err != nil {
				return nil, err
			}
			if order[0] != 0 {
				return nil, fmt.Errorf("%w: %s is %d, expected 0: of bitsandbytes' orders only row-major is read",
					quant.ErrMalformed, tensor.Quote(want.Name), order[0])
			}
		}
	}
	return w, nil
}

func partNames(parts []tensor.Info) []string {
	names := make([]string, len(parts))
	for i, p := range parts {
		names[i] = p.Name
	}
	return names
}

func (w *int8Reader) Info() tensor.Info { return w.info }
func (w *int8Reader) Spec() quant.Spec  { return spec{Type: "int8"}.public() }
func (w *int8Reader) Parts() []string   { return partNames(w.parts) }
func (w *int8Reader) Unit() int64       { return 1 }

// Values is F32: what an int8 weight was before is not stored, and no rounding to it is part of the scheme.
func (w *int8Reader) Values() tensor.DType { return tensor.F32 }

func (w *int8Reader) Inputs(r []quant.Range, lo, hi int64) []quant.Range {
	if lo >= hi {
		return r
	}
	r0, r1 := lo/w.info.Shape[1], ceilDiv(hi, w.info.Shape[1])
	return append(r, quant.Range{Part: partRows, Offset: lo, Length: hi - lo},
		quant.Range{Part: partSCB, Offset: 4 * r0, Length: 4 * (r1 - r0)})
}

func (w *int8Reader) Decode(dst []byte, lo, hi int64, in [][]byte) error {
	if lo >= hi {
		return nil
	}
	f := floats.Get().(*[]float32)
	defer floats.Put(f)
	scb := grow(f, len(in[1])/4)
	getFloats(scb, in[1])
	q, cols := in[0], w.info.Shape[1]
	decode := func(rows, width int64) {
		n := rows * width
		kernels.Dequantize8(dst[:4*n], kernels.F32, q[:n], scb[:rows], int(width))
		dst, q, scb = dst[4*n:], q[n:], scb[rows:]
	}
	if begun := lo % cols; begun > 0 { // the rest of a row
		decode(1, min(cols-begun, hi-lo))
	}
	if rows := int64(len(q)) / cols; rows > 0 {
		decode(rows, cols)
	}
	if len(q) > 0 { // the beginning of one
		decode(1, int64(len(q)))
	}
	return nil
}

// int8Encoder encodes to int8, whole rows at a time.
type int8Encoder struct {
	info  tensor.Info
	spec  spec
	parts []tensor.Info
	float kernels.Float
}

func newInt8Encoder(s spec, t tensor.Info) (quant.Encoder, error) {
	module, ok := strings.CutSuffix(t.Name, ".weight")
	if !ok {
		return nil, fmt.Errorf("%w to int8: its name does not end in .weight, which M.SCB is named after",
			quant.ErrUnsupported)
	}
	if len(t.Shape) != 2 {
		return nil, fmt.Errorf("%w to int8: its shape is %v, expected two dimensions", quant.ErrUnsupported, t.Shape)
	}
	float, err := floatOf(t.DType)
	if err != nil {
		return nil, err
	}
	return &int8Encoder{info: t, spec: s, parts: int8Infos(module, t.Shape), float: float}, nil
}

func floatOf(d tensor.DType) (kernels.Float, error) {
	switch d {
	case tensor.F32:
		return kernels.F32, nil
	case tensor.F16:
		return kernels.F16, nil
	case tensor.BF16:
		return kernels.BF16, nil
	}
	return 0, fmt.Errorf("%w: its dtype is %v, expected F32, F16 or BF16", quant.ErrUnsupported, d)
}

func (e *int8Encoder) Outputs() []tensor.Info { return e.parts }
func (e *int8Encoder) Unit() int64            { return e.info.Shape[1] }

// Deferred is nothing: a row stands for itself.
func (e *int8Encoder) Deferred(int64, int64) int64 { return 0 }

func (e *int8Encoder) Tiles(r []quant.Range, lo, hi int64) []quant.Range {
	r0, r1 := lo/e.Unit(), hi/e.Unit()
	return append(r, quant.Range{Part: partRows, Offset: lo, Length: hi - lo},
		quant.Range{Part: partSCB, Offset: 4 * r0, Length: 4 * (r1 - r0)})
}

func (e *int8Encoder) Encode(out [][]byte, _ []float32, lo, hi int64, src []byte) error {
	f := floats.Get().(*[]float32)
	defer floats.Put(f)
	scb := grow(f, len(out[1])/4)
	bad := kernels.Quantize8(out[0], scb, src, e.float, int(e.Unit()))
	if bad >= 0 && !e.spec.AllowNonFinite {
		return &quant.NonFiniteError{Index: lo + int64(bad),
			What: "NaN, infinity or a value past 65504, the largest float16,"}
	}
	putFloats(out[1], scb)
	return nil
}

func (e *int8Encoder) Finish(_ quant.Deferred, write func(part int, off int64, p []byte) error) error {
	return write(partFormat, 0, []byte{0})
}
