package compressedtensors

import "encoding/binary"

// fields are integers of 1 to 8 bits that are packed in words of 32 bits.
type fields struct {
	bits   int
	padded bool // none crosses a word
}

// words is how many words n fields take.
func (f fields) words(n int64) int64 {
	if f.padded {
		return ceilDiv(n, int64(32/f.bits))
	}
	// In two steps, since n*bits may not fit.
	return n/32*int64(f.bits) + ceilDiv(n%32*int64(f.bits), 32)
}

// unpack takes len(dst) fields out of the words of src.
func (f fields) unpack(dst, src []byte) {
	switch {
	case f.padded:
		each := 32 / f.bits
		mask := uint32(1)<<f.bits - 1
		for i := range dst {
			w := binary.LittleEndian.Uint32(src[i/each*4:])
			dst[i] = byte(w >> (i % each * f.bits) & mask)
		}
	case f.bits == 8:
		copy(dst, src)
	case f.bits == 4:
		for i := range len(dst) / 2 {
			c := src[i]
			dst[2*i], dst[2*i+1] = c&15, c>>4
		}
		if n := len(dst); n%2 == 1 {
			dst[n-1] = src[n/2] & 15
		}
	default:
		// Eight fields take as many bytes as one has bits.
		mask := uint64(1)<<f.bits - 1
		for len(dst) > 0 {
			var w [8]byte
			copy(w[:], src[:min(f.bits, len(src))])
			x := binary.LittleEndian.Uint64(w[:])
			n := min(8, len(dst))
			for i := range dst[:n] {
				dst[i] = byte(x & mask)
				x >>= f.bits
			}
			dst, src = dst[n:], src[min(f.bits, len(src)):]
		}
	}
}

// pack puts fields into the words of dst, and zeros behind them.
func (f fields) pack(dst, src []byte) {
	switch {
	case f.padded:
		each := 32 / f.bits
		for k := 0; 4*k < len(dst); k++ {
			var w uint32
			for i := range min(each, len(src)) {
				w |= uint32(src[i]) << (i * f.bits)
			}
			src = src[min(each, len(src)):]
			binary.LittleEndian.PutUint32(dst[4*k:], w)
		}
	case f.bits == 8:
		clear(dst[copy(dst, src):])
	case f.bits == 4:
		n := len(src) / 2
		for i := 0; i < n/4*4; i += 4 { // eight at a time
			x := binary.LittleEndian.Uint64(src[2*i:])
			x = (x | x>>4) & 0x00ff00ff00ff00ff
			x = (x | x>>8) & 0x0000ffff0000ffff
			binary.LittleEndian.PutUint32(dst[i:], uint32(x|x>>16))
		}
		for i := n / 4 * 4; i < n; i++ {
			dst[i] = src[2*i] | src[2*i+1]<<4
		}
		rest := dst[n:]
		if len(src)%2 == 1 {
			rest[0] = src[2*n]
			rest = rest[1:]
		}
		clear(rest)
	default:
		for len(dst) > 0 {
			var x uint64
			n := min(8, len(src))
			for i := range n {
				x |= uint64(src[i]) << (i * f.bits)
			}
			src = src[n:]
			var w [8]byte
			binary.LittleEndian.PutUint64(w[:], x)
			dst = dst[copy(dst, w[:f.bits]):]
		}
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

func ceilDiv(a, b int64) int64 {
	n := a / b
	if a%b != 0 {
		n++
	}
	return n
}
