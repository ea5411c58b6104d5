package svd

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
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
	for i := range rows {
		for j, x := range u.RawRowView(i) {
			u.Set(i, j, x*s[j])
		}
	}
	m := kernels.NewMat(rows, cols)
	kernels.MulAdd(m, small(u), small(v).T())
	return m.Data
}

func sum2(s []float64) (sum float64) {
	for _, v := range s {
		sum += v * v
	}
	return sum
}

// captured is the energy of m within the column space of d.V: ‖M·V‖².
func captured(data []float32, rows, cols int, d *Decomposition) float64 {
	y := kernels.NewMat(rows, len(d.S))
	kernels.MulAdd(y, kernels.MatOf(data, rows, cols), d.V)
	return kernels.SquaredNorm(y.Data)
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
		t.Fatalf("%d values (at most %d), U %d x %d, V %d x %d of a matrix of %d x %d", k, most, d.U.Rows, d.U.Cols, d.V.Rows,
			d.V.Cols, rows, cols)
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

// Spectra of all kinds, with rows and columns on either side of a tile and of a matrix that is held: what is missed of
// the energy that the best approximation of the rank holds.
func TestTruncatedCapturesWhatTheExactDoes(t *testing.T) {
	add := func(a, b []float32) []float32 {
		for i, v := range b {
			a[i] += v
		}
		return a
	}
	for _, shape := range [][2]int{{320, 256}, {300, 500}, {1400, 760}} {
		rows, cols := shape[0], shape[1]
		least := min(rows, cols)
		edge := 0.02 * (math.Sqrt(float64(rows)) + math.Sqrt(float64(cols)))
		noise := func() []float32 { return gaussian(17, rows*cols, 0.02) }
		cases := map[string][]float32{
			"noise":        noise(),
			"inverse":      spectrum(7, rows, cols, decay(least, func(i float64) float64 { return 1 / i })),
			"inverse root": spectrum(7, rows, cols, decay(least, func(i float64) float64 { return 1 / math.Sqrt(i) })),
			"fourth root":  spectrum(7, rows, cols, decay(least, func(i float64) float64 { return math.Pow(i, -0.25) })),
			"from strong to hidden": add(noise(), spectrum(3, rows, cols,
				decay(16, func(i float64) float64 { return 10 * edge * math.Pow(0.03, (i-1)/15) }))),
		}
		for _, factor := range []float64{0.3, 1, 3, 10, 1000} {
			cases[fmt.Sprint("signal ", factor)] = add(noise(), spectrum(3, rows, cols,
				decay(16, func(i float64) float64 { return factor * edge * math.Pow(0.9, i-1) })))
		}
		for name, data := range cases {
			if rows > 1000 && name != "noise" && name != "from strong to hidden" {
				continue // exact values of a matrix that is too large to be held take long
			}
			g := gram(kernels.MatOf(data, rows, cols), kernels.MatOf(data, rows, cols))
			exact, ok := tridiagonalize(g, cols).values()
			require.True(t, ok)
			for _, rank := range []int{4, 16, 64} {
				if rank == 4 && rows > 1000 {
					continue
				}
				d, err := Truncated(background, Dense(data, rows, cols), Options{Rank: rank})
				require.NoError(t, err)
				wellFormed(t, d, rows, cols, rank)
				require.Len(t, d.S, rank)
				best := 0.0
				for _, v := range exact[:rank] {
					best += v
				}
				got := captured(data, rows, cols, d)
				require.Less(t, (best-got)/best, 1e-4, "%s, %v, rank %d", name, shape, rank)
				require.InEpsilon(t, got, sum2(d.S), 1e-4)
				require.Less(t, sum2(d.S), got*(1+1e-5))
			}
		}
	}
}

// The product is that of an exact decomposition, at any rank.
func TestProductAgreesWithTheExact(t *testing.T) {
	const rows, cols = 360, 320
	for name, data := range map[string][]float32{
		"noise":    gaussian(5, rows*cols, 0.02),
		"slow":     spectrum(5, rows, cols, decay(cols, func(i float64) float64 { return 1 / math.Sqrt(i) })),
		"low rank": spectrum(5, rows, cols, decay(20, func(i float64) float64 { return 1 / i })),
	} {
		var f mat.SVD
		require.True(t, f.Factorize(wide(kernels.MatOf(data, rows, cols)), mat.SVDThin))
		var u, v mat.Dense
		f.UTo(&u)
		f.VTo(&v)
		product := func(u, v mat.Matrix, s []float64) *mat.Dense {
			var us, p mat.Dense
			us.Mul(u, mat.NewDiagDense(len(s), s))
			p.Mul(&us, v.T())
			return &p
		}
		for _, rank := range []int{8, 16, 48, 100} {
			d, err := Truncated(background, Dense(data, rows, cols), Options{Rank: rank, Product: 1e-3})
			require.NoError(t, err)
			wellFormed(t, d, rows, cols, rank)
			p := product(wide(d.U), wide(d.V), d.S)
			p.Sub(p, product(u.Slice(0, rows, 0, rank), v.Slice(0, cols, 0, rank), f.Values(nil)[:rank]))
			require.Less(t, mat.Norm(p, 2), 1e-3*math.Sqrt(d.Energy), "%s, rank %d", name, rank)
		}
	}
}

// Equal singular values, more of them than a block has columns: MᵀM leads from a block to itself.
func TestEqualValues(t *testing.T) {
	const n = 300
	data := make([]float32, n*n)
	for i := range n {
		data[i*n+i] = 2
	}
	for _, product := range []float64{0, 1e-3} {
		d, err := Truncated(background, Dense(data, n, n), Options{Rank: 50, Product: product})
		require.NoError(t, err)
		wellFormed(t, d, n, n, 50)
		require.Len(t, d.S, 50)
		require.InEpsilon(t, 200, sum2(d.S), 1e-5)
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
		data := gaussian(rapid.Uint64().Draw(t, "seed"), rows*cols,
			math.Pow(10, float64(rapid.IntRange(-18, 18).Draw(t, "scale"))))
		inner := rapid.IntRange(1, cols).Draw(t, "different columns")
		for i := range rows {
			for j := inner; j < cols; j++ {
				data[i*cols+j] = data[i*cols+j%inner]
			}
		}
		o := Options{Rank: rapid.IntRange(1, 20).Draw(t, "rank"), Block: rapid.IntRange(0, 20).Draw(t, "block"),
			Iterations: rapid.IntRange(0, 3).Draw(t, "iterations")}
		d, err := Truncated(background, Dense(data, rows, cols), o)
		if err != nil {
			t.Fatalf("%v", err)
		}
		wellFormed(t, d, rows, cols, o.Rank)
		if len(d.S) < min(o.Rank, inner, rows) {
			t.Fatalf("%d values of a matrix of rank %d", len(d.S), min(inner, rows))
		}
		// A process that is cut short holds no less than the values say. One vector at a time is late to part values that
		// lie close together.
		tolerance := 1e-4
		if o.Block == 1 {
			tolerance = 1e-3
		}
		if got := captured(data, rows, cols, d); sum2(d.S)-got > 1e-4*d.Energy || o.Iterations == 0 &&
			math.Abs(got-sum2(d.S)) > tolerance*d.Energy || got > d.Energy*(1+1e-5) {
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

// The process holds the matrix on its side and scaled; where it gives up, LAPACK takes the matrix as it is.
func TestEnergyOfAWideMatrixInSmallNumbers(t *testing.T) {
	for _, scale := range []float64{1, 1e-15, 1e15} {
		for _, dims := range [][2]int{{200, 1000}, {1000, 200}} {
			rows, cols := dims[0], dims[1]
			data := gaussian(3, rows*cols, scale)
			d, err := Energy(background, Dense(data, rows, cols), 0.9, 200, Options{})
			require.NoError(t, err)
			wellFormed(t, d, rows, cols, 200)
			require.InDelta(t, math.Sqrt(1-sum2(d.S)/d.Energy), relativeError(data, rows, cols, d), 1e-5)
			require.InDelta(t, 0.9, sum2(d.S)/d.Energy, 0.01)
		}
	}
}

func TestProduct(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rows, r, cols := rapid.IntRange(1, 50).Draw(t, "rows"), rapid.IntRange(1, 20).Draw(t, "r"),
			rapid.IntRange(1, 50).Draw(t, "cols")
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

// bits is a digest of decompositions that take every path through float32.
func bits(t *testing.T) string {
	h := sha256.New()
	for _, shape := range [][2]int{{300, 260}, {200, 400}, {1100, 960}} {
		data := difference(shape[0], shape[1])
		if shape[0] == 300 { // until the basis is full
			data = gaussian(9, shape[0]*shape[1], 1)
		}
		d, err := Truncated(background, Dense(data, shape[0], shape[1]), Options{Rank: 8, Seed: 3})
		require.NoError(t, err)
		for _, m := range []kernels.Mat{d.U, d.V} {
			require.NoError(t, binary.Write(h, binary.LittleEndian, m.Data))
		}
		require.NoError(t, binary.Write(h, binary.LittleEndian, d.S))
	}
	return hex.EncodeToString(h.Sum(nil))
}

// The kernels are chosen as a program starts, so a process for each set.
func TestSameBitsForAllKernels(t *testing.T) {
	const mark = "digest: "
	got := mark + bits(t)
	t.Log(got)
	if os.Getenv("LORAKIT_KERNELS") != "" {
		return
	}
	for _, set := range kernels.Available() {
		for _, threads := range []string{"1", "3"} {
			cmd := exec.Command(os.Args[0], "-test.run=^TestSameBitsForAllKernels$", "-test.v")
			cmd.Env = append(os.Environ(), "LORAKIT_KERNELS="+set, "GOMAXPROCS="+threads)
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			require.Contains(t, string(out), got, "%s with %s threads", set, threads)
		}
	}
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
