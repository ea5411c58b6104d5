package mlx

import "encoding/binary"

// pack sets words to the lowest bits of codes, one after the other from the lowest bit of the first word on. There are
// a multiple of 32 codes, or with 4 and 8 bits of 8.
func pack(words, codes []byte, bits int64) {
	switch bits {
	case 8:
		copy(words, codes)
	case 4:
		for ; len(codes) >= 8; codes, words = codes[8:], words[4:] {
			x := binary.LittleEndian.Uint64(codes)
			x = (x | x>>4) & 0x00ff00ff00ff00ff
			x = (x | x>>8) & 0x0000ffff0000ffff
			binary.LittleEndian.PutUint32(words, uint32(x|x>>16))
		}
	default:
		// Eight codes are as many bytes as a code has bits.
		for ; len(codes) >= 8; codes, words = codes[8:], words[bits:] {
			var x uint64
			for i, c := range (*[8]byte)(codes) {
				x |= uint64(c) << (int64(i) * bits)
			}
			for i := range words[:bits] {
				words[i] = byte(x >> (8 * i))
			}
		}
	}
}

// unpack is the inverse of pack.
func unpack(codes, words []byte, bits int64) {
	switch bits {
	case 8:
		copy(codes, words)
	case 4:
		for ; len(codes) >= 8; codes, words = codes[8:], words[4:] {
			x := uint64(binary.LittleEndian.Uint32(words))
			x = (x | x<<16) & 0x0000ffff0000ffff
			x = (x | x<<8) & 0x00ff00ff00ff00ff
			x = (x | x<<4) & 0x0f0f0f0f0f0f0f0f
			binary.LittleEndian.PutUint64(codes, x)
		}
	default:
		mask := byte(1)<<bits - 1
		for ; len(codes) >= 8; codes, words = codes[8:], words[bits:] {
			var x uint64
			for i, w := range words[:bits] {
				x |= uint64(w) << (8 * i)
			}
			for i := range (*[8]byte)(codes) {
				codes[i] = byte(x>>(int64(i)*bits)) & mask
			}
		}
	}
}
