// Package ggml is the scheme of the tensors in GGUF files that are in blocks of ggml: a weight is one tensor, whose
// tensor.Encoding has the name of a block type.
package ggml

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

func init() { quant.Register(Scheme{}) }

// Scheme is the quant.Scheme of ggml's block types.
type Scheme struct{}

// Name returns the quant_method that transformers has for such weights.
func (Scheme) Name() string { return "gguf" }

// Types lists the block types by their names in lower case, such as "q4_k", but for those that other schemes have too:
// these are ggml-mxfp4 and ggml-nvfp4. Each puts a weight in exactly that type.
func (Scheme) Types() []quant.Type {
	var types []quant.Type
	for _, t := range ggml.Types() {
		types = append(types, quant.Type{Name: name(t), ReadOnly: t.ReadOnly()})
	}
	return types
}

func name(t ggml.Type) string { return t.Unique() }

// Validated is a parameter of all types: a block whose scale no float16 holds is refused, as llama-quantize refuses it,
// instead of stored with an infinite one, as the functions of ggml do.
const Validated = "validated"

// Spec makes the spec of a block type. Its one parameter is Validated.
func (Scheme) Spec(typ string, asked quant.Params) (quant.Spec, error) {
	t, err := ggml.Parse(typ)
	if err != nil {
		return quant.Spec{}, fmt.Errorf("%w: %w", quant.ErrUnknown, err)
	}
	s := quant.Spec{Type: name(t)}
	if asked.Bool(Validated) {
		s.Params = quant.Params{{Name: Validated, Value: true}}
	}
	return s, nil
}

// Find returns the tensors that are stored in blocks of ggml.
func (Scheme) Find(ctx context.Context, s quant.Stored) ([]quant.Decoder, error) {
	return quant.FindEach(ctx, s, func(t tensor.Info) (quant.Decoder, error) {
		if t.Encoding == (tensor.Encoding{}) {
			return nil, nil
		}
		typ, err := ggml.Parse(t.Encoding.Name)
		if err != nil {
			return nil, nil // another scheme's
		}
		if err := check(t, typ); err != nil {
			return nil, fmt.Errorf("%w: %w", quant.ErrMalformed, err)
		}
		if want := typ.Encoding(); t.Encoding != want {
			return nil, fmt.Errorf("%w: found blocks of %d elements in %d bytes of %s, expected %d in %d", quant.ErrMalformed,
				t.Encoding.Elements, t.Encoding.Bytes, tensor.Quote(t.Encoding.Name), want.Elements, want.Bytes)
		}
		dtype := s.DType()
		if !dtype.Float() {
			dtype = tensor.F32
		}
		return &decoder{weight{tensor.Info{Name: t.Name, DType: dtype, Shape: t.Shape}, typ}}, nil
	})
}

// check returns an error unless the rows of a tensor are whole blocks.
func check(t tensor.Info, typ ggml.Type) error {
	row := int64(1)
	if len(t.Shape) > 0 {
		row = t.Shape[len(t.Shape)-1]
	}
	if row <= 0 || row%int64(typ.Elements()) != 0 {
		return fmt.Errorf("its shape is %v, expected rows of a multiple of %d for %v", t.Shape, typ.Elements(), typ)
	}
	return nil
}

// Encoder prepares to store t, which has float elements, in a block type.
func (Scheme) Encoder(_ context.Context, s quant.Spec, t tensor.Info) (quant.Encoder, error) {
	typ, err := ggml.Parse(s.Type)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", quant.ErrUnknown, err)
	}
	if typ.ReadOnly() {
		return nil, fmt.Errorf("%w to %s: the type is read only", quant.ErrUnsupported, s.Type)
	}
	if !t.DType.Float() {
		return nil, fmt.Errorf("%w to %s: its dtype is %v, expected F32, F16 or BF16", quant.ErrUnsupported, s.Type, t.DType)
	}
	if err := check(t, typ); err != nil {
		return nil, fmt.Errorf("%w to %s: %w", quant.ErrUnsupported, s.Type, err)
	}
	if t.Count() == 0 {
		return nil, fmt.Errorf("%w to %s: it is empty", quant.ErrUnsupported, s.Type)
	}
	e := &encoder{weight: weight{t, typ}, allowNonFinite: s.AllowNonFinite, validated: s.Params.Bool(Validated)}
	e.infinite.Store(math.MaxInt64)
	return e, nil
}

// Config returns the member that tells transformers of such weights.
func (Scheme) Config([]quant.Assigned, []string) (key string, object []byte, err error) {
	return "quantization_config", []byte(`{"quant_method": "gguf"}`), nil
}

// Declaration knows its own quantization_config. Which weights it is about, the tensors say by themselves.
func (s Scheme) Declaration(config []byte) (quant.Declaration, bool) {
	var c struct {
		Method string `json:"quant_method"`
	}
	return quant.Declaration{}, json.Unmarshal(config, &c) == nil && c.Method == s.Name()
}

