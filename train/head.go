package train

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// ignored is the label that does not count.
const ignored = -100

// heading is the output head as it is computed: logits = cap(scale·(W·x + b)).
type heading struct {
	*projection
	scale, softCap float32
}

// logits computes those of the tokens from lo to hi, in the room for a chunk.
func (s *step) logits(x kernels.Mat, lo, hi int) (application, kernels.Mat, error) {
	h := s.network.head
	s.slab.reset()
	part := s.slab.mat(x.Rows, hi-lo)
	copyMat(part, cols(x, lo, hi))
	a := s.slab.apply(h.projection, hi-lo)
	y := kernels.MatOf(s.room.logits[:h.out*(hi-lo)], h.out, hi-lo)
	px, err := s.pack(s.room.wide, part)
	if err == nil {
		err = s.forward(&a, y, part, px)
	}
	if err != nil || h.scale == 1 && h.softCap == 0 {
		return a, y, err
	}
	return a, y, s.parts(y.Rows, 8, func(_ *worker, lo, hi int) {
		for i := lo; i < hi; i++ {
			z := row(y, i)
			for t, v := range z {
				v *= h.scale
				if h.softCap != 0 {
					v = float32(float64(h.softCap) * math.Tanh(float64(v)/float64(h.softCap)))
				}
				z[t] = v
			}
		}
	})
}

// forwardLoss returns the sum of the cross-entropy over the tokens whose label counts, a chunk of tokens at a time.
// Where g has data, it becomes the gradient of x of that sum over count, and the gradients of the head are added to.
func (s *step) forwardLoss(x, g kernels.Mat, labels []int, count int) (float64, error) {
	h := s.network.head
	losses := make([]float64, x.Cols)
	for lo := 0; lo < x.Cols; lo += s.room.chunk {
		hi := min(lo+s.room.chunk, x.Cols)
		a, y, err := s.logits(x, lo, hi)
		if err != nil {
			return 0, err
		}
		gradient := g.Data != nil
		err = s.parts(hi-lo, 16, func(w *worker, first, last int) {
			crossEntropy(w, cols(y, first, last), labels[lo+first:lo+last], losses[lo+first:lo+last], gradient, count, h)
		})
		if err != nil {
			return 0, err
		}
		if !gradient {
			continue
		}
		gx := s.slab.mat(x.Rows, hi-lo)
		clearRows(gx, 0, gx.Rows)
		if err := s.backward(&a, gx, y); err != nil {
			return 0, err
		}
		copyMat(cols(g, lo, hi), gx)
	}
	var sum float64
	for _, l := range losses {
		sum += l
	}
	if math.IsNaN(sum) || math.IsInf(sum, 0) {
		return 0, fmt.Errorf("%s: %w: the loss is %v", h.module, ErrNotFinite, sum)
	}
	return sum, nil
}

// crossEntropy sets losses to those of some tokens, by their logits, and where gradient is set the logits to its
// gradients over count.
func crossEntropy(
	w *worker, y kernels.Mat, labels []int, losses []float64, gradient bool, count int, h *heading,
) {
	n := y.Cols
	numbers := w.zeros(2 * n)
	most, sums := numbers[:n], numbers[n:2*n]
	for t := range most {
		most[t] = math.Inf(-1)
	}
	for i := range y.Rows {
		for t, v := range row(y, i) {
			most[t] = max(most[t], float64(v))
		}
	}
	power := w.scratch(0, 1, n).Data
	for i := range y.Rows {
		for t, v := range row(y, i) {
			power[t] = v - float32(most[t])
		}
		kernels.Exp(power, power)
		for t, v := range power {
			sums[t] += float64(v)
		}
	}
	for t, label := range labels {
		losses[t] = 0
		if label != ignored {
			losses[t] = most[t] + math.Log(sums[t]) - float64(row(y, label)[t])
		}
	}
	if !gradient {
		return
	}
	for i := range y.Rows {
		z := row(y, i)
		for t, v := range z {
			power[t] = v - float32(most[t])
		}
		kernels.Exp(power, power)
		for t, v := range z {
			var g float64
			if label := labels[t]; label != ignored {
				g = float64(power[t]) / sums[t]
				if label == i {
					g--
				}
				g /= float64(count)
			}
			g *= float64(h.scale)
			if h.softCap != 0 {
				c := float64(v) / float64(h.softCap)
				g *= 1 - c*c
			}
			z[t] = float32(g)
		}
	}
}
