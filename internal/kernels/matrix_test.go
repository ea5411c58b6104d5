package kernels

import (
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// layouts are the ways in which an operand of a product may lie in memory.
var layouts = []string{"rows", "columns", "wide rows", "wide columns", "scattered"}

// laidOut returns a matrix of the given elements, which are by rows, in a layout.
func laidOut(x []float32, rows, cols int, layout string) Mat {
	m := Mat{Rows: rows, Cols: cols}
	switch layout {
	case "rows":
		m.RowStride, m.ColStride = cols, 1
	case "columns":
		m.RowStride, m.ColStride = 1, rows
	case "wide rows":
		m.RowStride, m.ColStride = cols+3, 1
	case "wide columns":
		m.RowStride, m.ColStride = 1, rows+5
	case "scattered":
		m.RowStride, m.ColStride = 2*cols+1, 2
	}
	if rows == 0 || cols == 0 {
		return m
	}
	m.Data = make([]float32, m.extent())
	for i := range m.Data {
		m.Data[i] = nan // what no product may take
	}
	for i := range rows {
		for j := range cols {
			m.Data[i*m.RowStride+j*m.ColStride] = x[i*cols+j]
		}
	}
	return m
}

// fma returns x*y + z, rounded once to float32.
func fma(x, y, z float32) float32 { return float32(odd(x, y, z)) }

// equalMulAdd holds all sets against the rule, element by element.
func equalMulAdd(t require.TestingT, c, a, b []float32, m, k, n int, layoutA, layoutB string) {
	want := slices.Clone(c)
	for i := range m {
		for j := range n {
			z := c[i*n+j]
			for l := range k {
				z = number(fma(a[i*k+l], b[l*n+j], z))
			}
			want[i*n+j] = z
		}
	}
	ma, mb := laidOut(a, m, k, layoutA), laidOut(b, k, n, layoutB)
	for _, s := range Sets() {
		for _, gap := range []int{0, 7} {
			got := make([]float32, m*(n+gap)+1)
			for i := range got {
				got[i] = 0.5
			}
			mc := Mat{Data: got, Rows: m, Cols: n, RowStride: n + gap, ColStride: 1}
			for i := range m {
				copy(mc.row(i), c[i*n:])
			}
			s.MulAdd(mc, ma, mb)
			for i := range m {
				require.True(t, slices.Equal(float32Bits(want[i*n:][:n]), float32Bits(mc.row(i))),
					"%s: %d x %d x %d, %s, %s, row %d", s.name, m, k, n, layoutA, layoutB, i)
				for _, v := range got[i*(n+gap)+n:][:gap] {
					require.Equal(t, float32(0.5), v, "%s: written past row %d", s.name, i)
				}
			}
			require.Equal(t, float32(0.5), got[len(got)-1])
		}
		equalPanels(t, s, want, c, ma, mb)
	}
}

// equalPanels holds products by panels, at once and by parts of the depth, against what MulAdd has to give.
func equalPanels(t require.TestingT, s *Set, want, c []float32, a, b Mat) {
	data := make([]float32, PanelsLen(b.Rows, b.Cols))
	for i := range data {
		data[i] = nan
	}
	p := s.NewPanels(data, b)
	for i := range p.Blocks() {
		p.Pack(i)
	}
	whole, parts := MatOf(slices.Clone(c), a.Rows, b.Cols), MatOf(slices.Clone(c), a.Rows, b.Cols)
	p.MulAdd(whole, a)
	require.True(t, slices.Equal(float32Bits(want), float32Bits(whole.Data)), "%s: panels of %d x %d", s.name, b.Rows,
		b.Cols)
	for k := 0; k < b.Rows; k += PanelsDepth {
		p.MulAddFrom(parts, a.Slice(0, a.Rows, k, min(k+PanelsDepth, b.Rows)), k)
	}
	require.True(t, slices.Equal(float32Bits(want), float32Bits(parts.Data)), "%s: parts of panels of %d x %d", s.name,
		b.Rows, b.Cols)
}

func TestMulAddShapes(t *testing.T) {
	for _, m := range []int{0, 1, 2, 3, 7, 8, 9, 16, 21} {
		for _, k := range []int{0, 1, 2, 7, 8, 9, 31} {
			for _, n := range []int{0, 1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 33, 47, 48, 49, 96, 101} {
				layoutA, layoutB := layouts[(m+n)%len(layouts)], layouts[(k+n/2)%len(layouts)]
				equalMulAdd(t, random(m*n, 1), random(m*k, 2), random(k*n, 3), m, k, n, layoutA, layoutB)
			}
		}
	}
}

// TestMulAddBlocks has shapes of several blocks in each direction.
func TestMulAddBlocks(t *testing.T) {
	for _, shape := range [][3]int{{3, 1111, 20}, {70, 130, 33}, {9, 260, 1100}, {65, 65, 200}, {11, 2, 2100},
		{2, 600, 260}} {
		m, k, n := shape[0], shape[1], shape[2]
		x, y, z := random(m*k, 2), random(k*n, 3), random(m*n, 1)
		for i, layout := range layouts {
			equalMulAdd(t, z, x, y, m, k, n, layout, layouts[(i+m)%len(layouts)])
		}
	}
}

var special = []float32{
	0, float32(math.Copysign(0, -1)), 1, -1, inf, -inf, nan, math.Float32frombits(0xffc12345),
	math.Float32frombits(0x7f800001),
	math.MaxFloat32, -math.MaxFloat32, 1e-45, -1e-45, 0x1p-126, -0x1p-126, 0x1.fffffcp-127, 0x1p-75, 0x1p-64, 0x1p64, 3,
	0x1.fffffep-1, 0x1.000002p0,
}

func TestMulAddSpecial(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	pick := func(n int) []float32 {
		x := make([]float32, n)
		for i := range x {
			x[i] = special[r.IntN(len(special))]
		}
		return x
	}
	for range 20 {
		equalMulAdd(t, pick(17*61), pick(17*1), pick(1*61), 17, 1, 61, "rows", "rows")
		equalMulAdd(t, pick(12*61), pick(12*3), pick(3*61), 12, 3, 61, "columns", "columns")
	}
}

func TestMulAddRapid(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m, k, n := rapid.IntRange(0, 40).Draw(t, "m"), rapid.IntRange(0, 70).Draw(t, "k"), rapid.IntRange(0, 130).Draw(t, "n")
		seed := rapid.Uint64().Draw(t, "seed")
		layout := rapid.SampledFrom(layouts)
		equalMulAdd(t, random(m*n, seed), random(m*k, seed+1), random(k*n, seed+2), m, k, n, layout.Draw(t, "a"),
			layout.Draw(t, "b"))
	})
}

