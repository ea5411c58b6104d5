package kernels

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// someLattice has about an eighth of all vectors.
func someLattice() *Lattice {
	r := rand.New(rand.NewPCG(7, 8))
	var vectors []uint16
	for v := range uint16(latticeVectors) {
		if v == 0 || r.IntN(8) == 0 {
			vectors = append(vectors, v)
		}
	}
	r.Shuffle(len(vectors), func(i, k int) { vectors[i], vectors[k] = vectors[k], vectors[i] })
	return NewLattice(vectors)
}

// TestLattice: a list has the vector itself, or three distances, in their order.
func TestLattice(t *testing.T) {
	l := NewLattice([]uint16{0o0000, 0o7777, 0o1000, 0o0001, 0o0002, 0o0444})
	list := func(at uint32) (vectors []uint16) {
		for i, v := range l.near[l.lists[at]:][:l.entries[at]] {
			assert.Equal(t, uint32(i), v>>latticeBits)
			vectors = append(vectors, uint16(v&(latticeVectors-1)))
		}
		return vectors
	}
	assert.Equal(t, []uint16{0o0002}, list(0o0002))
	assert.Equal(t, []uint16{0o0002, 0o0001, 0o0000}, list(0o0003))
	assert.Equal(t, []uint16{0o1000, 0o0001, 0o0000, 0o0002, 0o0444}, list(0o1001))
	for at := range latticeVectors {
		n := l.lists[at+1] - l.lists[at]
		assert.True(t, n >= leastList && n%Lanes == 0, at)
	}
}

// equalLattices holds the sets against the plain Go, for groups of 32 magnitudes.
func equalLattices(t require.TestingT, l *Lattice, x []float32) {
	find := func(s *Set) (all []uint32) {
		var f Search
		for i, v := range x {
			v = min(abs32(v), 1<<30-64)
			f.X[i], f.Weights[i] = v, float32(math.Sqrt(float64(float32(v*v))))
		}
		s.SearchLattice(&f, l)
		for g, scale := range f.Scale {
			all = append(all, math.Float32bits(scale))
			for k := range latticeFours {
				all = append(all, uint32(f.Vector(g, k)))
			}
		}
		return all
	}
	want := find(&Set{name: "purego"})
	for _, s := range Sets() {
		require.Equal(t, want, find(s), s.name)
	}
}

func TestLatticesEqualTwin(t *testing.T) {
	l, r := someLattice(), rand.New(rand.NewPCG(9, 10))
	for range 2000 {
		equalLattices(t, l, oddities(r, Lanes*longestGroup))
	}
}

func FuzzLattices(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4})
	f.Add(weights(4*256, F32))
	l := someLattice()
	f.Fuzz(func(t *testing.T, b []byte) {
		x := make([]float32, Lanes*longestGroup)
		for i := range x {
			if 4*i+4 <= len(b) {
				if v := math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:])); v-v == 0 {
					x[i] = v
				}
			}
		}
		equalLattices(t, l, x)
	})
}
