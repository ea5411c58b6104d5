package ggml

import (
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// The types whose codes are floats of 4 bits, E2M1: MXFP4 with a power of two as a block's scale (OCP Microscaling
// Formats, 1.0) and NVFP4 with a float of 8 bits, UE4M3, as that of 16 elements.

// doubled are twice the values of the codes, so that they are whole numbers.
var doubled = [16]float32{0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}

// middles are half way between the values of the codes 0 to 7.
var middles = [7]float32{0.5, 1.5, 2.5, 3.5, 5, 7, 10}

// thresholds are what a magnitude has to be greater than to have a code above 0 to 6. Where ggml compares the errors of
// all codes, the first of those with the least wins: in the middle the one below, and 0 before -0.
type thresholds [7]float32

func newThresholds(scale float32) *thresholds {
	var t thresholds
	for i, m := range middles {
		t[i] = m * scale
		if scale == 0 { // all errors are the same
			t[i] = math.MaxFloat32
		}
	}
	return &t
}

func (t *thresholds) code(x float32) (code byte) {
	m := abs(x)
	if m > t[3] {
		code = 4
	}
	if m > t[code+1] {
		code += 2
	}
	if m > t[code] {
		code++
	}
	if x < 0 && code > 0 {
		code |= 8
	}
	return code
}

// powerOfTwo is 2^(e-128), half of what e stands for.
func powerOfTwo(e byte) float32 {
	if e < 2 {
		return math.Float32frombits(0x00200000 << e)
	}
	return math.Float32frombits(uint32(e-1) << 23)
}

// floorLog2 is the floor of the logarithm as a float32, which close below a power of two is rounded up to it.
func floorLog2(x float32) int {
	b := math.Float32bits(x)
	if exponent, rest := b>>23, b&0x7fffff; exponent > 0 && rest < 0x7fff00 {
		return int(exponent) - 127
	}
	return int(math.Floor(float64(float32(math.Log2(float64(x))))))
}

func encodeMXFP4(p []byte, x []float32) {
	p[0] = 0
	if m := largest(x); m > 0 {
		p[0] = byte(floorLog2(m) - 2 + 127)
	}
	t := newThresholds(powerOfTwo(p[0]))
	for j := range 16 {
		p[1+j] = t.code(x[j]) | t.code(x[j+16])<<4
	}
}

// toUE4M3 rounds to a float of 4 bits of exponent and 3 of mantissa, halves up; negative numbers become 0.
func toUE4M3(x float32) byte {
	if !(x > 0) {
		return 0
	}
	x = min(x, 448)
	b := math.Float32bits(x)
	exponent := int32(b>>23) - 127 + 7
	if exponent <= 0 {
		return byte(min(7, kernels.Truncate(float32(x*512)+0.5)))
	}
	mantissa := int32(b>>20&7) + int32(b>>19&1)
	if mantissa > 7 {
		mantissa = 0
		exponent++
	}
	if exponent >= 15 {
		return 0x7e
	}
	return byte(exponent<<3 | mantissa)
}

// halfUE4M3 is half of a float's value. NaN is read as 0.
func halfUE4M3(b byte) float32 {
	exponent, mantissa := b>>3&15, float32(b&7)
	switch {
	case b == 0 || b == 0x7f:
		return 0
	case exponent == 0:
		return mantissa * (1.0 / 1024)
	}
	return (1 + mantissa/8) * math.Float32frombits(uint32(127-8+int(exponent))<<23)
}

func encodeNVFP4(p []byte, x []float32) {
	for s := range 4 {
		group := x[16*s:][:16]
		p[s] = toUE4M3(largest(group) / 6)
		t := newThresholds(halfUE4M3(p[s]))
		for j := range 8 {
			p[4+8*s+j] = t.code(group[j]) | t.code(group[j+8])<<4
		}
	}
}

func scaleMXFP4(p []byte) float32 { return powerOfTwo(p[0]) }
