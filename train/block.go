package train

import "github.com/lorakit/lorakit/internal/kernels"

// block is a layer as it is computed.
type block struct {
	*layer
	beforeAttention, afterAttention, beforeMLP, afterMLP *normal
	attending                                            *attending
	feeding                                              *feeding // nil where there are experts
	routing                                              *routing
}

// blockRun is one pass through a block, and what its backward pass needs. A branch is norm, attention or MLP, norm.
type blockRun struct {
	*block
	length         int         // of the rows of the batch
	x              kernels.Mat // the input
	middle         kernels.Mat // x and the attention; where the branches are parallel there is none
	normed, feed   kernels.Mat // what the branches read
	raw, rawMLP    kernels.Mat // what they give, before the norms after them
	branch         kernels.Mat // what they give
	before, after  normalised
	beforeM, aftrM normalised
	attention      *attentionRun
	mlp            *mlpRun
	experts        *expertsRun
	gBranch, gRead kernels.Mat // of the backward pass: of what a branch gives, and of what it reads
	gMiddle        kernels.Mat
}

// run makes room for a pass, and where backward is set for the backward pass.
func (s *slab) run(b *block, hidden, tokens, length int, backward bool) *blockRun {
	r := &blockRun{block: b, length: length}
	norm := func(n *normal) (kernels.Mat, normalised) {
		if n == nil {
			return kernels.Mat{}, normalised{}
		}
		return s.mat(hidden, tokens), s.normalise(n, hidden, tokens)
	}
	r.normed, r.before = norm(b.beforeAttention)
	r.raw, r.after = norm(b.afterAttention)
	r.feed, r.beforeM = norm(b.beforeMLP)
	r.rawMLP, r.aftrM = norm(b.afterMLP)
	if !b.parallel {
		r.middle = s.mat(hidden, tokens)
	}
	r.branch = s.mat(hidden, tokens)
	if backward {
		r.gBranch, r.gRead = s.mat(hidden, tokens), s.mat(hidden, tokens)
		if !b.parallel {
			r.gMiddle = s.mat(hidden, tokens)
		}
	}
	r.attention = s.attend(b.attending, tokens)
	if b.feeding != nil {
		r.mlp = s.feed(b.feeding, tokens)
	}
	mark := s.used
	if backward {
		s.attendBackward(r.attention, tokens)
		s.used = mark // the backward pass of the MLP is over before that of the attention begins
		if r.mlp != nil {
			s.feedBackward(r.mlp, tokens)
		}
	}
	if b.routing != nil {
		r.experts = s.route(b.routing, tokens, backward)
	}
	return r
}

// forwardBlock sets y to the output of a block for x. Without an output it computes what the backward pass needs, and y
// is not looked at.
func (s *step) forwardBlock(r *blockRun, y, x kernels.Mat, output bool) error {
	r.x = x
	read := x
	if r.block.beforeAttention != nil {
		if err := s.forwardNorm(&r.before, r.normed, x); err != nil {
			return err
		}
		read = r.normed
	}
	if err := s.attentionBranch(r, read, output || !r.parallel); err != nil {
		return err
	}
	middle := r.middle
	switch {
	case !r.parallel:
		if err := s.addBranch(middle, x, r.branch, r.residual); err != nil {
			return err
		}
		x, read = middle, middle
	case output:
		if err := s.addBranch(y, x, r.branch, r.residual); err != nil {
			return err
		}
	}
	if r.block.beforeMLP != nil {
		if err := s.forwardNorm(&r.beforeM, r.feed, x); err != nil {
			return err
		}
		read = r.feed
	}
	if err := s.mlpBranch(r, read, output); err != nil || !output {
		return err
	}
	if r.parallel {
		x = y
	}
	return s.addBranch(y, x, r.branch, r.residual)
}

// attentionBranch sets r.branch to the attention of x, with the norm after it.
func (s *step) attentionBranch(r *blockRun, x kernels.Mat, output bool) error {
	if r.block.afterAttention == nil {
		return s.forwardAttention(r.attention, r.branch, x, r.length, output)
	}
	if err := s.forwardAttention(r.attention, r.raw, x, r.length, true); err != nil {
		return err
	}
	return s.forwardNorm(&r.after, r.branch, r.raw)
}

