package ggml

import (
	"encoding/binary"
	"math"
	"slices"
	"sync"

	"github.com/lorakit/lorakit/internal/kernels"
)

// IQ3_S is the one type with a grid that ggml makes without an importance matrix. Of the magnitudes of each four
// elements a vector of the grid is the code; a group of 32 has eight of those, and a scale of 4 bits.

// corners are all vectors of four codes of 3 bits, by those bits, the first in the lowest. Code l stands for 2l+1.
const corners = 1 << 12

// vectors are those of the grid of IQ3_S.
type vectors struct {
	// index is where the grid has a vector, -1 where it does not.
	index [corners]int16
	// near lists, for a vector that the grid does not have, those that it has at the three least distances, the nearest
	// first. They are near[first[v]:first[v+1]].
	near  []uint16
	first [corners + 1]uint32
}

var iq3Vectors = sync.OnceValue(func() *vectors {
	grid := grids()["iq3_s"]
	v := new(vectors)
	for i := range v.index {
		v.index[i] = -1
	}
	codes := make([]uint16, len(grid)/4)
	for i := range codes {
		for j, value := range grid[4*i : 4*i+4] {
			codes[i] |= uint16(value) >> 1 << (3 * j)
		}
		v.index[codes[i]] = int16(i)
	}
	var shells [4*7*7 + 1][]uint16 // by the square of the distance
	for at := range uint16(corners) {
		v.first[at] = uint32(len(v.near))
		if v.index[at] >= 0 {
			continue
		}
		for i := range shells {
			shells[i] = shells[i][:0]
		}
		for _, c := range codes {
			square := 0
			for shift := 0; shift < 12; shift += 3 {
				d := int(c>>shift&7) - int(at>>shift&7)
				square += d * d
			}
			shells[square] = append(shells[square], c)
		}
		found := 0
		for _, shell := range shells {
			if found < 3 && len(shell) > 0 {
				v.near = append(v.near, shell...)
				found++
			}
		}
	}
	v.first[corners] = uint32(len(v.near))
	v.near = slices.Clip(v.near)
	return v
})

// iq3Group is a group of 32 elements while its scale is looked for.
type iq3Group struct {
	x       [32]float32 // magnitudes
	roots   [32]float32 // of the weights, which are the squares of the elements
	signs   uint32
	largest float32
}

func (g *iq3Group) set(x []float32) {
	g.signs, g.largest = 0, 0
	for i, v := range x[:32] {
		if v < 0 {
			g.signs |= 1 << i
		}
		v = abs(v)
		g.x[i] = v
		g.roots[i] = float32(math.Sqrt(float64(float32(v * v))))
		g.largest = max(g.largest, v)
	}
}

// round sets codes to the vectors nearest to the elements times inverse, and reports whether the grid had them all.
// For one that it does not have it takes, of those near it, the one with the least weighted error at a scale.
func (g *iq3Group) round(codes *[8]uint16, inverse, scale float32, v *vectors) (exact bool) {
	exact = true
	var levels [8]float32
	for l := range levels {
		levels[l] = scale * float32(2*l+1)
	}
	for k := range codes {
		x := (*[4]float32)(g.x[4*k:])
		var at uint16
		for j, m := range x {
			l := clip(kernels.RoundCode(float32(0.5*(float32(inverse*m)-1))), 0, 7)
			at |= uint16(l) << (3 * j)
		}
		if near := v.near[v.first[at]:v.first[at+1]]; len(near) > 0 {
			exact = false
			at = nearest(near, x, (*[4]float32)(g.roots[4*k:]), &levels)
		}
		codes[k] = at
	}
	return exact
}

// nearest returns the first of some vectors with the least error. The error of an element is its root times the square
// of what the level of its code is off.
func nearest(near []uint16, x, roots *[4]float32, levels *[8]float32) (best uint16) {
	var errs [4][8]float32
	for j := range errs {
		w, m := roots[j], x[j]
		for l, level := range levels {
			diff := level - m
			errs[j][l] = float32(w*diff) * diff
		}
	}
	least := float32(math.MaxFloat32)
	for _, c := range near {
		e := errs[0][c&7] + errs[1][c>>3&7] + errs[2][c>>6&7] + errs[3][c>>9&7]
		if e < least {
			least, best = e, c
		}
	}
	return best
}

// sums are those of w*x*q and w*q*q, of which the best scale is the quotient.
func (g *iq3Group) sums(codes *[8]uint16) (xq, qq float32) {
	for k, c := range codes {
		for j, m := range g.x[4*k : 4*k+4] {
			w, q := float32(m*m), float32(2*(c>>(3*j)&7)+1)
			xq += float32(float32(w*m) * q)
			qq += float32(float32(w*q) * q)
		}
	}
	return xq, qq
}

// iq3Trials are what the largest element of a group is that a search tries.
var iq3Trials = func() (trials [19]float32) {
	const tried, step = float32(15), float32(0.2)
	for i := range trials {
		trials[i] = tried + float32(float32(i-9)*step)
	}
	return trials
}()

// search finds the codes and the scale of a group that has elements other than 0.
func (g *iq3Group) search(codes *[8]uint16, v *vectors) (scale float32) {
	*codes = [8]uint16{}
	exact, best := false, float32(0)
	scale = g.largest / 15
	for _, trial := range iq3Trials {
		var tried [8]uint16
		inverse := trial / g.largest
		all := g.round(&tried, inverse, 1/inverse, v)
		if xq, qq := g.sums(&tried); qq > 0 && float32(xq*xq) > float32(best*qq) {
			scale = xq / qq
			best = float32(scale * xq)
			*codes, exact = tried, all
		}
	}
	if exact || !(scale > 0) {
		return scale
	}
	g.round(codes, 1/scale, scale, v)
	if xq, qq := g.sums(codes); qq > 0 {
		scale = xq / qq
	}
	return scale
}

// tooLarge is a magnitude with which a block's scale is beyond all of float16, and up to which all sums are finite.
const tooLarge = float32(1 << 30)

func encodeIQ3S(dst []byte, x []float32) {
	v := iq3Vectors()
	var g iq3Group
	for ; len(x) > 0; dst, x = dst[110:], x[256:] {
		p := dst[:110]
		clear(p)
		if largest(x[:256]) >= tooLarge {
			putHalf(p, float32(math.Inf(1)))
			continue
		}
		high := p[66:74]
		var scales [8]float32
		var greatest float32
		stored := 0
		for k := range scales {
			if g.set(x[32*k:]); g.largest == 0 {
				continue
			}
			var codes [8]uint16
			scales[k] = g.search(&codes, v)
			greatest = max(greatest, scales[k])
			// ggml does not leave the room of a group of zeros free: the indices and signs, but not the high bits and the
			// scales, of the groups after it move up.
			for j, c := range codes {
				index := v.index[c]
				p[2+8*stored+j] = byte(index)
				high[k] |= byte(index>>8) << j
			}
			binary.LittleEndian.PutUint32(p[74+4*stored:], g.signs)
			stored++
		}
		if greatest == 0 {
			continue
		}
		d := greatest / 31
		putHalf(p, d*1.033)
		inverse := 1 / d
		for k, scale := range scales {
			l := clip(kernels.RoundCode(float32(0.5*(float32(inverse*scale)-1))), 0, 15)
			p[106+k/2] |= byte(l) << (k % 2 * 4)
		}
	}
}
