package svd

import (
	"math"
	"slices"

	"gonum.org/v1/gonum/mat"
)

// tridiagonal is a symmetric matrix A as Q·T·Qᵀ, for a tridiagonal T and a product Q of reflections. What is asked
// of a Krylov process between two passes is a few eigenvalues, and at its end a few eigenvectors; so both come from T,
// and the full set of vectors that LAPACK's driver makes is never formed. No sum is left to the order or the fused
// instructions of one machine: when a process stops is the same on all of them.
type tridiagonal struct {
	d, e    []float64   // the diagonal, and beside it
	reflect [][]float64 // each is 1 - v·vᵀ, of the leading rows
}

// tridiagonalize reduces the leading n x n part of a symmetric matrix, of which it reads the lower triangle.
func tridiagonalize(symmetric *mat.Dense, n int) *tridiagonal {
	t := &tridiagonal{d: make([]float64, n), e: make([]float64, max(0, n-1))}
	a := make([][]float64, n)
	data := make([]float64, n*(n+1)/2)
	for i := range a {
		a[i], data = data[:i+1], data[i+1:]
		copy(a[i], symmetric.RawRowView(i))
	}
	w := make([]float64, n)
	// From the last row up, so that the part that is left stays a leading one.
	for k := n - 1; k > 0; k-- {
		v := a[k][:k]
		t.d[k] = a[k][k]
		rest := dot(v[:k-1], v[:k-1])
		if rest == 0 {
			t.e[k-1] = v[k-1]
			t.reflect = append(t.reflect, nil)
			continue
		}
		norm := math.Sqrt(rest + float64(v[k-1]*v[k-1]))
		if v[k-1] > 0 {
			norm = -norm
		}
		t.e[k-1] = norm
		scale := 1 / math.Sqrt(norm*(norm-v[k-1])) // so that the reflection is 1 - v·vᵀ
		v[k-1] -= norm
		for i := range v {
			v[i] *= scale
		}
		// w = A·v, of the lower triangle alone.
		p := w[:k]
		for i := range p {
			row := a[i][:i]
			x, f := v[:i], v[i]
			p[i] = float64(a[i][i]*f) + dotAdd(row, x, p[:i], f)
		}
		f := dot(p, v) / 2
		for i := range p {
			p[i] -= float64(f * v[i])
		}
		for i := range p {
			row, x, y := a[i], v[i], p[i]
			u, z := v[:len(row)], p[:len(row)]
			for j := range row {
				row[j] -= float64(x*z[j]) + float64(y*u[j])
			}
		}
		t.reflect = append(t.reflect, v)
	}
	if n > 0 {
		t.d[0] = a[0][0]
	}
	return t
}

// dot returns the sum of x·y in four lanes.
func dot(x, y []float64) float64 {
	var a, b, c, d float64
	y = y[:len(x)]
	i := 0
	for ; i+4 <= len(x); i += 4 {
		a += float64(x[i] * y[i])
		b += float64(x[i+1] * y[i+1])
		c += float64(x[i+2] * y[i+2])
		d += float64(x[i+3] * y[i+3])
	}
	for ; i < len(x); i++ {
		a += float64(x[i] * y[i])
	}
	return (a + b) + (c + d)
}

// dotAdd returns the sum of x·y, and adds f·x to z.
func dotAdd(x, y, z []float64, f float64) float64 {
	var a, b float64
	y, z = y[:len(x)], z[:len(x)]
	i := 0
	for ; i+2 <= len(x); i += 2 {
		u, v := x[i], x[i+1]
		a += float64(u * y[i])
		b += float64(v * y[i+1])
		z[i] += float64(f * u)
		z[i+1] += float64(f * v)
	}
	if i < len(x) {
		a += float64(x[i] * y[i])
		z[i] += float64(f * x[i])
	}
	return a + b
}

// values returns all eigenvalues, falling, by the implicit QL iteration; ok is false if it does not converge.
func (t *tridiagonal) values() (s []float64, ok bool) {
	n := len(t.d)
	d := append([]float64(nil), t.d...)
	e := append(append([]float64(nil), t.e...), 0)
	for l := range n {
		for round := 0; ; round++ {
			m := l
			for m < n-1 && math.Abs(e[m]) > 0x1p-53*(math.Abs(d[m])+math.Abs(d[m+1])) {
				m++
			}
			if m == l {
				break
			}
			if round == 60 {
				return nil, false
			}
			g := (d[l+1] - d[l]) / (2 * e[l])
			g = d[m] - d[l] + e[l]/(g+math.Copysign(math.Sqrt(float64(g*g)+1), g))
			sin, cos, p := 1.0, 1.0, 0.0
			i := m - 1
			for ; i >= l; i-- {
				f, b := float64(sin*e[i]), float64(cos*e[i])
				r := math.Sqrt(float64(f*f) + float64(g*g))
				e[i+1] = r
				if r == 0 {
					d[i+1] -= p
					e[m] = 0
					break
				}
				sin, cos = f/r, g/r
				g = d[i+1] - p
				r = float64((d[i]-g)*sin) + float64(2*cos*b)
				p = float64(sin * r)
				d[i+1] = g + p
				g = float64(cos*r) - b
			}
			if i >= l {
				continue
			}
			d[l] -= p
			e[l], e[m] = g, 0
		}
	}
	slices.Sort(d)
	slices.Reverse(d)
	return d, true
}

