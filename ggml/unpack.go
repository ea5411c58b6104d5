package ggml

import (
	"encoding/binary"
	"sync"

	"github.com/lorakit/lorakit/internal/kernels"
)

// Codes are unpacked eight at a time, in the bytes of a word.
const (
	ones   = 0x0101010101010101
	twos   = 0x0303030303030303 // masks of 2 bits
	fours  = 0x0f0f0f0f0f0f0f0f // masks of 4 bits
	signs  = 0x8080808080808080
	within = 256 // elements that are decoded at a time
)

// unpacked are the codes of 256 elements as signed bytes, and the scale and the minimum of each 16.
type unpacked struct {
	codes        [within]byte
	scales, mins [within / 16]float32
}

var unpackeds = sync.Pool{New: func() any { return new(unpacked) }}

// byRuns makes a decoder from a function that unpacks the blocks of 256 elements, or of fewer at the end.
func byRuns(elements, bytes int, minima bool, unpack func(u *unpacked, src []byte)) func([]float32, []byte) {
	return func(dst []float32, src []byte) {
		u := unpackeds.Get().(*unpacked)
		defer unpackeds.Put(u)
		for len(dst) > 0 {
			n := min(within, len(dst))
			m := n / elements * bytes
			unpack(u, src[:m])
			mins := u.mins[:n/16]
			if !minima {
				mins = nil
			}
			kernels.ScaleCodes(dst[:n], u.codes[:n], u.scales[:n/16], mins)
			dst, src = dst[n:], src[m:]
		}
	}
}

func word(p []byte) uint64 { return binary.LittleEndian.Uint64(p) }

func putWord(p []byte, w uint64) { binary.LittleEndian.PutUint64(p, w) }

// less takes n, up to 128, off each of eight codes that are below 128.
func less(w, n uint64) uint64 { return (w | signs) - n*ones ^ signs }

// spread makes a byte, 0 or 1, of each bit.
func spread(bits byte) uint64 {
	return (uint64(bits)*ones&0x8040201008040201 + 0x00406070787c7e7f) >> 7 & ones
}

// nibbles32 unpacks 32 codes of 4 bits, with a fifth one from high where that is not nil, and takes zero off.
func nibbles32(codes, src []byte, high []byte, zero uint64) {
	for j := 0; j < 16; j += 8 {
		w := word(src[j:])
		low, up := w&fours, w>>4&fours
		if high != nil {
			low |= spread(high[j/8]) << 4
			up |= spread(high[j/8+2]) << 4
		}
		putWord(codes[j:], less(low, zero))
		putWord(codes[j+16:], less(up, zero))
	}
}

// small is an unpacker of blocks of 32 elements: their scale stands first, then a minimum that is added, if any, then
// the fifth bits of the codes, if any, then four bits of each.
func small(bytes int, minima, fifth bool, zero uint64) func(u *unpacked, src []byte) {
	return func(u *unpacked, src []byte) {
		for i := 0; len(src) > 0; i, src = i+1, src[bytes:] {
			p, d := src[2:], half(src)
			u.scales[2*i], u.scales[2*i+1] = d, d
			if minima {
				m := -half(p)
				u.mins[2*i], u.mins[2*i+1] = m, m
				p = p[2:]
			}
			var high []byte
			if fifth {
				high, p = p[:4], p[4:]
			}
			nibbles32(u.codes[32*i:], p, high, zero)
		}
	}
}

// tabled is an unpacker of blocks of 32 elements whose codes stand for whole numbers.
func tabled(bytes, scaleBytes int, scale func(p []byte) float32, table *[256][2]byte) func(u *unpacked, src []byte) {
	return func(u *unpacked, src []byte) {
		for i := 0; len(src) > 0; i, src = i+1, src[bytes:] {
			d := scale(src)
			u.scales[2*i], u.scales[2*i+1] = d, d
			tabled16(u.codes[32*i:], src[scaleBytes:], 16, table)
		}
	}
}

// tabled16 unpacks n bytes: the low nibbles first, then the high ones.
func tabled16(codes, src []byte, n int, table *[256][2]byte) {
	low, up := codes[:n], codes[n:2*n]
	for j, b := range src[:n] {
		pair := &table[b]
		low[j], up[j] = pair[0], pair[1]
	}
}

// pairs is the table of the whole numbers that both nibbles of a byte stand for.
func pairs(values *[16]float32) *[256][2]byte {
	var t [256][2]byte
	for b := range t {
		t[b] = [2]byte{byte(int8(values[b&15])), byte(int8(values[b>>4]))}
	}
	return &t
}

