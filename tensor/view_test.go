package tensor

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// TestViewGathers holds Gather of any range, read in pieces of any size, to the definition of a view.
func TestViewGathers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		// A result of nested dimensions, some of which the view has a part of, over a source of the same in another order.
		rank := rapid.IntRange(0, 5).Draw(t, "rank")
		dims := make([]Dim, rank)
		to := int64(1)
		for i := rank - 1; i >= 0; i-- {
			dims[i].To = to
			dims[i].N = rapid.Int64Range(1, 5).Draw(t, "n")
			to *= dims[i].N + rapid.Int64Range(0, 2).Draw(t, "gap")
		}
		from := int64(1)
		for _, i := range rapid.Permutation(indices(rank)).Draw(t, "order") {
			dims[i].From = from
			from *= dims[i].N + rapid.Int64Range(0, 1).Draw(t, "gap")
		}
		dims = rapid.Permutation(dims).Draw(t, "dims")
		v := NewView(dims, rapid.Int64Range(0, 3).Draw(t, "from"), rapid.Int64Range(0, 3).Draw(t, "to"))
		width := rapid.SampledFrom([]int64{1, 2, 4, 8}).Draw(t, "width")
		size := to + v.To
		lo := rapid.Int64Range(0, size).Draw(t, "lo")
		hi := rapid.Int64Range(lo, size).Draw(t, "hi")
		atOnce := rapid.Int64Range(1, 200).Draw(t, "at once")

		source := make([]byte, (from+v.From+1)*width)
		for i := range source {
			source[i] = byte(rapid.IntRange(1, 255).Draw(t, "byte"))
		}
		want := make([]byte, (hi-lo)*width)
		each(dims, v.From, v.To, func(from, to int64) {
			if to >= lo && to < hi {
				copy(want[(to-lo)*width:(to-lo+1)*width], source[from*width:])
			}
		})
		got := make([]byte, (hi-lo)*width)
		require.NoError(t, v.Gather(got, lo, hi, width, atOnce, func(from, n int64) ([]byte, error) {
			require.LessOrEqual(t, n, atOnce)
			return source[from*width : (from+n)*width], nil
		}))
		require.Equal(t, want, got, "%+v [%d, %d)", v, lo, hi)

		last := int64(-1)
		found := map[[2]int64]bool{}
		for from, to := range v.Elements() {
			require.Greater(t, to, last)
			last, found[[2]int64{from, to}] = to, true
		}
		back, there := map[[2]int64]bool{}, map[[2]int64]bool{}
		i := v.Inverse()
		each(i.Dims, i.From, i.To, func(from, to int64) { back[[2]int64{to, from}] = true })
		each(v.Dims, v.From, v.To, func(from, to int64) { there[[2]int64{from, to}] = true })
		require.Equal(t, there, back)
		require.Equal(t, there, found)
		require.Len(t, there, int(v.Count()))
	})
}

func indices(n int) []int {
	list := make([]int, n)
	for i := range list {
		list[i] = i
	}
	return list
}

// each calls use for every element of a view, by its definition.
func each(dims []Dim, from, to int64, use func(from, to int64)) {
	if len(dims) == 0 {
		use(from, to)
		return
	}
	for i := range dims[0].N {
		each(dims[1:], from+i*dims[0].From, to+i*dims[0].To, use)
	}
}

// TestViewReads holds how much is read, and in how many pieces.
func TestViewReads(t *testing.T) {
	for _, c := range []struct {
		name         string
		view         View
		lo, hi       int64
		pieces, most int64 // elements read in all
	}{
		{"rows in pairs", NewView([]Dim{{4, 64 * 1024, 64 * 1024}, {2, 32 * 1024, 1024}, {32, 1024, 2048}, {1024, 1, 1}},
			0, 0), 8192, 16384, 2, 8192},
		{"turned round", NewView([]Dim{{512, 1, 4096}, {4096, 512, 1}}, 0, 0), 0, 64 * 4096, 4096, 64 * 4096},
		{"all of it turned round", NewView([]Dim{{256, 1, 4096}, {4096, 256, 1}}, 0, 0), 0, 256 * 4096, 1, 256 * 4096},
		{"every other row", NewView([]Dim{{128, 2048, 1024}, {1024, 1, 1}}, 0, 0), 1024, 3072, 1, 3072},
	} {
		t.Run(c.name, func(t *testing.T) {
			var pieces, all int64
			err := c.view.Gather(make([]byte, 2*(c.hi-c.lo)), c.lo, c.hi, 2, 1<<20, func(_, n int64) ([]byte, error) {
				pieces++
				all += n
				return make([]byte, 2*n), nil
			})
			require.NoError(t, err)
			require.Equal(t, c.pieces, pieces)
			require.LessOrEqual(t, all, c.most)
		})
	}
}

func BenchmarkViewTurned(b *testing.B) {
	const rows, cols = 3072, 768
	source := make([]byte, 2*rows*cols)
	v := NewView([]Dim{{cols, 1, rows}, {rows, cols, 1}}, 0, 0)
	for _, strip := range []int64{42, 340, cols} {
		b.Run(fmt.Sprint(strip), func(b *testing.B) {
			dst := make([]byte, 2*strip*rows)
			b.SetBytes(int64(len(dst)))
			for range b.N {
				_ = v.Gather(dst, 0, strip*rows, 2, 1<<22, func(from, n int64) ([]byte, error) {
					return source[2*from : 2*(from+n)], nil
				})
			}
		})
	}
}

// Turned is what is read a little at a time: every second column of a matrix that is turned round too.
func TestViewTurned(t *testing.T) {
	require.False(t, View{}.Turned())
	require.False(t, NewView([]Dim{{4, 3, 3}, {3, 1, 1}}, 0, 0).Turned())
	require.False(t, NewView([]Dim{{2, 100, 8}, {4, 2, 1}}, 0, 0).Turned(), "every second of rows")
	require.True(t, NewView([]Dim{{4, 1, 3}, {3, 4, 1}}, 0, 0).Turned())
	require.True(t, NewView([]Dim{{2, 100, 12}, {4, 2, 3}, {3, 8, 1}}, 1, 0).Turned(), "every second of columns")
}
