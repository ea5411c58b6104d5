// Package mxfp4 reads the experts of gpt-oss: P_blocks has floats of 4 bits, E2M1, 32 in a block of 16 bytes, and
// P_scales a power of two for each block. They lie with the rows of a matrix together, and the parameter P, a stack of
// matrices, has them as columns.
package mxfp4

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/minifloat"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

func init() { quant.Register(Scheme{}) }

// Scheme is the quant.Scheme of such experts.
type Scheme struct{}

const (
	method = "mxfp4"
	typ    = "mxfp4-blocks"

	blocksEnd = "_blocks"
	scalesEnd = "_scales"

	blockElements = 32
	blockBytes    = 16
)

// Name returns the quant_method of a config.json.
func (Scheme) Name() string { return method }

// Types lists what is read.
func (Scheme) Types() []quant.Type { return []quant.Type{{Name: typ, ReadOnly: true}} }

// Spec makes the spec of the one type, which has no parameters.
func (Scheme) Spec(asked string, _ quant.Params) (quant.Spec, error) {
	if asked != typ {
		return quant.Spec{}, fmt.Errorf("%w %q", quant.ErrUnknown, asked)
	}
	return quant.Spec{Type: typ}, nil
}

// Find returns the stacks of experts among the tensors. Where config.json does not have the scheme, only what looks
// like it in every way is one.
func (Scheme) Find(ctx context.Context, s quant.Stored) ([]quant.Decoder, error) {
	declared := declares(quant.Quantization(s.Config()))
	return quant.FindEach(ctx, s, func(t tensor.Info) (quant.Decoder, error) { return find(s, t, declared) })
}

// declares reports whether a quantization_config has the scheme.
func declares(config []byte) bool {
	var c struct {
		Method string `json:"quant_method"`
	}
	return json.Unmarshal(config, &c) == nil && c.Method == method
}

func find(s quant.Stored, t tensor.Info, declared bool) (quant.Decoder, error) {
	fail := func(format string, args ...any) (quant.Decoder, error) {
		if !declared {
			return nil, nil
		}
		return nil, fmt.Errorf("%w: %s", quant.ErrMalformed, fmt.Sprintf(format, args...))
	}
	if name, ok := strings.CutSuffix(t.Name, scalesEnd); ok {
		if _, ok := s.Lookup(name + blocksEnd); !ok {
			return fail("%s is missing", tensor.Quote(name+blocksEnd))
		}
	}
	name, ok := strings.CutSuffix(t.Name, blocksEnd)
	if !ok {
		return nil, nil
	}
	scales, ok := s.Lookup(name + scalesEnd)
	if !ok {
		return fail("%s is missing", tensor.Quote(name+scalesEnd))
	}
	if t.DType != tensor.U8 || len(t.Shape) != 4 || t.Shape[3] != blockBytes || slices.Min(t.Shape) < 1 {
		return fail("it is %v %v, expected U8 of four dimensions, the last of %d", t.DType, t.Shape, blockBytes)
	}
	if scales.DType != tensor.U8 || !slices.Equal(scales.Shape, t.Shape[:3]) {
		return fail("%s is %v %v, expected U8 %v", tensor.Quote(scales.Name), scales.DType, scales.Shape, t.Shape[:3])
	}
	if t.Shape[2] > math.MaxInt64/blockElements {
		return fail("its shape is %v", t.Shape)
	}
	dtype := s.DType()
	if !dtype.Float() {
		dtype = tensor.BF16
	}
	shape := tensor.Shape{t.Shape[0], t.Shape[2] * blockElements, t.Shape[1]}
	d := &decoder{parts: []string{t.Name, scales.Name}, rows: t.Shape[1], blocks: t.Shape[2],
		info: tensor.Info{Name: name, DType: dtype, Shape: shape}}
	if _, err := (tensor.Info{DType: tensor.F32, Shape: d.info.Shape}).Size(); err != nil {
		return fail("%v", err)
	}
	return d, nil
}

// Encoder refuses: the type is read only.
func (Scheme) Encoder(_ context.Context, s quant.Spec, _ tensor.Info) (quant.Encoder, error) {
	return nil, fmt.Errorf("%w to %s: the type is read only", quant.ErrUnsupported, s.Type)
}

