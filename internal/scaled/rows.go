package scaled

import (
	"math"
	"slices"

	"github.com/lorakit/lorakit/internal/kernels"
)

// Groups is how many of the kernels' groups a block has of a row, 0 where a row or a block is no whole number of them.
func (g Grid) Groups() int {
	size := min(g.BlockCols, g.Cols)
	if size%kernels.Group != 0 || g.Cols%kernels.Group != 0 {
		return 0
	}
	return int(size / kernels.Group)
}

// RowScale is the number of the first scale of the row that begins at an element, of those that [lo, …) has.
func (g Grid) RowScale(lo, at int64) int {
	return int((g.ScaleRow(at/g.Cols) - g.ScaleRow(lo/g.Cols)) * g.ScaleCols())
}

// Spread sets by, a number for each of the kernels' groups of a row, to those of its blocks. Blocks are whole Groups.
func (g Grid) Spread(by, scales []float32) {
	for k := 0; len(by) > 0; k++ {
		n := min(g.Groups(), len(by))
		for i := range by[:n] {
			by[i] = scales[k]
		}
		by = by[n:]
	}
}

// Ranges sets least and greatest to Range of the blocks of the rows in src. It reports false where these have no whole
// blocks, or not all is finite.
func (g Grid) Ranges(least, greatest []float32, src []byte, from kernels.Float) bool {
	const step = 32 // what the kernel takes multiples of
	if g.BlockRows != 1 || g.BlockCols%step != 0 || g.Cols%g.BlockCols != 0 {
		return false
	}
	if kernels.Extremes(least, greatest, src, from, int(g.BlockCols)) >= 0 {
		return false
	}
	for i := range least {
		least[i], greatest[i] = min(least[i], 0), max(greatest[i], 0)
	}
	return true
}

// Largest takes the magnitudes of a row into the largest of its blocks, but for what is not finite: of that it returns
// the first index, or -1. It has room for a number for each of the kernels' groups of the row.
func (g Grid) Largest(largest, x []float32, room []uint32) (bad int) {
	if each := g.Groups(); each > 0 {
		kernels.Magnitudes(room, x)
		if slices.Max(room) < infinity {
			for k := 0; len(room) > 0; k++ {
				n := min(each, len(room))
				largest[k] = max(largest[k], math.Float32frombits(slices.Max(room[:n])))
				room = room[n:]
			}
			return -1
		}
	}
	finite := true
	for k := 0; k*int(g.BlockCols) < len(x); k++ {
		from := k * int(g.BlockCols)
		m, good := MaxAbs(x[from:min(from+int(g.BlockCols), len(x))])
		largest[k] = max(largest[k], m)
		finite = finite && good
	}
	if finite {
		return -1
	}
	return NonFinite(x)
}
