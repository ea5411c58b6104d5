package kernels

import "sync"

// tiles multiplies matrices by assembly that keeps a tile of c, of tileRows rows and width columns, in registers for
// many steps of k.
//
// b is copied so that the assembly reads it in order: as panels of width columns, row after row, that stay in the
// second-level cache for all rows of a; the last panel has as many columns as whole vectors need, filled up with zeros.
// Of a, tiles of tileRows rows stay in the first-level cache for all panels; they are read where they lie, which is no
// slower than from a copy in order if their rows or their columns are contiguous.
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
)

type packed struct {
	a copied
	b [blockB]float32
}

// copied has a copy of a tile of a.
type copied [tileRows * depth]float32

var (
	packs  = sync.Pool{New: func() any { return new(packed) }}
	copies = sync.Pool{New: func() any { return new(copied) }}
)

// wide is the number of columns that a block has of a b of the given number of rows.
func (t *tiles) wide(rows int) int { return blockB / min(depth, rows) / t.width * t.width }

// mulAdd is Set.MulAdd. Each block of steps goes on from what c holds, so an element takes its products in order.
func (t *tiles) mulAdd(c, a, b Mat) {
	pack := packs.Get().(*packed)
	defer packs.Put(pack)
	wide := t.wide(b.Rows)
	for j := 0; j < b.Cols; j += wide {
		n := min(wide, b.Cols-j)
		for k := 0; k < b.Rows; k += depth {
			steps := min(depth, b.Rows-k)
			t.packB(pack.b[:], b.Slice(k, k+steps, j, j+n))
			t.mulBlock(c.Slice(0, c.Rows, j, j+n), a.Slice(0, a.Rows, k, k+steps), pack.b[:], &pack.a)
		}
	}
}

// mulBlock adds the product of a and a packed block of b. memory is for tiles that are not read where they lie.
func (t *tiles) mulBlock(c, a Mat, b []float32, memory *copied) {
	for i := 0; i < a.Rows; i += tileRows {
		rows := min(tileRows, a.Rows-i)
		tile := a.Slice(i, i+rows, 0, a.Cols)
		if a.RowStride != 1 && a.ColStride != 1 {
			tile = memory.of(tile)
		}
		t.mulTile(c.Slice(i, i+rows, 0, c.Cols), tile, b)
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

// of copies a tile, column after column.
func (x *copied) of(tile Mat) Mat {
	for k := range tile.Cols {
		for i := range tile.Rows {
			x[k*tileRows+i] = tile.at(i, k)
		}
	}
	return Mat{Data: x[:], Rows: tile.Rows, Cols: tile.Cols, RowStride: 1, ColStride: tileRows}
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
