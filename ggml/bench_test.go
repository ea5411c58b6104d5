package ggml_test

import (
	"testing"
	"time"

	"github.com/lorakit/lorakit/ggml"
)

// measure reports the bytes of float32 a second, on average and in the fastest call: on a busy machine the latter says
// more.
func measure(b *testing.B, elements int, call func()) {
	b.SetBytes(int64(4 * elements))
	best := time.Hour
	for b.Loop() {
		start := time.Now()
		call()
		best = min(best, time.Since(start))
	}
	b.ReportMetric(float64(4*elements)/best.Seconds()/1e6, "best-MB/s")
}

func BenchmarkQuantize(b *testing.B) {
	x := normal(16*256, 1)
	for _, typ := range ggml.Types() {
		if typ.ReadOnly() {
			continue
		}
		b.Run(typ.String(), func(b *testing.B) {
			out := make([]byte, len(x)/typ.Elements()*typ.Bytes())
			measure(b, len(x), func() { typ.Quantize(out, x) })
		})
	}
}

func BenchmarkDequantize(b *testing.B) {
	y := make([]float32, 16*256)
	for _, typ := range ggml.Types() {
		b.Run(typ.String(), func(b *testing.B) {
			blocks := make([]byte, len(y)/typ.Elements()*typ.Bytes())
			for i := range blocks {
				blocks[i] = byte(i*7) & 0x3f
			}
			measure(b, len(y), func() { typ.Dequantize(y, blocks) })
		})
	}
}
