package fp8

import (
	"math"
	"sync"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/minifloat"
	"github.com/lorakit/lorakit/internal/scaled"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/rows"
	"github.com/lorakit/lorakit/tensor"
)

// The parts of a weight, in the order in which Parts and Outputs list them.
const (
	partCodes = iota
	partScale
)

// weight is a weight in the scheme.
type weight struct {
	spec
	info tensor.Info // the logical one
	grid scaled.Grid
}

// perByte is how many codes are in a byte.
func (w *weight) perByte() int64 {
	if w.pairs {
		return 2
	}
	return 1
}

func (w *weight) ranges(r []quant.Range, lo, hi int64) []quant.Range {
	if lo >= hi {
		return r
	}
	n := w.perByte()
	r = append(r, quant.Range{Part: partCodes, Offset: lo / n, Length: (hi - lo) / n})
	first, last := w.grid.Scales(lo, hi)
	size := w.scale.Bits() / 8
	return append(r, quant.Range{Part: partScale, Offset: first * size, Length: (last - first) * size})
}

// scratch is what a tile needs besides its values.
type scratch struct {
	values, scales, inverse []float32
	by                      []float32 // for each kernels.Group of a row
	most                    []uint32
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// decoder reads a weight.
type decoder struct {
	weight
	scaleName string
}

func (d *decoder) Info() tensor.Info { return d.info }
func (d *decoder) Spec() quant.Spec  { return d.public() }
func (d *decoder) Parts() []string   { return []string{d.info.Name, d.scaleName} }

// Unit is a row.
func (d *decoder) Unit() int64 { return d.grid.Cols }

// Values is F32: no rounding is part of the scheme.
func (d *decoder) Values() tensor.DType { return tensor.F32 }

func (d *decoder) Inputs(r []quant.Range, lo, hi int64) []quant.Range { return d.ranges(r, lo, hi) }

func (d *decoder) Decode(dst []byte, lo, hi int64, in [][]byte) error {
	if lo >= hi {
		return nil
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	scales := rows.Room(&s.scales, int64(len(in[partScale]))*8/d.scale.Bits())
	if d.scale.Float() {
		if err := tensor.ToFloats(scales, in[partScale], d.scale); err != nil {
			return err
		}
	} else {
		for i, c := range in[partScale] {
			scales[i] = minifloat.E8M0[c]
		}
	}
	row := rows.Room(&s.values, d.grid.Cols)
	codes, cols := in[partCodes], int(d.grid.Cols)
	var failed error
	d.grid.Each(lo, hi, func(from, to, k int) {
		at := from % cols
		if d.pairs {
			scaled.Nibbles(row[at:at+to-from], codes[from/2:], &minifloat.E2M1, scales[k])
		} else {
			scaled.Bytes(row[at:at+to-from], codes[from:], &minifloat.E4M3, scales[k])
		}
		if to%cols == 0 {
			if err := tensor.FromFloats(dst[4*(to-cols):4*to], tensor.F32, row); err != nil {
				failed = err
			}
		}
	})
	return failed
}

// encoder writes a weight as transformers rounds it, in F32.
type encoder struct {
	weight
	whole float32 // the factor of a tensor with one scale
	inv   float32 // and its scale
}

func (e *encoder) Outputs() []tensor.Info {
	codes := e.info
	codes.DType = tensor.F8E4M3
	return []tensor.Info{codes, e.scaleInfo(e.info.Name, e.info.Shape, e.grid)}
}

// Unit is the rows of a block; those of a stack of matrices that blocks do not divide are all rows of a matrix.
func (e *encoder) Unit() int64 {
	rows := e.block[0]
	switch {
	case rows == 0:
		rows = 1
	case len(e.info.Shape) > 2 && e.grid.Rows%rows != 0:
		rows = e.grid.Rows
	}
	return min(rows, e.grid.Rows) * e.grid.Cols
}

// Deferred is nothing.
func (e *encoder) Deferred(int64, int64) int64 { return 0 }

// Tiles leaves the scale of a whole tensor to Finish.
func (e *encoder) Tiles(r []quant.Range, lo, hi int64) []quant.Range {
	n := len(r)
	r = e.ranges(r, lo, hi)
	if e.block == [2]int64{} && lo < hi {
		r = r[:n+1]
	}
	return r
}

func (e *encoder) Encode(out [][]byte, _ []float32, lo, hi int64, src []byte) error {
	if lo >= hi {
		return nil
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	first, last := e.grid.Scales(lo, hi)
	factors := rows.Room(&s.scales, last-first)
	if e.block == [2]int64{} {
		factors[0] = e.whole
	} else if err := e.factors(s, factors, out[partScale], lo, src); err != nil {
		return err
	}
	at, codes := lo, out[partCodes]
	return rows.Each(&s.values, src, e.info.DType, e.grid.Cols, func(x []float32) error {
		row := factors[e.grid.RowScale(lo, at):]
		if e.grid.Groups() > 0 {
			by := rows.Room(&s.by, e.grid.Cols/kernels.Group)
			e.grid.Spread(by, row)
			kernels.Multiply(x, by)
		} else {
			e.grid.Each(at, at+e.grid.Cols, func(from, to, k int) {
				f := row[k]
				for i := range x[from:to] {
					x[from+i] *= f
				}
			})
		}
		kernels.EncodeE4M3(codes[:len(x)], x, minusZero)
		codes = codes[e.grid.Cols:]
		at += e.grid.Cols
		return nil
	})
}

// minusZero leaves a sum as it is.
var minusZero = float32(math.Copysign(0, -1))

// factors finds what the elements of each block are multiplied by, and writes the scales.
func (e *encoder) factors(s *scratch, factors []float32, out []byte, lo int64, src []byte) error {
	clear(factors)
	at := lo
	err := rows.Each(&s.values, src, e.info.DType, e.grid.Cols, func(x []float32) error {
		err := rows.Largest(&s.most, factors[e.grid.RowScale(lo, at):], e.grid, at, x, e.allowNonFinite)
		at += e.grid.Cols
		return err
	})
	if err != nil {
		return err
	}
	inverse := rows.Room(&s.inverse, int64(len(factors)))
	for i, m := range factors {
		factors[i], inverse[i] = e.factorOf(m)
	}
	return e.putScales(out, inverse)
}

// putScales writes scales as they are stored.
func (e *encoder) putScales(out []byte, scales []float32) error {
	if e.scale.Float() {
		return tensor.FromFloats(out, e.scale, scales)
	}
	for i, v := range scales {
		out[i] = byte(math.Float32bits(v) >> 23)
	}
	return nil
}

// factorOf is what the elements of a block are multiplied by whose largest magnitude is most, and the scale, which the
// codes are multiplied by.
func (e *encoder) factorOf(most float32) (factor, inverse float32) {
	factor = float32(minifloat.MaxE4M3 * (1 / most)) // rounded here, not in what follows
	if factor-factor != 0 {                          // nothing, or next to it
		factor = 1
	}
	inverse = 1 / factor
	if e.scale == tensor.F32 {
		return factor, inverse
	}
	if e.scale.Float() {
		var b [4]byte
		p, one := b[:e.scale.Bits()/8], []float32{inverse}
		if tensor.FromFloats(p, e.scale, one) == nil && tensor.ToFloats(one, p, e.scale) == nil && one[0] > 0 {
			inverse = one[0]
		}
		return 1 / inverse, inverse
	}
	// 2^ceil(log2 x), of a logarithm in F32.
	log := float32(math.Log2(float64(max(inverse, 0x1p-126))))
	inverse = float32(math.Ldexp(1, min(int(math.Ceil(float64(log))), 127)))
	return 1 / inverse, inverse
}

// Notices says of weights whose last blocks are smaller, as some of DeepSeek's are, who reads that: vLLM by its
// validate_fp8_block_shape; transformers has a scale for such a block, but dequantises by dividing the shape. It is the
// same for all weights of a shape.
func (e *encoder) Notices() []string {
	g := e.grid
	if e.block == [2]int64{} || g.Rows%g.BlockRows == 0 && g.Cols%g.BlockCols == 0 {
		return nil
	}
	return []string{"smaller blocks at the end, as " + blockOf(e.block) + " does not divide the shape: transformers " +
		"reads that on a GPU, and does not dequantise it; vLLM does on one GPU, of a weight that stands alone or is the " +
		"last of those that it joins"}
}

func (e *encoder) Finish(_ quant.Deferred, write func(part int, off int64, p []byte) error) error {
	if e.block != [2]int64{} {
		return nil
	}
	var b [4]byte
	p := b[:e.scale.Bits()/8]
	if err := e.putScales(p, []float32{e.inv}); err != nil {
		return err
	}
	return write(partScale, 0, p)
}

// measured is an encoder with one scale, which has to know the largest magnitude first.
type measured struct{ *encoder }

// Statistics is the largest magnitude.
func (m *measured) Statistics() int { return 1 }

func (m *measured) Measure(numbers []float32, lo, _ int64, src []byte) error {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	at := lo
	return rows.Each(&s.values, src, m.info.DType, m.grid.Cols, func(x []float32) error {
		err := rows.Largest(&s.most, numbers, m.grid, at, x, m.allowNonFinite)
		at += m.grid.Cols
		return err
	})
}

func (m *measured) Join(numbers, others []float32) { numbers[0] = max(numbers[0], others[0]) }

func (m *measured) Begin(numbers []float32) error {
	m.whole, m.inv = m.factorOf(numbers[0])
	return nil
}
