package ggml

import (
	"encoding/binary"

	"github.com/lorakit/lorakit/internal/kernels"
)

// The types with one scale a block, and no groups: Q4_0 … Q8_0, Q1_0 and Q2_0.

// nibbles packs 32 codes of 4 bits: byte j has those of elements j and j+16.
func nibbles(p []byte, codes *[32]byte) {
	for j := range p[:16] {
		p[j] = codes[j]&15 | codes[j+16]<<4
	}
}

// fifthBits collects bit 4 of 32 codes.
func fifthBits(codes *[32]byte) (bits uint32) {
	for j, q := range codes {
		bits |= uint32(q>>4&1) << j
	}
	return bits
}

// signedCodes finds the codes of Q4_0 and Q5_0, whose zero is the code zero. The largest element gets code 0.
func signedCodes(codes *[32]byte, x []float32, zero float32) (scale float32) {
	var m, magnitude float32
	for _, v := range x {
		if a := abs(v); a > magnitude {
			magnitude, m = a, v
		}
	}
	scale = m / -zero
	inv := inverse(scale)
	for i, v := range x {
		codes[i] = byte(min(int8(2*zero-1), int8(kernels.Truncate(float32(v*inv)+(zero+0.5)))))
	}
	return scale
}

// rangedCodes finds the codes of Q4_1 and Q5_1, from 0 for the least element to most for the greatest.
func rangedCodes(codes *[32]byte, x []float32, most float32) (scale, least float32) {
	low, high := x[0], x[0]
	for _, v := range x[1:] {
		if v < low {
			low = v
		}
		if v > high {
			high = v
		}
	}
	scale = (high - low) / most
	inv := inverse(scale)
	for i, v := range x {
		codes[i] = byte(min(int8(most), int8(kernels.Truncate(float32((v-low)*inv)+0.5))))
	}
	return scale, low
}

func encodeQ4x0(p []byte, x []float32) {
	var codes [32]byte
	putHalf(p, signedCodes(&codes, x, 8))
	nibbles(p[2:], &codes)
}

func encodeQ4x1(p []byte, x []float32) {
	var codes [32]byte
	scale, least := rangedCodes(&codes, x, 15)
	putHalf(p, scale)
	putHalf(p[2:], least)
	nibbles(p[4:], &codes)
}

func encodeQ5x0(p []byte, x []float32) {
	var codes [32]byte
	putHalf(p, signedCodes(&codes, x, 16))
	binary.LittleEndian.PutUint32(p[2:], fifthBits(&codes))
	nibbles(p[6:], &codes)
}

func encodeQ5x1(p []byte, x []float32) {
	var codes [32]byte
	scale, least := rangedCodes(&codes, x, 31)
	putHalf(p, scale)
	putHalf(p[2:], least)
	binary.LittleEndian.PutUint32(p[4:], fifthBits(&codes))
	nibbles(p[8:], &codes)
}

func encodeQ1x0(p []byte, x []float32) {
	var sum float32
	for _, v := range x {
		sum += abs(v)
	}
	putHalf(p, sum/128)
	clear(p[2:])
	for j, v := range x {
		if v >= 0 {
			p[2+j/8] |= 1 << (j % 8)
		}
	}
}

func encodeQ2x0(p []byte, x []float32) {
	d := largest(x)
	putHalf(p, d)
	inv := inverse(d)
	clear(p[2:])
	for j, v := range x {
		q := clip(kernels.RoundAway(float32(v*inv)), -1, 2) + 1
		p[2+j/4] |= byte(q) << (2 * (j % 4))
	}
}

func decodeQ1x0(dst []float32, src []byte) {
	for ; len(src) > 0; dst, src = dst[128:], src[18:] {
		values := [2]float32{-half(src), half(src)}
		for j := range dst[:128] {
			dst[j] = values[src[2+j/8]>>(j%8)&1]
		}
	}
}

func decodeQ2x0(dst []float32, src []byte) {
	for ; len(src) > 0; dst, src = dst[64:], src[18:] {
		d := half(src)
		for j := range dst[:64] {
			dst[j] = float32(int32(src[2+j/4]>>(2*(j%4))&3)-1) * d
		}
	}
}
