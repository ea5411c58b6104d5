package gguf

import (
	"io"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// mxfp4 is blocks of a scale, a power of two, and 32 codes of 4 bits.
var mxfp4 = tensor.Encoding{Name: "mxfp4", Elements: 32, Bytes: 17}

// mxfp4FileType is general.file_type of a file with such blocks.
const mxfp4FileType = uint32(38)

// packMXFP4 makes blocks of MXFP4, 17 bytes each, of their scales and of 16 bytes of codes for each. Checkpoints have
// two codes that follow one another in a byte; GGUF has one of the first 16 and one of the last 16.
func packMXFP4(dst, codes, scales []byte) {
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

// Packed is the bytes of a tensor in blocks of MXFP4, which are packed as they are read from the tensors of its codes
// and of its scales.
func (t *Tensor) Packed(codes, scales formats.Tensor) io.ReaderAt {
	return &packed{codes, scales, t.View, t.ScalesView}
}

type packed struct {
	codes, scales         formats.Tensor
	codesView, scalesView tensor.View
}

// ReadAt fills p from the byte off on.
func (r *packed) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, io.EOF
	}
	blocks := r.scalesView.Count()
	lo := min(off/mxfp4.Bytes, blocks)
	hi := min((off+int64(len(p))+mxfp4.Bytes-1)/mxfp4.Bytes, blocks)
	n := hi - lo
	codes, scales, out := make([]byte, 16*n), make([]byte, n), make([]byte, mxfp4.Bytes*n)
	err := r.codesView.Gather(codes, 16*lo, 16*hi, 1, 32*n+4096, reading(r.codes))
	if err == nil {
		err = r.scalesView.Gather(scales, lo, hi, 1, 2*n+4096, reading(r.scales))
	}
	if err != nil {
		return 0, err
	}
	packMXFP4(out, codes, scales)
	m := copy(p, out[min(off-lo*mxfp4.Bytes, int64(len(out))):])
	if m < len(p) {
		return m, io.EOF
	}
	return m, nil
}

// reading reads bytes of a tensor.
func reading(t formats.Tensor) func(from, n int64) ([]byte, error) {
	var b []byte
	return func(from, n int64) ([]byte, error) {
		if int64(cap(b)) < n {
			b = make([]byte, n)
		}
		return b[:n], formats.ReadFull(t.Data, b[:n], t.Offset+from)
	}
}
