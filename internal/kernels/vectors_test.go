package kernels

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// equalVectors holds the sets against the plain Go, with results beside the operands and in their place.
func equalVectors(t require.TestingT, x, y, z []float32, acc []float64) {
	plain := &Set{name: "purego"}
	type function struct {
		name string
		do   func(s *Set, x, y, z []float32) [][]float32
	}
	fresh := func() []float32 { return make([]float32, len(x)) }
	for _, f := range []function{
		{"Exp", func(s *Set, x, _, _ []float32) [][]float32 {
			out := fresh()
			s.Exp(out, x)
			s.Exp(x, x)
			return [][]float32{out, x}
		}},
		{"Sigmoid", func(s *Set, x, _, _ []float32) [][]float32 {
			out := fresh()
			s.Sigmoid(out, x)
			s.Sigmoid(x, x)
			return [][]float32{out, x}
		}},
		{"SiLUMul", func(s *Set, x, y, _ []float32) [][]float32 {
			out := fresh()
			s.SiLUMul(out, x, y)
			s.SiLUMul(y, x, y)
			return [][]float32{out, y}
		}},
		{"SiLUMulGrad", func(s *Set, x, y, z []float32) [][]float32 {
			dGate, dUp := fresh(), fresh()
			s.SiLUMulGrad(dGate, dUp, z, x, y)
			s.SiLUMulGrad(x, y, z, x, y)
			return [][]float32{dGate, dUp, x, y}
		}},
	} {
		want := f.do(plain, slices.Clone(x), slices.Clone(y), slices.Clone(z))
		half := len(want) / 2
		for i := range half {
			require.Equal(t, float32Bits(want[i]), float32Bits(want[half+i]), "%s in place", f.name)
		}
		for _, s := range Sets() {
			for i, got := range f.do(s, slices.Clone(x), slices.Clone(y), slices.Clone(z)) {
				require.Equal(t, float32Bits(want[i]), float32Bits(got), "%s: %s of %d elements", s.name, f.name, len(x))
			}
		}
	}
	bits := func(s *Set) []uint64 {
		sum := slices.Clone(acc)
		s.AddProducts(sum, x, y)
		s.AddProducts(sum, z, z)
		b := make([]uint64, len(sum))
		for i, v := range sum {
			b[i] = math.Float64bits(v)
		}
		return b
	}
	for _, s := range Sets() {
		require.Equal(t, bits(plain), bits(s), "%s: AddProducts of %d elements", s.name, len(x))
	}
}

func TestVectors(t *testing.T) {
	float64s := func(x []float32) []float64 {
		wide := make([]float64, len(x))
		for i, v := range x {
			wide[i] = float64(v)
		}
		return wide
	}
	for n := range 70 {
		equalVectors(t, random(n, 1), random(n, 2), random(n, 3), float64s(random(n, 4)))
	}
	r := rand.New(rand.NewPCG(5, 6))
	any := func(n int) []float32 {
		x := make([]float32, n)
		for i := range x {
			switch r.IntN(3) {
			case 0:
				x[i] = special[r.IntN(len(special))]
			case 1:
				x[i] = math.Float32frombits(r.Uint32())
			default:
				x[i] = float32(r.NormFloat64() * 50)
			}
		}
		return x
	}
	for range 50 {
		equalVectors(t, any(333), any(333), any(333), float64s(any(333)))
	}
}

// TestExp: the error of the exponential is below a unit in the last place, subnormal numbers included.
func TestExp(t *testing.T) {
	worst := 0.0
	check := func(x float32) {
		want, got := math.Exp(float64(x)), exp(x)
		_, e := math.Frexp(want)
		unit := math.Ldexp(1, max(e-24, -149))
		off := math.Abs(float64(got)-want) / unit
		require.Less(t, off, 1.0, "e^%x is %x, not %x", x, got, want)
		worst = max(worst, off)
	}
	for x := float32(-103.9); x < 88.722; x += 0x1p-9 {
		check(x)
	}
	r := rand.New(rand.NewPCG(3, 4))
	for range 1 << 16 {
		check(float32(r.Float64()*2 - 1))
		check(float32(math.Ldexp(r.Float64()-0.5, -r.IntN(140))))
		check(float32(r.Float64()*192.6 - 103.9))
	}
	require.Greater(t, worst, 0.5)
	t.Logf("largest error %.3f units in the last place", worst)

	for x, want := range map[float32]float32{
		0: 1, float32(math.Copysign(0, -1)): 1, inf: inf, -inf: 0, 88.72284: inf, 1000: inf, -103.98: 0, -1000: 0,
		-103.97: 1e-45,
	} {
		require.Equal(t, want, exp(x), "e^%v", x)
	}
}

