package train

import (
	"slices"

	"github.com/lorakit/lorakit/internal/kernels"
)

// lookup is an embedding as it is computed: rows of a table, with what an adapter does to it,
//
//	y = E[id] + scale·(B·A)[:, id]               LoRA
//	y = (m/n)·(E[id] + scale·(B·A)[:, id])       DoRA: n are the norms of the columns of E + scale·(B·A)ᵀ, constants
type lookup struct {
	module  string
	rows    int // of the table
	width   int
	table   source
	whole   *trainable // the table, where it is trained itself
	some    *trainable // the rows indices of the table that are trained
	indices []int
	low     *lowRank
	norms   []float32
	padding int     // a row that gets no gradient, or -1
	factor  float32 // of what is looked up
}

// forwardLookup adds the rows of ids to y, a column each.
func (s *step) forwardLookup(l *lookup, y kernels.Mat, ids []int) error {
	return s.each(len(ids), func(w *worker, t int) error {
		v := w.scratch(0, 1, l.width).Data
		if err := l.table.read(w, v, l.width, ids[t], ids[t]+1); err != nil {
			return err
		}
		if l.low != nil {
			l.addColumn(w, v, ids[t])
		}
		for i, x := range v {
			if l.low != nil && l.low.magnitude != nil {
				x *= l.magnitudeOver(i)
			}
			row(y, i)[t] += x * l.factor
		}
		return nil
	})
}

// addColumn adds a column of scale·B·A to a row of the table.
func (l *lookup) addColumn(w *worker, v []float32, id int) {
	b, inner := l.low.b.matrix(), w.scratch(1, l.low.rank, 1)
	for k := range inner.Rows {
		inner.Data[k] = l.low.scale * l.low.a.at(k, id)
	}
	kernels.MulAdd(kernels.Mat{Data: v, Rows: l.width, Cols: 1, RowStride: 1, ColStride: 1}, b, inner)
}

func (l *lookup) magnitudeOver(i int) float32 { return l.low.magnitude.at(i, 0) / l.norms[i] }

// backwardLookup adds to the gradients of what is trained, by the gradient of y, which it multiplies by
// the factor.
func (s *step) backwardLookup(l *lookup, gy kernels.Mat, ids []int) error {
	if l.whole == nil && l.some == nil && l.low == nil {
		return nil
	}
	s.slab.reset()
	if l.factor != 1 {
		for i := range gy.Rows {
			scale(row(gy, i), l.factor)
		}
	}
	if l.low != nil {
		gz := gy
		if l.low.magnitude != nil {
			var err error
			if gz, err = s.lookupMagnitude(l, gy, ids); err != nil {
				return err
			}
		}
		s.lookupLowRank(l, gz, ids)
	}
	return s.parts(l.width, 64, func(_ *worker, lo, hi int) {
		for t, id := range ids {
			if id == l.padding {
				continue
			}
			if l.whole != nil {
				addColumn(l.whole.gradient[id*l.width:], gy, t, lo, hi)
			}
			if k := slices.Index(l.indices, id); k >= 0 {
				addColumn(l.some.gradient[k*l.width:], gy, t, lo, hi)
			}
		}
	})
}

// addColumn adds the elements from lo to hi of a column to those of sum.
func addColumn(sum []float32, m kernels.Mat, column, lo, hi int) {
	for i := lo; i < hi; i++ {
		sum[i] += row(m, i)[column]
	}
}

// lookupLowRank adds to the gradients of A and B.
func (s *step) lookupLowRank(l *lookup, gy kernels.Mat, ids []int) {
	a, b := l.low.a, l.low.b
	inner, g := s.slab.mat(l.low.rank, len(ids)), s.slab.mat(l.low.rank, len(ids))
	for k := range inner.Rows { // scale·A's columns
		for t, id := range ids {
			row(inner, k)[t] = l.low.scale * a.at(k, id)
		}
	}
	clearRows(g, 0, g.Rows)
	kernels.MulAdd(g, b.matrix().T(), gy)
	slope := b.slope()
	near := s.slab.mat(b.rows, b.cols)
	copyMat(near, slope)
	kernels.MulAdd(near, gy, inner.T())
	copyMat(slope, near)
	to := a.slope()
	for k := range g.Rows {
		for t, id := range ids {
			if id != l.padding {
				to.Data[k*to.RowStride+id*to.ColStride] += float32(l.low.scale * row(g, k)[t])
			}
		}
	}
}

// lookupMagnitude adds to the gradient of m, and returns the gradient of what m/n multiplies.
func (s *step) lookupMagnitude(l *lookup, gy kernels.Mat, ids []int) (kernels.Mat, error) {
	z, gz := s.slab.mat(l.width, len(ids)), s.slab.mat(l.width, len(ids))
	plain := *l
	plain.factor, plain.low = 1, &lowRank{a: l.low.a, b: l.low.b, rank: l.low.rank, scale: l.low.scale}
	clearRows(z, 0, z.Rows)
	if err := s.forwardLookup(&plain, z, ids); err != nil {
		return gz, err
	}
	m := l.low.magnitude
	return gz, s.parts(l.width, 8, func(_ *worker, lo, hi int) {
		for i := lo; i < hi; i++ {
			var sum float64
			for t, v := range row(gy, i) {
				sum += float64(v) * float64(row(z, i)[t])
				row(gz, i)[t] = v * l.magnitudeOver(i)
			}
			m.of.gradient[m.offset+i*m.rowStride] += float32(sum / float64(l.norms[i]))
		}
	})
}

// lookupRoom takes what the backward pass of a lookup takes.
func (s *slab) lookupRoom(l *lookup, tokens int) {
	if l == nil || l.low == nil {
		return
	}
	s.reset()
	s.floats(2*l.low.rank*tokens + l.low.b.rows*l.low.b.cols)
	if l.low.magnitude != nil {
		s.floats(2 * l.width * tokens)
	}
}

// findLookupNorms computes n of DoRA: the norms of the columns of E + scale·(B·A)ᵀ, in float64.
func (s *step) findLookupNorms(l *lookup) error {
	if l.low == nil || l.low.magnitude == nil {
		return nil
	}
	return s.columnNorms(l.norms, l.table, l.rows, l.low)
}
