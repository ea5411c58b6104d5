package svd

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/stretchr/testify/require"
	"gonum.org/v1/gonum/mat"
	"pgregory.net/rapid"
)

var background = context.Background()

func gaussian(seed uint64, n int, scale float64) []float32 {
	r := rand.New(rand.NewPCG(seed, 1))
	data := make([]float32, n)
	for i := range data {
		data[i] = float32(r.NormFloat64() * scale)
	}
	return data
}

// basis returns n random orthonormal columns.
func basis(seed uint64, rows, n int) *mat.Dense {
	q, _ := householder(wide(kernels.MatOf(gaussian(seed, rows*n, 1), rows, n)))
	return q
}

// spectrum returns U·diag(s)·Vᵀ for random orthonormal U and V.
func spectrum(seed uint64, rows, cols int, s []float64) []float32 {
	u, v := basis(seed, rows, len(s)), basis(seed+1, cols, len(s))
	var us, m mat.Dense
	us.Mul(u, mat.NewDiagDense(len(s), s))
	m.Mul(&us, v.T())
	return small(&m).Data
}

func sum2(s []float64) (sum float64) {
	for _, v := range s {
		sum += v * v
	}
	return sum
}

// captured is the energy of m within the column space of d.V: ‖M·V‖².
func captured(data []float32, rows, cols int, d *Decomposition) float64 {
	var y mat.Dense
	y.Mul(wide(kernels.MatOf(data, rows, cols)), wide(d.V))
	n := mat.Norm(&y, 2)
	return n * n
}

// relativeError is ‖M - U·diag(S)·Vᵀ‖ / ‖M‖.
func relativeError(data []float32, rows, cols int, d *Decomposition) float64 {
	m := wide(kernels.MatOf(data, rows, cols))
	norm := mat.Norm(m, 2)
	if len(d.S) > 0 {
		var us, p mat.Dense
		us.Mul(wide(d.U), mat.NewDiagDense(len(d.S), d.S))
		p.Mul(&us, wide(d.V).T())
		m.Sub(m, &p)
	}
	return mat.Norm(m, 2) / norm
}

type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// wellFormed checks shapes, order, orthonormal columns and signs.
func wellFormed(t fataler, d *Decomposition, rows, cols, most int) {
	t.Helper()
	k := len(d.S)
	if k > most || d.U.Rows != rows || d.V.Rows != cols || d.U.Cols != k || d.V.Cols != k {
		t.Fatalf("%d values (at most %d), U %d x %d, V %d x %d of a matrix of %d x %d", k, most, d.U.Rows, d.U.Cols, d.V.Rows, d.V.Cols, rows, cols)
	}
	for i, s := range d.S {
		if !(s > 0) || i > 0 && s > d.S[i-1] {
			t.Fatalf("singular values %v", d.S)
		}
	}
	for _, m := range []kernels.Mat{d.U, d.V} {
		if k == 0 {
			break
		}
		w := wide(m)
		var g mat.Dense
		g.Mul(w.T(), w)
		for i := range k {
			for j := range k {
				want := 0.0
				if i == j {
					want = 1
				}
				if got := g.At(i, j); !(math.Abs(got-want) < 2e-5) {
					t.Fatalf("columns %d and %d: product %v", i, j, got)
				}
			}
		}
	}
	for j := range k {
		largest := float32(0)
		for i := range rows {
			if v := d.U.Data[i*d.U.RowStride+j*d.U.ColStride]; max(v, -v) > max(largest, -largest) {
				largest = v
			}
		}
		if largest <= 0 {
			t.Fatalf("column %d of U: largest entry %v", j, largest)
		}
	}
}

func decay(n int, f func(i float64) float64) []float64 {
	s := make([]float64, n)
	for i := range s {
		s[i] = f(float64(i + 1))
	}
	return s
}

