package kernels

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels/race"
)

// Exp sets dst[i] to e^src[i], with an error below one unit in the last place. What is too large becomes an infinity,
// what is too small a subnormal number or zero; a NaN that comes out has one pattern. dst may be src.
func Exp(dst, src []float32) { active.Exp(dst, src) }

// Exp is the function Exp by this set.
func (s *Set) Exp(dst, src []float32) { mapped(dst, src, s.exp, exp) }

// Sigmoid sets dst[i] to 1/(1 + e^-src[i]), each operation rounded to float32. A NaN that comes out has one pattern.
// dst may be src.
func Sigmoid(dst, src []float32) { active.Sigmoid(dst, src) }

// Sigmoid is the function Sigmoid by this set.
func (s *Set) Sigmoid(dst, src []float32) { mapped(dst, src, s.sigmoid, sigmoid) }

// mapped sets dst[i] to f(src[i]), by a routine as far as that goes.
func mapped(dst, src []float32, routine func(dst, src []float32) int, f func(float32) float32) {
	if len(src) != len(dst) {
		panic(fmt.Sprintf("kernels: a function of %d elements into %d", len(src), len(dst)))
	}
	race.ReadSlice(src)
	race.WriteSlice(dst)
	done := 0
	if routine != nil {
		done = routine(dst, src)
	}
	dst, src = dst[done:], src[done:]
	for i, x := range src {
		dst[i] = number(f(x))
	}
}

// SiLUMul sets dst[i] to (gate[i]*σ)*up[i], with σ the Sigmoid of gate[i], each operation rounded to float32: a gated
// MLP's SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020). A NaN that comes out has one pattern. dst may be
// gate or up.
func SiLUMul(dst, gate, up []float32) { active.SiLUMul(dst, gate, up) }

// SiLUMul is the function SiLUMul by this set.
func (s *Set) SiLUMul(dst, gate, up []float32) {
	if len(gate) != len(dst) || len(up) != len(dst) {
		panic(fmt.Sprintf("kernels: %d gates of %d elements into %d", len(gate), len(up), len(dst)))
	}
	race.ReadSlice(gate)
	race.ReadSlice(up)
	race.WriteSlice(dst)
	done := 0
	if s.siluMul != nil {
		done = s.siluMul(dst, gate, up)
	}
	dst, gate, up = dst[done:], gate[done:], up[done:]
	for i, x := range gate {
		dst[i] = number(float32(x*sigmoid(x)) * up[i])
	}
}

// SiLUMulGrad is the way back through SiLUMul. With d the gradient of what SiLUMul has set and σ the Sigmoid of
// gate[i], dGate[i] is (d[i]*up[i]) * (σ*(1 + gate[i]*(1-σ))) and dUp[i] is d[i] * (gate[i]*σ), each operation rounded
// to float32. A NaN that comes out has one pattern. dGate and dUp may be any two of d, gate and up.
func SiLUMulGrad(dGate, dUp, d, gate, up []float32) { active.SiLUMulGrad(dGate, dUp, d, gate, up) }

// SiLUMulGrad is the function SiLUMulGrad by this set.
func (s *Set) SiLUMulGrad(dGate, dUp, d, gate, up []float32) {
	n := len(d)
	if len(dGate) != n || len(dUp) != n || len(gate) != n || len(up) != n {
		panic(fmt.Sprintf("kernels: a gradient of %d elements for %d gates of %d into %d and %d", n, len(gate), len(up),
			len(dGate), len(dUp)))
	}
	race.ReadSlice(d)
	race.ReadSlice(gate)
	race.ReadSlice(up)
	race.WriteSlice(dGate)
	race.WriteSlice(dUp)
	done := 0
	if s.siluMulGrad != nil {
		done = s.siluMulGrad(dGate, dUp, d, gate, up)
	}
	for i := done; i < n; i++ {
		g, x := d[i], gate[i]
		y := sigmoid(x)
		slope := float32(x*(1-y)) + 1
		onUp := float32(g * up[i])
		dUp[i] = number(float32(x*y) * g)
		dGate[i] = number(float32(y*slope) * onUp)
	}
}

// AddProducts adds x[i]*y[i], which is exact in float64, to acc[i]: of the rows of two matrices one after the other it
// makes the dot products of their columns. A NaN that comes out has one pattern. x and y may be the same slice.
func AddProducts(acc []float64, x, y []float32) { active.AddProducts(acc, x, y) }

// AddProducts is the function AddProducts by this set.
func (s *Set) AddProducts(acc []float64, x, y []float32) {
	if len(x) != len(acc) || len(y) != len(acc) {
		panic(fmt.Sprintf("kernels: products of %d elements and %d into %d", len(x), len(y), len(acc)))
	}
	race.ReadSlice(x)
	race.ReadSlice(y)
	race.WriteSlice(acc)
	done := 0
	if s.addProducts != nil {
		done = s.addProducts(acc, x, y)
	}
	for i := done; i < len(acc); i++ {
		sum := acc[i] + float64(x[i])*float64(y[i])
		if sum != sum {
			sum = math.NaN()
		}
		acc[i] = sum
	}
}

// exp is e^x by the polynomial of Cephes' expf (Moshier, 1989): x = n*ln 2 + r with |r| <= ln 2 / 2, and n*ln 2 in two
// parts, of which the first is exact. Every operation is rounded to float32, none is fused.
func exp(x float32) float32 {
	const ln2High, ln2Low = 0.693359375, -2.12194440e-4
	const round = 0x1.8p23 // adding it rounds to a whole number
	x = max(min(x, 89), -104)
	n := (float32(x*math.Log2E) + round) - round
	r := (x - float32(n*ln2High)) - float32(n*ln2Low)
	y := float32(1.9875691500e-4*r) + 1.3981999507e-3
	y = float32(y*r) + 8.3334519073e-3
	y = float32(y*r) + 4.1665795894e-2
	y = float32(y*r) + 1.6666665459e-1
	y = float32(y*r) + 5.0000001201e-1
	y = (float32(y*float32(r*r)) + r) + 1
	// By 2^n in two steps, as one factor has not enough bits of an exponent.
	half := int32(n) >> 1
	return y * power(half) * power(int32(n)-half)
}

// power returns 2^n for a normal number.
func power(n int32) float32 { return math.Float32frombits(uint32(n+127) << 23) }

// sigmoid is 1/(1 + e^-x).
func sigmoid(x float32) float32 { return 1 / (1 + exp(-x)) }
