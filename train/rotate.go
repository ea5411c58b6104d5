package train

import (
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// turns are the cosines and sines of a rotary embedding: pair p at position t is number p*positions + t.
type turns struct {
	pairs, positions int
	interleaved      bool
	cos, sin         []float32
}

// turnsOf computes those of rows of so many positions. The angles are rounded to float32, as torch has them.
func turnsOf(r *rotary, positions int) *turns {
	frequencies, factor := r.frequencies(positions)
	t := &turns{pairs: r.dim / 2, positions: positions, interleaved: r.interleaved}
	t.cos, t.sin = make([]float32, t.pairs*positions), make([]float32, t.pairs*positions)
	for p := range t.pairs {
		for i := range positions {
			sin, cos := math.Sincos(float64(float32(float32(i) * float32(frequencies[p]))))
			t.cos[p*positions+i] = float32(cos) * float32(factor)
			t.sin[p*positions+i] = float32(sin) * float32(factor)
		}
	}
	return t
}

// rotate turns the heads of x in place; back turns them the other way, which is the backward pass.
func (s *step) rotate(x kernels.Mat, r *turns, headDim int, back bool) error {
	if r == nil {
		return nil
	}
	return s.each(x.Rows/headDim, func(_ *worker, head int) error {
		for p := range r.pairs {
			i, j := p, p+r.pairs
			if r.interleaved {
				i, j = 2*p, 2*p+1
			}
			cos, sin := r.cos[p*r.positions:][:r.positions], r.sin[p*r.positions:][:r.positions]
			a, b := row(x, head*headDim+i), row(x, head*headDim+j)
			for first := 0; first < len(a); first += r.positions {
				turnPair(a[first:][:r.positions], b[first:][:r.positions], cos, sin, back)
			}
		}
		return nil
	})
}

func turnPair(a, b, cos, sin []float32, back bool) {
	b, cos, sin = b[:len(a)], cos[:len(a)], sin[:len(a)]
	for t, x := range a {
		y, c, s := b[t], cos[t], sin[t]
		if back {
			s = -s
		}
		a[t] = float32(x*c) - float32(y*s)
		b[t] = float32(y*c) + float32(x*s)
	}
}