// TestMulAddAtOnce writes parts of one matrix from parts of another in several goroutines.
func TestMulAddAtOnce(t *testing.T) {
	const n, parts = 96, 4
	a, b := MatOf(random(n*n, 1), n, n), MatOf(random(n*n, 2), n, n)
	want, got := NewMat(n, n), NewMat(n, n)
	mulAdd(want, a, b)
	var wait sync.WaitGroup
	for i := range parts {
		for j := range parts {
			wait.Go(func() {
				r0, r1, c0, c1 := i*n/parts, (i+1)*n/parts, j*n/parts, (j+1)*n/parts
				MulAdd(got.Slice(r0, r1, c0, c1), a.Slice(r0, r1, 0, n), b.Slice(0, n, c0, c1))
			})
		}
	}
	wait.Wait()
	require.True(t, slices.Equal(float32Bits(want.Data), float32Bits(got.Data)))
}

// TestPanelsAtOnce packs blocks and then writes rows of one matrix in several goroutines.
func TestPanelsAtOnce(t *testing.T) {
	const m, k, n = 50, 600, 700
	a, b := MatOf(random(m*k, 1), m, k), MatOf(random(k*n, 2), k, n)
	want := NewMat(m, n)
	MulAdd(want, a, b)
	for _, s := range Sets() {
		p, got := s.NewPanels(make([]float32, PanelsLen(k, n)), b), NewMat(m, n)
		var wait sync.WaitGroup
		for i := range p.Blocks() {
			wait.Go(func() { p.Pack(i) })
		}
		wait.Wait()
		for i := 0; i < m; i += 10 {
			wait.Go(func() { p.MulAdd(got.Slice(i, i+10, 0, n), a.Slice(i, i+10, 0, k)) })
		}
		wait.Wait()
		require.True(t, slices.Equal(float32Bits(want.Data), float32Bits(got.Data)), s.name)
	}
}