// A few strong directions above noise: what a fine-tuned difference looks like.
func TestTruncatedCapturesWhatTheExactDoes(t *testing.T) {
	const rank = 16
	for _, c := range []struct {
		name       string
		rows, cols int
		s          []float64
		iterations int
		missing    float64
	}{
		{"inverse", 320, 256, decay(256, func(i float64) float64 { return 1 / i }), 0, 1e-5},
		{"inverse root", 300, 256, decay(256, func(i float64) float64 { return 1 / math.Sqrt(i) }), 0, 1e-3},
		{"inverse root, one more iteration", 300, 256, decay(256, func(i float64) float64 { return 1 / math.Sqrt(i) }), 4, 1e-4},
		{"strong over slow noise", 256, 400, decay(256, func(i float64) float64 {
			if i <= 8 {
				return 4 - i/4
			}
			return 0.3 * math.Exp(-i/200)
		}), 0, 1e-3},
		{"the same, more iterations", 256, 400, decay(256, func(i float64) float64 {
			if i <= 8 {
				return 4 - i/4
			}
			return 0.3 * math.Exp(-i/200)
		}), 6, 1e-4},
		{"fourth root", 400, 300, decay(300, func(i float64) float64 { return math.Pow(i, -0.25) }), 0, 1e-2},
	} {
		t.Run(c.name, func(t *testing.T) {
			data := spectrum(7, c.rows, c.cols, c.s)
			d, err := Truncated(background, Dense(data, c.rows, c.cols), Options{Rank: rank, Iterations: c.iterations})
			require.NoError(t, err)
			wellFormed(t, d, c.rows, c.cols, rank)
			require.Len(t, d.S, rank)
			best := sum2(c.s[:rank])
			missing := (best - captured(data, c.rows, c.cols, d)) / best
			t.Logf("missing %.1e", missing)
			require.Less(t, missing, c.missing)
			require.InEpsilon(t, sum2(c.s), d.Energy, 1e-5)
			require.InEpsilon(t, captured(data, c.rows, c.cols, d), sum2(d.S), 1e-5)
		})
	}
}

func TestTruncatedRecoversLowRank(t *testing.T) {
	for _, shape := range [][2]int{{500, 300}, {300, 500}, {70, 1000}, {1000, 70}, {90, 80}} {
		for _, rank := range []int{1, 7, 16} {
			for name, s := range map[string][]float64{
				"flat":  decay(rank, func(float64) float64 { return 1e-3 }),
				"steep": decay(rank, func(i float64) float64 { return math.Pow(10, -i/4) }),
				"tiny":  decay(rank, func(i float64) float64 { return 1e-30 / i }),
				"huge":  decay(rank, func(i float64) float64 { return 1e30 / i }),
			} {
				t.Run(fmt.Sprint(shape, rank, name), func(t *testing.T) {
					data := spectrum(3, shape[0], shape[1], s)
					d, err := Truncated(background, Dense(data, shape[0], shape[1]), Options{Rank: 16})
					require.NoError(t, err)
					wellFormed(t, d, shape[0], shape[1], 16)
					require.Less(t, relativeError(data, shape[0], shape[1], d), 1e-5)
					for i, want := range s {
						require.InDelta(t, want, d.S[i], 1e-5*s[0])
					}
				})
			}
		}
	}
}

func TestSmallMatricesAreExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rows, cols := rapid.IntRange(1, 40).Draw(t, "rows"), rapid.IntRange(1, 40).Draw(t, "cols")
		data := make([]float32, rows*cols)
		for i := range data {
			data[i] = rapid.Float32Range(-1e3, 1e3).Draw(t, "v")
		}
		rank := rapid.IntRange(1, min(rows, cols)).Draw(t, "rank")
		d, err := Truncated(background, Dense(data, rows, cols), Options{Rank: rank})
		if err != nil {
			t.Fatalf("%v", err)
		}
		wellFormed(t, d, rows, cols, rank)
		var f mat.SVD
		f.Factorize(wide(kernels.MatOf(data, rows, cols)), mat.SVDNone)
		want := f.Values(nil)
		for i, s := range d.S {
			if math.Abs(s-want[i]) > 1e-9*want[0] {
				t.Fatalf("value %d is %v, expected %v", i, s, want[i])
			}
		}
		if math.Abs(d.Energy-sum2(want)) > 1e-9*d.Energy {
			t.Fatalf("energy %v, expected %v", d.Energy, sum2(want))
		}
		v, err := Values(background, Dense(data, rows, cols), Options{})
		if err != nil || !v.Complete || len(v.S) != len(want) {
			t.Fatalf("%v, %v", v, err)
		}
		for i := range want {
			if math.Abs(v.S[i]-want[i]) > 2e-7*want[0] {
				t.Fatalf("of all, value %d is %v, expected %v", i, v.S[i], want[i])
			}
		}
	})
}

