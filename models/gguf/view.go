package gguf

import "github.com/lorakit/lorakit/tensor"

// view is the elements of a tensor in another order, or some of them: element i0, i1, … of the result, row-major in
// Dims, is element Offset + i0*Strides[0] + i1*Strides[1] + … of the tensor. All that an architecture does to a weight
// but adding to it is one: heads that are permuted, matrices that are turned round, rows that are chosen, experts that
// are told apart.
type view struct {
	Dims    []int64
	Strides []int64
	Offset  int64
}

// whole is all of a tensor as it is.
func whole(shape tensor.Shape) view {
	v := view{Dims: append([]int64{}, shape...), Strides: make([]int64, len(shape))}
	stride := int64(1)
	for i := len(shape) - 1; i >= 0; i-- {
		v.Strides[i] = stride
		stride *= shape[i]
	}
	return v
}

// count is the number of elements.
func (v view) count() int64 {
	n := int64(1)
	for _, d := range v.Dims {
		n *= d
	}
	return n
}

// placed is the view as one of a result in which its elements begin at to.
func (v view) placed(to int64) tensor.View {
	dims := make([]tensor.Dim, len(v.Dims))
	stride := int64(1)
	for i := len(v.Dims) - 1; i >= 0; i-- {
		dims[i] = tensor.Dim{N: v.Dims[i], From: v.Strides[i], To: stride}
		stride *= v.Dims[i]
	}
	return tensor.NewView(dims, v.Offset, to)
}

// cut parts dimension d into outer runs of inner elements each.
func (v view) cut(d int, outer, inner int64) view {
	v.Dims = append(append(append([]int64{}, v.Dims[:d]...), outer, inner), v.Dims[d+1:]...)
	v.Strides = append(append(append([]int64{}, v.Strides[:d]...), v.Strides[d]*inner, v.Strides[d]), v.Strides[d+1:]...)
	return v
}

// exchanged exchanges two dimensions.
func (v view) exchanged(a, b int) view {
	v.Dims, v.Strides = append([]int64{}, v.Dims...), append([]int64{}, v.Strides...)
	v.Dims[a], v.Dims[b] = v.Dims[b], v.Dims[a]
	v.Strides[a], v.Strides[b] = v.Strides[b], v.Strides[a]
	return v
}

// some keeps count elements of dimension d, from first on.
func (v view) some(d int, first, count int64) view {
	v.Dims = append([]int64{}, v.Dims...)
	v.Dims[d] = count
	v.Offset += first * v.Strides[d]
	return v
}

// without drops a dimension of one element.
func (v view) without(d int) view {
	v.Dims = append(append([]int64{}, v.Dims[:d]...), v.Dims[d+1:]...)
	v.Strides = append(append([]int64{}, v.Strides[:d]...), v.Strides[d+1:]...)
	return v
}
