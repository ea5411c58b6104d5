package ggml

import (
	"encoding/binary"
	"math"
	"sync"

	"github.com/lorakit/lorakit/internal/kernels"
)

// The K types: blocks of 256 in groups of 16 or 32, whose scales, and minima for Q2_K, Q4_K and Q5_K, are codes by
// themselves. To quantise, each group gets the scale and minimum that fit it best; the block's scale follows from them;
// then all codes are made again from what is stored.

// scratch is what one goroutine quantises blocks with.
type scratch struct {
	search  kernels.Search
	groups  minGroups
	scales  [16]float32
	inverse [16]float32
	codes   [256]byte
	padded  [256]float32
	stored  [16]float32 // scales that codes are made with
}

// zeros are the minima of types without.
var zeros [16]float32

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// grouped makes an encoder of many blocks from that of one, which has groups.
func grouped(encode func(s *scratch, p []byte, x []float32)) func(dst []byte, x []float32) {
	return func(dst []byte, x []float32) {
		s := scratches.Get().(*scratch)
		defer scratches.Put(s)
		size := len(dst) / (len(x) / 256)
		for ; len(x) > 0; dst, x = dst[size:], x[256:] {
			encode(s, dst[:size:size], x[:256:256])
		}
	}
}

// sideBySide puts the elements of groups next to one another, as the searches of package kernels take them.
func sideBySide(side, x []float32, width int) {
	side = side[:len(x)]
	for g := range kernels.Lanes {
		for i, v := range x[g*width:][:width] {
			side[kernels.Lanes*i+g] = v
		}
	}
}

var (
	ruleQ2K = kernels.NewMinRule(3, -0.5, 16, true)
	ruleQ4K = kernels.NewMinRule(15, -1, 21, false)
	ruleQ5K = kernels.NewMinRule(31, -0.5, 16, false)
)

// minGroups are the groups of a block of Q2_K, Q4_K or Q5_K, and their codes.
type minGroups struct {
	scale, min, inverse, low [16]float32
	storedScale, storedMin   [16]float32 // of 16 elements each
	codes                    [256]byte
	greatest                 [2]float32 // scale, minimum
	width                    int        // elements of a group
}

// minima finds the scales and minima of groups of so many elements. The weight of an element is its magnitude, to which
// in Q4_K and Q5_K the root of the group's mean square is added.
func (s *scratch) minima(x []float32, width int, r *kernels.MinRule, absolute bool) *minGroups {
	g, f := &s.groups, &s.search
	g.width, g.greatest = width, [2]float32{}
	part := kernels.Lanes * width
	for k := range len(x) / part {
		x, at := x[k*part:][:part], k*kernels.Lanes
		sideBySide(s.search.X[:], x, width)
		var base [kernels.Lanes]float32
		if !absolute {
			for i := 0; i < part; i += kernels.Lanes {
				for lane, v := range f.X[i : i+kernels.Lanes] {
					base[lane] += float32(v * v)
				}
			}
			for lane, sum := range base {
				base[lane] = float32(math.Sqrt(float64(sum / float32(width))))
			}
		}
		for i := 0; i < part; i += kernels.Lanes {
			w := f.Weights[i : i+kernels.Lanes]
			for lane, v := range f.X[i : i+kernels.Lanes] {
				w[lane] = base[lane] + abs(v)
			}
		}
		kernels.SearchMin(f, width, r)
		copy(g.scale[at:], f.Scale[:])
		copy(g.min[at:], f.Min[:])
		copy(g.inverse[at:], f.Inverse[:])
		copy(g.low[at:], f.Low[:])
	}
	for i := range len(x) / width {
		if g.scale[i] > g.greatest[0] {
			g.greatest[0] = g.scale[i]
		}
		if g.min[i] > g.greatest[1] {
			g.greatest[1] = g.min[i]
		}
	}
	return g
}

// encode sets the codes from what is stored of the groups, the scales and minima of each 16 elements.
func (g *minGroups) encode(x []float32, most int32) {
	kernels.QuantizeCodes(g.codes[:], x, g.storedScale[:], g.storedMin[:], 0, most)
	for i, scale := range g.storedScale {
		if scale != 0 {
			continue
		}
		k := i * 16 / g.width // the codes that the search found
		codes := g.codes[16*i:][:16]
		for j, v := range x[16*i:][:16] {
			codes[j] = byte(clip(kernels.RoundCode(float32(g.inverse[k]*(v-g.low[k]))), 0, most))
		}
	}
}

// reciprocal is a over the greatest of what is above zero, else 0.
func reciprocal(a, greatest float32) float32 {
	if greatest > 0 {
		return a / greatest
	}
	return 0
}