// The Krylov process on matrices of any shape, with columns that repeat.
func TestKrylovIsWellFormed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rows, cols := rapid.IntRange(65, 300).Draw(t, "rows"), rapid.IntRange(65, 300).Draw(t, "cols")
		data := gaussian(rapid.Uint64().Draw(t, "seed"), rows*cols, math.Pow(10, float64(rapid.IntRange(-18, 18).Draw(t, "scale"))))
		inner := rapid.IntRange(1, cols).Draw(t, "different columns")
		for i := range rows {
			for j := inner; j < cols; j++ {
				data[i*cols+j] = data[i*cols+j%inner]
			}
		}
		o := Options{Rank: rapid.IntRange(1, 20).Draw(t, "rank"), Block: rapid.IntRange(0, 20).Draw(t, "block"), Iterations: rapid.IntRange(0, 3).Draw(t, "iterations")}
		d, err := Truncated(background, Dense(data, rows, cols), o)
		if err != nil {
			t.Fatalf("%v", err)
		}
		wellFormed(t, d, rows, cols, o.Rank)
		if len(d.S) < min(o.Rank, inner, rows) {
			t.Fatalf("%d values of a matrix of rank %d", len(d.S), min(inner, rows))
		}
		if got := captured(data, rows, cols, d); math.Abs(got-sum2(d.S)) > 1e-4*d.Energy || got > d.Energy*(1+1e-5) {
			t.Fatalf("values hold %v, vectors %v, of %v", sum2(d.S), got, d.Energy)
		}
	})
}

func TestEnergyFindsTheRank(t *testing.T) {
	const rows, cols = 420, 360
	for name, s := range map[string][]float64{
		"inverse":      decay(cols, func(i float64) float64 { return 1 / i }),
		"inverse root": decay(cols, func(i float64) float64 { return 1 / math.Sqrt(i) }),
		"exponential":  decay(cols, func(i float64) float64 { return math.Exp(-i / 30) }),
		"rank 40":      decay(40, func(i float64) float64 { return 1 + 1/i }),
	} {
		data := spectrum(11, rows, cols, s)
		for _, share := range []float64{0.3, 0.7, 0.9, 0.95, 0.99, 1} {
			want := RankFor(s, sum2(s), share)
			d, err := Energy(background, Dense(data, rows, cols), share, cols, Options{})
			require.NoError(t, err)
			wellFormed(t, d, rows, cols, cols)
			t.Logf("%s, %v: rank %d, exact %d", name, share, len(d.S), want)
			require.GreaterOrEqual(t, sum2(d.S), (share-2e-6)*d.Energy)
			require.GreaterOrEqual(t, len(d.S), want-cols/100)
			require.LessOrEqual(t, len(d.S), want+1+want/20)
			d, err = Energy(background, Dense(data, rows, cols), share, 10, Options{Rank: 3})
			require.NoError(t, err)
			require.InDelta(t, min(10, want), len(d.S), 1)
		}
	}
}

func TestProduct(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rows, r, cols := rapid.IntRange(1, 50).Draw(t, "rows"), rapid.IntRange(1, 20).Draw(t, "r"), rapid.IntRange(1, 50).Draw(t, "cols")
		left := kernels.MatOf(gaussian(rapid.Uint64().Draw(t, "seed"), rows*r, 1), rows, r)
		right := kernels.MatOf(gaussian(rapid.Uint64().Draw(t, "seed"), r*cols, 1e-3), cols, r).T()
		if rapid.Bool().Draw(t, "dependent") {
			for i := range rows {
				left.Data[i*r+r-1] = left.Data[i*r]
			}
		}
		d, err := Product(left, right)
		if err != nil {
			t.Fatalf("%v", err)
		}
		wellFormed(t, d, rows, cols, min(rows, r, cols))
		var m mat.Dense
		m.Mul(wide(left), wide(right))
		var f mat.SVD
		f.Factorize(&m, mat.SVDNone)
		for i, s := range d.S {
			if want := f.Values(nil)[i]; math.Abs(s-want) > 1e-12*d.S[0] {
				t.Fatalf("value %d is %v, expected %v", i, s, want)
			}
		}
		var us, p mat.Dense
		us.Mul(wide(d.U), mat.NewDiagDense(len(d.S), d.S))
		p.Mul(&us, wide(d.V).T())
		p.Sub(&p, &m)
		if e := mat.Norm(&p, 2); e > 1e-6*mat.Norm(&m, 2) {
			t.Fatalf("off by %v", e)
		}
	})
}