// TestPanelsRefused: what does not fit is refused before anything is written.
func TestPanelsRefused(t *testing.T) {
	require.Equal(t, 0, NewPanels(nil, NewMat(0, 5)).Blocks())
	require.Equal(t, 0, NewPanels(nil, NewMat(5, 0)).Blocks())
	b := NewMat(600, 20)
	for _, s := range Sets() {
		p, c := s.NewPanels(make([]float32, PanelsLen(600, 20)), b), NewMat(8, 20)
		for i := range p.Blocks() {
			p.Pack(i)
		}
		for _, run := range []func(){
			func() { s.NewPanels(make([]float32, 600*20), b) },
			func() {
				s.NewPanels(make([]float32, PanelsLen(600, 20)), Mat{Data: b.Data, Rows: 600, Cols: 20, RowStride: 21})
			},
			func() { p.Pack(p.Blocks()) },
			func() { p.MulAdd(c, NewMat(8, 599)) },
			func() { p.MulAdd(c, NewMat(7, 600)) },
			func() { p.MulAdd(NewMat(8, 19), NewMat(8, 600)) },
			func() { p.MulAdd(NewMat(20, 8).T(), NewMat(8, 600)) },
			func() { p.MulAddFrom(c, NewMat(8, 256), 1) },
			func() { p.MulAddFrom(c, NewMat(8, 256), -256) },
			func() { p.MulAddFrom(c, NewMat(8, 100), 256) },
			func() { p.MulAddFrom(c, NewMat(8, 256), 512) },
		} {
			require.Panics(t, run, s.name)
		}
		require.Equal(t, NewMat(8, 20), c)
	}
}

// exactFMA is x*y + z by math/big.
func exactFMA(x, y, z float32) float32 {
	wide := func(v float32) *big.Float { return new(big.Float).SetPrec(1000).SetFloat64(float64(v)) }
	sum := new(big.Float).SetPrec(1000).Mul(wide(x), wide(y))
	f, _ := sum.Add(sum, wide(z)).Float32()
	return f
}

// TestFMA holds the twin's fused multiply-add against exact sums, where rounding twice goes wrong: close to the
// middles between float32, normal and subnormal, and at the end of the range.
func TestFMA(t *testing.T) {
	require.Equal(t, float32(0x1.000002p0), fma((1+0x1p-23)*0x1p-12, (1-0x1p-23)*0x1p-12, 1+0x1p-23))
	r := rand.New(rand.NewPCG(9, 10))
	twice := 0
	check := func(x, y, z float32) {
		if x-x != 0 || y-y != 0 { // math/big has no NaN
			return
		}
		want := exactFMA(x, y, z)
		got := fma(x, y, z)
		require.True(t, want == got, // as numbers: math/big has its own sign of a zero
			"%x * %x + %x: %x, not %x", x, y, z, got, want)
		if want != float32(float64(x)*float64(y)+float64(z)) {
			twice++
		}
		for _, s := range Sets() {
			c := Mat{Data: []float32{z}, Rows: 1, Cols: 1, RowStride: 1, ColStride: 1}
			s.MulAdd(c, MatOf([]float32{x}, 1, 1), MatOf([]float32{y}, 1, 1))
			require.Equal(t, math.Float32bits(got), math.Float32bits(c.Data[0]), "%s: %x * %x + %x", s.name, x, y, z)
		}
	}
	for range 4000 {
		// The product is half of the last bit of z, a little more or less.
		near := 1 + math.Ldexp(float64(r.IntN(9)-4), -r.IntN(24))
		e := r.IntN(250) - 126
		z := math.Ldexp(1+float64(r.IntN(1<<23))*0x1p-23, e)
		half := math.Ldexp(1, max(e, -126)-24)
		if r.IntN(2) == 0 {
			half = -half
		}
		split := r.IntN(60) - 30
		x := float32(math.Ldexp(near, split))
		check(x, float32(half/float64(x)), float32(z))
		check(x, float32(math.Ldexp(half*(2-near), -split)), float32(z))

		// Results below the least normal float32.
		tiny := math.Ldexp(float64(r.IntN(1<<24)), -150+r.IntN(3))
		check(float32(math.Ldexp(near, -70)), float32(math.Ldexp(1+r.Float64(), r.IntN(30)-90)), float32(tiny))
		check(float32(math.Ldexp(near, -75)), float32(math.Ldexp(2-near, -75)), float32(tiny))

		// Around the middle between the largest float32 and infinity.
		check(float32(math.Ldexp(near, 50)), float32(math.Ldexp(2-near, 53)), math.MaxFloat32)
		check(-float32(math.Ldexp(near, 50)), float32(math.Ldexp(2-near, 53)), -math.MaxFloat32)
		check(math.Float32frombits(r.Uint32()&0xbfffffff), math.Float32frombits(r.Uint32()&0xbfffffff),
			math.Float32frombits(r.Uint32()&0xbfffffff))
	}
	require.Greater(t, twice, 100, "the search finds what two roundings get wrong")
}

