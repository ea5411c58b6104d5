package ggml_test

import (
	"testing"

	"github.com/lorakit/lorakit/ggml"
)

// What is measured is the float32 side.

func BenchmarkQuantize(b *testing.B) {
	x := normal(64*256, 1)
	for _, typ := range ggml.Types() {
		if typ.ReadOnly() {
			continue
		}
		b.Run(typ.String(), func(b *testing.B) {
			out := make([]byte, len(x)/typ.Elements()*typ.Bytes())
			b.SetBytes(int64(4 * len(x)))
			for b.Loop() {
				typ.Quantize(out, x)
			}
		})
	}
}

func BenchmarkDequantize(b *testing.B) {
	y := make([]float32, 64*256)
	for _, typ := range ggml.Types() {
		b.Run(typ.String(), func(b *testing.B) {
			blocks := make([]byte, len(y)/typ.Elements()*typ.Bytes())
			for i := range blocks {
				blocks[i] = byte(i*7) & 0x3f
			}
			b.SetBytes(int64(4 * len(y)))
			for b.Loop() {
				typ.Dequantize(y, blocks)
			}
		})
	}
}
