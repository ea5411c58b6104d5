package train

import "math"

// The constants of AdamW, as torch.optim.AdamW has them.
const (
	beta1       = 0.9
	beta2       = 0.999
	epsilon     = 1e-8
	weightDecay = 0.01
)

// adamW takes step number t, from 1 on, on a tensor: the decay first, and epsilon after the correction of the moments
// (Loshchilov and Hutter, 2019).
func adamW(p *trainable, lo, hi, t int, rate float64) {
	first, second := 1-math.Pow(beta1, float64(t)), math.Sqrt(1-math.Pow(beta2, float64(t)))
	for i := lo; i < hi; i++ {
		g := float64(p.gradient[i])
		w := float64(p.value[i]) * (1 - rate*weightDecay)
		m := beta1*float64(p.first[i]) + (1-beta1)*g
		v := beta2*float64(p.second[i]) + (1-beta2)*g*g
		p.first[i], p.second[i] = float32(m), float32(v)
		p.value[i] = float32(w - rate/first*m/(math.Sqrt(v)/second+epsilon))
	}
}
