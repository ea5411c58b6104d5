// Package columns reads what GPTQ and AWQ have in common: the matrix of a linear layer that is stored turned round,
// (in, out), in integers of a few bits, where some inputs of an output share a scale and a zero. A value is the integer
// less its zero, times the scale, rounded to the type of the scales.
package columns

import (
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/bitfield"
	"github.com/lorakit/lorakit/tensor"
)

// Decoder reads such a weight. It is a quant.Decoder, and what the Find of a Scheme makes.
type Decoder struct {
	weight tensor.Info
	scale  tensor.DType
	parts  []string
	Layout
}

// Layout says how a weight is stored. Its fields are known to the scheme.
type Layout struct {
	Spec    quant.Spec
	Out, In int64
	Bits    int64 // of an integer: 2, 3, 4 or 8
	// Down says that the codes of an output stand one after the other in the words of its column. Otherwise those of an
	// input do along its row, in 4 bits.
	Down bool
	// Interleaved says that the fields of a row stand in another order, of every eight 0, 2, 4, 6, 1, 3, 5, 7.
	Interleaved bool
	// Plus is added to each zero, modulo 2 to the power of Bits.
	Plus uint8
	// Groups of inputs have a scale and a zero for each output. Index names the tensor that says which group an input has;
	// where it is empty, GroupSize inputs that follow one another have one.
	Groups, GroupSize int64
	Index             string
}

// The parts of a weight.
const (
	partCodes  = iota
	partScales // (groups, out)
	partZeros  // I32: (groups, out) in Bits, along the rows
	partIndex  // I32 (in), the group of each input
)

// Info is the weight as the model has it, (out, in).
func (d *Decoder) Info() tensor.Info { return d.weight }

// Spec is how it is quantised.
func (d *Decoder) Spec() quant.Spec { return d.Layout.Spec }

// Parts names the stored tensors.
func (d *Decoder) Parts() []string { return d.parts }

// Unit is a row of the weight, which is a column of what is stored.
func (d *Decoder) Unit() int64 { return d.In }

// Values is the type of the scales, to which a product is rounded.
func (d *Decoder) Values() tensor.DType { return d.scale }

// Inputs are strips of columns.
func (d *Decoder) Inputs(r []quant.Range, lo, hi int64) []quant.Range {
	if lo >= hi {
		return r
	}
	o0, o1 := lo/d.In, (hi+d.In-1)/d.In
	if d.Down {
		r = append(r, quant.Range{Part: partCodes, Offset: 4 * o0, Length: 4 * (o1 - o0), Stride: 4 * d.Out,
			Count: bitfield.Words(d.In, d.Bits)})
	} else {
		r = append(r, d.fields(partCodes, o0, o1, d.In))
	}
	width := d.scale.Bits() / 8
	r = append(r, quant.Range{Part: partScales, Offset: width * o0, Length: width * (o1 - o0), Stride: width * d.Out,
		Count: d.Groups}, d.fields(partZeros, o0, o1, d.Groups))
	if d.Index != "" {
		r = append(r, quant.Range{Part: partIndex, Length: 4 * d.In})
	}
	return r
}

// fields are the bytes of the columns [o0, o1), whole eights of them, in rows of integers. Eight of them are Bits
// bytes.
func (d *Decoder) fields(part int, o0, o1, rows int64) quant.Range {
	row := 4 * bitfield.Words(d.Out, d.Bits)
	from, to := o0/8*d.Bits, min((o1+7)/8*d.Bits, row)
	return quant.Range{Part: part, Offset: from, Length: to - from, Stride: row, Count: rows}
}