// Config returns the member that transformers writes.
func (Scheme) Config(_ []quant.Assigned, skip []string) (key string, object []byte, err error) {
	object, err = json.Marshal(map[string]any{"quant_method": method, "modules_to_not_convert": skip},
		json.Deterministic(true), json.FormatNilSliceAsNull(true))
	return "quantization_config", object, err
}

// Declaration knows its own quantization_config. It is about experts alone.
func (Scheme) Declaration(config []byte) (quant.Declaration, bool) {
	return quant.Declaration{Skips: func(string) bool { return true }}, declares(config)
}

// decoder reads a stack of experts.
type decoder struct {
	parts        []string
	info         tensor.Info // experts x (blocks*32) x rows
	rows, blocks int64
}

func (d *decoder) Info() tensor.Info { return d.info }
func (d *decoder) Spec() quant.Spec  { return quant.Spec{Type: typ} }
func (d *decoder) Parts() []string   { return d.parts }

// Unit is a block of all rows.
func (d *decoder) Unit() int64 { return blockElements * d.rows }

// Values is BF16, which has all values exactly.
func (d *decoder) Values() tensor.DType { return tensor.BF16 }

// each hands out the blocks [from, to) of all rows of an expert that the elements [lo, hi) are in.
func (d *decoder) each(lo, hi int64, use func(expert, from, to int64)) {
	for at := lo / d.Unit(); at < hi/d.Unit(); {
		expert, from := at/d.blocks, at%d.blocks
		n := min(d.blocks-from, hi/d.Unit()-at)
		use(expert, from, from+n)
		at += n
	}
}

// Inputs lists the codes and the scales of each expert, some blocks of every row.
func (d *decoder) Inputs(r []quant.Range, lo, hi int64) []quant.Range {
	d.each(lo, hi, func(expert, from, to int64) {
		for part, size := range partSizes {
			r = append(r, quant.Range{Part: part, Offset: (expert*d.rows*d.blocks + from) * size, Length: (to - from) * size,
				Stride: d.blocks * size, Count: d.rows})
		}
	})
	return r
}

// partSizes are how many bytes of each part a block has.
var partSizes = [...]int64{blockBytes, 1}

// strip is how many rows are turned round at a time, and wide how many blocks of them.
const (
	strip = 64
	wide  = 8
)

// scratch is what that takes.
type scratch struct {
	floats      [strip * wide * blockElements]float32
	by          [wide * blockElements / kernels.Group]float32
	lines, cols [2 * strip * wide * blockElements]byte
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

func (d *decoder) Decode(dst []byte, lo, hi int64, in [][]byte) (err error) {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	d.each(lo, hi, func(_, from, to int64) {
		n := to - from
		for at := int64(0); at < n; at += wide {
			blocks := min(wide, n-at)
			for first := int64(0); first < d.rows; first += strip {
				if e := s.turn(dst, d.rows, first, n, at, blocks, in); e != nil {
					err = e
				}
			}
			dst = dst[2*blocks*d.Unit():]
		}
		in = in[len(partSizes):]
	})
	return err
}

// turn decodes a strip of rows, from first on, of which in has n blocks: some of them, from at on. They become columns
// of dst.
func (s *scratch) turn(dst []byte, all, first, n, at, blocks int64, in [][]byte) error {
	rows, width := min(strip, all-first), blocks*blockElements
	for k := range rows {
		block := (first+k)*n + at
		for i, c := range in[1][block:][:blocks] {
			scale := minifloat.E8M0[c]
			s.by[2*i], s.by[2*i+1] = scale, scale
		}
		kernels.Nibbles(s.floats[k*width:][:width], in[0][block*blockBytes:][:blocks*blockBytes], &minifloat.E2M1,
			s.by[:2*blocks])
	}
	lines, cols := s.lines[:2*rows*width], s.cols[:2*rows*width]
	if err := tensor.FromFloats(lines, tensor.BF16, s.floats[:rows*width]); err != nil {
		return err
	}
	tensor.Transpose(cols, lines, int(rows), int(width), 2)
	for i := range width {
		copy(dst[2*(i*all+first):], cols[2*i*rows:][:2*rows])
	}
	return nil
}
