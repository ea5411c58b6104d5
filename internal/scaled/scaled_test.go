package scaled

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/minifloat"
)

// TestGrid holds the runs of any rows to the definition of a grid.
func TestGrid(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string) int64 { return rapid.Int64Range(1, 9).Draw(t, name) }
		g := Grid{draw("rows"), draw("cols"), draw("block rows"), draw("block cols")}
		stack := draw("stack")
		lo := rapid.Int64Range(0, stack*g.Rows).Draw(t, "lo")
		hi := rapid.Int64Range(lo, stack*g.Rows).Draw(t, "hi")
		first, last := g.Scales(lo*g.Cols, hi*g.Cols)
		var got []int64
		g.Each(lo*g.Cols, hi*g.Cols, func(from, to, scale int) {
			require.Len(t, got, from)
			for range to - from {
				got = append(got, first+int64(scale))
			}
		})
		var want []int64
		for row := lo; row < hi; row++ {
			matrix, r := row/g.Rows, row%g.Rows
			for c := range g.Cols {
				want = append(want, (matrix*g.ScaleRows()+r/g.BlockRows)*g.ScaleCols()+c/g.BlockCols)
			}
		}
		require.Equal(t, want, got)
		for _, s := range got {
			require.True(t, s >= first && s < last)
		}
	})
}

// TestRows holds what is done to a row at once to what is done to its blocks, with whole groups of the kernels and
// without.
func TestRows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		unit := rapid.SampledFrom([]int64{1, 16}).Draw(t, "unit")
		draw := func(name string) int64 { return rapid.Int64Range(1, 9).Draw(t, name) }
		g := Grid{draw("rows"), unit * draw("cols"), draw("block rows"), unit * draw("block cols")}
		row := rapid.Int64Range(0, 3*g.Rows-1).Draw(t, "row")
		from := rapid.Int64Range(0, row).Draw(t, "from")
		first, _ := g.Scales(from*g.Cols, (from+1)*g.Cols)
		own, end := g.Scales(row*g.Cols, (row+1)*g.Cols)
		require.Equal(t, int(own-first), g.RowScale(from*g.Cols, row*g.Cols))

		values := rapid.SampledFrom([]float32{0, 1, -2, 3, -400, float32(math.NaN()), float32(math.Inf(1))})
		x := rapid.SliceOfN(values, int(g.Cols), int(g.Cols)).Draw(t, "x")
		got, want := make([]float32, end-own), make([]float32, end-own)
		bad := g.Largest(got, x, make([]uint32, g.Cols/kernels.Group))
		require.Equal(t, NonFinite(x), bad)
		scales := make([]int, g.Cols)
		g.Each(row*g.Cols, (row+1)*g.Cols, func(from, to, k int) {
			want[k], _ = MaxAbs(x[from:to])
			for i := from; i < to; i++ {
				scales[i] = k
			}
		})
		require.Equal(t, want, got)
		if g.Groups() == 0 {
			return
		}
		by, numbers := make([]float32, g.Cols/kernels.Group), make([]float32, end-own)
		for k := range numbers {
			numbers[k] = float32(k)
		}
		g.Spread(by, numbers)
		for i, k := range scales {
			require.Equal(t, float32(k), by[i/kernels.Group])
		}
	})
}

func TestRuns(t *testing.T) {
	codes := []byte{0x12, 0x7e, 0xf8}
	got := make([]float32, 6)
	Nibbles(got, codes, &minifloat.E2M1, 2)
	require.Equal(t, []float32{2, 1, -8, 12, float32(math.Copysign(0, -1)), -12}, got)
	Bytes(got[:3], []byte{0x38, 0xb8, 0x7e}, &minifloat.E4M3, 0.5)
	require.Equal(t, []float32{0.5, -0.5, 224}, got[:3])

	nan, inf := float32(math.NaN()), float32(math.Inf(-1))
	m, finite := MaxAbs([]float32{1, -3, 2})
	require.Equal(t, float32(3), m)
	require.True(t, finite)
	m, finite = MaxAbs([]float32{1, nan, -2, inf})
	require.Equal(t, float32(2), m)
	require.False(t, finite)
	lo, hi, finite := Range([]float32{1, 3, inf})
	require.Equal(t, []float32{0, 3}, []float32{lo, hi})
	require.False(t, finite)
	require.Equal(t, 1, NonFinite([]float32{1, nan, inf}))
	require.Equal(t, -1, NonFinite([]float32{1}))
}

// TestRanges: what is found of all blocks at once is what Range finds of each, and what it does not take it says.
func TestRanges(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, g := range []Grid{ByRow(3, 128, 32), ByRow(2, 192, 64), ByRow(1, 96, 96)} {
		x := make([]float32, g.Rows*g.Cols)
		for i := range x {
			x[i] = float32(r.NormFloat64())
			if int64(i)/g.BlockCols%3 == 0 {
				x[i] = -x[i] * x[i] // none above zero
			}
		}
		bytes := func() (b []byte) {
			for _, v := range x {
				b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
			}
			return b
		}
		n := int64(len(x)) / g.BlockCols
		least, greatest := make([]float32, n), make([]float32, n)
		require.True(t, g.Ranges(least, greatest, bytes(), kernels.F32))
		for i := range n {
			lo, hi, finite := Range(x[i*g.BlockCols:][:g.BlockCols])
			require.True(t, finite)
			require.Equal(t, [2]float32{lo, hi}, [2]float32{least[i], greatest[i]}, "%v: %d", g, i)
		}
		x[len(x)-1] = float32(math.Inf(-1))
		require.False(t, g.Ranges(least, greatest, bytes(), kernels.F32))
	}
	for _, g := range []Grid{ByRow(1, 80, 40), ByRow(1, 96, 64), Whole(2, 32)} {
		require.False(t, g.Ranges(nil, nil, nil, kernels.F32), g)
	}
}