func TestMatViews(t *testing.T) {
	m := MatOf([]float32{1, 2, 3, 4, 5, 6}, 2, 3)
	require.Equal(t, float32(6), m.at(1, 2))
	require.Equal(t, float32(6), m.T().at(2, 1))
	part := m.T().Slice(1, 3, 0, 2)
	require.Equal(t, []float32{2, 5, 3, 6}, []float32{part.at(0, 0), part.at(0, 1), part.at(1, 0), part.at(1, 1)})
	require.Equal(t, 0, m.Slice(2, 2, 0, 3).Rows)
	require.Len(t, NewMat(3, 4).Data, 12)
	require.Equal(t, 0, NewMat(3, 0).Cols)

	square := NewMat(4, 4)
	for _, run := range []func(){
		func() { MatOf(make([]float32, 5), 2, 3) },
		func() { MatOf(make([]float32, 6), -2, -3) },
		func() { MatOf(make([]float32, 6), 2, 0) },
		func() { MatOf(nil, -1, 0) },
		func() { m.Slice(0, 3, 0, 3) },
		func() { m.Slice(0, 2, 2, 1) },
		func() { m.Slice(-1, 2, 0, 1) },
		func() { MulAdd(square, NewMat(4, 3), NewMat(4, 4)) },
		func() { MulAdd(square, NewMat(3, 4), NewMat(4, 4)) },
		func() { MulAdd(square, NewMat(4, 4), NewMat(4, 3)) },
		func() { MulAdd(square.T(), square, square) },
		func() {
			MulAdd(Mat{Data: square.Data, Rows: 4, Cols: 4, RowStride: 3, ColStride: 1}, NewMat(4, 4), NewMat(4, 4))
		},
		func() {
			MulAdd(square, Mat{Data: square.Data[:15], Rows: 4, Cols: 4, RowStride: 4, ColStride: 1}, NewMat(4, 4))
		},
		func() {
			MulAdd(square, NewMat(4, 4), Mat{Data: square.Data, Rows: 4, Cols: 4, RowStride: 1 << 62, ColStride: 1})
		},
		func() {
			MulAdd(square, NewMat(4, 4), Mat{Data: square.Data, Rows: 4, Cols: 4, RowStride: -1, ColStride: 1})
		},
		func() { MulAdd(square, NewMat(4, 4), Mat{Rows: 4, Cols: 4}) },
	} {
		require.Panics(t, run)
	}
	require.Equal(t, NewMat(4, 4), square)
}

