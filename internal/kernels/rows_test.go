package kernels

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/lorakit/lorakit/internal/kernels/race"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// reference is the rule of MergeRow, one element after the other, with sums of sixteen lanes that are added in halves.
type reference struct {
	ed, dd [16]float64
	n      int
}

func (r *reference) add(out, base, total, delta float32) {
	e := (float64(out) - float64(base)) - float64(total)
	r.ed[r.n%16] = math.FMA(e, float64(delta), r.ed[r.n%16])
	r.dd[r.n%16] = math.FMA(float64(delta), float64(delta), r.dd[r.n%16])
	r.n++
}

func halves(l [16]float64) float64 {
	four := func(i int) float64 { return (l[i] + l[i+8]) + (l[i+4] + l[i+12]) }
	return (four(0) + four(2)) + (four(1) + four(3))
}

// sameSum compares bits; there is one NaN.
func sameSum(t require.TestingT, want, got float64, message ...any) {
	if want != want {
		want = math.NaN()
	}
	require.Equal(t, math.Float64bits(want), math.Float64bits(got), message...)
}

// equalMergeRow holds all sets against the rule.
func equalMergeRow(t require.TestingT, src []byte, from Float, delta []float32, scale float32) {
	src = unaligned(src)
	for _, to := range types {
		want := make([]byte, len(delta)*to.Size())
		var r reference
		for i, v := range delta {
			base, d := widen(load(src, from, i), from), float32(scale*v)
			store(want, to, i, number(base+d))
			r.add(widen(load(want, to, i), to), base, d, d)
		}
		for _, s := range Sets() {
			got := output(len(want))
			ed, dd := s.MergeRow(got, to, src, from, delta, scale)
			require.Equal(t, want, got, "%s: %v to %v", s.name, from, to)
			require.True(t, intact(got), "%s: %v to %v", s.name, from, to)
			sameSum(t, halves(r.ed), ed, "%s: %v to %v", s.name, from, to)
			sameSum(t, halves(r.dd), dd, "%s: %v to %v", s.name, from, to)
			if to == from {
				got := slices.Clone(src)
				again, _ := s.MergeRow(got, to, got, from, delta, scale)
				require.Equal(t, want, got, "%s: %v in place", s.name, from)
				sameSum(t, ed, again)
			}
		}
	}
}

// equalSums holds the float32 loops of all sets against the rule.
func equalSums(t require.TestingT, out, base, all, delta []float32, scale float32) {
	n := len(out)
	var r, norm reference
	sum := make([]float32, n)
	for i := range n {
		r.add(out[i], base[i], all[i], delta[i])
		norm.add(out[i], 0, 0, base[i])
		sum[i] = number(base[i] + float32(scale*delta[i]))
	}
	for _, s := range Sets() {
		ed, dd := s.Kept(out, base, all, delta)
		sameSum(t, halves(r.ed), ed, s.name)
		sameSum(t, halves(r.dd), dd, s.name)
		sameSum(t, halves(r.dd), s.Dot(delta, delta), s.name)
		sameSum(t, halves(norm.ed), s.Dot(out, base), s.name)
		dst := outputFloats(n)
		s.AddScaled(dst, base, delta, scale)
		require.True(t, slices.Equal(float32Bits(sum), float32Bits(dst)), s.name)
		require.True(t, intactFloats(dst), s.name)
		dst = slices.Clone(base)
		s.AddScaled(dst, dst, delta, scale)
		require.True(t, slices.Equal(float32Bits(sum), float32Bits(dst)), "%s in place", s.name)
	}
	sameSum(t, halves(r.dd), SquaredNorm(delta))
}

func TestRowsEqualTwin(t *testing.T) {
	for _, n := range lengths {
		delta := random(n, 3)
		for _, f := range types {
			equalMergeRow(t, encode(f, random(n, uint64(n))...), f, delta, 0.01)
		}
		equalSums(t, random(n, 1), random(n, 2), random(n, 4), delta, -1.7)
	}
}

// TestMergeRowSpecial merges what a file may hold: every 16-bit pattern, and pairs of special values.
func TestMergeRowSpecial(t *testing.T) {
	src := make([]byte, 2<<16)
	for i := range 1 << 16 {
		binary.LittleEndian.PutUint16(src[2*i:], uint16(i))
	}
	delta := random(1<<16, 6)
	for _, f := range []Float{F16, BF16} {
		equalMergeRow(t, src, f, delta, 1)
		equalMergeRow(t, src, f, delta, 0x1p-20)
	}
	r := rand.New(rand.NewPCG(1, 1))
	for range 200 {
		n := r.IntN(100)
		x, d := make([]float32, n), make([]float32, n)
		for i := range x {
			x[i], d[i] = special[r.IntN(len(special))], special[r.IntN(len(special))]
		}
		scale := special[r.IntN(len(special))]
		for _, f := range types {
			equalMergeRow(t, encode(f, x...), f, d, scale)
		}
		equalSums(t, x, d, d, x, scale)
	}
}

func TestRowsRapid(t *testing.T) {
	values := rapid.Custom(func(t *rapid.T) float32 { return math.Float32frombits(rapid.Uint32().Draw(t, "bits")) })
	rapid.Check(t, func(t *rapid.T) {
		delta := rapid.SliceOfN(values, 0, 70).Draw(t, "delta")
		rows := rapid.SliceOfN(values, len(delta), len(delta))
		base, out, scale := rows.Draw(t, "base"), rows.Draw(t, "out"), values.Draw(t, "scale")
		for _, f := range types {
			equalMergeRow(t, encode(f, base...), f, delta, scale)
		}
		equalSums(t, out, base, delta, delta, scale)
	})
}