// weight is a tensor in blocks.
type weight struct {
	info tensor.Info
	typ  ggml.Type
}

func (w *weight) Unit() int64 { return int64(w.typ.Elements()) }

// ranges appends the bytes that the elements [lo, hi) are in.
func (w *weight) ranges(r []quant.Range, lo, hi int64) []quant.Range {
	size := int64(w.typ.Bytes())
	return append(r, quant.Range{Offset: lo / w.Unit() * size, Length: (hi - lo) / w.Unit() * size})
}

// chunk is the number of elements that are worked on at a time, so that they stay in the nearest cache: whole blocks of
// any type.
const chunk = 4096

var chunks = sync.Pool{New: func() any { return new([chunk]float32) }}

// each hands work the elements from lo to hi in chunks: room for them, how many bytes of blocks are before them and how
// many they have.
func (w *weight) each(lo, hi int64, work func(x []float32, first, bytes int) error) error {
	buf := chunks.Get().(*[chunk]float32)
	defer chunks.Put(buf)
	for at := lo; at < hi; at += chunk {
		n := int(min(hi-at, chunk))
		first := int(at-lo) / w.typ.Elements() * w.typ.Bytes()
		if err := work(buf[:n], first, n/w.typ.Elements()*w.typ.Bytes()); err != nil {
			return err
		}
	}
	return nil
}

// decoder reads a weight in blocks.
type decoder struct{ weight }

func (d *decoder) Info() tensor.Info    { return d.info }
func (d *decoder) Spec() quant.Spec     { return quant.Spec{Type: name(d.typ)} }
func (d *decoder) Parts() []string      { return []string{d.info.Name} }
func (d *decoder) Values() tensor.DType { return tensor.F32 }

func (d *decoder) Inputs(r []quant.Range, lo, hi int64) []quant.Range { return d.ranges(r, lo, hi) }

func (d *decoder) Decode(dst []byte, lo, hi int64, in [][]byte) error {
	at := 0
	return d.each(lo, hi, func(x []float32, first, bytes int) error {
		if bad := d.typ.Dequantize(x, in[0][first:first+bytes]); bad >= 0 {
			block := (lo+int64(at))/d.Unit() + int64(bad)
			return fmt.Errorf("%w: found a scale that is a NaN or an infinity in block %d of %v", quant.ErrMalformed, block,
				d.typ)
		}
		n := len(x)
		err := tensor.FromFloats(dst[4*at:4*(at+n)], tensor.F32, x)
		at += n
		return err
	})
}

// encoder writes a weight in blocks.
type encoder struct {
	weight
	allowNonFinite bool
	validated      bool
	infinite       atomic.Int64 // the first block with an infinite scale that was found
}

// Notices says that there are blocks with infinite scales.
func (e *encoder) Notices() []string {
	first := e.infinite.Load()
	if first == math.MaxInt64 {
		return nil
	}
	return []string{fmt.Sprintf("block %d and perhaps others have an infinite scale, as their values are too large or "+
		"too small for %s: they are no numbers when they are read", first, name(e.typ))}
}

// noteInfinite notes a block with an infinite scale.
func (e *encoder) noteInfinite(block int64) {
	for {
		first := e.infinite.Load()
		if block >= first || e.infinite.CompareAndSwap(first, block) {
			return
		}
	}
}

func (e *encoder) Outputs() []tensor.Info {
	return []tensor.Info{{Name: e.info.Name, Shape: e.info.Shape, Encoding: e.typ.Encoding()}}
}

// Deferred is nothing: a block stands for itself.
func (e *encoder) Deferred(int64, int64) int64 { return 0 }

func (e *encoder) Tiles(r []quant.Range, lo, hi int64) []quant.Range { return e.ranges(r, lo, hi) }

func (e *encoder) Encode(out [][]byte, _ []float32, lo, hi int64, src []byte) error {
	size, at := int(e.info.DType.Bits()/8), 0
	return e.each(lo, hi, func(x []float32, first, bytes int) error {
		n := len(x)
		if err := tensor.ToFloats(x, src[size*at:size*(at+n)], e.info.DType); err != nil {
			return err
		}
		if bad := e.typ.Quantize(out[0][first:first+bytes], x); bad >= 0 && !e.allowNonFinite {
			what := "NaN or infinity"
			nonFinite := slices.IndexFunc(x, func(v float32) bool { return v-v != 0 })
			if nonFinite >= 0 && !e.validated {
				bad = nonFinite // whatever else is in blocks before it
			}
			if v := x[bad]; v-v == 0 {
				if nonFinite < 0 && !e.validated {
					e.noteInfinite((lo + int64(at+bad)) / e.Unit())
					at += n
					return nil
				}
				what = fmt.Sprintf("a block whose scale %v cannot hold, as its values are too large or too small,", e.typ)
			}
			return &quant.NonFiniteError{Index: lo + int64(at+bad), What: what}
		}
		at += n
		return nil
	})
}

func (e *encoder) Finish(quant.Deferred, func(int, int64, []byte) error) error { return nil }
