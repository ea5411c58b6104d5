package gguf

import "github.com/lorakit/lorakit/tensor"

// mxfp4 is blocks of a scale, a power of two, and 32 codes of 4 bits.
var mxfp4 = tensor.Encoding{Name: "mxfp4", Elements: 32, Bytes: 17}

// mxfp4FileType is general.file_type of a file with such blocks.
const mxfp4FileType = uint32(38)

// PackMXFP4 makes blocks of MXFP4, 17 bytes each, of their scales and of 16 bytes of codes for each. Checkpoints have
// two codes that follow one another in a byte; GGUF has one of the first 16 and one of the last 16.
func PackMXFP4(dst, codes, scales []byte) {
	for i, scale := range scales {
		block, c := dst[17*i:17*i+17], codes[16*i:16*i+16]
		block[0] = scale
		for j := range 8 {
			low, high := c[j], c[j+8]
			block[1+2*j] = low&0xf | high<<4
			block[2+2*j] = low>>4 | high&0xf0
		}
	}
}

// UnpackMXFP4 is the inverse of PackMXFP4.
func UnpackMXFP4(codes, scales, src []byte) {
	for i := range scales {
		block, c := src[17*i:17*i+17], codes[16*i:16*i+16]
		scales[i] = block[0]
		for j := range 8 {
			even, odd := block[1+2*j], block[2+2*j]
			c[j] = even&0xf | odd<<4
			c[j+8] = even>>4 | odd&0xf0
		}
	}
}