// products are the shapes that are measured: m, k, n.
var products = []struct {
	m, k, n    int
	transposed bool // a, in memory
}{
	{1024, 1024, 1024, false}, {2048, 2048, 2048, false}, {2048, 2048, 2048, true},
	{128, 1, 2048, false}, {128, 4, 2048, false}, {128, 8, 2048, false}, {128, 16, 2048, false}, {128, 32, 2048, false},
	{128, 64, 2048, false}, {128, 256, 2048, false},
	{128, 1, 5632, false}, {128, 4, 5632, false}, {128, 8, 5632, false}, {128, 16, 5632, false}, {128, 32, 5632, false},
	{128, 64, 5632, false}, {128, 256, 5632, false},
	{2048, 5632, 24, false}, {5632, 2048, 24, true}, {24, 2048, 5632, false},
}

// BenchmarkMulAdd counts a multiplication and an addition a step.
func BenchmarkMulAdd(b *testing.B) {
	for _, p := range products {
		name := fmt.Sprintf("%dx%dx%d", p.m, p.k, p.n)
		if p.transposed {
			name += "T"
		}
		for _, s := range Sets() {
			b.Run(name+"/"+s.name, func(b *testing.B) {
				x, y, z := MatOf(random(p.m*p.k, 1), p.m, p.k), MatOf(random(p.k*p.n, 2), p.k, p.n), NewMat(p.m, p.n)
				if p.transposed {
					x = MatOf(x.Data, p.k, p.m).T()
				}
				flops(b, 2*float64(p.m)*float64(p.k)*float64(p.n), func() { s.MulAdd(z, x, y) })
			})
		}
	}
}

// flops reports operations a second, in the fastest call.
func flops(b *testing.B, operations float64, call func()) {
	best := fastest(b, call)
	b.ReportMetric(operations/best.Seconds()/1e9, "best-GFLOP/s")
}

// steps are the products of a training step, by a tile of a weight and by the factors of a low rank: m, k, n, and the
// stride of a's rows, or of its columns where it is turned.
var steps = []struct {
	name    string
	m, k, n int
	stride  int
	turned  bool
}{
	{"forward", 64, 2048, 256, 2048 + 16, false}, {"forward", 64, 5632, 256, 5632 + 16, false},
	{"forward", 64, 2048, 512, 2048 + 16, false}, {"forward", 64, 2048, 2048, 2048 + 16, false},
	{"backward", 2048, 256, 256, 2048 + 16, true}, {"backward", 5632, 256, 256, 5632 + 16, true},
	{"backward", 2048, 256, 512, 2048 + 16, true}, {"backward", 2048, 256, 2048, 2048 + 16, true},
	{"backward", 2048, 64, 256, 2048 + 16, true}, {"backward", 2048, 128, 256, 2048 + 16, true},
	{"backward", 2048, 256, 256, 2048, true},
	{"A", 8, 2048, 256, 2048, false}, {"B", 2048, 8, 256, 8, false}, {"gB", 2048, 256, 8, 256, false},
	{"At", 2048, 8, 256, 2048, true}, {"Bt", 8, 2048, 256, 8, true}, {"gA", 8, 256, 2048, 256, false},
}

// BenchmarkPanels counts the multiplication and the addition of each step, without the packing.
func BenchmarkPanels(b *testing.B) {
	for _, p := range steps {
		for _, s := range Sets()[:len(Sets())-1] {
			b.Run(fmt.Sprintf("%s/%dx%dx%d+%d/%s", p.name, p.m, p.k, p.n, p.stride, s.name), func(b *testing.B) {
				rows := p.m
				if p.turned {
					rows = p.k
				}
				x := Mat{Data: random(rows*p.stride, 1), Rows: p.m, Cols: p.k, RowStride: p.stride, ColStride: 1}
				if p.turned {
					x.RowStride, x.ColStride = 1, p.stride
				}
				y, z := s.NewPanels(make([]float32, PanelsLen(p.k, p.n)), MatOf(random(p.k*p.n, 2), p.k, p.n)), NewMat(p.m, p.n)
				for i := range y.Blocks() {
					y.Pack(i)
				}
				flops(b, 2*float64(p.m)*float64(p.k)*float64(p.n), func() { y.MulAdd(z, x) })
			})
		}
	}
}
