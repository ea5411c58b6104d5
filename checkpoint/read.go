package checkpoint

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// ReadPart fills p from a stored tensor, beginning at its byte off. A file that has become shorter since it was opened
// is an error that says so.
func ReadPart(t *formats.Tensor, p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > t.Bytes {
		return fmt.Errorf("bytes %d to %d asked for, it has %d", off, off+int64(len(p)), t.Bytes)
	}
	if err := formats.ReadFull(t.Data, p, t.Offset+off); err != nil {
		return fmt.Errorf("%s: %w", t.File, err)
	}
	return nil
}

// Reader reads pieces of weights. Its memory grows to what the largest piece needs and is used again for every other.
// It is for one goroutine at a time.
type Reader struct {
	strip, piece, values []byte
	tile, row            inputs
	band                 band
	compute              chan struct{}
	column               []float32
	cast                 []byte  // of a weight that is put together
	inner                *Reader // of what such a weight is put together of
}

// NewReader makes a Reader. While it computes it holds a token in compute, so that readers that share the channel
// compute no more at once than it has room; nil is no limit.
func NewReader(compute chan struct{}) *Reader { return &Reader{compute: compute} }

// Begin waits until this reader's goroutine may compute, and End lets another.
func (r *Reader) Begin() {
	if r.compute != nil {
		r.compute <- struct{}{}
	}
}

// End gives back what Begin took.
func (r *Reader) End() {
	if r.compute != nil {
		<-r.compute
	}
}

// Read returns the elements [lo, hi) of a weight, row-major in the model's own orientation (or, with flip, of a matrix
// in the other), in w.Values. The result is valid until r is used again.
func (r *Reader) Read(w *Weight, lo, hi int64, flip bool) ([]byte, error) {
	if w.Transposed != flip {
		return r.readTransposed(w, lo, hi)
	}
	return r.readStored(w, &r.values, lo, hi)
}

// readStored returns the elements [lo, hi) as they lie in the file, decoded.
func (r *Reader) readStored(w *Weight, values *[]byte, lo, hi int64) ([]byte, error) {
	if w.Decoder == nil {
		bits := w.Values.Bits()
		b := sized(values, (hi-lo)*bits/8)
		if c, ok := w.Parts[0].Data.(*composed); ok {
			if r.inner == nil {
				r.inner = NewReader(r.compute)
			}
			return b, c.read(r.inner, b, lo)
		}
		return b, ReadPart(&w.Parts[0], b, lo*bits/8)
	}
	// A decoder starts at whole units: decode some more, return a part.
	unit, n, width := w.Decoder.Unit(), w.Count(), w.Values.Bits()/8
	first, last := lo-lo%unit, min(hi+(unit-hi%unit)%unit, n)
	if err := r.readInputs(w, first, last); err != nil {
		return nil, err
	}
	b := sized(values, (last-first)*width)
	r.Begin()
	err := w.Decoder.Decode(b, first, last, r.tile.views)
	r.End()
	if err != nil {
		return nil, err
	}
	return b[(lo-first)*width : (hi-first)*width], nil
}

// readFloats fills rows of dst, which begin stride elements apart, with rows that lie one after the other in the file,
// of cols elements, the first at the element at.
func (r *Reader) readFloats(w *Weight, dst []float32, stride, at, rows, cols int64) error {
	switch d := w.Decoder; {
	case w.Values != tensor.F32:
	case d == nil:
		for k := range rows {
			err := tensor.FillFloats(dst[k*stride:][:cols], func(b []byte) error {
				return ReadPart(&w.Parts[0], b, 4*(at+k*cols))
			})
			if err != nil {
				return err
			}
		}
		return nil
	case at%d.Unit() == 0 && cols%d.Unit() == 0:
		return r.decodeFloats(w, dst, stride, at, rows, cols)
	}
	values, err := r.readStored(w, &r.values, at, at+rows*cols)
	if err != nil {
		return err
	}
	size := cols * w.Values.Bits() / 8
	r.Begin()
	defer r.End()
	for k := range rows {
		if err := tensor.ToFloats(dst[k*stride:][:cols], values[k*size:][:size], w.Values); err != nil {
			return err
		}
	}
	return nil
}

