package tensor

import (
	"cmp"
	"encoding/binary"
	"iter"
	"slices"
)

// View says where elements of one tensor, the source, stand in another, the result: the element with the indices
// i0, i1, … below Dims[0].N, Dims[1].N, … is element From + i0*Dims[0].From + i1*Dims[1].From + … of the source and
// To + i0*Dims[0].To + i1*Dims[1].To + … of the result. Matrices that are turned round, rows in another order, parts of
// a stack and heads of which each is cut in two are views.
//
// Dims stand in the order of the result: what the dimensions behind one span there is no longer than its To. NewView
// puts them in this order.
type View struct {
	Dims     []Dim
	From, To int64
}

// Dim is a dimension of a View: how many elements it has, and how far apart they are in the source and in the result.
type Dim struct{ N, From, To int64 }

// NewView makes a view of dimensions in any order, with as few of them as it takes.
func NewView(dims []Dim, from, to int64) View {
	v := View{From: from, To: to}
	for _, d := range dims {
		if d.N != 1 {
			v.Dims = append(v.Dims, d)
		}
	}
	slices.SortStableFunc(v.Dims, func(a, b Dim) int { return cmp.Compare(b.To, a.To) })
	v.Dims = merged(v.Dims)
	return v
}

// merged joins neighbours that are one dimension on both sides.
func merged(dims []Dim) []Dim {
	n := 0
	for _, d := range dims {
		if last := n - 1; n > 0 && dims[last].From == d.N*d.From && dims[last].To == d.N*d.To {
			dims[last] = Dim{dims[last].N * d.N, d.From, d.To}
			continue
		}
		dims[n] = d
		n++
	}
	return dims[:n]
}

// Count is the number of elements.
func (v View) Count() int64 {
	n := int64(1)
	for _, d := range v.Dims {
		n *= d.N
	}
	return n
}

// Plain reports whether the elements follow one another in both tensors.
func (v View) Plain() bool {
	return len(v.Dims) == 0 || len(v.Dims) == 1 && v.Dims[0].From == 1 && v.Dims[0].To == 1
}

// Turned reports whether elements that follow one another in the result are far apart in the source, as in a matrix
// that is turned round.
func (v View) Turned() bool {
	last := len(v.Dims) - 1
	return last >= 0 && slices.ContainsFunc(v.Dims, func(d Dim) bool { return d.From < v.Dims[last].From })
}

// Inverse exchanges source and result.
func (v View) Inverse() View {
	dims := make([]Dim, len(v.Dims))
	for i, d := range v.Dims {
		dims[i] = Dim{d.N, d.To, d.From}
	}
	return NewView(dims, v.To, v.From)
}

// Elements returns where each element stands in the source and in the result, in the order of the result.
func (v View) Elements() iter.Seq2[int64, int64] {
	return func(yield func(from, to int64) bool) { v.elements(yield) }
}

func (v View) elements(yield func(from, to int64) bool) bool {
	if len(v.Dims) == 0 {
		return yield(v.From, v.To)
	}
	d := v.Dims[0]
	for i := range d.N {
		if !(View{v.Dims[1:], v.From + i*d.From, v.To + i*d.To}).elements(yield) {
			return false
		}
	}
	return true
}

// Moved is the view with its elements further on in the source and in the result.
func (v View) Moved(from, to int64) View {
	v.From += from
	v.To += to
	return v
}

// span is how far apart the first and the last element of dimensions are in the source, and one.
func span(dims []Dim) int64 {
	n := int64(1)
	for _, d := range dims {
		n += (d.N - 1) * d.From
	}
	return n
}

