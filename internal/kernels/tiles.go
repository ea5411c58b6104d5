package kernels

import "sync"

// tiles multiplies matrices by assembly that keeps a tile of c, of tileRows rows and width columns, in registers for
// many steps of k.
//
// The operands are copied so that the assembly reads them in order: b as panels of width columns, row after row, that
// stay in the second-level cache for all rows of a; the last panel has as many columns as whole vectors need, filled
// up with zeros. a as tiles of tileRows rows, column after column, that stay in the first-level cache for all panels.
type tiles struct {
	width int // of three vectors
	full  multiplier
	edge  [3]multiplier // for 1, 2 and 3 vectors of which the last is not full
	// transpose sets the element (i, j) of dst to (j, i) of src, which has tileRows rows, for the first done of k
	// columns.
	transpose func(dst, src []float32, dstRow, srcRow, k int) (done int)
}

// multiplier adds the products of k steps to rows of c, from panels of b that lie one after the other and have cols
// columns in all.
type multiplier = func(c, a, b []float32, cRow, aRow, aCol, k, rows, cols int)

const (
	tileRows = 8
	// depth and blockB are the steps and the elements of a packed block of b, which has half of a second-level cache of 1
	// MiB.
	depth  = 256
	blockB = depth * 480
	// narrow is how many columns b may have for a tile of a not to be copied: it is read too few times to repay that.
	narrow = 192
)

type packed struct {
	a [tileRows * depth]float32
	b [blockB]float32
}

var packs = sync.Pool{New: func() any { return new(packed) }}

// mulAdd is Set.MulAdd. Each block of steps goes on from what c holds, so an element takes its products in order.
func (t *tiles) mulAdd(c, a, b Mat) {
	pack := packs.Get().(*packed)
	defer packs.Put(pack)
	wide := blockB / min(depth, a.Cols) / t.width * t.width
	for j := 0; j < b.Cols; j += wide {
		n := min(wide, b.Cols-j)
		for k := 0; k < a.Cols; k += depth {
			steps := min(depth, a.Cols-k)
			t.packB(pack.b[:], b.Slice(k, k+steps, j, j+n))
			for i := 0; i < a.Rows; i += tileRows {
				rows := min(tileRows, a.Rows-i)
				tile := a.Slice(i, i+rows, k, k+steps)
				if b.Cols > narrow || a.RowStride != 1 && a.ColStride != 1 {
					turn := t.packA(pack.a[:], tile)
					tile = Mat{Data: turn, Rows: rows, Cols: steps, RowStride: 1, ColStride: tileRows}
				}
				t.mulTile(c.Slice(i, i+rows, j, j+n), tile, pack.b[:])
			}
		}
	}
}

// mulTile adds the product of a tile of a and a packed block of b.
func (t *tiles) mulTile(c, a Mat, b []float32) {
	whole, vector := c.Cols/t.width*t.width, t.width/3
	if whole > 0 {
		t.full(c.Data, a.Data, b, c.RowStride, a.RowStride, a.ColStride, a.Cols, a.Rows, whole)
	}
	if rest := c.Cols - whole; rest > 0 {
		t.edge[(rest-1)/vector](c.Data[whole:], a.Data, b[a.Cols*whole:], c.RowStride, a.RowStride, a.ColStride, a.Cols,
			a.Rows, rest)
	}
}

// packA copies a tile, column after column, and returns the copy.
func (t *tiles) packA(dst []float32, a Mat) []float32 {
	dst = dst[:a.Cols*tileRows]
	switch {
	case a.Rows < tileRows:
		for k := range a.Cols {
			for i := range a.Rows {
				dst[k*tileRows+i] = a.at(i, k)
			}
		}
	case a.RowStride == 1:
		for k := range a.Cols {
			*(*[tileRows]float32)(dst[k*tileRows:]) = [tileRows]float32(a.Data[k*a.ColStride:])
		}
	default:
		t.turn(dst, a, tileRows)
	}
	return dst
}

// turn stores the transpose of tileRows rows by rows of the given stride.
func (t *tiles) turn(dst []float32, m Mat, stride int) {
	done := 0
	if m.ColStride == 1 {
		done = t.transpose(dst, m.Data, stride, m.RowStride, m.Cols)
	}
	for k := done; k < m.Cols; k++ {
		for i := range tileRows {
			dst[k*stride+i] = m.at(i, k)
		}
	}
}

// packB copies b into panels.
func (t *tiles) packB(dst []float32, b Mat) {
	whole, vector := b.Cols/t.width*t.width, t.width/3
	last := (b.Cols - whole + vector - 1) / vector * vector // the width of the last panel
	clear(dst[whole*b.Rows:][:last*b.Rows])
	if b.ColStride == 1 {
		for k := range b.Rows {
			row := b.Data[k*b.RowStride:][:b.Cols]
			for j := 0; j < whole; j += t.width {
				copy(dst[j*b.Rows+k*t.width:][:t.width], row[j:])
			}
			copy(dst[whole*b.Rows+k*last:][:last], row[whole:])
		}
		return
	}
	for j := 0; j < b.Cols; j += tileRows {
		panel, width := j/t.width*t.width, t.width
		if panel == whole {
			width = last
		}
		out := dst[panel*b.Rows+j-panel:]
		if j+tileRows <= b.Cols {
			t.turn(out, b.Slice(0, b.Rows, j, j+tileRows).T(), width)
			continue
		}
		for k := range b.Rows {
			for i := range b.Cols - j {
				out[k*width+i] = b.at(k, j+i)
			}
		}
	}
}