func encodeQ2K(s *scratch, p []byte, x []float32) {
	g := s.minima(x, 16, ruleQ2K, true)
	d, m := putHalf(p[80:], g.greatest[0]/15), putHalf(p[82:], g.greatest[1]/15)
	scales, mins := reciprocal(15, g.greatest[0]), reciprocal(15, g.greatest[1])
	for i := range 16 {
		p[i] = byte(kernels.RoundCode(float32(scales*g.scale[i]))) |
			byte(kernels.RoundCode(float32(mins*g.min[i]))<<4)
		g.storedScale[i], g.storedMin[i] = d*float32(p[i]&15), m*float32(p[i]>>4)
	}
	g.encode(x, 3)
	pack2(p[16:80], &g.codes)
}

// packScales packs 8 scales and 8 minima of 6 bits, those of the first four groups apart from the others, whose upper
// bits stand above them.
func packScales(p *[12]byte, scales, mins *[8]byte) {
	for g := range 4 {
		p[g] = scales[g] | scales[g+4]>>4<<6
		p[g+4] = mins[g] | mins[g+4]>>4<<6
		p[g+8] = scales[g+4]&15 | mins[g+4]<<4
	}
}

func unpackScales(p *[12]byte, scales, mins *[8]byte) {
	for g := range 4 {
		scales[g], mins[g] = p[g]&63, p[g+4]&63
		scales[g+4] = p[g+8]&15 | p[g]>>6<<4
		mins[g+4] = p[g+8]>>4 | p[g+4]>>6<<4
	}
}

// encode6 fills the 16 bytes that Q4_K and Q5_K begin with, and sets the codes.
func (g *minGroups) encode6(p []byte, x []float32, most int32) {
	d, m := putHalf(p, g.greatest[0]/63), putHalf(p[2:], g.greatest[1]/63)
	toScale, toMin := reciprocal(63, g.greatest[0]), reciprocal(63, g.greatest[1])
	var scales, mins [8]byte
	for i := range 8 {
		scales[i] = min(63, byte(kernels.RoundCode(float32(toScale*g.scale[i]))))
		mins[i] = min(63, byte(kernels.RoundCode(float32(toMin*g.min[i]))))
		scale, least := d*float32(scales[i]), m*float32(mins[i])
		g.storedScale[2*i], g.storedScale[2*i+1] = scale, scale
		g.storedMin[2*i], g.storedMin[2*i+1] = least, least
	}
	g.encode(x, most)
	packScales((*[12]byte)(p[4:]), &scales, &mins)
}

// pack4 packs 256 codes of 4 bits: of each run of 64, byte r has those of elements r and r+32.
func pack4(p []byte, codes *[256]byte) {
	for c := range 4 {
		for r := range 32 {
			p[32*c+r] = codes[64*c+r]&15 | codes[64*c+r+32]<<4
		}
	}
}

func encodeQ4K(s *scratch, p []byte, x []float32) {
	g := s.minima(x, 32, ruleQ4K, false)
	g.encode6(p, x, 15)
	pack4(p[16:], &g.codes)
}

func encodeQ5K(s *scratch, p []byte, x []float32) {
	g := s.minima(x, 32, ruleQ5K, false)
	g.encode6(p, x, 31)
	clear(p[16:48])
	for i, q := range g.codes {
		p[16+i%32] |= q >> 4 << (i / 32)
	}
	pack4(p[48:], &g.codes)
}

// largestScale returns the scale of groups with the greatest magnitude. Where a group has elements so large that no
// scale was found, which ggml takes for a group of zeros, it stores a NaN as the block's scale at p and returns false.
func largestScale(scales []float32, p []byte) (m float32, ok bool) {
	for _, s := range scales {
		if s-s != 0 {
			putHalf(p, s-s)
			return 0, false
		}
	}
	return kernels.LargestSigned(scales), true
}

