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
