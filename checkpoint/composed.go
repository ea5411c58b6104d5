package checkpoint

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Excerpt is a part of a weight that is put together of elements of others.
type Excerpt struct {
	Weight *Weight
	View   tensor.View
}

// Compose makes a weight of that name, shape and type of pieces, which cover each of its elements once. shift is added
// to each value, in float32, or where a piece is F16 with the sum rounded to that. Where the only piece is all of
// another weight, nothing is computed: the result is that one under the new name, in its scheme. Without a type in info
// it is that of the pieces, before they were quantised, or where these differ or are shifted that of the values.
func Compose(info tensor.Info, pieces []Excerpt, shift float32) (*Weight, error) {
	count, err := info.Shape.Count()
	if err != nil {
		return nil, err
	}
	covered := int64(0)
	for _, p := range pieces {
		covered += p.View.Count()
	}
	if len(pieces) == 0 || covered != count {
		return nil, fmt.Errorf("%w: %d elements are there for its %d", ErrRefused, covered, count)
	}
	if first := pieces[0]; len(pieces) == 1 && first.View.Plain() && shift == 0 && first.Weight.Count() == count {
		return first.Weight.renamed(info), nil
	}
	c := &composed{pieces: pieces, shift: shift, values: pieces[0].Weight.Values}
	w := &Weight{Info: info}
	dtype := pieces[0].Weight.DType
	for _, p := range pieces {
		if p.Weight.DType != dtype {
			dtype = 0
		}
		if p.Weight.Values != c.values {
			c.values = tensor.F32
		}
		c.stored += int64(float64(p.Weight.StoredBytes()) / float64(max(p.Weight.Count(), 1)) * float64(p.View.Count()))
	}
	if shift != 0 {
		c.halves = c.values == tensor.F16
		c.values, dtype = tensor.F32, 0
	}
	w.Values = c.values
	w.DType = cmp.Or(w.DType, dtype, c.values)
	c.turned = pieces[0].View.Turned()
	w.Parts = []formats.Tensor{{
		Info: tensor.Info{Name: info.Name, DType: c.values, Shape: info.Shape}, File: pieces[0].Weight.Parts[0].File, Data: c,
		Bytes: count * (c.values.Bits() / 8),
	}}
	return w, nil
}

// renamed is the weight under another name, in a shape of as many elements.
func (w *Weight) renamed(info tensor.Info) *Weight {
	n := *w
	n.Info = info
	if info.DType == 0 {
		n.DType = w.DType
	}
	if w.Decoder != nil {
		n.Decoder = named{w.Decoder, n.Info}
		return &n
	}
	n.Parts = []formats.Tensor{w.Parts[0]}
	n.Parts[0].Name, n.Parts[0].Shape = info.Name, info.Shape
	return &n
}

// named is the decoder of a weight that has got another name, or shape.
type named struct {
	quant.Decoder
	info tensor.Info
}

func (n named) Info() tensor.Info { return n.info }

// Exact is that of the weight, where it has one.
func (n named) Exact() quant.Decoder {
	if e, ok := n.Decoder.(quant.Exact); ok {
		return named{e.Exact(), n.info}
	}
	return n
}

// composed is the file of a weight that is put together.
type composed struct {
	pieces  []Excerpt
	shift   float32
	halves  bool // sums are rounded to F16
	turned  bool
	values  tensor.DType
	stored  int64 // bytes that it is made of
	readers sync.Pool
}

// Composed reports whether a weight is put together of elements of others, so that its bytes are no range of a file.
func (w *Weight) Composed() bool {
	_, ok := w.Parts[0].Data.(*composed)
	return ok
}

// Decoders are those that read the weight: its own, or those of what it is put together of.
func (w *Weight) Decoders() []quant.Decoder {
	if w.Decoder != nil {
		return []quant.Decoder{w.Decoder}
	}
	var list []quant.Decoder
	if c, ok := w.Parts[0].Data.(*composed); ok {
		for _, x := range c.pieces {
			list = append(list, x.Weight.Decoders()...)
		}
	}
	return list
}

// Decodes reports whether reading the weight dequantises something.
func (w *Weight) Decodes() bool { return len(w.Decoders()) > 0 }

// Scattered reports whether elements of a weight that is put together are far apart in the file, so that larger pieces
// of it are read faster.
func (w *Weight) Scattered() bool {
	c, ok := w.Parts[0].Data.(*composed)
	return ok && c.turned
}

// ReadAt fills p, whole elements.
func (c *composed) ReadAt(p []byte, off int64) (int, error) {
	width := c.values.Bits() / 8
	if off%width != 0 || int64(len(p))%width != 0 {
		return 0, fmt.Errorf("bytes %d to %d of a weight that is put together of elements of %d", off, off+int64(len(p)),
			width)
	}
	r, ok := c.readers.Get().(*Reader)
	if !ok {
		r = NewReader(nil)
	}
	defer c.readers.Put(r)
	if err := c.read(r, p, off/width); err != nil {
		return 0, err
	}
	return len(p), nil
}

// read fills p with the elements from lo on.
func (c *composed) read(r *Reader, p []byte, lo int64) error {
	width := c.values.Bits() / 8
	hi := lo + int64(len(p))/width
	for i := range c.pieces {
		piece := &c.pieces[i]
		w := piece.Weight
		err := piece.View.Gather(p, lo, hi, width, c.atOnce(hi-lo), func(from, n int64) ([]byte, error) {
			if from < 0 || from > w.Count()-n {
				return nil, fmt.Errorf("tensor %s: %w: %d elements from %d on are asked for, it has %d", tensor.Quote(w.Name),
					io.ErrUnexpectedEOF, n, from, w.Count())
			}
			values, err := r.Read(w, from, from+n, false)
			if err != nil {
				return nil, fmt.Errorf("tensor %s: %w", tensor.Quote(w.Name), err)
			}
			if w.Values == c.values {
				return values, nil
			}
			b := sized(&r.cast, n*width)
			return b, tensor.Convert(b, c.values, values, w.Values)
		})
		if err != nil {
			return err
		}
	}
	tensor.Shift(p, c.shift)
	if !c.halves {
		return nil
	}
	b := sized(&r.cast, int64(len(p)/2))
	if err := tensor.Convert(b, tensor.F16, p, tensor.F32); err != nil {
		return err
	}
	return tensor.Convert(p, tensor.F32, b, tensor.F16)
}

// atOnce is how many elements are read at once for n.
func (c *composed) atOnce(n int64) int64 { return 2*n + 4096 }

// memory is what reading n elements takes, the room for them not counted.
func (c *composed) memory(n int64) int64 {
	var most int64
	for _, p := range c.pieces {
		m := MemoryFor(p.Weight, c.atOnce(n), false).Total()
		if p.Weight.Values != c.values {
			m += min(c.atOnce(n), p.Weight.Count()) * c.values.Bits() / 8
		}
		most = max(most, m)
	}
	if c.halves {
		most += 2 * n
	}
	return most
}

// Made is a weight whose values are there already, of no file.
func Made(info tensor.Info, values []float32, file string) (*Weight, error) {
	info.DType = tensor.F32
	data := make([]byte, 4*len(values))
	if err := tensor.FromFloats(data, tensor.F32, slices.Clone(values)); err != nil {
		return nil, err
	}
	return &Weight{Info: info, Values: tensor.F32, Parts: []formats.Tensor{{
		Info: info, File: file, Data: bytes.NewReader(data), Bytes: int64(len(data)),
	}}}, nil
}
