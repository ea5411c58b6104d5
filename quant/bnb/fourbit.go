package bnb

import (
	"encoding/binary"
	"fmt"
	"math"
	"sync"

	"github.com/lorakit/lorakit/nf4"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// The parts of a 4-bit weight W, in the order in which Parts and Outputs list them.
const (
	partCodes        = iota // W: two indices a byte
	partAbsmax              // W.absmax: one F32, or with double quantisation one U8, a block
	partCode                // W.quant_map: the codebook
	partState               // W.quant_state.bitsandbytes__TYPE
	partNestedAbsmax        // W.nested_absmax: one F32 for 256 blocks; with double quantisation only
	partNestedCode          // W.nested_quant_map
)

// partInfos lists the stored tensors of a weight of n elements.
func partInfos(s spec, t tensor.Info, stateBytes int64) []tensor.Info {
	n := t.Count()
	blocks := ceilDiv(n, int64(s.BlockSize))
	absmax := tensor.F32
	if s.DoubleQuant {
		absmax = tensor.U8
	}
	infos := []tensor.Info{
		partCodes:  {Name: t.Name, DType: tensor.U8, Shape: tensor.Shape{ceilDiv(n, 2), 1}},
		partAbsmax: {Name: t.Name + ".absmax", DType: absmax, Shape: tensor.Shape{blocks}},
		partCode:   {Name: t.Name + ".quant_map", DType: tensor.F32, Shape: tensor.Shape{16}},
		partState:  {Name: t.Name + stateSuffix + s.Type, DType: tensor.U8, Shape: tensor.Shape{stateBytes}},
	}
	if s.DoubleQuant {
		infos = append(infos,
			tensor.Info{Name: t.Name + ".nested_absmax", DType: tensor.F32,
				Shape: tensor.Shape{ceilDiv(blocks, nf4.NestedBlockSize)}},
			tensor.Info{Name: t.Name + ".nested_quant_map", DType: tensor.F32, Shape: tensor.Shape{256}})
	}
	return infos
}

// fourBit decodes a 4-bit weight.
type fourBit struct {
	info   tensor.Info
	values tensor.DType
	spec   spec
	offset float32
	parts  []tensor.Info
}

func open4bit(name string, typ nf4.Type, s quant.Stored) (quant.Decoder, error) {
	st, err := readState(name, typ, s)
	if err != nil {
		return nil, err
	}
	dtype, err := tensor.ParseDType(st.DType)
	if err != nil || !dtype.Float() {
		return nil, fmt.Errorf("%w: the quant_state's dtype is %s, expected float32, float16 or bfloat16", quant.ErrMalformed,
			tensor.Quote(st.DType))
	}
	w := &fourBit{
		info:   tensor.Info{Name: name, DType: dtype, Shape: st.Shape},
		values: dtype,
		spec:   spec{Type: typ.String(), BlockSize: st.BlockSize, DoubleQuant: st.NestedOffset != nil},
	}
	if _, err := w.info.Size(); err != nil {
		return nil, fmt.Errorf("%w: the quant_state's %v", quant.ErrMalformed, err)
	}
	if w.spec.DoubleQuant {
		w.offset = float32(*st.NestedOffset)
	}
	key := name + stateSuffix + typ.String()
	stateInfo, _ := s.Lookup(key)
	w.parts = partInfos(w.spec, w.info, stateInfo.Count())
	for i, want := range w.parts {
		got, ok := s.Lookup(want.Name)
		if !ok {
			return nil, fmt.Errorf("%w: %s is missing", quant.ErrMalformed, tensor.Quote(want.Name))
		}
		wantBytes, err := want.Size()
		if err != nil {
			return nil, fmt.Errorf("%w: %v", quant.ErrMalformed, err)
		}
		gotBytes, err := got.Size()
		if err != nil {
			return nil, fmt.Errorf("%w: %v", quant.ErrMalformed, err)
		}
		// quant_storage only views the bytes of the codes as another type, whose width the count is then rounded to.
		ok = got.DType == want.DType && gotBytes == wantBytes
		if i == partCodes && !ok {
			width := got.DType.Bits() / 8
			ok = (got.DType.Float() || width == 1) && gotBytes == ceilDiv(wantBytes, width)*width
		}
		if !ok {
			return nil, fmt.Errorf("%w: %s is %v %v, expected %v %v for a weight of shape %v with block size %d",
				quant.ErrMalformed, tensor.Quote(want.Name), got.DType, got.Shape, want.DType, want.Shape, w.info.Shape,
				w.spec.BlockSize)
		}
	}
	return w, nil
}

func (w *fourBit) Info() tensor.Info { return w.info }
func (w *fourBit) Spec() quant.Spec  { return w.spec.public() }
func (w *fourBit) Unit() int64       { return int64(w.spec.BlockSize) }

// Values is the dtype of the quant_state, to which bitsandbytes rounds, or F32.
func (w *fourBit) Values() tensor.DType { return w.values }

// Exact decodes to code * absmax in float32, what bitsandbytes' 4-bit product on a CPU multiplies by.
func (w *fourBit) Exact() quant.Decoder {
	exact := *w
	exact.values = tensor.F32
	return &exact
}

func (w *fourBit) Parts() []string { return partNames(w.parts) }

func (w *fourBit) Inputs(r []quant.Range, lo, hi int64) []quant.Range {
	b0, b1 := w.blocks(lo, hi)
	r = append(r, codeRange(lo, hi))
	if !w.spec.DoubleQuant {
		return append(r, quant.Range{Part: partAbsmax, Offset: 4 * b0, Length: 4 * (b1 - b0)},
			quant.Range{Part: partCode, Length: 4 * 16})
	}
	n0, n1 := b0/nf4.NestedBlockSize, ceilDiv(b1, nf4.NestedBlockSize)
	return append(r,
		quant.Range{Part: partAbsmax, Offset: b0, Length: b1 - b0},
		quant.Range{Part: partCode, Length: 4 * 16},
		quant.Range{Part: partNestedAbsmax, Offset: 4 * n0, Length: 4 * (n1 - n0)},
		quant.Range{Part: partNestedCode, Length: 4 * 256})
}

func codeRange(lo, hi int64) quant.Range {
	return quant.Range{Part: partCodes, Offset: lo / 2, Length: ceilDiv(hi, 2) - lo/2}
}

func (w *fourBit) blocks(lo, hi int64) (int64, int64) {
	return lo / int64(w.spec.BlockSize), ceilDiv(hi, int64(w.spec.BlockSize))
}

func (w *fourBit) Decode(dst []byte, lo, hi int64, in [][]byte) error {
	b0, b1 := w.blocks(lo, hi)
	f := floats.Get().(*[]float32)
	defer floats.Put(f)
	buf := grow(f, 16+int(b1-b0)+256+int(ceilDiv(b1-b0, nf4.NestedBlockSize))+1)
	code, absmax, nested := (*[16]float32)(buf), buf[16:][:b1-b0], buf[16+b1-b0:]

	if !w.spec.DoubleQuant {
		getFloats(absmax, in[1])
	} else {
		nestedCode := (*[256]float32)(nested)
		getFloats(nestedCode[:], in[4])
		nested = nested[256:][:len(in[3])/4]
		getFloats(nested, in[3])
		// A tile may begin within a nested block: the first piece ends where that block does.
		q := in[1]
		first := min(len(q), int(nf4.NestedBlockSize-b0%nf4.NestedBlockSize))
		nf4.DequantizeAbsmax(absmax[:first], q[:first], nestedCode, nested[:1], w.offset)
		if first < len(q) {
			nf4.DequantizeAbsmax(absmax[first:], q[first:], nestedCode, nested[1:], w.offset)
		}
	}
	getFloats(code[:], in[2])
	if w.spec.Type == "fp4" && code[8] == 0 {
		code[8] = 0 // +0, also where the file has -0
	}
	nf4.Dequantize(dst, w.values, in[0], absmax, code, w.spec.BlockSize)
	return nil
}

// fourBitEncoder encodes to 4 bits.
type fourBitEncoder struct {
	typ   nf4.Type
	info  tensor.Info
	spec  spec
	parts []tensor.Info
}

func new4bitEncoder(s spec, t tensor.Info) (quant.Encoder, error) {
	typ, err := nf4.ParseType(s.Type)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", quant.ErrUnknown, err)
	}
	if err := nf4.CheckBlockSize(s.BlockSize); err != nil {
		return nil, fmt.Errorf("%w: %v", quant.ErrUnsupported, err)
	}
	return &fourBitEncoder{typ: typ, info: t, spec: s, parts: partInfos(s, t, int64(stateLen(s, t)))}, nil
}

