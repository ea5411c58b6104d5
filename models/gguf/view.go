package gguf

import (
	"fmt"
	"iter"

	"github.com/lorakit/lorakit/tensor"
)

// View is the elements of a tensor in another order, or some of them: element i0, i1, … of the result, row-major in
// Dims, is element Offset + i0*Strides[0] + i1*Strides[1] + … of the tensor. All that an architecture does to a weight
// but adding to it is one: heads that are permuted, matrices that are turned round, rows that are chosen, experts that
// are told apart. Read the other way it is its own inverse.
type View struct {
	Dims    []int64
	Strides []int64
	Offset  int64
}

// whole is all of a tensor as it is.
func whole(shape tensor.Shape) View {
	v := View{Dims: append([]int64{}, shape...), Strides: make([]int64, len(shape))}
	stride := int64(1)
	for i := len(shape) - 1; i >= 0; i-- {
		v.Strides[i] = stride
		stride *= shape[i]
	}
	return v
}

// Placed is the view as one of a result in which its elements begin at to.
func (v View) Placed(to int64) tensor.View {
	dims := make([]tensor.Dim, len(v.Dims))
	stride := int64(1)
	for i := len(v.Dims) - 1; i >= 0; i-- {
		dims[i] = tensor.Dim{N: v.Dims[i], From: v.Strides[i], To: stride}
		stride *= v.Dims[i]
	}
	return tensor.NewView(dims, v.Offset, to)
}

// cut parts dimension d into outer runs of inner elements each.
func (v View) cut(d int, outer, inner int64) View {
	v.Dims = append(append(append([]int64{}, v.Dims[:d]...), outer, inner), v.Dims[d+1:]...)
	v.Strides = append(append(append([]int64{}, v.Strides[:d]...), v.Strides[d]*inner, v.Strides[d]), v.Strides[d+1:]...)
	return v
}

// exchanged exchanges two dimensions.
func (v View) exchanged(a, b int) View {
	v.Dims, v.Strides = append([]int64{}, v.Dims...), append([]int64{}, v.Strides...)
	v.Dims[a], v.Dims[b] = v.Dims[b], v.Dims[a]
	v.Strides[a], v.Strides[b] = v.Strides[b], v.Strides[a]
	return v
}

// some keeps count elements of dimension d, from first on.
func (v View) some(d int, first, count int64) View {
	v.Dims = append([]int64{}, v.Dims...)
	v.Dims[d] = count
	v.Offset += first * v.Strides[d]
	return v
}

// without drops a dimension of one element.
func (v View) without(d int) View {
	v.Dims = append(append([]int64{}, v.Dims[:d]...), v.Dims[d+1:]...)
	v.Strides = append(append([]int64{}, v.Strides[:d]...), v.Strides[d+1:]...)
	return v
}

// Count is the number of elements.
func (v View) Count() int64 {
	n := int64(1)
	for _, d := range v.Dims {
		n *= d
	}
	return n
}

// merged is the same view with as few dimensions as it takes.
func (v View) merged() View {
	m := View{Offset: v.Offset}
	for i := len(v.Dims) - 1; i >= 0; i-- {
		switch {
		case v.Dims[i] == 1:
		case len(m.Dims) > 0 && v.Strides[i] == m.Dims[0]*m.Strides[0]:
			m.Dims[0] *= v.Dims[i]
		default:
			m.Dims, m.Strides = append([]int64{v.Dims[i]}, m.Dims...), append([]int64{v.Strides[i]}, m.Strides...)
		}
	}
	if len(m.Dims) == 0 {
		m.Dims, m.Strides = []int64{1}, []int64{1}
	}
	return m
}

// Plain reports whether the view is elements that follow one another in the tensor too, from Offset on.
func (v View) Plain() bool {
	m := v.merged()
	return len(m.Dims) == 1 && m.Strides[0] == 1
}

// Run is elements that follow one another in the result, and are Stride apart in the tensor.
type Run struct{ At, From, Count, Stride int64 } // the first in the result, the first in the tensor

