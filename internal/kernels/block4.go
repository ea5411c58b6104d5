package kernels

import (
	"encoding/binary"
	"math"
	"slices"
)

const maxBlockSize = 4096

// tiny is the least divisor: a block of zeros has to stay one.
const tiny = 1e-38

// Codebook is what 4-bit codes stand for, prepared for quantising.
type Codebook struct {
	// Code holds the values in index order.
	Code [16]float32
	// thresholds lie halfway between neighbours of the sorted code. The last is infinite: it pads the array.
	thresholds [16]float32
	order      [16]int64 // of the thresholds
	// position has the index of each rank of the sorted code.
	position [16]uint32
	lookup   lookup
	// bucketed says that the code is sorted, so that a rank is an index, and that no bucket of lookup holds two
	// thresholds.
	bucketed bool
}

// A lookup holds the tables of the assembly, where t is thresholds. As float32:
//
//	  0 t[r], t[r+1], t[r+3] for r in 0..15, infinite past the end
//	 80 t[3+8r] at -r mod 4, twice; t[1+4r] at -r mod 4; t[2r] at -r mod 8
//	100 the threshold in each of 32 buckets, or infinity
//
// and as integers:
//
//	 48 position[r]<<4 and position[r]
//	 96 position[r] as bytes, at -r mod 16
//	132 the number of thresholds below the bucket
//
// The bucket of s is the integer nearest to 15*s, mod 32.
type lookup = [164]uint32

// NewCodebook prepares a code, which need not be sorted. Its values lie in [-1, 1].
func NewCodebook(code [16]float32) *Codebook {
	c := &Codebook{Code: code}
	for i := range c.position {
		c.position[i] = uint32(i)
	}
	slices.SortStableFunc(c.position[:], func(a, b uint32) int {
		switch {
		case code[a] < code[b]:
			return -1
		case code[a] > code[b]:
			return 1
		}
		return 0
	})
	for i := range 15 {
		c.thresholds[i] = (code[c.position[i]] + code[c.position[i+1]]) / 2
	}
	c.thresholds[15] = math.Float32frombits(f32Inf)
	for i, t := range c.thresholds {
		c.order[i] = order(t)
	}
	c.tabulate()
	return c
}

// tabulate fills the tables of the assembly.
func (c *Codebook) tabulate() {
	l := &c.lookup
	t := func(i int) uint32 { return math.Float32bits(c.thresholds[min(i, 15)]) }
	for r := range 16 {
		l[r], l[16+r], l[32+r] = t(r), t(r+1), t(r+3)
		l[48+r], l[64+r] = c.position[r]<<4, c.position[r]
		at := -r & 15
		l[96+at/4] |= c.position[r] << (8 * (at % 4))
	}
	l[80], l[81], l[82], l[83] = t(3), t(3), t(11), t(11)
	for r := range 4 {
		l[84+-r&3] = t(1 + 4*r)
	}
	for r := range 8 {
		l[88+-r&7] = t(2 * r)
	}
	c.bucketed = slices.IsSorted(c.position[:])
	rank := 0
	for bucket := -16; bucket < 16; bucket++ {
		at := bucket & 31
		l[100+at], l[132+at] = t(15), uint32(rank)
		for in := 0; rank < 15 && math.RoundToEven(15*float64(c.thresholds[rank])) <= float64(bucket); in++ {
			l[100+at] = t(rank)
			rank++
			c.bucketed = c.bucketed && in == 0
		}
	}
}

// index returns the code for a scaled element: the one whose rank is the number of thresholds below s, found by
// bisection. A tie stays low; a NaN counts as above them all.
//
// Half of the comparisons hold, unpredictably, so the sign of a difference is used in place of branches.
func (c *Codebook) index(s float32) byte {
	t, k := &c.order, order(s)
	rank := (t[7] - k) >> 63 & 8
	rank |= (t[rank+3] - k) >> 63 & 4
	rank |= (t[rank+1] - k) >> 63 & 2
	rank |= (t[rank] - k) >> 63 & 1
	return byte(c.position[rank])
}

// order returns an integer that compares as the float does, but -0 is below 0. A NaN is above all numbers.
func order(s float32) int64 {
	if s != s {
		return math.MaxInt32
	}
	b := int32(math.Float32bits(s))
	return int64(b ^ b>>31&math.MaxInt32)
}

// quantizeBlock is the twin of Set.bisect4 and Set.bucket4 for one block, and the only code for a short block and for
// one that is not all finite. The result is the index of the first element that is not, or -1.
//
// A full block is multiplied by a reciprocal, a short one is divided, and only the short one's absmax is stored no
// less than tiny. The products would be clamped to [-1, 1]; as all thresholds lie between, that changes no index.
func (c *Codebook) quantizeBlock(packed []byte, absmax *float32, src []byte, from Float, short bool) (bad int) {
	largest := widen(maxAbs(src, from), from)
	bad = -1
	if largest-largest != 0 {
		bad = firstNotFinite(src, from)
	}
	if largest != largest {
		largest = math.Float32frombits(f32NaN)
	}
	divisor := largest
	if divisor < tiny {
		divisor = tiny
	}
	*absmax = largest
	if short {
		*absmax = divisor
	}
	reciprocal := 1 / divisor

	var x [piece + 1]float32
	for len(src) > 0 {
		n := min(len(src)/from.Size(), piece)
		s := x[:n+n%2]
		widenAll(s[:n], src, from)
		for i, v := range s[:n] {
			if short {
				s[i] = v / divisor
			} else {
				s[i] = v * reciprocal
			}
		}
		if n%2 != 0 {
			s[n] = 0
		}
		for i := range len(s) / 2 {
			packed[i] = c.index(s[2*i])<<4 | c.index(s[2*i+1])
		}
		src, packed = src[n*from.Size():], packed[len(s)/2:]
	}
	return bad
}

// firstNotFinite returns the index of the first NaN or infinity, or -1.
func firstNotFinite(src []byte, f Float) int {
	for i := range len(src) / f.Size() {
		if x := widen(load(src, f, i), f); x-x != 0 {
			return i
		}
	}
	return -1
}

// dequantizeBlock is the twin of Set.dequantize4 for one block of any length. Each of the 16 values that a block may
// hold is rounded once.
func dequantizeBlock(dst []byte, to Float, packed []byte, absmax float32, code *[16]float32) {
	var values [4 * 16]byte
	for i, v := range code {
		store(values[:], to, i, product(v, absmax))
	}
	for i := range len(dst) / to.Size() {
		index := int(packed[i/2] >> 4)
		if i%2 == 1 {
			index = int(packed[i/2] & 15)
		}
		if to == F32 {
			binary.LittleEndian.PutUint32(dst[4*i:], load(values[:], to, index))
		} else {
			binary.LittleEndian.PutUint16(dst[2*i:], uint16(load(values[:], to, index)))
		}
	}
}
