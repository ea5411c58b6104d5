package train

import (
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// The tanh form of GELU, 0.5·x·(1 + tanh(z)) with z = sqrt(2/π)·(x + 0.044715·x³), is x·sigmoid(2z).
const (
	geluLinear = 2 * 0.7978845608028654 // 2·sqrt(2/π)
	geluCubic  = geluLinear * 0.044715
)

// apply sets dst, which is not x, to the function of x.
func (a activation) apply(w *worker, dst, x []float32) {
	switch a {
	case silu:
		kernels.Sigmoid(dst, x)
		multiply(dst, x)
	case geluTanh:
		for i, v := range x {
			dst[i] = v * (geluLinear + float32(geluCubic*v)*v)
		}
		kernels.Sigmoid(dst, dst)
		multiply(dst, x)
	case geluErf:
		for i, v := range x {
			dst[i] = float32(0.5 * float64(v) * math.Erfc(-float64(v)/math.Sqrt2))
		}
	case relu:
		for i, v := range x {
			dst[i] = max(v, 0)
		}
	}
}

// slope replaces x by the derivative of the function times g.
func (a activation) slope(w *worker, x, g []float32) {
	sig := w.scratch(0, 1, len(x)).Data
	switch a {
	case silu:
		kernels.Sigmoid(sig, x)
		for i, v := range x {
			s := sig[i]
			x[i] = g[i] * (s + float32(v*s)*(1-s))
		}
	case geluTanh:
		for i, v := range x {
			sig[i] = v * (geluLinear + float32(geluCubic*v)*v)
		}
		kernels.Sigmoid(sig, sig)
		for i, v := range x {
			s := sig[i]
			inner := geluLinear + float32(3*geluCubic*v)*v
			x[i] = g[i] * (s + float32(v*s)*float32((1-s)*inner))
		}
	case geluErf:
		for i, v := range x {
			y := float64(v)
			x[i] = g[i] * float32(0.5*math.Erfc(-y/math.Sqrt2)+y*math.Exp(-y*y/2)/math.Sqrt(2*math.Pi))
		}
	case relu:
		for i, v := range x {
			x[i] = 0
			if v > 0 {
				x[i] = g[i]
			}
		}
	}
}

// multiply multiplies x by y.
func multiply(x, y []float32) {
	y = y[:len(x)]
	for i, v := range y {
		x[i] *= v
	}
}