// TestSiLU holds the gated product and its gradient against float64, and the gradient against differences.
func TestSiLU(t *testing.T) {
	const n = 1000
	gate, up, d := random(n, 1), random(n, 2), random(n, 3)
	for i := range gate {
		gate[i] *= 4
	}
	out, dGate, dUp := make([]float32, n), make([]float32, n), make([]float32, n)
	SiLUMul(out, gate, up)
	SiLUMulGrad(dGate, dUp, d, gate, up)
	product := func(x, y float64) float64 { return x / (1 + math.Exp(-x)) * y }
	for i := range n {
		x, y, g := float64(gate[i]), float64(up[i]), float64(d[i])
		require.InDelta(t, product(x, y), float64(out[i]), 1e-6*max(1, math.Abs(product(x, y))))
		const h = 1e-4
		require.InDelta(t, g*(product(x+h, y)-product(x-h, y))/(2*h), float64(dGate[i]), 1e-5*max(1, math.Abs(g*y)))
		require.InDelta(t, g*(product(x, y+h)-product(x, y-h))/(2*h), float64(dUp[i]), 1e-5*max(1, math.Abs(g*x)))
	}
	out = out[:6]
	Sigmoid(out, []float32{0, inf, -inf, 1, -1, -88})
	require.Equal(t, []float32{0.5, 1, 0, 0.7310586, 0.26894143, 6.054601e-39}, out)
	Sigmoid(out[:1], []float32{math.Float32frombits(0xffc12345)})
	require.Equal(t, uint32(f32NaN), math.Float32bits(out[0]))
}

// TestVectorsRefused: lengths that do not fit are refused before anything is written.
func TestVectorsRefused(t *testing.T) {
	three, two := []float32{1, 2, 3}, []float32{1, 2}
	for _, run := range []func(){
		func() { Exp(three, two) },
		func() { Sigmoid(two, three) },
		func() { SiLUMul(three, three, two) },
		func() { SiLUMul(three, two, three) },
		func() { SiLUMulGrad(three, three, three, three, two) },
		func() { SiLUMulGrad(three, three, three, two, three) },
		func() { SiLUMulGrad(three, three, two, three, three) },
		func() { SiLUMulGrad(three, two, three, three, three) },
		func() { SiLUMulGrad(two, three, three, three, three) },
		func() { AddProducts(make([]float64, 3), three, two) },
		func() { AddProducts(make([]float64, 3), two, three) },
		func() { AddProducts(make([]float64, 2), three, three) },
	} {
		require.Panics(t, run)
	}
	require.Equal(t, []float32{1, 2, 3}, three)
	require.Equal(t, []float32{1, 2}, two)
}

// BenchmarkVectors counts elements: in the first-level cache, and in the second.
func BenchmarkVectors(b *testing.B) {
	for _, n := range []int{256, 64 << 10} {
		x, y, z, out, acc := random(n, 1), random(n, 2), random(n, 3), make([]float32, n), make([]float64, n)
		other := make([]float32, n)
		for _, s := range Sets() {
			for _, f := range []struct {
				name string
				do   func()
			}{
				{"Exp", func() { s.Exp(out, x) }},
				{"Sigmoid", func() { s.Sigmoid(out, x) }},
				{"SiLUMul", func() { s.SiLUMul(out, x, y) }},
				{"SiLUMulGrad", func() { s.SiLUMulGrad(out, other, z, x, y) }},
				{"AddProducts", func() { s.AddProducts(acc, x, y) }},
			} {
				b.Run(fmt.Sprintf("%s/%d/%s", f.name, n, s.name), func(b *testing.B) {
					best := fastest(b, f.do)
					b.ReportMetric(float64(n)/best.Seconds()/1e9, "best-G/s")
				})
			}
		}
	}
}

func FuzzVectors(f *testing.F) {
	fuzzed(f, func(b []byte) { f.Add(b) })
	f.Fuzz(func(t *testing.T, b []byte) {
		n := len(b) / 4
		acc := make([]float64, n)
		for i, v := range fuzzedFloats(b, n, 3) {
			acc[i] = float64(v)
		}
		equalVectors(t, fuzzedFloats(b, n, 0), fuzzedFloats(b, n, 1), fuzzedFloats(b, n, 2), acc)
	})
}
