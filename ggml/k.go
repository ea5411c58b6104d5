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
}

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
func (s *scratch) sideBySide(x []float32, width int) {
	side := s.search.X[:len(x)]
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
		s.sideBySide(x, width)
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

// encode sets the codes of a group from what is stored of it.
func (g *minGroups) encode(i int, x []float32, scale, least float32, most int32) {
	codes, x := g.codes[i*g.width:][:g.width], x[i*g.width:][:g.width]
	if scale == 0 { // the codes that the search found
		for j, v := range x {
			codes[j] = byte(clip(kernels.RoundCode(float32(g.inverse[i]*(v-g.low[i]))), 0, most))
		}
		return
	}
	for j, v := range x {
		codes[j] = byte(clip(kernels.RoundCode((v+least)/scale), 0, most))
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
		g.encode(i, x, d*float32(p[i]&15), m*float32(p[i]>>4), 3)
	}
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
		g.encode(i, x, d*float32(scales[i]), m*float32(mins[i]), most)
	}
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
		s.sideBySide(x[128*k:][:128], 16)
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
	codes := &s.codes
	clear(codes[:])
	for g := range 16 {
		stored := int8(min(127, kernels.RoundCode(float32(toCode*scales[g]))))
		p[192+g] = byte(stored)
		scale := d * float32(stored)
		codes, x := codes[16*g:][:16], x[16*g:][:16]
		switch {
		case scale != 0:
			for j, v := range x {
				codes[j] = byte(clip(kernels.RoundCode(v/scale), -32, 31) + 32)
			}
		case inverses[g] != 0: // the codes that the search found
			for j, v := range x {
				codes[j] = byte(clip(kernels.RoundCode(float32(inverses[g]*v)), -32, 31) + 32)
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

// search3 finds the scale of a group of Q3_K and its codes, from 0 to 7. It takes the codes nearest to four steps for
// the largest element, and then moves single codes as long as that helps.
func search3(codes []byte, x []float32) (scale float32) {
	m := kernels.LargestSigned(x)
	if abs(m) < 1e-15 {
		clear(codes)
		return 0
	}
	inv := -4 / m
	var c, weights [16]float32
	var a, b float32
	for i, v := range x {
		l := float32(clip(kernels.RoundCode(float32(inv*v)), -4, 3))
		w := float32(v * v)
		c[i], weights[i] = l, w
		a += float32(float32(w*v) * l)
		b += float32(float32(w*l) * l)
	}
	for range 5 {
		changed := false
		for i, v := range x {
			w, l := weights[i], c[i]
			a1 := a - float32(float32(w*v)*l)
			if !(a1 > 0) {
				continue
			}
			b1 := b - float32(float32(w*l)*l)
			next := float32(clip(kernels.RoundCode(float32(v*b1)/a1), -4, 3))
			if next == l {
				continue
			}
			a1 += float32(float32(w*v) * next)
			b1 += float32(float32(w*next) * next)
			if b1 > 0 && float32(float32(a1*a1)*b) > float32(float32(a*a)*b1) {
				c[i], a, b = next, a1, b1
				changed = true
			}
		}
		if !changed {
			break
		}
	}
	for i := range x {
		codes[i] = byte(int32(c[i]) + 4)
	}
	if b > 0 {
		scale = a / b
	}
	return scale
}

func encodeQ3K(s *scratch, p []byte, x []float32) {
	codes, scales := &s.codes, &s.scales
	for g := range scales {
		scales[g] = search3(codes[16*g:][:16], x[16*g:][:16])
	}
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
		scale := d * float32(signed)
		if scale == 0 { // the codes that the search found
			continue
		}
		for j, v := range x[16*g:][:16] {
			codes[16*g+j] = byte(clip(kernels.RoundCode(v/scale), -4, 3) + 4)
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
			s.sideBySide(s.padded[:], 32)
		} else {
			s.sideBySide(x[:width], 32)
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
	s.sideBySide(x, 32)
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
