package train

import (
	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/kernels"
)

// source gives the rows of a matrix as they are used.
type source interface {
	// read fills the rows of dst, which lie stride floats apart, with those from lo to hi.
	read(w *worker, dst []float32, stride, lo, hi int) error
}

// decoded is a matrix of the file. It is decoded whenever it is needed.
type decoded struct{ *checkpoint.ParameterMatrix }

func (d decoded) read(w *worker, dst []float32, stride, lo, hi int) error {
	m := d.By(&w.reader)
	return m.ReadInto(dst, stride, lo, hi)
}

// held is a matrix that is trained itself, by rows.
type held struct {
	*trainable
	cols int
}

func (h held) read(_ *worker, dst []float32, stride, lo, hi int) error {
	for i := lo; i < hi; i++ {
		copy(dst[(i-lo)*stride:][:h.cols], h.value[i*h.cols:])
	}
	return nil
}

// patched is a matrix some of whose rows are others: those that the adapter trains.
type patched struct {
	source
	*adaptation
	cols int
}

func (p *patched) read(w *worker, dst []float32, stride, lo, hi int) error {
	if err := p.source.read(w, dst, stride, lo, hi); err != nil {
		return err
	}
	for k, i := range p.indices {
		if lo <= i && i < hi {
			copy(dst[(i-lo)*stride:][:p.cols], p.rows.value[k*p.cols:])
		}
	}
	return nil
}

// A tile of a weight is some rows of it, as many as a cache holds. tilePad keeps its rows apart, so that those of a
// width that is a power of two do not all fall into the same lines of a cache.
const (
	tileFloats   = 128 << 10 // for one thread
	sharedFloats = 512 << 10 // for all of them
	tilePad      = 16
)

// tileRows is how many rows of cols elements a tile of so many floats has.
func tileRows(floats, rows, cols int) int {
	return min(max(floats/(cols+tilePad)/8*8, 8), rows)
}

// rowTile reads some rows into the worker's own memory.
func (w *worker) rowTile(from source, cols, lo, hi int) (kernels.Mat, error) {
	stride := cols + tilePad
	if n := (hi - lo) * stride; len(w.tile) < n {
		w.tile = make([]float32, n)
	}
	tile := kernels.Mat{Data: w.tile[:(hi-lo)*stride], Rows: hi - lo, Cols: cols, RowStride: stride, ColStride: 1}
	return tile, from.read(w, tile.Data, stride, lo, hi)
}

// byRows hands the rows of a matrix to use in tiles, each to one worker, in any order.
func (c *crew) byRows(from source, rows, cols int, use func(w *worker, tile kernels.Mat, lo int)) error {
	size := tileRows(tileFloats, rows, cols)
	return c.each((rows+size-1)/size, func(w *worker, i int) error {
		lo := i * size
		tile, err := w.rowTile(from, cols, lo, min(lo+size, rows))
		if err != nil {
			return err
		}
		use(w, tile, lo)
		return nil
	})
}

// shared is what all workers use at once: a tile, and the one that is read meanwhile, with a packed part of what they
// are multiplied with.
type shared struct {
	tiles, panels [2][]float32
}

// byTiles hands the rows of a matrix to use in tiles, one after the other, each to all workers at once: part is the
// worker's, of parts. The next tile is read meanwhile, and ready called for it.
func (c *crew) byTiles(
	room *shared, from source, rows, cols int, ready func(t, lo, hi int),
	use func(w *worker, t int, tile kernels.Mat, lo, part, parts int),
) error {
	size := tileRows(sharedFloats, rows, cols)
	stride, n, parts := cols+tilePad, (rows+size-1)/size, len(c.workers)
	fill := func(w *worker, t, part int) error { // a part of the rows of a tile
		lo, hi := t*size, min((t+1)*size, rows)
		if part == parts-1 {
			ready(t, lo, hi)
		}
		each := (hi - lo + parts - 1) / parts
		first, last := min(lo+part*each, hi), min(lo+(part+1)*each, hi)
		if first == last {
			return nil
		}
		return from.read(w, room.tiles[t%2][(first-lo)*stride:], stride, first, last)
	}
	for t := -1; t < n; t++ {
		err := c.each(parts, func(w *worker, part int) error {
			if t+1 < n {
				if err := fill(w, t+1, part); err != nil {
					return err
				}
			}
			if t >= 0 {
				lo, hi := t*size, min((t+1)*size, rows)
				tile := kernels.Mat{Data: room.tiles[t%2], Rows: hi - lo, Cols: cols, RowStride: stride, ColStride: 1}
				use(w, t, tile, lo, part, parts)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// nothing is what is to be done for a tile where only its values count.
func nothing(_, _, _ int) {}