// vectors returns the eigenvectors of A to the leading len(values) of its eigenvalues, as rows, by inverse iteration.
// Each is made orthogonal to those before it, for equal values have any vectors.
func (t *tridiagonal) vectors(values []float64) *mat.Dense {
	n := len(t.d)
	norm := 0.0
	for i, v := range t.d {
		norm = max(norm, math.Abs(v))
		if i < n-1 {
			norm = max(norm, math.Abs(t.e[i]))
		}
	}
	if norm == 0 {
		norm = 1
	}
	apart := float64(0x1p-50 * norm)
	s := mat.NewDense(len(values), n, nil)
	f := newFactors(n)
	shift := math.Inf(1)
	state := uint64(1)
	for k, value := range values {
		shift = min(value, shift-apart) // equal shifts would find the same vector
		f.factorize(t, shift, apart)
		x := s.RawRowView(k)
		for i := range x { // any start will do
			state = state*6364136223846793005 + 1442695040888963407
			x[i] = float64(state>>40)/(1<<24) - 0.5
		}
		for range 3 {
			f.solve(x)
			for range 2 { // what is left after once is no longer orthogonal where little is left
				for j := range k {
					y := s.RawRowView(j)
					c := dot(x, y)
					for i, v := range y {
						x[i] -= float64(c * v)
					}
				}
				normalize(x)
			}
		}
	}
	// Q·x: the last reflection first.
	for k := range values {
		x := s.RawRowView(k)
		for i := len(t.reflect) - 1; i >= 0; i-- {
			v := t.reflect[i]
			c := dot(v, x[:len(v)])
			for j, w := range v {
				x[j] -= float64(c * w)
			}
		}
	}
	return s
}

// normalize scales a vector, not of zeros, to length 1.
func normalize(x []float64) {
	largest := 0.0
	for _, v := range x {
		largest = max(largest, math.Abs(v))
	}
	if largest == 0 {
		return
	}
	for i := range x {
		x[i] /= largest
	}
	length := math.Sqrt(dot(x, x))
	for i := range x {
		x[i] /= length
	}
}

// factors is the LU decomposition, with rows exchanged, of a tridiagonal matrix less a shift.
type factors struct {
	u0, u1, u2, l []float64
	exchanged     []bool
}

func newFactors(n int) *factors {
	return &factors{make([]float64, n), make([]float64, n), make([]float64, n), make([]float64, n), make([]bool, n)}
}

func (f *factors) factorize(t *tridiagonal, shift, least float64) {
	n := len(t.d)
	diagonal, upper := t.d[0]-shift, 0.0
	if n > 1 {
		upper = t.e[0]
	}
	for i := range n - 1 {
		below, next, after := t.e[i], t.d[i+1]-shift, 0.0
		if i+2 < n {
			after = t.e[i+1]
		}
		if f.exchanged[i] = math.Abs(below) > math.Abs(diagonal); f.exchanged[i] {
			m := diagonal / below
			f.u0[i], f.u1[i], f.u2[i], f.l[i] = below, next, after, m
			diagonal, upper = upper-float64(m*next), float64(-m*after)
			continue
		}
		if math.Abs(diagonal) < least {
			diagonal = math.Copysign(least, diagonal)
		}
		m := below / diagonal
		f.u0[i], f.u1[i], f.u2[i], f.l[i] = diagonal, upper, 0, m
		diagonal, upper = next-float64(m*upper), after
	}
	if math.Abs(diagonal) < least {
		diagonal = math.Copysign(least, diagonal)
	}
	f.u0[n-1], f.u1[n-1], f.u2[n-1] = diagonal, 0, 0
}

func (f *factors) solve(x []float64) {
	n := len(x)
	for i := range n - 1 {
		if f.exchanged[i] {
			x[i], x[i+1] = x[i+1], x[i]
		}
		x[i+1] -= float64(f.l[i] * x[i])
	}
	for i := n - 1; i >= 0; i-- {
		v := x[i]
		if i+1 < n {
			v -= float64(f.u1[i] * x[i+1])
		}
		if i+2 < n {
			v -= float64(f.u2[i] * x[i+2])
		}
		x[i] = v / f.u0[i]
	}
}
