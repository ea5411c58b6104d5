package kernels

import (
	"math"

	"github.com/lorakit/lorakit/internal/kernels/race"
)

// Lattice are some of the vectors of four codes of 3 bits each, of which the first is in the lowest bits of a number.
// Code l stands for 2l+1.
type Lattice struct {
	// near has a list for every vector: itself if the lattice has it, else those that it has at the three least distances,
	// the nearest first. Above the twelve bits of an entry is its place in the list. The assembly takes eight at once, so
	// a list is filled up with copies of its last entry.
	near []uint32
	// lists are where each list begins; the last one is the end.
	lists [latticeVectors + 1]uint32
	// entries are the entries of each that are no copies.
	entries [latticeVectors]uint16
}

const (
	latticeBits    = 12
	latticeVectors = 1 << latticeBits
	// leastList is what the assembly takes of a list before it looks for its end.
	leastList = 2 * Lanes
)

// NewLattice makes a lattice of some vectors. Where two are as near to another, the one before is nearer.
func NewLattice(vectors []uint16) *Lattice {
	l := new(Lattice)
	var has [latticeVectors]bool
	for _, v := range vectors {
		has[v] = true
	}
	var shells [4*7*7 + 1][]uint16 // by the square of the distance
	for at := range uint16(latticeVectors) {
		begin := len(l.near)
		l.lists[at] = uint32(begin)
		add := func(v uint16) { l.near = append(l.near, uint32(len(l.near)-begin)<<latticeBits|uint32(v)) }
		if has[at] {
			add(at)
		} else {
			for i := range shells {
				shells[i] = shells[i][:0]
			}
			for _, v := range vectors {
				square := 0
				for shift := 0; shift < latticeBits; shift += 3 {
					d := int(v>>shift&7) - int(at>>shift&7)
					square += d * d
				}
				shells[square] = append(shells[square], v)
			}
			found := 0
			for _, shell := range shells {
				if found == 3 {
					break
				}
				if len(shell) > 0 {
					found++
				}
				for _, v := range shell {
					add(v)
				}
			}
		}
		n := len(l.near) - begin
		l.entries[at] = uint16(n)
		for last := l.near[begin+n-1]; n < leastList || n%Lanes != 0; n++ {
			l.near = append(l.near, last)
		}
	}
	l.lists[latticeVectors] = uint32(len(l.near))
	return l
}

// Rows of Search.work: what a rounding is given, what it finds, and the best of a search.
const (
	latticeInverse = iota
	latticeScale
	latticeXQ // the sum of w*x*q, where w is the square of x
	latticeQQ // that of w*q*q
	latticeOff
	latticeCodes = 16
	latticeFound = 24

	latticeFours = 8 // vectors of a group
)

// latticeTrials are what the largest element of a group is that SearchLattice tries.
var latticeTrials = func() (trials [19]float32) {
	const largest, step = float32(15), float32(0.2)
	for i := range trials {
		trials[i] = largest + float32(float32(i-9)*step)
	}
	return trials
}()

// SearchLattice finds, for each group of 32 elements, the Scale and the vectors of a lattice with the least error,
// weighted by the squares of the elements, as ggml does for IQ3_S; Vector returns them. The elements are magnitudes
// below 2^30, and Weights the roots of their squares. A group of zeros has the scale 0, and its vectors mean nothing.
func SearchLattice(f *Search, l *Lattice) { active.SearchLattice(f, l) }

// Vector returns what SearchLattice has found for the elements 4k to 4k+3 of group g.
func (f *Search) Vector(g, k int) uint16 { return uint16(math.Float32bits(f.work[latticeFound+k][g])) }

