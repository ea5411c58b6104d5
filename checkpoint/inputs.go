package checkpoint

import (
	"fmt"
	"slices"

	"github.com/lorakit/lorakit/quant"
)

// inputs are the bytes that some elements of a quantised weight are decoded from.
type inputs struct {
	ranges []quant.Range
	raw    []byte
	views  [][]byte // of each range
}

// read reads those of the elements [lo, hi), whole units.
func (in *inputs) read(w *Weight, lo, hi int64) error {
	in.ranges = w.Decoder.Inputs(in.ranges[:0], lo, hi)
	raw := in.room()
	in.views = in.views[:0]
	for _, x := range in.ranges {
		n := x.Bytes()
		view := raw[:n:n]
		raw = raw[n:]
		part := &w.Parts[x.Part]
		if x.Scattered() && x.Stride == x.Length { // which is one piece after all
			x.Length, x.Count = n, 1
		}
		for k := range max(x.Count, 1) {
			if err := ReadPart(part, view[k*x.Length:][:x.Length], x.Offset+k*x.Stride); err != nil {
				return err
			}
		}
		in.views = append(in.views, view)
	}
	return nil
}

// room is memory for all ranges.
func (in *inputs) room() []byte {
	var total int64
	for _, x := range in.ranges {
		total += x.Bytes()
	}
	return sized(&in.raw, total)
}

// within finds those of the elements [lo, hi) in what has been read for more of them. What is scattered is copied, so
// that it stands together.
func (in *inputs) within(of *inputs, d quant.Decoder, lo, hi int64) error {
	in.ranges = d.Inputs(in.ranges[:0], lo, hi)
	raw := in.room()
	in.views = in.views[:0]
	first := of.run(in.ranges)
	if first < 0 {
		return fmt.Errorf("%w: elements %d to %d are decoded from other bytes than those around them",
			quant.ErrMalformed, lo, hi)
	}
	for i, x := range in.ranges {
		all, from := of.ranges[first+i], x.Offset-of.ranges[first+i].Offset
		view := of.views[first+i][from:]
		if x.Scattered() && x.Length < all.Length {
			view = raw[:x.Bytes()]
			raw = raw[x.Bytes():]
			for k := range x.Count {
				copy(view[k*x.Length:][:x.Length], of.views[first+i][k*all.Length+from:])
			}
		}
		in.views = append(in.views, view[:x.Bytes():x.Bytes()])
	}
	return nil
}

// run finds as many of the ranges in a row that hold all of others, and returns the first of them, or -1. Before and
// behind them stands a range of the part that all begin with: of a stack of matrices, those of other matrices.
func (in *inputs) run(others []quant.Range) int {
	begins := func(i int) bool { return i == len(in.ranges) || in.ranges[i].Part == in.ranges[0].Part }
	for first := range len(in.ranges) - len(others) + 1 {
		if begins(first) && begins(first+len(others)) && slices.EqualFunc(in.ranges[first:first+len(others)], others, holds) {
			return first
		}
	}
	return -1
}

// holds reports whether all bytes of x are among those of a range that was read.
func holds(all, x quant.Range) bool {
	if all.Part != x.Part || all.Scattered() != x.Scattered() || x.Scattered() && (all.Count != x.Count ||
		all.Stride != x.Stride) {
		return false
	}
	return x.Offset >= all.Offset && x.Offset-all.Offset <= all.Length-x.Length
}

// band are the inputs of the elements [lo, hi) of a weight whose ranges are scattered. A few columns are read hardly
// faster than many, so many are, and serve for the tiles that follow.
type band struct {
	inputs
	w      *Weight
	lo, hi int64 // what has been read of it
	n      int64 // its Band
}

// bandBytes is the least that a band has of stored bytes; of a weight with fewer than twice as many it has all.
const bandBytes = 4 << 20

// Band is how many elements a Reader reads at once of a weight whose bytes lie the other way round than its elements;
// one after the other they are best asked of one Reader. It is 0 for all other weights.
func (w *Weight) Band() int64 {
	if c, ok := w.Parts[0].Data.(*composed); ok && len(c.pieces) > 0 {
		return c.pieces[0].Weight.Band()
	}
	if w.Decoder == nil || w.Count() == 0 {
		return 0
	}
	unit := w.Decoder.Unit()
	scattered := false
	for _, x := range w.Decoder.Inputs(nil, 0, min(unit, w.Count())) {
		scattered = scattered || x.Scattered()
	}
	if !scattered {
		return 0
	}
	n := w.Count() / max(1, w.StoredBytes()/bandBytes)
	n = max(n-n%unit, min(unit, w.Count()))
	if s := w.Stored(); len(s) == 3 { // of a stack whole matrices, which are one piece each
		matrix := s[1] * s[2]
		if whole := (n + matrix - 1) / matrix * matrix; w.StoredBytes()/s[0] <= mostMatrixBytes {
			n = min(whole, w.Count())
		}
	}
	return n
}

// mostMatrixBytes is the most stored bytes of a matrix of a stack that is read as a whole.
const mostMatrixBytes = 4 * bandBytes

// BandBytes is about the memory that a Reader takes for a band.
func (w *Weight) BandBytes() int64 {
	return int64(float64(w.StoredBytes()) * float64(w.Band()) / float64(max(w.Count(), 1)))
}

// readInputs reads what the elements [lo, hi) of a quantised weight, whole units, are decoded from.
func (r *Reader) readInputs(w *Weight, lo, hi int64) error {
	b := &r.band
	if b.w != w {
		b.w, b.lo, b.hi, b.n = w, 0, 0, w.Band()
	}
	if b.n == 0 {
		return r.tile.read(w, lo, hi)
	}
	if lo < b.lo || hi > b.hi {
		end := max(hi, min(lo+b.n, w.Count()))
		b.lo, b.hi = 0, 0
		if err := b.read(w, lo, end); err != nil {
			return err
		}
		b.lo, b.hi = lo, end
	}
	return r.tile.within(&b.inputs, w.Decoder, lo, hi)
}

// inputBytes is what n elements are decoded from.
func inputBytes(d quant.Decoder, n int64) int64 {
	var total int64
	for _, x := range d.Inputs(nil, 0, n) {
		total += x.Bytes()
	}
	return total
}