// within hands out the elements [lo, hi) of the result that the view has, as views of their own.
func (v View) within(lo, hi int64, use func(View) error) error {
	if len(v.Dims) == 0 {
		if v.To >= lo && v.To < hi {
			return use(v)
		}
		return nil
	}
	d, rest := v.Dims[0], v.Dims[1:]
	size := int64(1) // of the dimensions behind the first
	for _, r := range rest {
		size += (r.N - 1) * r.To
	}
	at := func(i int64) View { return View{rest, v.From + i*d.From, v.To + i*d.To} }
	// The first that ends behind lo, and the first that does not begin before hi.
	first := clamp(ceil(lo-v.To-size+1, d.To), d.N)
	end := clamp(ceil(hi-v.To, d.To), d.N)
	// Of those, the ones that are inside entirely.
	a := clamp(ceil(lo-v.To, d.To), d.N)
	b := clamp(floor(hi-v.To-size, d.To)+1, d.N)
	if a >= b {
		a, b = end, end
	}
	for i := first; i < a; i++ {
		if err := at(i).within(lo, hi, use); err != nil {
			return err
		}
	}
	if a < b {
		whole := at(a)
		if b-a > 1 {
			whole.Dims = append([]Dim{{b - a, d.From, d.To}}, rest...)
		}
		if err := use(whole); err != nil {
			return err
		}
	}
	for i := max(b, first); i < end; i++ {
		if err := at(i).within(lo, hi, use); err != nil {
			return err
		}
	}
	return nil
}

func clamp(i, n int64) int64 { return max(0, min(i, n)) }

// floor and ceil divide by a number above 0.
func floor(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}

func ceil(a, b int64) int64 { return -floor(-a, b) }

// Gather fills dst, which is the elements [lo, hi) of the result, of width bytes each, where the view has them. read
// returns n elements of the source from one on; it is asked for no more than atOnce, and for few that are not needed.
// What it returns is not kept. The order of the reads is that of the source but for the ends of the range.
func (v View) Gather(dst []byte, lo, hi, width, atOnce int64, read func(from, n int64) ([]byte, error)) error {
	return v.within(lo, hi, func(box View) error {
		dims := slices.Clone(box.Dims)
		slices.SortStableFunc(dims, func(a, b Dim) int { return cmp.Compare(b.From, a.From) })
		dims = merged(dims)
		return gather(dst, dims, box.From, box.To-lo, width, atOnce, read)
	})
}

// pieceBytes is about what one read more costs.
const pieceBytes = 1 << 10

// gather reads what dimensions, in the order of the source, span there: at once, or in a part for each element of the
// first where most of it would be for nothing.
func gather(dst []byte, dims []Dim, from, to, width, atOnce int64, read func(from, n int64) ([]byte, error)) error {
	n := span(dims)
	count, parts := int64(1), int64(1)
	for i, d := range dims {
		count *= d.N
		if i < len(dims)-1 || d.From > 1 {
			parts *= d.N
		}
	}
	if len(dims) > 0 && (n > atOnce || n > 2*count && (n-count)*width > parts*pieceBytes) {
		d := dims[0]
		step := int64(1) // of a dimension whose elements follow one another, as many as may be read
		if len(dims) == 1 && d.From == 1 {
			step = max(1, atOnce)
		}
		for i := int64(0); i < d.N; i += step {
			rest := dims[1:]
			if step > 1 {
				rest = []Dim{{min(step, d.N-i), d.From, d.To}}
			}
			if err := gather(dst, rest, from+i*d.From, to+i*d.To, width, atOnce, read); err != nil {
				return err
			}
		}
		return nil
	}
	src, err := read(from, n)
	if err != nil {
		return err
	}
	place(dst, src, dims, to, 0, width)
	return nil
}

// place copies elements: element at of src, and on by dims, to element to of dst and on.
func place(dst, src []byte, dims []Dim, to, at, width int64) {
	switch len(dims) {
	case 0:
		copy(dst[to*width:(to+1)*width], src[at*width:])
		return
	case 1:
	default:
		d := dims[0]
		for i := range d.N {
			place(dst, src, dims[1:], to+i*d.To, at+i*d.From, width)
		}
		return
	}
	d := dims[0]
	if d.From == 1 && d.To == 1 {
		copy(dst[to*width:(to+d.N)*width], src[at*width:])
		return
	}
	dst, src = dst[to*width:], src[at*width:]
	from, on := d.From*width, d.To*width
	switch width {
	case 2:
		for i := range d.N {
			binary.LittleEndian.PutUint16(dst[i*on:], binary.LittleEndian.Uint16(src[i*from:]))
		}
	case 4:
		for i := range d.N {
			binary.LittleEndian.PutUint32(dst[i*on:], binary.LittleEndian.Uint32(src[i*from:]))
		}
	default:
		for i := range d.N {
			copy(dst[i*on:i*on+width], src[i*from:])
		}
	}
}