// decodeFloats is readFloats of a decoder that computes in float32, for rows of whole units: all bytes are read at
// once, and each row is decoded where it belongs.
func (r *Reader) decodeFloats(w *Weight, dst []float32, stride, at, rows, cols int64) error {
	if err := r.readInputs(w, at, at+rows*cols); err != nil {
		return err
	}
	r.Begin()
	defer r.End()
	for k := range rows {
		lo := at + k*cols
		if err := r.row.within(&r.tile, w.Decoder, lo, lo+cols); err != nil {
			return err
		}
		err := tensor.FillFloats(dst[k*stride:][:cols], func(b []byte) error {
			return w.Decoder.Decode(b, lo, lo+cols, r.row.views)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// readTransposed returns the elements [lo, hi) of the transpose of what lies in the file: a strip of columns, which
// become rows.
func (r *Reader) readTransposed(w *Weight, lo, hi int64) ([]byte, error) {
	stored, width := w.Stored(), w.Values.Bits()/8
	rows, cols := stored[0], stored[1]
	c0, c1 := lo/rows, (hi+rows-1)/rows
	wide := c1 - c0

	var strip []byte
	if wide == cols {
		var err error
		if strip, err = r.readStored(w, &r.strip, 0, rows*cols); err != nil {
			return nil, err
		}
	} else {
		strip = sized(&r.strip, rows*wide*width)
		for at, left := int64(0), strip; at < rows; {
			n := min(w.rowsAtOnce(), rows-at)
			piece, err := r.readStored(w, &r.piece, at*cols+c0, (at+n-1)*cols+c1)
			if err != nil {
				return nil, err
			}
			for k := range n {
				left = left[copy(left, piece[k*cols*width:][:wide*width]):]
			}
			at += n
		}
	}
	b := sized(&r.values, rows*wide*width)
	r.Begin()
	tensor.Transpose(b, strip, int(rows), int(wide), int(width))
	r.End()
	return b[(lo-c0*rows)*width : (hi-c0*rows)*width], nil
}

// rowsAtOnce is how many rows of the file are best read together where parts of them are wanted: several where a
// decoder works on no less than one, which it does faster than one by one.
func (w *Weight) rowsAtOnce() int64 {
	stored := w.Stored()
	if cols := stored[len(stored)-1]; w.Decoder != nil && w.Decoder.Unit() == cols {
		return max(1, (64<<10)/cols)
	}
	return 1
}

// sized returns (*b)[:n], with new memory only where b is too small.
func sized(b *[]byte, n int64) []byte {
	if int64(cap(*b)) < n {
		*b = make([]byte, n)
	}
	return (*b)[:n]
}

// ReaderMemory is the bytes of a Reader's buffers.
type ReaderMemory struct{ raw, band, strip, piece, values int64 }

// MemoryFor is what a Reader takes at most to read n elements of w at a time.
func MemoryFor(w *Weight, n int64, flip bool) ReaderMemory {
	n = min(n, w.Count())
	width := w.Values.Bits() / 8
	var m ReaderMemory
	m.values = n * width
	extra := int64(0) // a decoder's whole units around a piece
	if w.Decoder != nil {
		extra = 2 * w.Decoder.Unit()
	}
	if w.Transposed != flip {
		stored := w.Stored()
		m.values = (n + 2*stored[0]) * width // whole columns around it
		m.strip = m.values + extra*width
		m.piece = (n/max(stored[0], 1) + 2 + extra + (w.rowsAtOnce()-1)*stored[1]) * width
	}
	if c, ok := w.Parts[0].Data.(*composed); ok {
		m.raw = c.memory(n)
	}
	if d := w.Decoder; d != nil {
		m.values += extra * width
		n = min(n+extra, w.Count())
		m.raw += inputBytes(d, n)
		if b := w.Band(); b > 0 {
			m.band = inputBytes(d, max(b, n))
		}
	}
	return m
}

// Max is what a Reader takes for the larger of two reads.
func (m ReaderMemory) Max(o ReaderMemory) ReaderMemory {
	return ReaderMemory{
		max(m.raw, o.raw), max(m.band, o.band), max(m.strip, o.strip), max(m.piece, o.piece), max(m.values, o.values),
	}
}

// Total is the sum of all buffers.
func (m ReaderMemory) Total() int64 { return m.raw + m.band + m.strip + m.piece + m.values }

// float64Reader reads pieces of a weight as float64.
type float64Reader struct {
	w     *Weight
	r     Reader
	bytes []byte
	out   []float64
}

// read returns the elements [lo, hi), valid until the next call.
func (r *float64Reader) read(lo, hi int64) ([]float64, error) {
	values, err := r.r.Read(r.w, lo, hi, false)
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
