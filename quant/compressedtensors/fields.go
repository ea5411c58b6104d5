package compressedtensors

import (
	"encoding/binary"

	"github.com/lorakit/lorakit/quant/internal/bitfield"
)

// fields are integers of 1 to 8 bits that are packed in words of 32 bits.
type fields struct {
	bits   int
	padded bool // none crosses a word
}

// words is how many words n fields take.
func (f fields) words(n int64) int64 {
	if each := int64(32 / f.bits); f.padded {
		return n/each + min(n%each, 1)
	}
	return bitfield.Words(n, int64(f.bits))
}

// unpack takes len(dst) fields out of the words of src.
func (f fields) unpack(dst, src []byte) {
	if !f.padded {
		bitfield.Unpack(dst, src, int64(f.bits))
		return
	}
	each, mask := 32/f.bits, uint32(1)<<f.bits-1
	for i := range dst {
		w := binary.LittleEndian.Uint32(src[i/each*4:])
		dst[i] = byte(w >> (i % each * f.bits) & mask)
	}
}

// pack puts fields into the words of dst, and zeros behind them.
func (f fields) pack(dst, src []byte) {
	if !f.padded {
		bitfield.Pack(dst, src, int64(f.bits))
		return
	}
	each := 32 / f.bits
	for k := 0; 4*k < len(dst); k++ {
		var w uint32
		for i := range min(each, len(src)) {
			w |= uint32(src[i]) << (i * f.bits)
		}
		src = src[min(each, len(src)):]
		binary.LittleEndian.PutUint32(dst[4*k:], w)
	}
}

// column takes the fields of rows lo to hi out of packed columns: field r of a column begins at its bit r*bits. src has
// the words from that of lo on, rows of width words.
func (f fields) column(dst []byte, src []byte, lo, hi, width, col int64) {
	bits := int64(f.bits)
	mask := uint64(1)<<bits - 1
	firstWord := f.columnWord(lo)
	for r := lo; r < hi; r++ {
		word, shift := r*bits/32, r*bits%32
		if f.padded {
			each := 32 / bits
			word, shift = r/each, r%each*bits
		}
		at := ((word-firstWord)*width + col) * 4
		x := uint64(binary.LittleEndian.Uint32(src[at:]))
		if next := at + width*4; shift+bits > 32 && next < int64(len(src)) {
			x |= uint64(binary.LittleEndian.Uint32(src[next:])) << 32
		}
		dst[r-lo] = byte(x >> shift & mask)
	}
}

// columnWord is the word that field r of a column begins in.
func (f fields) columnWord(r int64) int64 {
	if f.padded {
		return r / int64(32/f.bits)
	}
	return r * int64(f.bits) / 32
}