// mlpBranch sets r.branch to the MLP or the experts of x, with the norm after it.
func (s *step) mlpBranch(r *blockRun, x kernels.Mat, output bool) error {
	y := r.branch
	if r.block.afterMLP != nil {
		y, output = r.rawMLP, true
	}
	var err error
	switch {
	case r.mlp != nil:
		err = s.forwardMLP(r.mlp, y, x, nil, output)
	case output:
		err = s.forwardExperts(r.experts, y, x)
	default:
		err = s.forwardRouter(r.experts, x)
	}
	if err != nil || r.block.afterMLP == nil {
		return err
	}
	return s.forwardNorm(&r.aftrM, r.branch, y)
}

// addBranch sets y to x + by·branch.
func (s *step) addBranch(y, x, branch kernels.Mat, by float32) error {
	return s.parts(y.Rows, 1, func(_ *worker, lo, hi int) {
		for i := lo; i < hi; i++ {
			to, from, more := row(y, i), row(x, i), row(branch, i)
			for t, v := range from {
				to[t] = v + float32(by*more[t])
			}
		}
	})
}

// backwardBlock makes of g, the gradient of the output, that of the input.
func (s *step) backwardBlock(r *blockRun, g kernels.Mat) error {
	// The MLP. What it reads is the norm before it, or where that is missing what the norm reads.
	if err := s.backwardBranch(r, &r.aftrM, r.block.afterMLP, g); err != nil {
		return err
	}
	clearRows(r.gRead, 0, r.gRead.Rows)
	var err error
	if r.mlp != nil {
		err = s.backwardMLP(r.mlp, r.gRead, r.gBranch, nil, nil)
	} else {
		err = s.backwardExperts(r.experts, r.gRead, r.gBranch)
	}
	if err != nil {
		return err
	}
	out := g // the gradient of what the attention is added to
	if !r.parallel {
		// g goes on as the gradient of the middle.
		if err := s.throughNorm(&r.beforeM, r.block.beforeMLP, g, r.gRead); err != nil {
			return err
		}
		if err := s.backwardBranch(r, &r.after, r.block.afterAttention, g); err != nil {
			return err
		}
		clearRows(r.gRead, 0, r.gRead.Rows)
	} else {
		// Both branches have the gradient of the output; what comes of the MLP is added last.
		if err := s.backwardBranch(r, &r.after, r.block.afterAttention, g); err != nil {
			return err
		}
		if r.block.beforeMLP != nil {
			if err := s.throughNorm(&r.beforeM, r.block.beforeMLP, out, r.gRead); err != nil {
				return err
			}
			clearRows(r.gRead, 0, r.gRead.Rows)
		}
	}
	if err := s.backwardAttention(r.attention, r.gRead, r.gBranch, r.length); err != nil {
		return err
	}
	return s.throughNorm(&r.before, r.block.beforeAttention, out, r.gRead)
}

// backwardBranch sets r.gBranch to the gradient of what a branch gives before the norm after it, if it has one.
func (s *step) backwardBranch(r *blockRun, a *normalised, n *normal, g kernels.Mat) error {
	if n == nil {
		return s.scaled(r.gBranch, g, r.residual)
	}
	// r.branch is not needed any more.
	if err := s.scaled(r.branch, g, r.residual); err != nil {
		return err
	}
	clearRows(r.gBranch, 0, r.gBranch.Rows)
	return s.backwardNorm(a, r.gBranch, r.branch)
}

// throughNorm adds to g the gradient of what a norm reads, or where there is none what was read in its place.
func (s *step) throughNorm(a *normalised, n *normal, g, gRead kernels.Mat) error {
	if n == nil {
		return s.addBranch(g, g, gRead, 1)
	}
	return s.backwardNorm(a, g, gRead)
}

// scaled sets y to by·x.
func (s *step) scaled(y, x kernels.Mat, by float32) error {
	return s.parts(y.Rows, 1, func(_ *worker, lo, hi int) {
		for i := lo; i < hi; i++ {
			to := row(y, i)
			for t, v := range row(x, i) {
				to[t] = by * v
			}
		}
	})
}
