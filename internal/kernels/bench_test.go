package kernels

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// sizes are a tile of the pipeline, which stays in the caches, and a buffer that does not.
var sizes = []struct {
	name  string
	bytes int
}{{"512KiB", 512 << 10}, {"64MiB", 64 << 20}}

// weights makes normally distributed weights, of standard deviation 0.02.
func weights(size int, f Float) []byte {
	b := make([]byte, size)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range size / f.Size() {
		store(b, f, i, float32(r.NormFloat64()*0.02))
	}
	return b
}

// measure reports the bytes a second, on average and in the fastest call: on a busy machine the latter says more.
func measure(b *testing.B, bytes int, call func()) {
	b.SetBytes(int64(bytes))
	b.ReportMetric(float64(bytes)/fastest(b, call).Seconds()/1e6, "best-MB/s")
}

// fastest returns the time of the fastest call.
func fastest(b *testing.B, call func()) time.Duration {
	best := time.Hour
	for b.Loop() {
		start := time.Now()
		call()
		best = min(best, time.Since(start))
	}
	return best
}

// everySet runs a benchmark for each set, type and size; prepare returns what is to be measured.
func everySet(b *testing.B, types []Float, prepare func(s *Set, f Float, size int) func()) {
	for _, size := range sizes {
		for _, f := range types {
			for _, s := range Sets() {
				b.Run(fmt.Sprintf("%v/%s/%s", f, size.name, s.Name()), func(b *testing.B) {
					measure(b, size.bytes, prepare(s, f, size.bytes))
				})
			}
		}
	}
}

// BenchmarkMemcpy is what the others are held against.
func BenchmarkMemcpy(b *testing.B) {
	for _, size := range sizes {
		b.Run(size.name, func(b *testing.B) {
			src, dst := weights(size.bytes, BF16), make([]byte, size.bytes)
			measure(b, size.bytes, func() { copy(dst, src) })
		})
	}
}

// BenchmarkQuantizeNF4 counts the bytes of the input.
func BenchmarkQuantizeNF4(b *testing.B) { everySet(b, types, quantize4(nf4)) }

// BenchmarkQuantizeFP4 counts the bytes of the input.
func BenchmarkQuantizeFP4(b *testing.B) { everySet(b, []Float{BF16}, quantize4(fp4)) }

func quantize4(c *Codebook) func(s *Set, f Float, size int) func() {
	return func(s *Set, f Float, size int) func() {
		src, n := weights(size, f), size/f.Size()
		packed, absmax := make([]byte, n/2), make([]float32, n/64)
		return func() { s.Quantize4(c, packed, absmax, src, f, 64) }
	}
}

// BenchmarkDequantizeNF4 counts the bytes of the output.
func BenchmarkDequantizeNF4(b *testing.B) {
	everySet(b, types, func(s *Set, f Float, size int) func() {
		src, n := weights(size, f), size/f.Size()
		packed, absmax := make([]byte, n/2), make([]float32, n/64)
		s.Quantize4(nf4, packed, absmax, src, f, 64)
		return func() { s.Dequantize4(src, f, packed, absmax, &nf4.Code, 64) }
	})
}

// BenchmarkQuantize8 counts the bytes of the input.
func BenchmarkQuantize8(b *testing.B) {
	everySet(b, types, func(s *Set, f Float, size int) func() {
		src, n := weights(size, f), size/f.Size()
		q, scb := make([]byte, n), make([]float32, n/4096)
		return func() { s.Quantize8(q, scb, src, f, 4096) }
	})
}

// BenchmarkDequantize8 counts the bytes of the output.
func BenchmarkDequantize8(b *testing.B) {
	everySet(b, types, func(s *Set, f Float, size int) func() {
		src, n := weights(size, f), size/f.Size()
		q, scb := make([]byte, n), make([]float32, n/4096)
		s.Quantize8(q, scb, src, f, 4096)
		return func() { s.Dequantize8(src, f, q, scb, 4096) }
	})
}

// BenchmarkConvert counts the bytes of the longer side.
func BenchmarkConvert(b *testing.B) {
	for _, to := range types {
		for _, from := range types {
			if to == from {
				continue
			}
			b.Run(fmt.Sprintf("%vTo%v", from, to), func(b *testing.B) {
				everySet(b, []Float{from}, func(s *Set, f Float, size int) func() {
					n := size / max(f.Size(), to.Size())
					src, dst := weights(n*f.Size(), f), make([]byte, n*to.Size())
					return func() { s.Convert(dst, to, src, f) }
				})
			})
		}
	}
}