func encodeQ6K(s *scratch, p []byte, x []float32) {
	scales, inverses := &s.scales, &s.inverse
	for k := range 2 {
		sideBySide(s.search.X[:], x[128*k:][:128], 16)
		kernels.SearchSym(&s.search, 16)
		copy(scales[8*k:], s.search.Scale[:])
		copy(inverses[8*k:], s.search.Inverse[:])
	}
	clear(p)
	m, ok := largestScale(scales[:], p[208:])
	if !ok || abs(m) < 1e-15 {
		return
	}
	toCode := -128 / m
	d := putHalf(p[208:], 1/toCode)
	for g := range 16 {
		stored := int8(min(127, kernels.RoundCode(float32(toCode*scales[g]))))
		p[192+g] = byte(stored)
		s.stored[g] = d * float32(stored)
	}
	codes := &s.codes
	kernels.QuantizeCodes(codes[:], x, s.stored[:], zeros[:], -32, 31)
	for g, scale := range s.stored {
		if scale != 0 {
			continue
		}
		for j, v := range x[16*g:][:16] { // the codes that the search found, 0 if it found none
			codes[16*g+j] = 0
			if inverses[g] != 0 {
				codes[16*g+j] = byte(clip(kernels.RoundCode(float32(inverses[g]*v)), -32, 31) + 32)
			}
		}
	}
	for h := range 2 {
		c, low, high := codes[128*h:], p[64*h:], p[128+32*h:]
		for l := range 32 {
			a, b, e, f := c[l], c[l+32], c[l+64], c[l+96]
			low[l], low[l+32] = a&15|e<<4, b&15|f<<4
			high[l] = a>>4 | b>>4<<2 | e>>4<<4 | f>>4<<6
		}
	}
}

func encodeQ3K(s *scratch, p []byte, x []float32) {
	codes, scales := &s.codes, &s.scales
	sideBySide(s.search.X[:128], x[:128], 16)
	sideBySide(s.search.X[128:], x[128:], 16)
	kernels.SearchMoving(scales, &s.search)
	clear(p)
	m, ok := largestScale(scales[:], p[108:])
	if !ok {
		return
	}
	var d, toCode float32
	if m != 0 {
		toCode = -32 / m
		d = putHalf(p[108:], 1/toCode)
	}
	for g := range 16 {
		signed := int32(-32)
		if m != 0 {
			signed = clip(kernels.RoundCode(float32(toCode*scales[g])), -32, 31)
			stored := byte(signed + 32)
			p[96+g%8] |= stored & 15 << (g / 8 * 4)
			p[104+g%4] |= stored >> 4 << (g / 4 * 2)
		}
		s.stored[g] = d * float32(signed)
	}
	kernels.QuantizeCodes(codes[:], x, s.stored[:], zeros[:], -4, 3)
	for g, scale := range s.stored {
		if scale != 0 {
			continue
		}
		group := x[16*g:][:16]
		found := abs(kernels.LargestSigned(group)) >= 1e-15
		for j := range group { // the codes that the search found, 0 if it found none
			codes[16*g+j] = 0
			if found {
				codes[16*g+j] = s.search.MovedCode(g, j)
			}
		}
	}
	for i, q := range codes {
		p[i%32] |= q >> 2 << (i / 32)
	}
	pack2(p[32:96], codes)
}

// The IQ4 types: codes of 4 bits stand for values that are closer to each other near zero.

func encodeIQ4NL(dst []byte, x []float32) {
	const width = 32 * kernels.Lanes
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	for ; len(x) > 0; dst, x = dst[min(18*kernels.Lanes, len(dst)):], x[min(width, len(x)):] {
		n := min(width, len(x))
		if n < width {
			clear(s.padded[copy(s.padded[:], x):])
			sideBySide(s.search.X[:], s.padded[:], 32)
		} else {
			sideBySide(s.search.X[:], x[:width], 32)
		}
		kernels.SearchNonLinear(&s.search, 32)
		for g := range n / 32 {
			p, scale := dst[18*g:][:18], s.search.Scale[g]
			putHalf(p, scale)
			nonLinear(p[2:], x[32*g:], inverse(scale))
		}
	}
}

// nonLinear packs the codes of 32 elements.
func nonLinear(p []byte, x []float32, inv float32) {
	for j := range 16 {
		p[j] = byte(kernels.NearestNonLinear(float32(inv*x[j])) | kernels.NearestNonLinear(float32(inv*x[j+16]))<<4)
	}
}

func encodeIQ4XS(s *scratch, p []byte, x []float32) {
	sideBySide(s.search.X[:], x, 32)
	kernels.SearchNonLinear(&s.search, 32)
	scales := &s.search.Scale
	m, ok := largestScale(scales[:], p)
	if !ok {
		clear(p[2:])
		return
	}
	d := -m / 32
	putHalf(p, d)
	inv, high := inverse(d), uint16(0)
	clear(p[4:8])
	for g, scale := range scales {
		l := clip(kernels.RoundCode(float32(inv*scale)), -32, 31)
		nonLinear(p[8+16*g:], x[32*g:], inverse(d*float32(l)))
		p[4+g/2] |= byte(l+32) & 15 << (g % 2 * 4)
		high |= uint16(l+32) >> 4 << (2 * g)
	}
	binary.LittleEndian.PutUint16(p[2:], high)
}