func TestQRIsLAPACKs(t *testing.T) {
	for _, shape := range [][3]int{{60, 40, 8}, {40, 60, 8}, {50, 50, 50}, {300, 200, 32}, {1, 5, 1}, {5, 1, 1}} {
		rows, cols, k := shape[0], shape[1], shape[2]
		data := gaussian(5, rows*cols, 0.02)
		q, r, err := QR(background, Dense(data, rows, cols), k)
		require.NoError(t, err)
		wantQ, wantR := householder(wide(kernels.MatOf(data, rows, cols)))
		for i := range rows {
			for j := range k {
				require.InDelta(t, wantQ.At(i, j), q.Data[i*k+j], 1e-6)
			}
		}
		for i := range k {
			for j := range cols {
				require.InDelta(t, wantR.At(i, j), r.Data[i*cols+j], 1e-6)
			}
		}
	}
	// By hand: (3, 4) has length 5, and LAPACK turns it to the other side.
	q, r, err := QR(background, Dense([]float32{3, 1, 4, 2}, 2, 2), 1)
	require.NoError(t, err)
	require.InDeltaSlice(t, []float32{-0.6, -0.8}, q.Data, 1e-7)
	require.InDeltaSlice(t, []float32{-5, -2.2}, r.Data, 1e-6)
}

func TestValuesOfWideAndTall(t *testing.T) {
	s := decay(130, func(i float64) float64 { return 1 / i })
	for _, shape := range [][2]int{{130, 9000}, {9000, 130}} {
		data := spectrum(2, shape[0], shape[1], s)
		v, err := Values(background, Dense(data, shape[0], shape[1]), Options{})
		require.NoError(t, err)
		require.True(t, v.Complete)
		require.InDeltaSlice(t, s, v.S, 1e-6)
		require.InEpsilon(t, sum2(s), v.Energy, 1e-6)
	}
}

func TestNumbersOfASpectrum(t *testing.T) {
	require.InDelta(t, 5, EffectiveRank([]float64{2, 2, 2, 2, 2}), 1e-12)
	require.InDelta(t, 1, EffectiveRank([]float64{3, 0, 0}), 1e-12)
	// p = 1/2, 1/4, 1/4: entropy 1.5 ln 2.
	require.InDelta(t, math.Pow(2, 1.5), EffectiveRank([]float64{2, 1, 1}), 1e-12)
	require.Zero(t, EffectiveRank([]float64{0, 0}))
	require.Zero(t, EffectiveRank(nil))
	require.InDelta(t, 1.5, StableRank([]float64{2, 1, 1}, 6), 1e-12)
	require.Zero(t, StableRank(nil, 0))
	s := []float64{3, 2, 1}
	require.Equal(t, 1, RankFor(s, 14, 9.0/14))
	require.Equal(t, 2, RankFor(s, 14, 0.65))
	require.Equal(t, 3, RankFor(s, 14, 1))
	require.Equal(t, 4, RankFor(s, 28, 0.9))
	require.Zero(t, RankFor(nil, 0, 0.9))
}

func TestZeros(t *testing.T) {
	for _, shape := range [][2]int{{3, 4}, {300, 400}} {
		rows, cols := shape[0], shape[1]
		m := Dense(make([]float32, rows*cols), rows, cols)
		d, err := Truncated(background, m, Options{Rank: 2})
		require.NoError(t, err)
		wellFormed(t, d, rows, cols, 0)
		require.Zero(t, d.Energy)
		d, err = Energy(background, m, 0.9, 2, Options{})
		require.NoError(t, err)
		wellFormed(t, d, rows, cols, 0)
		v, err := Values(background, m, Options{})
		require.NoError(t, err)
		require.Equal(t, make([]float64, rows), v.S)
	}
	d, err := Product(kernels.NewMat(20, 4), kernels.MatOf(gaussian(1, 40, 1), 4, 10))
	require.NoError(t, err)
	wellFormed(t, d, 20, 10, 0)
	q, r, err := QR(background, Dense(make([]float32, 12), 4, 3), 2)
	require.NoError(t, err)
	require.Equal(t, []float32{1, 0, 0, 1, 0, 0, 0, 0}, q.Data)
	require.Equal(t, make([]float32, 6), r.Data)
}

