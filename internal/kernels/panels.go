package kernels

import (
	"fmt"

	"github.com/lorakit/lorakit/internal/kernels/race"
)

// Panels are a matrix b in the order in which products read it, for many products a·b.
//
// One goroutine or several pack the blocks. Then b is not looked at any more, and several goroutines may multiply at
// once.
type Panels struct {
	set  *Set
	data []float32
	b    Mat
}

// PanelsDepth is the number of rows at whose multiples a part of the panels begins.
const PanelsDepth = depth

// PanelsLen returns the number of elements that the Panels of a matrix of rows x cols take.
func PanelsLen(rows, cols int) int { return rows * upTo(cols, widest) }

// widest is the number of columns that the last panel's are filled up to, in the set that has the longest vectors.
const widest = 16

// upTo returns the least multiple of m that is not below n.
func upTo(n, m int) int { return (n + m - 1) / m * m }

// NewPanels returns Panels of b, which are still to be packed, in the memory of data: PanelsLen elements.
func NewPanels(data []float32, b Mat) *Panels { return active.NewPanels(data, b) }

// NewPanels is the function NewPanels by this set.
func (s *Set) NewPanels(data []float32, b Mat) *Panels {
	b.check()
	if len(data) != PanelsLen(b.Rows, b.Cols) {
		panic(fmt.Sprintf("kernels: %d elements for the panels of a matrix of %d x %d", len(data), b.Rows, b.Cols))
	}
	return &Panels{s, data, b}
}

// Blocks returns the number of blocks that are to be packed.
func (p *Panels) Blocks() int {
	if p.b.Rows == 0 || p.b.Cols == 0 {
		return 0
	}
	wide := p.wide()
	return (p.b.Rows + depth - 1) / depth * ((p.b.Cols + wide - 1) / wide)
}

// Pack packs block i. Several goroutines may pack, each other blocks.
func (p *Panels) Pack(i int) {
	if i < 0 || i >= p.Blocks() {
		panic(fmt.Sprintf("kernels: block %d of %d", i, p.Blocks()))
	}
	wide, down := p.wide(), (p.b.Rows+depth-1)/depth
	k, j := i%down*depth, i/down*wide
	b := p.b.Slice(k, min(k+depth, p.b.Rows), j, min(j+wide, p.b.Cols))
	out := p.block(k, j, b.Rows, b.Cols)
	if race.Enabled {
		b.each(race.ReadSlice[float32])
		race.WriteSlice(out)
	}
	if p.set.tiles != nil {
		p.set.tiles.packB(out, b)
		return
	}
	for r := range b.Rows {
		for l := range b.Cols {
			out[r*b.Cols+l] = b.at(r, l)
		}
	}
}

// wide is the number of columns of a block.
func (p *Panels) wide() int {
	if p.set.tiles == nil {
		return p.b.Cols
	}
	return p.set.tiles.wide(p.b.Rows)
}

// block returns the memory of the block of rows x cols that begins at row k and column j.
func (p *Panels) block(k, j, rows, cols int) []float32 {
	if t := p.set.tiles; t != nil {
		cols = upTo(cols, t.width/3)
	}
	return p.data[j*p.b.Rows+k*cols:][:rows*cols]
}

// MulAdd adds the product a·b to c, bit for bit as the function MulAdd does, with the same demands on c and a.
func (p *Panels) MulAdd(c, a Mat) { p.mulAdd(c, a, 0, p.b.Rows) }

// MulAddFrom adds to c the product of a and as many rows of b as a has columns: those from row k on. k is a multiple
// of PanelsDepth, and so is the number of rows, unless they are the last.
func (p *Panels) MulAddFrom(c, a Mat, k int) {
	end := k + a.Cols
	if k < 0 || k%depth != 0 || end < k || end > p.b.Rows || end%depth != 0 && end != p.b.Rows {
		panic(fmt.Sprintf("kernels: a product with rows %d to %d of panels of %d", k, end, p.b.Rows))
	}
	p.mulAdd(c, a, k, end)
}

// mulAdd multiplies a by the rows of b from k to before end.
func (p *Panels) mulAdd(c, a Mat, k, end int) {
	checkProduct(c, a, end-k, p.b.Cols)
	if c.Rows == 0 || c.Cols == 0 || a.Cols == 0 {
		return
	}
	if race.Enabled {
		a.each(race.ReadSlice[float32])
		race.ReadSlice(p.data)
		c.each(race.WriteSlice[float32])
	}
	t := p.set.tiles
	if t == nil {
		mulAdd(c, a, MatOf(p.data[k*c.Cols:end*c.Cols], end-k, c.Cols))
		return
	}
	memory := copies.Get().(*copied)
	defer copies.Put(memory)
	wide := p.wide()
	for j := 0; j < c.Cols; j += wide {
		n := min(wide, c.Cols-j)
		for l := k; l < end; l += depth {
			steps := min(depth, end-l)
			t.mulBlock(c.Slice(0, c.Rows, j, j+n), a.Slice(0, a.Rows, l-k, l-k+steps), p.block(l, j, steps, n), memory)
		}
	}
}
