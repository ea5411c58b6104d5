// Package scaled has what quantised matrices have in common in which each block of elements shares a scale: which scale
// an element has, and the values of runs of codes.
package scaled

import "math"

// MostColumns bounds the rows of what is read, as a row is decoded at once. No layer that is known has a twentieth of
// it.
const MostColumns = 1 << 20

// Grid says where blocks are: in a matrix, or in each of a stack of them.
type Grid struct {
	Rows, Cols           int64 // of a matrix
	BlockRows, BlockCols int64 // of a block; the last ones of a matrix end early
}

// Whole is the grid of one block.
func Whole(rows, cols int64) Grid { return Grid{rows, cols, max(rows, 1), max(cols, 1)} }

// ByRow is the grid of blocks that are a part of a row.
func ByRow(rows, cols, size int64) Grid { return Grid{rows, cols, 1, size} }

// ScaleRows is how many rows of scales a matrix has.
func (g Grid) ScaleRows() int64 { return ceil(g.Rows, g.BlockRows) }

// ScaleCols is how many scales there are in a row of them.
func (g Grid) ScaleCols() int64 { return ceil(g.Cols, g.BlockCols) }

func ceil(a, b int64) int64 {
	n := a / b
	if a%b != 0 {
		n++
	}
	return n
}

// ScaleRow is the row of scales that a row of a stack has.
func (g Grid) ScaleRow(row int64) int64 {
	return row/g.Rows*g.ScaleRows() + row%g.Rows/g.BlockRows
}

// Scales says which scales the elements [lo, hi), whole rows, have: those from first up to last.
func (g Grid) Scales(lo, hi int64) (first, last int64) {
	if lo >= hi {
		return 0, 0
	}
	return g.ScaleRow(lo/g.Cols) * g.ScaleCols(), (g.ScaleRow(hi/g.Cols-1) + 1) * g.ScaleCols()
}

// Each hands out the elements [lo, hi), whole rows, in runs that have one scale: where each begins and ends, counted
// from lo, and the number of its scale, counted from the first that Scales says.
func (g Grid) Each(lo, hi int64, run func(from, to, scale int)) {
	if lo >= hi {
		return
	}
	first := g.ScaleRow(lo / g.Cols)
	at := 0
	for row := lo / g.Cols; row < hi/g.Cols; row++ {
		scale := int((g.ScaleRow(row) - first) * g.ScaleCols())
		for end := at + int(g.Cols); at < end; scale++ {
			to := min(at+int(g.BlockCols), end)
			run(at, to, scale)
			at = to
		}
	}
}

// Bytes puts the values of codes of 8 bits, times a scale, into dst.
func Bytes(dst []float32, codes []byte, values *[256]float32, scale float32) {
	codes = codes[:len(dst)]
	for i, c := range codes {
		dst[i] = values[c] * scale
	}
}

// Nibbles puts the values of codes of 4 bits, times a scale, into dst: two codes a byte, the first in its lower half.
func Nibbles(dst []float32, codes []byte, values *[16]float32, scale float32) {
	var scaled [16]float32
	for i, v := range values {
		scaled[i] = v * scale
	}
	n := len(dst) / 2
	codes = codes[:n]
	for i, c := range codes {
		pair := dst[2*i : 2*i+2 : 2*i+2]
		pair[0], pair[1] = scaled[c&15], scaled[c>>4]
	}
}

// infinity is the least magnitude that is not finite, as bits.
const infinity = 0x7f800000

// MaxAbs is the largest magnitude of x, and whether all of x is finite; what is not is left out.
func MaxAbs(x []float32) (largest float32, finite bool) {
	var most, bad uint32
	for _, v := range x {
		b := math.Float32bits(v) &^ (1 << 31)
		if b >= infinity {
			bad, b = 1, 0
		}
		most = max(most, b)
	}
	return math.Float32frombits(most), bad == 0
}

// Range is the least and the greatest of x and 0, and whether all of x is finite; what is not is left out.
func Range(x []float32) (lo, hi float32, finite bool) {
	finite = true
	for _, v := range x {
		if v-v != 0 {
			finite = false
			continue
		}
		lo, hi = min(lo, v), max(hi, v)
	}
	return lo, hi, finite
}

// NonFinite is the index of the first of x that is a NaN or an infinity, or -1.
func NonFinite(x []float32) int {
	for i, v := range x {
		if v-v != 0 {
			return i
		}
	}
	return -1
}
