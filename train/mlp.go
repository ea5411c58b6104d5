package train

import (
	"github.com/lorakit/lorakit/internal/kernels"
)

// feeding is an MLP as it is computed: down(act(gate)·up), or down(act(up)) where gate is nil. Both may be one
// projection, whose first outputs are those of gate.
type feeding struct {
	act          activation
	gate, up     *projection
	gateUp, down *projection
}

// mlpRun is one pass through an MLP, and what its backward pass needs.
type mlpRun struct {
	*feeding
	x                      kernels.Mat
	gate, up, both, inner  kernels.Mat
	gateBy, upBy, bothBy   application
	by                     application
	gGate, gUp, gBoth, gIn kernels.Mat
}

// feed makes room for a pass.
func (s *slab) feed(f *feeding, tokens int) *mlpRun {
	r := &mlpRun{feeding: f}
	width := f.down.in
	switch {
	case f.gateUp != nil:
		r.both = s.mat(2*width, tokens)
		r.gate, r.up = rowsOf(r.both, 0, width), rowsOf(r.both, width, width)
		r.bothBy = s.apply(f.gateUp, tokens)
	case f.gate != nil:
		r.gate, r.up = s.mat(width, tokens), s.mat(width, tokens)
		r.gateBy, r.upBy = s.apply(f.gate, tokens), s.apply(f.up, tokens)
	default:
		r.up = s.mat(width, tokens)
		r.upBy = s.apply(f.up, tokens)
	}
	r.inner = s.mat(width, tokens)
	r.by = s.apply(f.down, tokens)
	return r
}

// feedBackward makes room for the backward pass.
func (s *slab) feedBackward(r *mlpRun, tokens int) {
	r.gIn = s.mat(r.feeding.down.in, tokens)
	// The gradients of gate and up take their places.
	r.gGate, r.gUp, r.gBoth = r.gate, r.up, r.both
}

// forwardMLP sets y to the MLP of x, or without an output computes what the backward pass needs. Where weights has an
// element for each token, the inner values are multiplied by it.
func (s *step) forwardMLP(r *mlpRun, y, x kernels.Mat, weights []float32, output bool) error {
	r.x = x
	px, err := s.pack(s.room.wide, x)
	if err != nil {
		return err
	}
	switch {
	case r.gateUp != nil:
		err = s.forward(&r.bothBy, r.both, x, px)
	case r.feeding.gate != nil:
		if err = s.forward(&r.gateBy, r.gate, x, px); err == nil {
			err = s.forward(&r.upBy, r.up, x, px)
		}
	default:
		err = s.forward(&r.upBy, r.up, x, px)
	}
	if err != nil {
		return err
	}
	err = s.parts(r.inner.Rows, 1, func(w *worker, lo, hi int) {
		for i := lo; i < hi; i++ {
			h := row(r.inner, i)
			switch {
			case r.gate.Data == nil:
				r.act.apply(w, h, row(r.up, i))
			case r.act == silu:
				kernels.SiLUMul(h, row(r.gate, i), row(r.up, i))
			default:
				r.act.apply(w, h, row(r.gate, i))
				multiply(h, row(r.up, i))
			}
			if weights != nil {
				multiply(h, weights)
			}
		}
	})
	if err != nil {
		return err
	}
	if px, err = s.pack(s.room.wide, r.inner); err != nil {
		return err
	}
	return s.output(&r.by, y, r.inner, px, output)
}

// backwardMLP adds to gx the gradient of x by that of the output, which it overwrites. To gWeights it adds the
// gradients of the weights.
func (s *step) backwardMLP(r *mlpRun, gx, gy kernels.Mat, weights []float32, gWeights []float64) error {
	clearRows(r.gIn, 0, r.gIn.Rows)
	if err := s.backward(&r.by, r.gIn, gy); err != nil {
		return err
	}
	if weights != nil {
		err := s.parts(r.gIn.Cols, tokenGrain, func(_ *worker, lo, hi int) { r.weightGradients(gWeights, weights, lo, hi) })
		if err != nil {
			return err
		}
	}
	err := s.parts(r.gIn.Rows, 1, func(w *worker, lo, hi int) {
		for i := lo; i < hi; i++ {
			r.backwardRow(w, i)
		}
	})
	switch {
	case err != nil:
	case r.gateUp != nil:
		err = s.backward(&r.bothBy, gx, r.gBoth)
	case r.feeding.gate != nil:
		if err = s.backward(&r.gateBy, gx, r.gGate); err == nil {
			err = s.backward(&r.upBy, gx, r.gUp)
		}
	default:
		err = s.backward(&r.upBy, gx, r.gUp)
	}
	return err
}

// weightGradients are those of the weights of tokens, and makes of gIn the gradient of what they multiply.
func (r *mlpRun) weightGradients(sums []float64, weights []float32, lo, hi int) {
	for i := range r.gIn.Rows {
		kernels.AddProducts(sums[lo:hi], row(r.inner, i)[lo:hi], row(r.gIn, i)[lo:hi])
		g := row(r.gIn, i)[lo:hi]
		for t, v := range weights[lo:hi] {
			g[t] *= v
		}
	}
	for t := lo; t < hi; t++ {
		if weights[t] != 0 {
			sums[t] /= float64(weights[t]) // inner is multiplied by it
		}
	}
}

// backwardRow replaces a row of gate and up by their gradients.
func (r *mlpRun) backwardRow(w *worker, i int) {
	g := row(r.gIn, i)
	if r.gate.Data == nil {
		r.act.slope(w, row(r.up, i), g)
		return
	}
	gate, up := row(r.gate, i), row(r.up, i)
	if r.act == silu {
		kernels.SiLUMulGrad(gate, up, g, gate, up)
		return
	}
	value := w.scratch(1, 1, len(g)).Data
	r.act.apply(w, value, gate)
	multiply(up, g) // the gradient of act(gate)
	r.act.slope(w, gate, up)
	for t, v := range g {
		up[t] = v * value[t]
	}
}
