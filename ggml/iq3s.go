package ggml

import (
	"encoding/binary"
	"math"
	"sync"

	"github.com/lorakit/lorakit/internal/kernels"
)

// IQ3_S is the one type with a grid that ggml makes without an importance matrix. Of the magnitudes of each four
// elements a vector of the grid is the code; a group of 32 has eight of those, and a scale of 4 bits.

// iq3Grid is the grid of IQ3_S by the codes of its vectors, 3 bits an element.
type iq3Grid struct {
	lattice *kernels.Lattice
	index   [1 << 12]uint16
}

var iq3Vectors = sync.OnceValue(func() *iq3Grid {
	grid, g := grids()["iq3_s"], new(iq3Grid)
	vectors := make([]uint16, len(grid)/4)
	for i := range vectors {
		for j, level := range grid[4*i : 4*i+4] {
			vectors[i] |= uint16(level) >> 1 << (3 * j)
		}
		g.index[vectors[i]] = uint16(i)
	}
	g.lattice = kernels.NewLattice(vectors)
	return g
})

// tooLarge is a magnitude with which a block's scale is beyond all of float16, and below which all sums are finite.
const tooLarge = float32(1 << 30)

func encodeIQ3S(s *scratch, p []byte, x []float32) {
	clear(p)
	if largest(x) >= tooLarge {
		putHalf(p, float32(math.Inf(1)))
		return
	}
	grid, f := iq3Vectors(), &s.search
	sideBySide(f.X[:], x, 32)
	for i, v := range f.X {
		v = abs(v)
		f.X[i] = v
		f.Weights[i] = float32(math.Sqrt(float64(float32(v * v))))
	}
	kernels.SearchLattice(f, grid.lattice)

	high, room := p[66:74], 0
	for g := range kernels.Lanes {
		group := x[32*g:][:32]
		if largest(group) == 0 {
			continue
		}
		// ggml leaves no room for a group of zeros: the indices and signs of the groups after it move up, but not their
		// high bits and their scales, so that such a block decodes to something else. It is so in llama-quantize's files.
		for k := range 8 {
			index := grid.index[f.Vector(g, k)]
			p[2+8*room+k] = byte(index)
			high[g] |= byte(index>>8) << k
		}
		var signs uint32
		for i, v := range group {
			if v < 0 {
				signs |= 1 << i
			}
		}
		binary.LittleEndian.PutUint32(p[74+4*room:], signs)
		room++
	}
	var greatest float32
	for _, scale := range f.Scale {
		greatest = max(greatest, scale)
	}
	if greatest == 0 {
		return
	}
	d := greatest / 31
	putHalf(p, d*1.033)
	inverse := 1 / d
	for g, scale := range f.Scale {
		l := clip(kernels.RoundCode(float32(0.5*(float32(inverse*scale)-1))), 0, 15)
		p[106+g/2] |= byte(l) << (g % 2 * 4)
	}
}
