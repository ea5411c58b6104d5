package pipeline

import (
	"encoding/binary"
	"math"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// scratch is the memory that one worker works in. Its slices grow to what the
// largest tile needs and are used again for every other.
type scratch struct {
	raw, strip, values, cast, out []byte
	carry                         []float32
	merge                         mergeBuffers
	ranges                        []quant.Range
	views                         [][]byte
	compute                       chan struct{} // holds a token for each thread that computes
}

// begin waits until this worker may compute, and end lets another.
func (s *scratch) begin() { s.compute <- struct{}{} }
func (s *scratch) end()   { <-s.compute }

// sized returns (*b)[:n], with new memory only where b is too small.
func sized(b *[]byte, n int64) []byte {
	if int64(cap(*b)) < n {
		*b = make([]byte, n)
	}
	return (*b)[:n]
}

// read returns the elements [lo, hi) of a weight, in the model's own
// orientation (or the other, with flip) and in w.Values. The result is valid
// until s is used again.
func (w *Weight) read(s *scratch, lo, hi int64, flip bool) ([]byte, error) {
	if w.Transposed != flip {
		return w.readTransposed(s, lo, hi)
	}
	return w.readStored(s, &s.values, lo, hi)
}

// readStored returns the elements [lo, hi) as they lie in the file, decoded.
func (w *Weight) readStored(s *scratch, values *[]byte, lo, hi int64) ([]byte, error) {
	if w.Decoder == nil {
		bits := w.Values.Bits()
		b := sized(values, (hi-lo)*bits/8)
		return b, readPart(&w.Parts[0], b, lo*bits/8)
	}
	// A decoder starts at whole units: decode some more, return a part.
	unit, n, width := w.Decoder.Unit(), w.Count(), w.Values.Bits()/8
	first, last := lo-lo%unit, min(hi+(unit-hi%unit)%unit, n)
	s.ranges = w.Decoder.Inputs(s.ranges[:0], first, last)
	var total int64
	for _, r := range s.ranges {
		total += r.Length
	}
	raw := sized(&s.raw, total)
	s.views = s.views[:0]
	for _, r := range s.ranges {
		view := raw[:r.Length:r.Length]
		raw = raw[r.Length:]
		if err := readPart(&w.Parts[r.Part], view, r.Offset); err != nil {
			return nil, err
		}
		s.views = append(s.views, view)
	}
	b := sized(values, (last-first)*width)
	s.begin()
	err := w.Decoder.Decode(b, first, last, s.views)
	s.end()
	if err != nil {
		return nil, err
	}
	return b[(lo-first)*width : (hi-first)*width], nil
}

// readTransposed returns the elements [lo, hi) of the transpose of what lies in the
// file: a strip of columns, which become rows.
func (w *Weight) readTransposed(s *scratch, lo, hi int64) ([]byte, error) {
	stored, width := w.stored(), w.Values.Bits()/8
	rows, cols := stored[0], stored[1]
	c0, c1 := lo/rows, (hi+rows-1)/rows
	wide := c1 - c0

	var strip []byte
	if wide == cols {
		var err error
		if strip, err = w.readStored(s, &s.strip, 0, rows*cols); err != nil {
			return nil, err
		}
	} else {
		strip = sized(&s.strip, rows*wide*width)
		for r := range rows {
			piece, err := w.readStored(s, &s.cast, r*cols+c0, r*cols+c1)
			if err != nil {
				return nil, err
			}
			copy(strip[r*wide*width:], piece)
		}
	}
	b := sized(&s.values, rows*wide*width)
	s.begin()
	tensor.Transpose(b, strip, int(rows), int(wide), int(width))
	s.end()
	return b[(lo-c0*rows)*width : (hi-c0*rows)*width], nil
}

// numeric reports whether elements of a type are numbers that a reader reads.
func numeric(d tensor.DType) bool { return d.Float() || d == tensor.F64 }

// reader reads pieces of a weight as float64.
type reader struct {
	w     *Weight
	s     scratch
	bytes []byte
	out   []float64
}

func newReader(w *Weight) *reader {
	return &reader{w: w, s: scratch{compute: make(chan struct{}, 1)}}
}

// float64s returns the elements [lo, hi), valid until the next call.
func (r *reader) float64s(lo, hi int64) ([]float64, error) {
	values, err := r.w.read(&r.s, lo, hi, false)
	if err != nil {
		return nil, err
	}
	if int64(cap(r.out)) < hi-lo {
		r.out = make([]float64, hi-lo)
	}
	r.out = r.out[:hi-lo]
	if r.w.Values == tensor.F64 {
		for i := range r.out {
			r.out[i] = math.Float64frombits(binary.LittleEndian.Uint64(values[8*i:]))
		}
		return r.out, nil
	}
	b := values // the others go through float32, which holds them all
	if r.w.Values != tensor.F32 {
		b = sized(&r.bytes, 4*(hi-lo))
		if err := tensor.Convert(b, tensor.F32, values, r.w.Values); err != nil {
			return nil, err
		}
	}
	for i := range r.out {
		r.out[i] = float64(math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:])))
	}
	return r.out, nil
}