// TestMergeRowKept holds the sums against exact ones, and shows what they are for: a delta far below the last bit of
// the weights is lost, a large one stays.
func TestMergeRowKept(t *testing.T) {
	base := encode(BF16, random(5000, 1)...)
	for _, c := range []struct{ size, low, high float64 }{{1, 0.9999, 1.0001}, {0x1p-30, 0, 0.01}} {
		delta := random(5000, 2)
		dst := make([]byte, len(base))
		ed, dd := MergeRow(dst, BF16, base, BF16, delta, float32(c.size))
		exactED, exactDD := new(big.Float).SetPrec(300), new(big.Float).SetPrec(300)
		for i, v := range delta {
			d := float64(float32(float32(c.size) * v))
			e := float64(widen(load(dst, BF16, i), BF16)) - float64(widen(load(base, BF16, i), BF16)) - d
			exactED.Add(exactED, new(big.Float).SetPrec(300).Mul(big.NewFloat(e), big.NewFloat(d)))
			exactDD.Add(exactDD, new(big.Float).SetPrec(300).Mul(big.NewFloat(d), big.NewFloat(d)))
		}
		want, _ := exactED.Float64()
		require.InEpsilon(t, want, ed, 1e-9)
		want, _ = exactDD.Float64()
		require.InEpsilon(t, want, dd, 1e-12)
		share := 1 + ed/dd
		require.True(t, c.low <= share && share <= c.high, "%v kept of a delta of %v", share, c.size)
	}
}

func TestRowsPanic(t *testing.T) {
	b, f := make([]byte, 64), make([]float32, 16)
	for _, run := range []func(){
		func() { MergeRow(b[:32], BF16, b[:32], BF16, f[:15], 1) },
		func() { MergeRow(b[:32], BF16, b[:30], BF16, f, 1) },
		func() { MergeRow(b[:30], BF16, b[:32], BF16, f, 1) },
		func() { MergeRow(b[:31], BF16, b[:32], BF16, f, 1) },
		func() { MergeRow(b, F32, b[:32], F32, f, 1) },
		func() { MergeRow(b[:32], floats, b[:32], BF16, f, 1) },
		func() { AddScaled(f, f[:15], f, 1) },
		func() { AddScaled(f, f, f[:15], 1) },
		func() { AddScaled(f[:15], f, f, 1) },
		func() { Kept(f, f[:15], f, f) },
		func() { Kept(f, f, f[:15], f) },
		func() { Kept(f, f, f, f[:15]) },
		func() { Kept(f[:15], f, f, f) },
		func() { active.Dot(f, f[:15]) },
	} {
		require.Panics(t, run)
	}
	require.Equal(t, make([]byte, 64), b)
}

// TestNothingAllocated runs what a merge calls for every row and tile.
func TestNothingAllocated(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector empties pools at will")
	}
	row := encode(BF16, random(1000, 1)...)
	x, y, c := MatOf(random(16*40, 1), 16, 40), MatOf(random(40*100, 2), 40, 100), NewMat(16, 100)
	delta := random(1000, 3)
	for _, s := range Sets() {
		allocated := testing.AllocsPerRun(100, func() {
			s.MulAdd(c, x, y)
			s.MergeRow(row, BF16, row, BF16, delta, 1e-3)
			s.AddScaled(delta, delta, delta, -1e-3)
			s.Kept(delta, delta, delta, delta)
			s.Dot(delta, delta)
		})
		require.Zero(t, allocated, s.name)
	}
}

// BenchmarkMergeRow counts the bytes that are read and written. The rows of a buffer are merged one after the other
// with the same delta.
func BenchmarkMergeRow(b *testing.B) {
	const cols = 4096
	for _, pair := range [][2]Float{{BF16, BF16}, {F16, F16}, {F32, F32}, {F32, BF16}} {
		from, to := pair[0], pair[1]
		b.Run(fmt.Sprintf("%vTo%v", from, to), func(b *testing.B) {
			everySet(b, []Float{from}, func(s *Set, f Float, size int) func() {
				n := size / (f.Size() + to.Size()) / cols
				src, dst, delta := weights(n*cols*f.Size(), f), make([]byte, n*cols*to.Size()), random(cols, 1)
				return func() {
					for r := range n {
						s.MergeRow(dst[r*cols*to.Size():][:cols*to.Size()], to, src[r*cols*f.Size():][:cols*f.Size()], f, delta, 0.001)
					}
				}
			})
		})
	}
}

// BenchmarkRows counts the bytes that are read and written.
func BenchmarkRows(b *testing.B) {
	for _, loop := range []struct {
		name   string
		slices int
		call   func(s *Set, x [4][]float32)
	}{
		{"AddScaled", 3, func(s *Set, x [4][]float32) { s.AddScaled(x[0], x[1], x[2], 0.01) }},
		{"Kept", 4, func(s *Set, x [4][]float32) { s.Kept(x[0], x[1], x[2], x[3]) }},
		{"Dot", 2, func(s *Set, x [4][]float32) { s.Dot(x[0], x[1]) }},
	} {
		b.Run(loop.name, func(b *testing.B) {
			everySet(b, []Float{F32}, func(s *Set, _ Float, size int) func() {
				var x [4][]float32
				for i := range x {
					x[i] = random(size/4/loop.slices, uint64(i))
				}
				return func() { loop.call(s, x) }
			})
		})
	}
}
