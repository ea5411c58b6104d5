package kernels

import (
	"encoding/binary"
	"math"
	"testing"
)

// fuzzed are seeds: nothing, numbers, and what is not finite.
func fuzzed(f *testing.F, add func(b []byte)) {
	add(nil)
	for _, t := range types {
		add(weights(400*t.Size(), t))
		add(encode(t, append(random(200, 9), inf, nan, -inf, 1e-45, math.MaxFloat32)...))
	}
}

func FuzzQuantize4(f *testing.F) {
	fuzzed(f, func(b []byte) { f.Add(b, uint8(0), uint8(1), true) })
	f.Fuzz(func(t *testing.T, b []byte, typ, block uint8, isNF4 bool) {
		from := types[typ%3]
		c := fp4
		if isNF4 {
			c = nf4
		}
		equalQuantize4(t, c, b[:len(b)/from.Size()*from.Size()], from, 32<<(block%8))
	})
}

func FuzzDequantize4(f *testing.F) {
	fuzzed(f, func(b []byte) { f.Add(b, uint32(1), uint8(1), true) })
	f.Fuzz(func(t *testing.T, b []byte, odd uint32, block uint8, isNF4 bool) {
		code := fp4.Code
		if isNF4 {
			code = nf4.Code
		}
		if odd%7 == 0 {
			code[odd%16] = math.Float32frombits(odd)
		}
		n, blockSize := max(2*len(b)-int(odd&1), 0), 32<<(block%8)
		absmax := make([]float32, (n+blockSize-1)/blockSize)
		for i := range absmax {
			absmax[i] = math.Float32frombits(binary.LittleEndian.Uint32(append(b[i%len(b):len(b):len(b)], 1, 2, 3, 4)))
		}
		equalDequantize4(t, b, absmax, &code, n, blockSize)
	})
}

func FuzzRows8(f *testing.F) {
	fuzzed(f, func(b []byte) { f.Add(b, uint8(0), uint16(33)) })
	f.Fuzz(func(t *testing.T, b []byte, typ uint8, cols uint16) {
		from, width := types[typ%3], int(cols)+1
		equalRows8(t, b[:len(b)/(from.Size()*width)*from.Size()*width], from, width)
		scb := make([]float32, len(b)/width)
		for i := range scb {
			scb[i] = math.Float32frombits(binary.LittleEndian.Uint32(append(b[i:len(b):len(b)], 1, 2, 3, 4)))
		}
		equalDequantize8(t, b[:len(scb)*width], scb, width)
	})
}

func FuzzConvert(f *testing.F) {
	fuzzed(f, func(b []byte) { f.Add(b) })
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, from := range types {
			equalConvert(t, b[:len(b)/from.Size()*from.Size()], from)
		}
	})
}

// fuzzedFloats takes n float32 from b, over and over.
func fuzzedFloats(b []byte, n, offset int) []float32 {
	x := make([]float32, n)
	for i := range x {
		if at := (4*(i+offset) + offset) % (len(b) + 1); at+4 <= len(b) {
			x[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[at:]))
		}
	}
	return x
}

func FuzzMulAdd(f *testing.F) {
	fuzzed(f, func(b []byte) { f.Add(b, uint8(9), uint8(17), uint8(50), uint8(1)) })
	f.Fuzz(func(t *testing.T, b []byte, rows, steps, cols, layout uint8) {
		m, k, n := int(rows)%40, int(steps)%80, int(cols)
		layoutA, layoutB := layouts[int(layout)%len(layouts)], layouts[int(layout)/len(layouts)%len(layouts)]
		equalMulAdd(t, fuzzedFloats(b, m*n, 0), fuzzedFloats(b, m*k, 1), fuzzedFloats(b, k*n, 2), m, k, n, layoutA, layoutB)
	})
}

func FuzzMergeRow(f *testing.F) {
	fuzzed(f, func(b []byte) { f.Add(b, uint8(0), float32(0.5)) })
	f.Fuzz(func(t *testing.T, b []byte, typ uint8, scale float32) {
		from := types[typ%3]
		n := len(b) / from.Size()
		delta := fuzzedFloats(b, n, 1)
		equalMergeRow(t, b[:n*from.Size()], from, delta, scale)
		equalSums(t, fuzzedFloats(b, n, 2), fuzzedFloats(b, n, 3), fuzzedFloats(b, n, 4), delta, scale)
	})
}
