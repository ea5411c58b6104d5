// Package bitfield packs integers of 1 to 8 bits one right behind the other into words of 32 bits, from the lowest bit
// of the first word on. Words are little-endian, so that eight integers are as many bytes as one has bits.
package bitfield

import "encoding/binary"

// Words is how many words n fields take.
func Words(n, bits int64) int64 { return n/32*bits + (n%32*bits+31)/32 } // n*bits may not fit

// Pack puts fields, each a byte of src, into dst, and zeros behind them.
func Pack(dst, src []byte, bits int64) {
	switch bits {
	case 8:
		clear(dst[copy(dst, src):])
		return
	case 4:
		for ; len(src) >= 8 && len(dst) >= 4; src, dst = src[8:], dst[4:] {
			x := binary.LittleEndian.Uint64(src)
			x = (x | x>>4) & 0x00ff_00ff_00ff_00ff
			x = (x | x>>8) & 0x0000_ffff_0000_ffff
			binary.LittleEndian.PutUint32(dst, uint32(x|x>>16))
		}
	}
	for len(dst) > 0 {
		var x uint64
		n := min(8, len(src))
		for i, c := range src[:n] {
			x |= uint64(c) << (int64(i) * bits & 63)
		}
		src = src[n:]
		if len(dst) >= 8 { // zeros behind what there is; others come over them
			binary.LittleEndian.PutUint64(dst, x)
			dst = dst[bits:]
			continue
		}
		var last [8]byte
		binary.LittleEndian.PutUint64(last[:], x)
		dst = dst[copy(dst, last[:bits]):]
	}
}

// Unpack sets dst to the fields of src, a byte each, and to zeros where there are no more.
func Unpack(dst, src []byte, bits int64) {
	switch bits {
	case 8:
		clear(dst[copy(dst, src):])
		return
	case 4:
		for ; len(dst) >= 8 && len(src) >= 4; dst, src = dst[8:], src[4:] {
			x := uint64(binary.LittleEndian.Uint32(src))
			x = (x | x<<16) & 0x0000_ffff_0000_ffff
			x = (x | x<<8) & 0x00ff_00ff_00ff_00ff
			binary.LittleEndian.PutUint64(dst, (x|x<<4)&0x0f0f_0f0f_0f0f_0f0f)
		}
	}
	// Eight fields are parted in halves, quarters and eighths.
	b := uint(bits)
	halves := uint64(1)<<(4*b) - 1
	quarters := (uint64(1)<<(2*b) - 1) * 0x0000_0001_0000_0001
	eighths := (uint64(1)<<b - 1) * 0x0001_0001_0001_0001
	for len(dst) > 0 {
		var x uint64
		if len(src) >= 8 {
			x = binary.LittleEndian.Uint64(src)
		} else { // the end
			var last [8]byte
			copy(last[:], src)
			x = binary.LittleEndian.Uint64(last[:])
		}
		src = src[min(int(b), len(src)):]
		x = x&halves | x>>(4*b&63)&halves<<32
		x = x&quarters | x>>(2*b&63)&quarters<<16
		x = x&eighths | x>>(b&63)&eighths<<8
		if len(dst) < 8 {
			var last [8]byte
			binary.LittleEndian.PutUint64(last[:], x)
			copy(dst, last[:])
			return
		}
		binary.LittleEndian.PutUint64(dst, x)
		dst = dst[8:]
	}
}
