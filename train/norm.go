package train

import (
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// normal is a norm as it is computed. The features of a token are groups of width, each normalised by itself; as many
// groups as there are heads share the weight, or have one each.
type normal struct {
	norm
	weight, bias           []float32 // width elements, or those of all groups
	weightWhole, biasWhole *trainable
}

// normalised is what the backward pass of a norm needs: its input, and a factor and a mean a group and token.
type normalised struct {
	*normal
	x            kernels.Mat
	factor, mean []float32
}

// normalise makes room for a norm of so many features and tokens.
func (s *slab) normalise(n *normal, rows, tokens int) normalised {
	a := normalised{normal: n, factor: s.floats(rows / n.width * tokens)}
	if n.kind == layerNorm {
		a.mean = s.floats(rows / n.width * tokens)
	}
	return a
}

// weights are the factors of a group.
func (n *normal) weights(group int) (w, b []float32) {
	w, b = n.weight, n.bias
	if n.weightWhole != nil {
		w = n.weightWhole.value
	}
	if n.biasWhole != nil {
		b = n.biasWhole.value
	}
	if len(w) > n.width {
		w = w[group*n.width:][:n.width]
		if b != nil {
			b = b[group*n.width:][:n.width]
		}
	}
	return w, b
}

// tokenGrain is how many tokens are normalised at once: their sums stay in a cache.
const tokenGrain = 64

// forwardNorm sets y, which may be x, to the normalised x. The backward pass needs x as it was.
func (s *step) forwardNorm(a *normalised, y, x kernels.Mat) error {
	a.x = x
	return s.parts(x.Cols, tokenGrain, func(w *worker, lo, hi int) {
		for group := range x.Rows / a.width {
			a.forward(w, y, x, group, lo, hi)
		}
	})
}

func (a *normalised) forward(w *worker, y, x kernels.Mat, group, lo, hi int) {
	first, n := group*a.width, hi-lo
	sums, means := w.zeros(2 * n)[:n], w.sums[n:2*n]
	if a.kind == layerNorm {
		for i := range a.width {
			for t, v := range row(x, first+i)[lo:hi] {
				means[t] += float64(v)
			}
		}
		for t := range means {
			means[t] /= float64(a.width)
			a.mean[group*x.Cols+lo+t] = float32(means[t])
		}
		for i := range a.width {
			for t, v := range row(x, first+i)[lo:hi] {
				d := float64(v) - means[t]
				sums[t] += d * d
			}
		}
	} else {
		for i := range a.width {
			kernels.AddProducts(sums, row(x, first+i)[lo:hi], row(x, first+i)[lo:hi])
		}
	}
	factor := a.factor[group*x.Cols:][lo:hi]
	for t, sum := range sums {
		factor[t] = float32(1 / math.Sqrt(sum/float64(a.width)+a.eps))
	}
	weight, bias := a.weights(group)
	for i := range a.width {
		from, to, g := row(x, first+i)[lo:hi], row(y, first+i)[lo:hi], weight[i]
		switch a.kind {
		case layerNorm:
			var b float32
			if bias != nil {
				b = bias[i]
			}
			mean := a.mean[group*x.Cols:][lo:hi]
			for t, v := range from {
				to[t] = float32(g*((v-mean[t])*factor[t])) + b
			}
		case rmsNormPlusOne:
			g++
			fallthrough
		default:
			for t, v := range from {
				to[t] = g * (v * factor[t])
			}
		}
	}
}

// backwardNorm adds to gx the gradient of x by that of the output, and to those of the weights that are trained.
func (s *step) backwardNorm(a *normalised, gx, gy kernels.Mat) error {
	err := s.parts(a.x.Cols, tokenGrain, func(w *worker, lo, hi int) {
		for group := range a.x.Rows / a.width {
			a.backward(w, gx, gy, group, lo, hi)
		}
	})
	if err != nil || a.weightWhole == nil && a.biasWhole == nil {
		return err
	}
	return s.parts(a.width, 8, func(_ *worker, lo, hi int) { a.weightGradient(gy, lo, hi) })
}

// backward is, with d = w·gy, h the normalised x and r the factor: r·(d - h·mean(d·h)), and of a layer norm
// r·(d - mean(d) - h·mean(d·h)).
func (a *normalised) backward(w *worker, gx, gy kernels.Mat, group, lo, hi int) {
	first, n := group*a.width, hi-lo
	along, plain := w.zeros(2 * n)[:n], w.sums[n:2*n]
	weight, _ := a.weights(group)
	plus := float32(0)
	if a.kind == rmsNormPlusOne {
		plus = 1
	}
	factor := a.factor[group*a.x.Cols:][lo:hi]
	var mean []float32
	if a.kind == layerNorm {
		mean = a.mean[group*a.x.Cols:][lo:hi]
	}
	for i := range a.width {
		x, g, by := row(a.x, first+i)[lo:hi], row(gy, first+i)[lo:hi], float64(weight[i]+plus)
		if mean == nil {
			for t, v := range g {
				along[t] += by * float64(v) * float64(x[t])
			}
			continue
		}
		for t, v := range g {
			d := by * float64(v)
			plain[t] += d
			along[t] += d * float64(x[t]-mean[t])
		}
	}
	for t := range along {
		r := float64(factor[t])
		along[t] *= r * r / float64(a.width) // times x - mean: mean(d·h)·h
		plain[t] /= float64(a.width)
	}
	for i := range a.width {
		x, g, to, by := row(a.x, first+i)[lo:hi], row(gy, first+i)[lo:hi], row(gx, first+i)[lo:hi], weight[i]+plus
		for t, v := range g {
			h := x[t]
			if mean != nil {
				h -= mean[t]
			}
			d := float64(by*v) - plain[t] - along[t]*float64(h)
			to[t] += float32(float64(factor[t]) * d)
		}
	}
}

// weightGradient sums over tokens, and over the groups that share a weight.
func (a *normalised) weightGradient(gy kernels.Mat, lo, hi int) {
	shared := len(a.weight) == a.width
	for group := range a.x.Rows / a.width {
		factor := a.factor[group*a.x.Cols:][:a.x.Cols]
		for i := lo; i < hi; i++ {
			at := i
			if !shared {
				at += group * a.width
			}
			x, g := row(a.x, group*a.width+i), row(gy, group*a.width+i)
			var sum, plain float64
			for t, v := range g {
				h := x[t]
				if a.mean != nil {
					h -= a.mean[group*a.x.Cols+t]
				}
				sum += float64(v) * float64(h*factor[t])
				plain += float64(v)
			}
			if a.weightWhole != nil {
				a.weightWhole.gradient[at] += float32(sum)
			}
			if a.biasWhole != nil {
				a.biasWhole.gradient[at] += float32(plain)
			}
		}
	}
}

// zeros is the worker's sums, n of them.
func (w *worker) zeros(n int) []float64 {
	if len(w.sums) < n {
		w.sums = make([]float64, n)
	}
	clear(w.sums[:n])
	return w.sums[:n]
}
