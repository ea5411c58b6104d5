package train

import (
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// attending is an attention as it is computed.
type attending struct {
	attention
	q, k, v, fused *projection
	out            *projection
	qNorm, kNorm   []*normal // one, or one a head
	turns          *turns
}

// attentionRun is one pass through an attention, and what its backward pass needs.
type attentionRun struct {
	*attending
	x                        kernels.Mat
	q, k, v                  kernels.Mat // as they meet, normalised and turned
	rawQ, rawK               kernels.Mat // before the norms
	joined                   kernels.Mat // q, k and v, one below the other
	mixed                    kernels.Mat // what the heads give
	qBy, kBy, vBy, fused, by application
	qNorm, kNorm             []normalised
	// gradients
	gq, gk, gv, gJoined kernels.Mat
	gMixed              kernels.Mat
	gHeadK, gHeadV      kernels.Mat // by query heads
}

// attend makes room for a pass.
func (s *slab) attend(a *attending, tokens int) *attentionRun {
	r := &attentionRun{attending: a}
	wide, narrow := a.heads*a.headDim, a.keyHeads*a.headDim
	r.joined = s.mat(wide+2*narrow, tokens)
	r.rawQ, r.rawK, r.v = split(r.joined, wide, narrow)
	r.q, r.k = r.rawQ, r.rawK
	if a.fused != nil {
		r.fused = s.apply(a.fused, tokens)
	} else {
		r.qBy, r.kBy, r.vBy = s.apply(a.q, tokens), s.apply(a.k, tokens), s.apply(a.v, tokens)
	}
	if a.qNorm != nil {
		r.q, r.qNorm = s.mat(wide, tokens), s.normaliseHeads(a.qNorm, wide, tokens)
		r.k, r.kNorm = s.mat(narrow, tokens), s.normaliseHeads(a.kNorm, narrow, tokens)
	}
	r.mixed = s.mat(wide, tokens)
	r.by = s.apply(a.out, tokens)
	return r
}

// attendBackward makes room for the backward pass.
func (s *slab) attendBackward(r *attentionRun, tokens int) {
	wide, narrow := r.heads*r.headDim, r.keyHeads*r.headDim
	r.gJoined = s.mat(wide+2*narrow, tokens)
	r.gq, r.gk, r.gv = split(r.gJoined, wide, narrow)
	r.gMixed = s.mat(wide, tokens)
	r.gHeadK, r.gHeadV = r.gk, r.gv
	if r.heads != r.keyHeads {
		r.gHeadK, r.gHeadV = s.mat(wide, tokens), s.mat(wide, tokens)
	}
}

// split are the parts of a matrix that has q, k and v one below the other.
func split(all kernels.Mat, wide, narrow int) (q, k, v kernels.Mat) {
	return rowsOf(all, 0, wide), rowsOf(all, wide, narrow), rowsOf(all, wide+narrow, narrow)
}

// rowsOf are n rows of a matrix, which without data has none.
func rowsOf(m kernels.Mat, first, n int) kernels.Mat {
	if m.Data == nil {
		return kernels.Mat{Rows: n, Cols: m.Cols, RowStride: m.RowStride, ColStride: 1}
	}
	return m.Slice(first, first+n, 0, m.Cols)
}

// forwardAttention sets y to the attention of x, whose rows are length tokens long. Without an output it computes what
// the backward pass needs.
func (s *step) forwardAttention(r *attentionRun, y, x kernels.Mat, length int, output bool) error {
	r.x = x
	px, err := s.pack(s.room.wide, x)
	if err != nil {
		return err
	}
	if r.attending.fused != nil {
		err = s.forward(&r.fused, r.joined, x, px)
	} else if err = s.forward(&r.qBy, r.rawQ, x, px); err == nil {
		if err = s.forward(&r.kBy, r.rawK, x, px); err == nil {
			err = s.forward(&r.vBy, r.v, x, px)
		}
	}
	if err == nil && r.attending.qNorm != nil {
		if err = eachNorm(r.qNorm, r.q, r.rawQ, s.forwardNorm); err == nil {
			err = eachNorm(r.kNorm, r.k, r.rawK, s.forwardNorm)
		}
	}
	if err == nil {
		err = s.rotate(r.q, r.turns, r.headDim, false)
	}
	if err == nil {
		err = s.rotate(r.k, r.turns, r.headDim, false)
	}
	if err == nil {
		err = s.eachHead(r, length, func(w *worker, h *headRun) { h.forward(w) })
	}
	if err != nil {
		return err
	}
	if px, err = s.pack(s.room.wide, r.mixed); err != nil {
		return err
	}
	return s.output(&r.by, y, r.mixed, px, output)
}

// normaliseHeads makes room for the norms of q or k.
func (s *slab) normaliseHeads(list []*normal, rows, tokens int) []normalised {
	runs := make([]normalised, len(list))
	for i, n := range list {
		runs[i] = s.normalise(n, rows/len(list), tokens)
	}
	return runs
}

// eachNorm calls do for each norm and its rows of two matrices.
func eachNorm(list []normalised, x, y kernels.Mat, do func(n *normalised, x, y kernels.Mat) error) error {
	rows := x.Rows / len(list)
	for i := range list {
		if err := do(&list[i], rowsOf(x, i*rows, rows), rowsOf(y, i*rows, rows)); err != nil {
			return err
		}
	}
	return nil
}

// output is the last product of a branch, which is left out where nothing needs it.
func (s *step) output(a *application, y, x kernels.Mat, px *kernels.Panels, needed bool) error {
	if needed || a.low != nil && a.low.magnitude != nil {
		return s.forward(a, y, x, px)
	}
	return s.down(a, x, px)
}

// backwardAttention adds to gx the gradient of x by that of the output, which it overwrites.
func (s *step) backwardAttention(r *attentionRun, gx, gy kernels.Mat, length int) error {
	clearRows(r.gJoined, 0, r.gJoined.Rows)
	clearRows(r.gMixed, 0, r.gMixed.Rows)
	err := s.backward(&r.by, r.gMixed, gy)
	if err == nil {
		err = s.eachHead(r, length, func(w *worker, h *headRun) { h.backward(w) })
	}
	if err == nil && r.heads != r.keyHeads {
		err = s.parts(r.gk.Rows, 1, func(_ *worker, lo, hi int) { r.sumOverHeads(lo, hi) })
	}
	if err == nil {
		err = s.rotate(r.gq, r.turns, r.headDim, true)
	}
	if err == nil {
		err = s.rotate(r.gk, r.turns, r.headDim, true)
	}
	if err == nil && r.attending.qNorm != nil {
		// What came of the norms is not needed any more.
		clearRows(r.q, 0, r.q.Rows)
		clearRows(r.k, 0, r.k.Rows)
		if err = eachNorm(r.qNorm, r.q, r.gq, s.backwardNorm); err == nil {
			err = eachNorm(r.kNorm, r.k, r.gk, s.backwardNorm)
		}
		copyMat(r.gq, r.q)
		copyMat(r.gk, r.k)
	}
	if err != nil {
		return err
	}
	if r.attending.fused != nil {
		return s.backward(&r.fused, gx, r.gJoined)
	}
	if err = s.backward(&r.qBy, gx, r.gq); err == nil {
		if err = s.backward(&r.kBy, gx, r.gk); err == nil {
			err = s.backward(&r.vBy, gx, r.gv)
		}
	}
	return err
}

// sumOverHeads adds up the gradients of keys and values over the query heads that share them.
func (r *attentionRun) sumOverHeads(lo, hi int) {
	group := r.heads / r.keyHeads
	for i := lo; i < hi; i++ {
		head, d := i/r.headDim, i%r.headDim
		for g := range group {
			from := (head*group+g)*r.headDim + d
			add(row(r.gk, i), row(r.gHeadK, from), 1)
			add(row(r.gv, i), row(r.gHeadV, from), 1)
		}
	}
}

// queryBlock is how many queries of a head are computed at once.
const queryBlock = 128

// headRun is one head of one row of the batch. Scores are keys by queries.
type headRun struct {
	*attentionRun
	q, k, v, out kernels.Mat // headDim x length
	gq, gk, gv   kernels.Mat
	gOut         kernels.Mat
}

// eachHead calls do for every query head of every row.
func (s *step) eachHead(r *attentionRun, length int, do func(w *worker, h *headRun)) error {
	rows := r.x.Cols / length
	return s.each(rows*r.heads, func(w *worker, i int) error {
		b, head := i/r.heads, i%r.heads
		key := head / (r.heads / r.keyHeads)
		cut := func(m kernels.Mat, head int) kernels.Mat {
			if m.Data == nil {
				return m
			}
			return m.Slice(head*r.headDim, (head+1)*r.headDim, b*length, (b+1)*length)
		}
		own := key // of the gradients of keys and values
		if r.heads != r.keyHeads {
			own = head
		}
		do(w, &headRun{
			attentionRun: r, q: cut(r.q, head), k: cut(r.k, key), v: cut(r.v, key), out: cut(r.mixed, head),
			gq: cut(r.gq, head), gk: cut(r.gHeadK, own), gv: cut(r.gHeadV, own), gOut: cut(r.gMixed, head),
		})
		return nil
	})
}

// blocks calls do for blocks of queries and the keys that any of them sees.
func (h *headRun) blocks(do func(q0, q1, k0, k1 int)) {
	for q0 := 0; q0 < h.q.Cols; q0 += queryBlock {
		q1, k0 := min(q0+queryBlock, h.q.Cols), 0
		if h.window > 0 {
			k0 = max(0, q0-h.window+1)
		}
		do(q0, q1, k0, q1)
	}
}

func (h *headRun) forward(w *worker) {
	clearRows(h.out, 0, h.headDim)
	h.blocks(func(q0, q1, k0, k1 int) {
		p := w.scratch(0, k1-k0, q1-q0)
		h.probabilities(w, p, kernels.Mat{}, q0, k0)
		kernels.MulAdd(cols(h.out, q0, q1), cols(h.v, k0, k1), p)
	})
}

// probabilities sets p to the soft maximum of the scores, over the keys that each query sees. Where scores are capped,
// and slope has data, that is set to the derivative of the cap.
func (h *headRun) probabilities(w *worker, p, slope kernels.Mat, q0, k0 int) {
	clearRows(p, 0, p.Rows)
	kernels.MulAdd(p, cols(h.k, k0, k0+p.Rows).T(), cols(h.q, q0, q0+p.Cols))
	most := w.zeros(2 * p.Cols)[:p.Cols]
	sums := w.sums[p.Cols : 2*p.Cols]
	for i := range most {
		most[i] = math.Inf(-1)
	}
	for j := range p.Rows {
		x := row(p, j)
		scale(x, h.scale)
		if h.softCap != 0 {
			for i, v := range x {
				t := math.Tanh(float64(v) / float64(h.softCap))
				x[i] = float32(t * float64(h.softCap))
				if slope.Data != nil {
					row(slope, j)[i] = float32(1 - t*t)
				}
			}
		}
		for i := h.first(q0, k0+j); i < h.last(q0, k0+j, p.Cols); i++ {
			most[i] = max(most[i], float64(x[i]))
		}
	}
	for j := range p.Rows {
		x := row(p, j)
		lo, hi := h.first(q0, k0+j), h.last(q0, k0+j, p.Cols)
		clear(x[:lo])
		clear(x[max(lo, hi):])
		for i := lo; i < hi; i++ {
			x[i] -= float32(most[i])
		}
		if lo < hi {
			kernels.Exp(x[lo:hi], x[lo:hi])
		}
		for i := lo; i < hi; i++ {
			sums[i] += float64(x[i])
		}
	}
	for i := range sums {
		sums[i] = 1 / sums[i]
	}
	for j := range p.Rows {
		x := row(p, j)
		for i := range x {
			x[i] *= float32(sums[i])
		}
	}
}

// first and last bound the queries of a block that see a key: those from the key's own on, within the window.
func (h *headRun) first(q0, key int) int { return max(0, key-q0) }

func (h *headRun) last(q0, key, n int) int {
	if h.window > 0 {
		return max(0, min(n, key+h.window-q0))
	}
	return n
}

func (h *headRun) backward(w *worker) {
	clearRows(h.gk, 0, h.headDim)
	clearRows(h.gv, 0, h.headDim)
	h.blocks(func(q0, q1, k0, k1 int) {
		p, g := w.scratch(0, k1-k0, q1-q0), w.scratch(1, k1-k0, q1-q0)
		var slope kernels.Mat
		if h.softCap != 0 {
			slope = w.scratch(2, k1-k0, q1-q0)
		}
		h.probabilities(w, p, slope, q0, k0)
		gOut := cols(h.gOut, q0, q1)
		kernels.MulAdd(cols(h.gv, k0, k1), gOut, p.T())
		clearRows(g, 0, g.Rows)
		kernels.MulAdd(g, cols(h.v, k0, k1).T(), gOut)
		sums := w.zeros(p.Cols)
		for j := range p.Rows {
			kernels.AddProducts(sums, row(p, j), row(g, j))
		}
		for j := range p.Rows {
			x, y := row(g, j), row(p, j)
			for i, v := range x {
				x[i] = y[i] * float32(float64(v)-sums[i]) * h.scale
			}
			if h.softCap != 0 {
				for i, c := range row(slope, j) {
					x[i] *= c
				}
			}
		}
		kernels.MulAdd(cols(h.gq, q0, q1), cols(h.k, k0, k1), g)
		kernels.MulAdd(cols(h.gk, k0, k1), cols(h.q, q0, q1), g.T())
	})
}

// cols are some columns of a matrix.
func cols(m kernels.Mat, lo, hi int) kernels.Mat { return m.Slice(0, m.Rows, lo, hi) }