// SearchLattice is the function SearchLattice by this set.
func (s *Set) SearchLattice(f *Search, l *Lattice) {
	race.ReadSlice(f.X[:])
	race.ReadSlice(f.Weights[:])
	var largest, best [Lanes]float32
	for i, v := range f.X {
		largest[i%Lanes] = max(largest[i%Lanes], v)
	}
	var off [Lanes]bool // the lattice does not have all vectors that are nearest to the elements
	for g, v := range largest {
		f.Scale[g], off[g] = v/15, true
	}
	clear(f.work[latticeFound : latticeFound+latticeFours])
	keep := func(g int) {
		for k := range latticeFours {
			f.work[latticeFound+k][g] = f.work[latticeCodes+k][g]
		}
	}
	for _, trial := range latticeTrials {
		for g, v := range largest {
			inverse := trial / v
			f.work[latticeInverse][g], f.work[latticeScale][g] = inverse, 1/inverse
		}
		s.roundLattice(f, l)
		for g, xq := range f.work[latticeXQ] {
			if qq := f.work[latticeQQ][g]; qq > 0 && float32(xq*xq) > float32(best[g]*qq) {
				f.Scale[g] = xq / qq
				best[g] = float32(f.Scale[g] * xq)
				off[g] = f.work[latticeOff][g] != 0
				keep(g)
			}
		}
	}
	for g, scale := range f.Scale {
		f.work[latticeInverse][g], f.work[latticeScale][g] = 1/scale, scale
	}
	s.roundLattice(f, l)
	for g := range f.Scale {
		if !off[g] || !(f.Scale[g] > 0) {
			continue
		}
		keep(g)
		if qq := f.work[latticeQQ][g]; qq > 0 {
			f.Scale[g] = f.work[latticeXQ][g] / qq
		}
	}
}

// roundLattice rounds the elements times the inverse of a scale to vectors. For one that the lattice does not have it
// takes, of those near it, the first with the least error at the scale, which is weighted with the weights.
func (s *Set) roundLattice(f *Search, l *Lattice) {
	if s.roundLatticeFast != nil {
		s.roundLatticeFast(&f.work, &f.X, &f.Weights, l.near, &l.lists)
		return
	}
	for g := range Lanes {
		roundLattice(f, g, l)
	}
}

// roundLattice is the twin of Set.roundLatticeFast, for one group.
func roundLattice(f *Search, g int, l *Lattice) {
	inverse, scale := f.work[latticeInverse][g], f.work[latticeScale][g]
	var levels [8]float32
	for code := range levels {
		levels[code] = scale * float32(2*code+1)
	}
	var xq, qq, off float32
	for k := range latticeFours {
		var x, w [4]float32
		var at uint32
		for j := range x {
			i := Lanes*(4*k+j) + g
			x[j], w[j] = f.X[i], f.Weights[i]
			code := max(0, min(RoundCode(float32(0.5*(float32(inverse*x[j])-1))), 7))
			at |= uint32(code) << (3 * j)
		}
		if n := l.entries[at]; n > 1 {
			off = 1
			at = nearestVector(l.near[l.lists[at]:][:n], &x, &w, &levels)
		}
		f.work[latticeCodes+k][g] = math.Float32frombits(at)
		for j, v := range x {
			w, q := float32(v*v), float32(2*(at>>(3*j)&7)+1)
			xq += float32(float32(w*v) * q)
			qq += float32(float32(w*q) * q)
		}
	}
	f.work[latticeXQ][g], f.work[latticeQQ][g], f.work[latticeOff][g] = xq, qq, off
}

// nearestVector returns the first of a list with the least error: of each element the weight times the square of what
// the level of its code is off.
func nearestVector(list []uint32, x, w *[4]float32, levels *[8]float32) (best uint32) {
	var errs [4][8]float32
	for j := range errs {
		w, v := w[j], x[j]
		for code, level := range levels {
			diff := level - v
			errs[j][code] = float32(w*diff) * diff
		}
	}
	least := float32(math.MaxFloat32)
	for _, v := range list {
		if e := errs[0][v&7] + errs[1][v>>3&7] + errs[2][v>>6&7] + errs[3][v>>9&7]; e < least {
			least, best = e, v
		}
	}
	return best & (latticeVectors - 1)
}
