package train

import (
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// projection is a linear layer as it is computed: y = W·x + b, with what an adapter does to it,
//
//	y = W·x + scale·B·(A·x) + b            LoRA
//	y = (m/n)·(W·x + scale·B·(A·x)) + b    DoRA: n are the norms of the rows of W + scale·B·A, constants
//
// W comes by tiles.
type projection struct {
	linear
	weight  source
	turned  bool       // weight has the rows of (in, out)
	whole   *trainable // the weight, where it is trained itself
	rows    *trainable // the rows indices of the weight that are trained
	indices []int

	bias      []float32  // or nil
	biasWhole *trainable // the bias, where it is trained itself
	biasAdded *trainable // added to it, times biasScale
	biasScale float32

	low   *lowRank
	norms []float32 // n of DoRA, of this step's factors
}

// application is a projection of some x, and what its backward pass needs.
type application struct {
	*projection
	x, u, z kernels.Mat // the input, scale·A·x, and of DoRA W·x + scale·B·(A·x)
}

// apply makes room for the application of a projection to so many tokens.
func (s *slab) apply(p *projection, tokens int) application {
	a := application{projection: p}
	if p.low != nil {
		a.u = s.mat(p.low.rank, tokens)
		if p.low.magnitude != nil {
			a.z = s.mat(p.out, tokens)
		}
	}
	return a
}

// forward sets y to the output for x, whose packed copy is px.
func (s *step) forward(a *application, y, x kernels.Mat, px *kernels.Panels) error {
	if err := s.down(a, x, px); err != nil {
		return err
	}
	if err := s.parts(y.Rows, 1, func(_ *worker, lo, hi int) { clearRows(y, lo, hi) }); err != nil {
		return err
	}
	var up *kernels.Panels
	var err error
	if a.low != nil {
		if up, err = s.pack(s.room.low, a.u); err != nil {
			return err
		}
	}
	finish := func(lo, hi int) { // what follows the product
		out := y.Slice(lo, hi, 0, y.Cols)
		if a.low != nil {
			b := a.low.b.matrix()
			up.MulAdd(out, b.Slice(lo, hi, 0, b.Cols))
			if a.low.magnitude != nil {
				copyMat(a.z.Slice(lo, hi, 0, y.Cols), out)
				a.scaleByMagnitude(out, lo)
			}
		}
		a.addBias(out, lo)
	}
	if a.turned {
		if err := s.mulTransposed(y, a.weight, x, a.in, a.out); err != nil {
			return err
		}
		return s.parts(y.Rows, 8, func(_ *worker, lo, hi int) { finish(lo, hi) })
	}
	return s.byRows(a.weight, a.out, a.in, func(_ *worker, tile kernels.Mat, lo int) {
		px.MulAdd(y.Slice(lo, lo+tile.Rows, 0, y.Cols), tile)
		finish(lo, lo+tile.Rows)
	})
}

// down computes the adapter's inner values, all that the backward pass needs of a forward one whose output nothing
// needs.
func (s *step) down(a *application, x kernels.Mat, px *kernels.Panels) error {
	a.x = x
	if a.low == nil {
		return nil
	}
	clearRows(a.u, 0, a.u.Rows)
	px.MulAdd(a.u, a.low.a.matrix())
	for i := range a.u.Rows {
		scale(row(a.u, i), a.low.scale)
	}
	return nil
}

// mulTransposed adds wᵀ·x to y, where w has rows x cols.
func (s *step) mulTransposed(y kernels.Mat, w source, x kernels.Mat, rows, cols int) error {
	var packed [2]*kernels.Panels
	pack := func(t, lo, hi int) {
		memory := s.room.shared.panels[t%2][:kernels.PanelsLen(hi-lo, x.Cols)]
		p := kernels.NewPanels(memory, x.Slice(lo, hi, 0, x.Cols))
		for i := range p.Blocks() {
			p.Pack(i)
		}
		packed[t%2] = p
	}
	return s.byTiles(&s.room.shared, w, rows, cols, pack,
		func(_ *worker, t int, tile kernels.Mat, _, part, parts int) {
			if first, last := share(cols, part, parts); first < last {
				packed[t%2].MulAdd(y.Slice(first, last, 0, y.Cols), tile.Slice(0, tile.Rows, first, last).T())
			}
		})
}

// share is the range of part among parts of n, of whole tiles of a product.
func share(n, part, parts int) (lo, hi int) {
	size := ((n+parts-1)/parts + 7) / 8 * 8
	return min(part*size, n), min((part+1)*size, n)
}

// backward adds to gx the gradient of x by that of y, and to the gradients of all that is trained. It overwrites gy.
func (s *step) backward(a *application, gx, gy kernels.Mat) error {
	if err := s.parts(a.out, 8, func(_ *worker, lo, hi int) { a.biasGradient(gy, lo, hi) }); err != nil {
		return err
	}
	if a.low != nil && a.low.magnitude != nil {
		err := s.parts(a.out, 8, func(_ *worker, lo, hi int) { a.magnitudeGradient(gy, lo, hi) })
		if err != nil {
			return err
		}
	}
	if err := s.weightGradient(a, gy); err != nil {
		return err
	}
	if a.turned {
		py, err := s.pack(s.room.wide, gy)
		if err != nil {
			return err
		}
		err = s.byRows(a.weight, a.in, a.out, func(_ *worker, tile kernels.Mat, lo int) {
			py.MulAdd(gx.Slice(lo, lo+tile.Rows, 0, gx.Cols), tile)
		})
		if err != nil {
			return err
		}
	} else if err := s.mulTransposed(gx, a.weight, gy, a.out, a.in); err != nil {
		return err
	}
	if a.low == nil {
		return nil
	}
	return s.lowRankGradient(a, gx, gy)
}

// lowRankGradient is the backward pass of scale·B·(A·x), by the gradient of its output.
func (s *step) lowRankGradient(a *application, gx, gy kernels.Mat) error {
	l := a.low
	wa, wb := l.a.matrix(), l.b.matrix()
	gu := kernels.MatOf(s.room.gu[:l.rank*gy.Cols], l.rank, gy.Cols)
	clearRows(gu, 0, gu.Rows)
	err := s.parts(gy.Cols, 64, func(_ *worker, lo, hi int) {
		kernels.MulAdd(gu.Slice(0, gu.Rows, lo, hi), wb.T(), gy.Slice(0, gy.Rows, lo, hi))
	})
	if err != nil {
		return err
	}
	for i := range gu.Rows {
		scale(row(gu, i), l.scale)
	}
	if err := s.addProduct(l.b.slope(), gy, a.u.T()); err != nil {
		return err
	}
	if err := s.addProduct(l.a.slope(), gu, a.x.T()); err != nil {
		return err
	}
	pu, err := s.pack(s.room.low, gu)
	if err != nil {
		return err
	}
	return s.parts(gx.Rows, 8, func(_ *worker, lo, hi int) {
		pu.MulAdd(gx.Slice(lo, hi, 0, gx.Cols), wa.Slice(0, wa.Rows, lo, hi).T())
	})
}

// addProduct adds x·y to a gradient, whose columns may lie apart. Each element takes its products in order, and goes on
// from what it was.
func (s *step) addProduct(c, x, y kernels.Mat) error {
	tall := c.Rows >= c.Cols
	n := c.Cols
	if tall {
		n = c.Rows
	}
	return s.parts(n, 64, func(w *worker, lo, hi int) {
		part, left, right := c, x, y
		if tall {
			part, left = c.Slice(lo, hi, 0, c.Cols), x.Slice(lo, hi, 0, x.Cols)
		} else {
			part, right = cols(c, lo, hi), cols(y, lo, hi)
		}
		if part.ColStride == 1 || part.Cols == 1 {
			part.ColStride = 1
			kernels.MulAdd(part, left, right)
			return
		}
		near := w.scratch(0, part.Rows, part.Cols)
		copyMat(near, part)
		kernels.MulAdd(near, left, right)
		copyMat(part, near)
	})
}

// weightGradient is that of a weight that is trained itself, or of rows of it.
func (s *step) weightGradient(a *application, gy kernels.Mat) error {
	switch {
	case a.whole != nil && a.conv:
		return s.addProduct(kernels.MatOf(a.whole.gradient, a.in, a.out), a.x, gy.T())
	case a.whole != nil:
		return s.addProduct(kernels.MatOf(a.whole.gradient, a.out, a.in), gy, a.x.T())
	}
	for k, i := range a.indices {
		out := kernels.MatOf(a.rows.gradient[k*a.in:(k+1)*a.in], 1, a.in)
		kernels.MulAdd(out, gy.Slice(i, i+1, 0, gy.Cols), a.x.T())
	}
	return nil
}

// addBias adds the bias to rows of the output from lo on.
func (p *projection) addBias(y kernels.Mat, lo int) {
	bias := p.bias
	if p.biasWhole != nil {
		bias = p.biasWhole.value
	}
	if bias == nil && p.biasAdded == nil {
		return
	}
	for i := range y.Rows {
		var b float32
		if bias != nil {
			b = bias[lo+i]
		}
		if p.biasAdded != nil {
			b += float32(p.biasScale * p.biasAdded.value[lo+i])
		}
		out := row(y, i)
		for t := range out {
			out[t] += b
		}
	}
}

// biasGradient adds up the gradients of the outputs from lo to hi.
func (p *projection) biasGradient(gy kernels.Mat, lo, hi int) {
	if p.biasWhole == nil && p.biasAdded == nil {
		return
	}
	for i := lo; i < hi; i++ {
		if p.biasWhole != nil {
			g := &p.biasWhole.gradient[i]
			for _, v := range row(gy, i) {
				*g += v
			}
		}
		if p.biasAdded != nil {
			// The factor is taken out of the sum, which goes on over chunks of tokens.
			g := &p.biasAdded.gradient[i]
			for _, v := range row(gy, i) {
				*g += float32(p.biasScale * v)
			}
		}
	}
}

// scaleByMagnitude multiplies rows of the output from lo on by m/n.
func (p *projection) scaleByMagnitude(y kernels.Mat, lo int) {
	for i := range y.Rows {
		scale(row(y, i), p.magnitudeOver(lo+i))
	}
}

// magnitudeOver is m/n of an output.
func (p *projection) magnitudeOver(i int) float32 { return p.low.magnitude.at(i, 0) / p.norms[i] }

// magnitudeGradient is that of m, and makes of the gradients of the outputs those of W·x + scale·B·(A·x).
func (a *application) magnitudeGradient(gy kernels.Mat, lo, hi int) {
	m := a.low.magnitude
	for i := lo; i < hi; i++ {
		g, z := row(gy, i), row(a.z, i)
		sum := &m.of.gradient[m.offset+i*m.rowStride]
		for t, v := range g {
			*sum += float32(v * z[t] / a.norms[i])
		}
		scale(g, a.magnitudeOver(i))
	}
}

// findNorms computes n of DoRA: the norms of the rows of W + scale·B·A, in float64.
func (s *step) findNorms(p *projection) error {
	if p.low == nil || p.low.magnitude == nil {
		return nil
	}
	a, b := p.low.a.matrix(), p.low.b.matrix()
	if !p.turned {
		return s.byRows(p.weight, p.out, p.in, func(w *worker, tile kernels.Mat, lo int) {
			w.addDelta(tile, p.low.scale, b.Slice(lo, lo+tile.Rows, 0, b.Cols), a)
			for i := range tile.Rows {
				p.norms[lo+i] = float32(math.Sqrt(kernels.SquaredNorm(row(tile, i))))
			}
		})
	}
	return s.columnNorms(p.norms, p.weight, p.in, p.low)
}

// columnNorms computes the norms of the columns of a matrix of so many rows with scale·(B·A)ᵀ added.
func (s *step) columnNorms(norms []float32, from source, rows int, low *lowRank) error {
	a, b := low.a.matrix(), low.b.matrix()
	sums := make([]float64, len(norms))
	err := s.byTiles(&s.room.shared, from, rows, len(norms), nothing,
		func(w *worker, _ int, tile kernels.Mat, lo, part, parts int) {
			first, last := share(len(norms), part, parts)
			if first == last {
				return
			}
			own := cols(tile, first, last)
			w.addDelta(own, low.scale, cols(a, lo, lo+tile.Rows).T(), b.Slice(first, last, 0, b.Cols).T())
			for i := range own.Rows {
				kernels.AddProducts(sums[first:last], row(own, i), row(own, i))
			}
		})
	for i, sum := range sums {
		norms[i] = float32(math.Sqrt(sum))
	}
	return err
}

// addDelta adds by·left·right to a part of a weight.
func (w *worker) addDelta(tile kernels.Mat, by float32, left, right kernels.Mat) {
	near := w.scratch(0, left.Rows, left.Cols)
	copyMat(near, left)
	for i := range near.Rows {
		scale(row(near, i), by)
	}
	kernels.MulAdd(tile, near, right)
}