func (e *fourBitEncoder) Outputs() []tensor.Info { return e.parts }
func (e *fourBitEncoder) Unit() int64            { return int64(e.spec.BlockSize) }

func (e *fourBitEncoder) Deferred(lo, hi int64) int64 {
	if !e.spec.DoubleQuant {
		return 0
	}
	return ceilDiv(hi-lo, int64(e.spec.BlockSize))
}

func (e *fourBitEncoder) Tiles(r []quant.Range, lo, hi int64) []quant.Range {
	r = append(r, codeRange(lo, hi))
	if e.spec.DoubleQuant {
		return r
	}
	b0, b1 := lo/int64(e.spec.BlockSize), ceilDiv(hi, int64(e.spec.BlockSize))
	return append(r, quant.Range{Part: partAbsmax, Offset: 4 * b0, Length: 4 * (b1 - b0)})
}

func (e *fourBitEncoder) Encode(out [][]byte, deferred []float32, lo, hi int64, src []byte) error {
	absmax := deferred
	if !e.spec.DoubleQuant {
		f := floats.Get().(*[]float32)
		defer floats.Put(f)
		absmax = grow(f, int(ceilDiv(hi-lo, int64(e.spec.BlockSize))))
	}
	if bad := e.typ.Quantize(out[0], absmax, src, e.info.DType, e.spec.BlockSize); bad >= 0 && !e.spec.AllowNonFinite {
		return &quant.NonFiniteError{Index: lo + int64(bad), What: "NaN or infinity"}
	}
	if !e.spec.DoubleQuant {
		putFloats(out[1], absmax)
	}
	return nil
}