// broken fails after some rows, or counts them.
type broken struct {
	Matrix
	err    error
	cancel func()
}

func (b broken) ReadRows(dst []float32, lo, hi int) error {
	if lo > 0 && b.err != nil {
		return b.err
	}
	if b.cancel != nil {
		b.cancel()
	}
	return b.Matrix.ReadRows(dst, lo, hi)
}

func TestBadInput(t *testing.T) {
	const rows, cols = 2000, 300
	good := gaussian(1, rows*cols, 1)
	all := func(ctx context.Context, m Matrix, rank int) map[string]error {
		_, truncated := Truncated(ctx, m, Options{Rank: rank})
		_, energy := Energy(ctx, m, 0.9, rank, Options{})
		_, _, qr := QR(ctx, m, rank)
		return map[string]error{"Truncated": truncated, "Energy": energy, "QR": qr}
	}
	for name, err := range all(background, Dense(good, rows, cols), 301) {
		require.ErrorIs(t, err, ErrRank, name)
		require.ErrorContains(t, err, "301", name)
		require.ErrorContains(t, err, "2000 x 300", name)
	}
	for name, err := range all(background, Dense(nil, 0, 5), 1) {
		require.ErrorIs(t, err, ErrShape, name)
	}
	for name, err := range all(background, Dense(good, rows, cols), 0) {
		require.ErrorIs(t, err, ErrRank, name)
	}
	for _, v := range []float64{math.NaN(), math.Inf(1), math.Inf(-1)} {
		for _, shape := range [][2]int{{rows, cols}, {rows * cols / 10, 10}} {
			data := append([]float32(nil), good...)
			data[len(data)-2] = float32(v)
			for name, err := range all(background, Dense(data, shape[0], shape[1]), 4) {
				require.ErrorIs(t, err, ErrNonFinite, name)
				require.ErrorContains(t, err, fmt.Sprintf("row %d, column %d", shape[0]-1, shape[1]-2), name)
			}
			_, err := Values(background, Dense(data, shape[0], shape[1]), Options{})
			require.ErrorIs(t, err, ErrNonFinite)
		}
		bad := kernels.MatOf([]float32{1, float32(v)}, 2, 1)
		_, err := Product(bad, bad.T())
		require.ErrorIs(t, err, ErrNonFinite)
	}
	reason := errors.New("disk on fire")
	for name, err := range all(background, broken{Matrix: Dense(good, rows, cols), err: reason}, 4) {
		require.ErrorIs(t, err, reason, name)
	}
	ctx, cancel := context.WithCancel(background)
	for name, err := range all(ctx, broken{Matrix: Dense(good, rows, cols), cancel: cancel}, 4) {
		require.ErrorIs(t, err, context.Canceled, name)
	}
	_, err := Product(kernels.NewMat(2, 3), kernels.NewMat(2, 3))
	require.ErrorIs(t, err, ErrShape)
	_, err = Energy(background, Dense(good, rows, cols), math.NaN(), 3, Options{})
	require.Error(t, err)
}

func TestSameBits(t *testing.T) {
	data := gaussian(9, 700*500, 1)
	o := Options{Rank: 8, Seed: 3}
	first, err := Truncated(background, Dense(data, 700, 500), o)
	require.NoError(t, err)
	again := make(chan *Decomposition, 4)
	for range cap(again) {
		go func() {
			d, _ := Truncated(background, Dense(data, 700, 500), o)
			again <- d
		}()
	}
	for range cap(again) {
		require.Equal(t, first, <-again)
	}
	other, err := Truncated(background, Dense(data, 700, 500), Options{Rank: 8, Seed: 4})
	require.NoError(t, err)
	require.NotEqual(t, first.V, other.V)
}