var nonLinearPairs, float4Pairs = pairs(&kernels.NonLinear), pairs(&doubled)

func unpackNVFP4(u *unpacked, src []byte) {
	for i := 0; len(src) > 0; i, src = i+1, src[36:] {
		for s := range 4 {
			u.scales[4*i+s] = halfUE4M3(src[s])
			tabled16(u.codes[64*i+16*s:], src[4+8*s:], 8, float4Pairs)
		}
	}
}

func unpackIQ4XS(u *unpacked, src []byte) {
	d, high := half(src), binary.LittleEndian.Uint16(src[2:])
	for g := range 8 {
		l := uint16(src[4+g/2]>>(g%2*4)&15) | high>>(2*g)&3<<4
		s := d * float32(int32(l)-32)
		u.scales[2*g], u.scales[2*g+1] = s, s
		tabled16(u.codes[32*g:], src[8+16*g:], 16, nonLinearPairs)
	}
}

// pairs2 unpacks what pack2 packs, and takes zero off.
func pairs2(u *unpacked, src []byte, zero uint64) {
	for j := 0; j < 64; j += 8 {
		w, at := word(src[j:]), j/32*128+j%32
		for k := range 4 {
			putWord(u.codes[at+32*k:], less(w>>(2*k)&twos, zero))
		}
	}
}

func unpackTQ2x0(u *unpacked, src []byte) {
	pairs2(u, src, 1)
	for i, d := 0, half(src[64:]); i < 16; i++ {
		u.scales[i] = d
	}
}

func unpackQ2K(u *unpacked, src []byte) {
	d, m := half(src[80:]), half(src[82:])
	for g, s := range src[:16] {
		u.scales[g], u.mins[g] = d*float32(s&15), m*float32(s>>4)
	}
	pairs2(u, src[16:], 0)
}

func unpackQ3K(u *unpacked, src []byte) {
	d := half(src[108:])
	for g := range 16 {
		s := src[96+g%8]>>(g/8*4)&15 | src[104+g%4]>>(g/4*2)&3<<4
		u.scales[g] = d * float32(int32(s)-32)
	}
	for j := 0; j < 64; j += 8 {
		w, high, at := word(src[32+j:]), word(src[j%32:])>>(j/32*4), j/32*128+j%32
		for k := range 4 {
			putWord(u.codes[at+32*k:], less(w>>(2*k)&twos|high>>k&ones<<2, 4))
		}
	}
}

// scales6 unpacks the scales and minima of Q4_K and Q5_K.
func scales6(u *unpacked, src []byte) {
	d, m := half(src), half(src[2:])
	var scales, mins [8]byte
	unpackScales((*[12]byte)(src[4:]), &scales, &mins)
	for g := range 8 {
		s, least := d*float32(scales[g]), m*float32(mins[g])
		u.scales[2*g], u.scales[2*g+1] = s, s
		u.mins[2*g], u.mins[2*g+1] = least, least
	}
}

func unpackQ4K(u *unpacked, src []byte) {
	scales6(u, src)
	for j := 0; j < 128; j += 8 {
		w, at := word(src[16+j:]), j/32*64+j%32
		putWord(u.codes[at:], w&fours)
		putWord(u.codes[at+32:], w>>4&fours)
	}
}

func unpackQ5K(u *unpacked, src []byte) {
	scales6(u, src)
	for j := 0; j < 128; j += 8 {
		w, at := word(src[48+j:]), j/32*64+j%32
		high := word(src[16+j%32:]) >> (j / 32 * 2)
		putWord(u.codes[at:], w&fours|high&ones<<4)
		putWord(u.codes[at+32:], w>>4&fours|high>>1&ones<<4)
	}
}

func unpackQ6K(u *unpacked, src []byte) {
	d := half(src[208:])
	for g, s := range src[192:208] {
		u.scales[g] = d * float32(int8(s))
	}
	for h := range 2 {
		low, high, codes := src[64*h:], src[128+32*h:], u.codes[128*h:]
		for l := 0; l < 32; l += 8 {
			a, b, top := word(low[l:]), word(low[l+32:]), word(high[l:])
			putWord(codes[l:], less(a&fours|top&twos<<4, 32))
			putWord(codes[l+32:], less(b&fours|top>>2&twos<<4, 32))
			putWord(codes[l+64:], less(a>>4&fours|top>>4&twos<<4, 32))
			putWord(codes[l+96:], less(b>>4&fours|top>>6&twos<<4, 32))
		}
	}
}