// finishBlocks is how many absmax Finish holds at once: whole nested blocks.
const finishBlocks = 64 * nf4.NestedBlockSize

func (e *fourBitEncoder) Finish(c quant.Deferred, write func(part int, off int64, p []byte) error) error {
	var offset float32
	if e.spec.DoubleQuant {
		var err error
		if offset, err = e.finishNested(c, write); err != nil {
			return err
		}
	}
	var code [4 * 16]byte
	putFloats(code[:], e.typ.Code()[:])
	if err := write(partCode, 0, code[:]); err != nil {
		return err
	}
	st := appendState(nil, e.spec, e.info, offset)
	for int64(len(st)) < e.parts[partState].Shape[0] {
		st = append(st, ' ')
	}
	return write(partState, 0, st)
}

// finishNested quantises the absmax of the whole weight, which takes two passes over them: one for their mean, one for
// the codes.
func (e *fourBitEncoder) finishNested(c quant.Deferred, write func(part int, off int64, p []byte) error) (float32,
	error) {
	f := floats.Get().(*[]float32)
	defer floats.Put(f)
	blocks := e.parts[partAbsmax].Shape[0]
	buf := grow(f, int(min(blocks, finishBlocks))+finishBlocks/nf4.NestedBlockSize)
	absmax, nested := buf[:len(buf)-finishBlocks/nf4.NestedBlockSize], buf[len(buf)-finishBlocks/nf4.NestedBlockSize:]

	var mean nf4.Mean
	for b := int64(0); b < blocks; b += finishBlocks {
		a := absmax[:min(blocks-b, finishBlocks)]
		if err := c.ReadFloats(a, b); err != nil {
			return 0, err
		}
		mean.Add(a)
	}
	offset := mean.Float32()

	raw := make([]byte, len(absmax)+4*len(nested))
	q, nestedRaw := raw[:len(absmax)], raw[len(absmax):]
	for b := int64(0); b < blocks; b += finishBlocks {
		a := absmax[:min(blocks-b, finishBlocks)]
		if blocks > finishBlocks { // else they are there still
			if err := c.ReadFloats(a, b); err != nil {
				return 0, err
			}
		}
		n := nested[:ceilDiv(int64(len(a)), nf4.NestedBlockSize)]
		nf4.QuantizeAbsmax(q[:len(a)], n, a, offset)
		putFloats(nestedRaw, n)
		if err := write(partAbsmax, b, q[:len(a)]); err != nil {
			return 0, err
		}
		if err := write(partNestedAbsmax, b/nf4.NestedBlockSize*4, nestedRaw[:4*len(n)]); err != nil {
			return 0, err
		}
	}
	var code [4 * 256]byte
	putFloats(code[:], nf4.DynamicMap()[:])
	return offset, write(partNestedCode, 0, code[:])
}

// floats pools the absmax of a tile.
var floats = sync.Pool{New: func() any { return new([]float32) }}

func grow(f *[]float32, n int) []float32 {
	if cap(*f) < n {
		*f = make([]float32, n)
	}
	return (*f)[:n]
}

// getFloats reads len(dst) numbers, a copy of memory as a rule. Only lengths that differ could be an error.
func getFloats(dst []float32, src []byte) { _ = tensor.ToFloats(dst, src[:4*len(dst)], tensor.F32) }

func putFloats(dst []byte, src []float32) {
	for i, x := range src {
		binary.LittleEndian.PutUint32(dst[4*i:], math.Float32bits(x))
	}
}

func ceilDiv(a, b int64) int64 {
	q := a / b
	if a%b != 0 {
		q++
	}
	return q
}
