package train

import (
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// routing are the experts of a block as they are computed.
type routing struct {
	experts
	router *projection
	expert func(e int) *feeding // made when it is needed, one at a time
}

// expertsRun is one pass through the experts of a block, and what its backward pass needs.
type expertsRun struct {
	*routing
	x       kernels.Mat
	by      application
	logits  kernels.Mat // count x tokens: the probabilities, once they are known
	weights kernels.Mat // of the experts that a token takes, 0 elsewhere
	sums    []float32   // of the probabilities that a token takes
	// What one expert has: its tokens' columns.
	some, gave, gSome kernels.Mat
	mark              int // of the slab, where an expert begins
	gLogits           kernels.Mat
}

// route makes room for a pass; that of an expert is taken for all tokens, which one expert may have.
func (s *slab) route(e *routing, tokens int, backward bool) *expertsRun {
	r := &expertsRun{routing: e}
	r.by = s.apply(e.router, tokens)
	r.logits, r.weights = s.mat(e.count, tokens), s.mat(e.count, tokens)
	r.sums = s.floats(tokens)
	r.some, r.gave = s.mat(e.hidden, tokens), s.mat(e.hidden, tokens)
	if backward {
		r.gLogits, r.gSome = s.mat(e.count, tokens), s.mat(e.hidden, tokens)
	}
	r.mark = s.used
	for i := range e.count {
		s.used = r.mark
		run := s.feed(e.expert(i), tokens)
		if backward {
			s.feedBackward(run, tokens)
		}
	}
	return r
}

// forwardRouter finds which experts a token takes, and their weights.
func (s *step) forwardRouter(r *expertsRun, x kernels.Mat) error {
	r.x = x
	px, err := s.pack(s.room.wide, x)
	if err != nil {
		return err
	}
	if err := s.forward(&r.by, r.logits, x, px); err != nil {
		return err
	}
	return s.parts(x.Cols, tokenGrain, func(_ *worker, lo, hi int) {
		for t := lo; t < hi; t++ {
			r.choose(t)
		}
	})
}

// choose makes probabilities of a token's logits, over all experts, and takes the largest; of two that are equal the
// first.
func (r *expertsRun) choose(t int) {
	p, w := column(r.logits, t), column(r.weights, t)
	most, sum := math.Inf(-1), 0.0
	for e := range r.count {
		most = max(most, float64(*p.at(e)))
	}
	for e := range r.count {
		sum += math.Exp(float64(*p.at(e)) - most)
	}
	for e := range r.count {
		*p.at(e) = float32(math.Exp(float64(*p.at(e))-most) / sum)
		*w.at(e) = 0
	}
	var taken float32
	for range r.topK {
		best := -1
		for e := range r.count {
			if *w.at(e) == 0 && (best < 0 || *p.at(e) > *p.at(best)) {
				best = e
			}
		}
		if best < 0 || *p.at(best) == 0 {
			break // what is multiplied by zero is not computed
		}
		*w.at(best) = *p.at(best)
		taken += *p.at(best)
	}
	r.sums[t] = 1
	if r.normalise {
		r.sums[t] = taken
		for e := range r.count {
			*w.at(e) /= taken
		}
	}
}

// forwardExperts sets y to the weighted sum of what the experts of each token give.
func (s *step) forwardExperts(r *expertsRun, y, x kernels.Mat) error {
	if err := s.forwardRouter(r, x); err != nil {
		return err
	}
	clearRows(y, 0, y.Rows)
	for e := range r.count {
		tokens, weights := r.of(e)
		if len(tokens) == 0 {
			continue
		}
		run, some, gave := s.beginExpert(r, e, tokens, false)
		if err := s.forwardMLP(run, gave, some, weights, true); err != nil {
			return err
		}
		if err := s.scatter(y, gave, tokens); err != nil {
			return err
		}
	}
	return nil
}

// of lists the tokens that take an expert, and its weight for each.
func (r *expertsRun) of(e int) (tokens []int, weights []float32) {
	for t, w := range row(r.weights, e) {
		if w != 0 {
			tokens, weights = append(tokens, t), append(weights, w)
		}
	}
	return tokens, weights
}

// beginExpert takes the columns of an expert's tokens, and makes room for it.
func (s *step) beginExpert(r *expertsRun, e int, tokens []int, backward bool) (run *mlpRun, some, gave kernels.Mat) {
	s.slab.used = r.mark
	run = s.slab.feed(r.expert(e), len(tokens))
	if backward {
		s.slab.feedBackward(run, len(tokens))
	}
	some, gave = narrow(r.some, len(tokens)), narrow(r.gave, len(tokens))
	gather(some, r.x, tokens)
	return run, some, gave
}

// backwardExperts adds to gx the gradient of x by that of the output, which it leaves as it is.
func (s *step) backwardExperts(r *expertsRun, gx, gy kernels.Mat) error {
	clearRows(r.gLogits, 0, r.gLogits.Rows)
	for e := range r.count {
		tokens, weights := r.of(e)
		if len(tokens) == 0 {
			continue
		}
		run, some, gave := s.beginExpert(r, e, tokens, true)
		if err := s.forwardMLP(run, gave, some, weights, false); err != nil {
			return err
		}
		gather(gave, gy, tokens)
		gSome, sums := narrow(r.gSome, len(tokens)), make([]float64, len(tokens))
		clearRows(gSome, 0, gSome.Rows)
		if err := s.backwardMLP(run, gSome, gave, weights, sums); err != nil {
			return err
		}
		if err := s.scatter(gx, gSome, tokens); err != nil {
			return err
		}
		for i, t := range tokens {
			row(r.gLogits, e)[t] = float32(sums[i])
		}
	}
	err := s.parts(gx.Cols, tokenGrain, func(_ *worker, lo, hi int) {
		for t := lo; t < hi; t++ {
			r.backwardChoice(t)
		}
	})
	if err != nil {
		return err
	}
	return s.backward(&r.by, gx, r.gLogits)
}

// backwardChoice makes of a token's gradients of weights those of the logits. The choice itself is constant.
func (r *expertsRun) backwardChoice(t int) {
	g, p, w := column(r.gLogits, t), column(r.logits, t), column(r.weights, t)
	if r.normalise {
		var sum float64
		for e := range r.count {
			sum += float64(*g.at(e)) * float64(*w.at(e))
		}
		for e := range r.count {
			if *w.at(e) != 0 {
				*g.at(e) = float32((float64(*g.at(e)) - sum) / float64(r.sums[t]))
			}
		}
	}
	var sum float64
	for e := range r.count {
		sum += float64(*g.at(e)) * float64(*p.at(e))
	}
	for e := range r.count {
		*g.at(e) = float32(float64(*p.at(e)) * (float64(*g.at(e)) - sum))
	}
}

// strided is a column of a matrix.
type strided struct {
	data   []float32
	stride int
}

func column(m kernels.Mat, j int) strided { return strided{m.Data[j:], m.RowStride} }

func (s strided) at(i int) *float32 { return &s.data[i*s.stride] }

// narrow is the memory of a matrix as one of fewer columns.
func narrow(m kernels.Mat, cols int) kernels.Mat {
	return kernels.MatOf(m.Data[:m.Rows*cols], m.Rows, cols)
}

// gather sets the columns of dst to those of src with these numbers.
func gather(dst, src kernels.Mat, columns []int) {
	for i := range dst.Rows {
		to, from := row(dst, i), row(src, i)
		for k, t := range columns {
			to[k] = from[t]
		}
	}
}

// scatter adds the columns of src to those of dst with these numbers.
func (s *step) scatter(dst, src kernels.Mat, columns []int) error {
	return s.parts(dst.Rows, 1, func(_ *worker, lo, hi int) {
		for i := lo; i < hi; i++ {
			to, from := row(dst, i), row(src, i)
			for k, t := range columns {
				to[t] += from[k]
			}
		}
	})
}