// Runs returns the elements lo to hi of the result in order, as runs.
func (v View) Runs(lo, hi int64) iter.Seq[Run] {
	m := v.merged()
	last := len(m.Dims) - 1
	length, stride := m.Dims[last], m.Strides[last]
	return func(yield func(Run) bool) {
		if lo < 0 || hi > v.Count() || lo >= hi {
			return
		}
		index := make([]int64, last)
		from := m.Offset
		for i, rest := last-1, lo/length; i >= 0; i-- {
			index[i] = rest % m.Dims[i]
			rest /= m.Dims[i]
			from += index[i] * m.Strides[i]
		}
		for at, skip := lo, lo%length; at < hi; skip = 0 {
			n := min(length-skip, hi-at)
			if !yield(Run{at, from + skip*stride, n, stride}) {
				return
			}
			at += n
			for i := last - 1; i >= 0; i-- {
				from += m.Strides[i]
				if index[i]++; index[i] < m.Dims[i] {
					break
				}
				from -= m.Dims[i] * m.Strides[i]
				index[i] = 0
			}
		}
	}
}

// Extent is the range of the tensor's elements that the elements lo to hi of the result are among.
func (v View) Extent(lo, hi int64) (first, end int64) {
	if lo >= hi {
		return 0, 0
	}
	m := v.merged()
	first, end = m.Offset, m.Offset
	stride := m.Count()
	for i, d := range m.Dims {
		stride /= d
		// Dimensions above the first in which lo and hi-1 differ stand still; below it any index may occur.
		a, b := lo/stride%d, (hi-1)/stride%d
		first += a * m.Strides[i]
		end += b * m.Strides[i]
		if a != b {
			for j := i + 1; j < len(m.Dims); j++ {
				end += (m.Dims[j] - 1) * m.Strides[j]
			}
			break
		}
	}
	return first, end + 1
}

// beside returns the runs of a range in groups: several that are of one length and begin side by side in the tensor, as
// the columns of a matrix do, share its cache lines.
func (v View) beside(lo, hi int64) iter.Seq[[]Run] {
	return func(yield func([]Run) bool) {
		group := make([]Run, 0, 16)
		for r := range v.Runs(lo, hi) {
			n := len(group)
			if n > 0 && (n == cap(group) || r.Stride == 1 || r.Count != group[0].Count || r.From != group[0].From+int64(n)) {
				if !yield(group) {
					return
				}
				group = group[:0]
			}
			group = append(group, r)
		}
		if len(group) > 0 {
			yield(group)
		}
	}
}

// Gather puts the elements lo to hi of the result into dst, which they fill. src are the tensor's elements from base
// on, Extent of them at least.
func Gather[T any](v View, lo, hi int64, dst, src []T, base int64) {
	for group := range v.beside(lo, hi) {
		first := group[0]
		if first.Stride == 1 {
			copy(dst[first.At-lo:first.At-lo+first.Count], src[first.From-base:])
			continue
		}
		for i := range first.Count {
			from := src[first.From-base+i*first.Stride:]
			for k, r := range group {
				dst[r.At-lo+i] = from[k]
			}
		}
	}
}

// Scatter is the inverse of Gather: the elements lo to hi of the result, which are src, are put back where they come
// from. It leaves the other elements of dst alone.
func Scatter[T any](v View, lo, hi int64, dst, src []T, base int64) {
	for group := range v.beside(lo, hi) {
		first := group[0]
		if first.Stride == 1 {
			copy(dst[first.From-base:], src[first.At-lo:first.At-lo+first.Count])
			continue
		}
		for i := range first.Count {
			to := dst[first.From-base+i*first.Stride:]
			for k, r := range group {
				to[k] = src[r.At-lo+i]
			}
		}
	}
}

// Shift adds a number to each of x, as torch does with a tensor of type d: the sums of F16 are rounded to F16, those of
// all others to F32. The inverse is a shift by the opposite number, of F32.
func Shift(x []float32, by float32, d tensor.DType) error {
	for i := range x {
		x[i] += by
	}
	if d != tensor.F16 {
		return nil
	}
	half := make([]byte, 2*len(x))
	if err := tensor.FromFloats(half, d, x); err != nil {
		return fmt.Errorf("rounding to %v: %w", d, err)
	}
	return tensor.ToFloats(x, half, d)
}
