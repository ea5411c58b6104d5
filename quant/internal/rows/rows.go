// Package rows goes through the rows of a weight for the schemes that give blocks of them a scale.
package rows

import (
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/scaled"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Room is *b with n elements, of any content. It is made anew only where it is too small, so that what a tile needs is
// allocated once.
func Room[T any](b *[]T, n int64) []T {
	if int64(cap(*b)) < n {
		*b = make([]T, n)
	}
	return (*b)[:n]
}

// Float is the kernels' name of a dtype that has one: F32, F16 or BF16.
func Float(d tensor.DType) kernels.Float {
	switch d {
	case tensor.F16:
		return kernels.F16
	case tensor.BF16:
		return kernels.BF16
	}
	return kernels.F32
}

// Each hands out the values of src, whole rows of cols elements, one row at a time. x is in room.
func Each(room *[]float32, src []byte, d tensor.DType, cols int64, use func(x []float32) error) error {
	row, size := Room(room, cols), int(cols*d.Bits()/8)
	for ; len(src) > 0; src = src[size:] {
		if err := tensor.ToFloats(row, src[:size], d); err != nil {
			return err
		}
		if err := use(row); err != nil {
			return err
		}
	}
	return nil
}

// Largest takes a row, which begins at element at of the weight, into the largest magnitudes of its blocks in a grid.
// What is not finite is left out, or a quant.NonFiniteError unless that is allowed.
func Largest(room *[]uint32, largest []float32, g scaled.Grid, at int64, x []float32, allowNonFinite bool) error {
	bad := g.Largest(largest, x, Room(room, g.Cols/kernels.Group))
	if bad >= 0 && !allowNonFinite {
		return &quant.NonFiniteError{Index: at + int64(bad), What: "NaN or infinity"}
	}
	return nil
}
