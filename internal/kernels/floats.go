package kernels

import (
	"encoding/binary"
	"math"
)

// Positive infinity of each type, as bits. What is above it, the sign put aside, is a NaN.
const (
	f32Inf  = 0x7f800000
	f16Inf  = 0x7c00
	bf16Inf = 0x7f80
)

// f32NaN and bf16NaN are the NaN that arithmetic makes, the same on every machine (processors differ in its sign). A
// bfloat16 made of any NaN is bf16NaN, as in PyTorch's scalar cast; its vectorised one makes 0xffff.
const (
	f32NaN  = 0x7fc00000
	bf16NaN = 0x7fc0
)

// piece is the number of elements that the twins widen at a time.
const piece = 32

// load returns the bits of element i.
func load(b []byte, f Float, i int) uint32 {
	if f == F32 {
		return binary.LittleEndian.Uint32(b[4*i:])
	}
	return uint32(binary.LittleEndian.Uint16(b[2*i:]))
}

// widen returns the float32 with the value of an element's bits.
func widen(bits uint32, f Float) float32 {
	switch f {
	case F16:
		return f32FromF16(uint16(bits))
	case BF16:
		return math.Float32frombits(bits << 16)
	}
	return math.Float32frombits(bits)
}

// widenAll widens the first len(x) elements of b.
func widenAll(x []float32, b []byte, f Float) {
	switch f {
	case F32:
		for i := range x {
			x[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
		}
	case F16:
		for i := range x {
			x[i] = f32FromF16(binary.LittleEndian.Uint16(b[2*i:]))
		}
	case BF16:
		for i := range x {
			x[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(b[2*i:])) << 16)
		}
	}
}

// store rounds x to the type of the elements of b, at index i.
func store(b []byte, f Float, i int, x float32) {
	switch f {
	case F32:
		binary.LittleEndian.PutUint32(b[4*i:], math.Float32bits(x))
	case F16:
		binary.LittleEndian.PutUint16(b[2*i:], f16FromF32(x))
	case BF16:
		binary.LittleEndian.PutUint16(b[2*i:], bf16FromF32(x))
	}
}

// storeAll rounds x to the first len(x) elements of b.
func storeAll(b []byte, f Float, x []float32) {
	switch f {
	case F32:
		for i, v := range x {
			binary.LittleEndian.PutUint32(b[4*i:], math.Float32bits(v))
		}
	case F16:
		for i, v := range x {
			binary.LittleEndian.PutUint16(b[2*i:], f16FromF32(v))
		}
	case BF16:
		for i, v := range x {
			binary.LittleEndian.PutUint16(b[2*i:], bf16FromF32(v))
		}
	}
}

// product returns a*b in float32. A NaN is always f32NaN.
func product(a, b float32) float32 { return number(a * b) }

// number returns x, and f32NaN for any NaN.
func number(x float32) float32 {
	if x != x {
		return math.Float32frombits(f32NaN)
	}
	return x
}

// convert is the twin of Set.convert.
func convert(dst []byte, to Float, src []byte, from Float) {
	var x [piece]float32
	for len(src) > 0 {
		n := min(len(src)/from.Size(), piece)
		widenAll(x[:n], src, from)
		storeAll(dst, to, x[:n])
		dst, src = dst[n*to.Size():], src[n*from.Size():]
	}
}

// maxAbs is the twin of Set.maxAbs. With the sign put aside, floats are ordered as their bits are, NaNs last.
func maxAbs(src []byte, f Float) (largest uint32) {
	if f == F32 {
		for ; len(src) >= 4; src = src[4:] {
			largest = max(largest, binary.LittleEndian.Uint32(src)&0x7fffffff)
		}
		return largest
	}
	for ; len(src) >= 2; src = src[2:] {
		largest = max(largest, uint32(binary.LittleEndian.Uint16(src)&0x7fff))
	}
	return largest
}

// bf16FromF32 rounds to nearest even.
func bf16FromF32(x float32) uint16 {
	b := math.Float32bits(x)
	if b&0x7fffffff > f32Inf {
		return bf16NaN
	}
	return uint16((b + 0x7fff + b>>16&1) >> 16)
}

// f16FromF32 rounds to nearest even. A NaN keeps its sign and the upper bits of its payload and becomes quiet, as
// VCVTPS2PH has it.
func f16FromF32(x float32) uint16 {
	b := math.Float32bits(x)
	sign, b := uint16(b>>16&0x8000), b&0x7fffffff
	switch {
	case b > f32Inf:
		return sign | 0x7e00 | uint16(b>>13&0x3ff)
	case b >= 0x47800000: // 2^16
		return sign | f16Inf
	case b >= 0x38800000: // 2^-14, the smallest normal float16
		b -= (127 - 15) << 23
		return sign | uint16((b+0xfff+b>>13&1)>>13)
	case b >= 0x33000000: // 2^-25, half of the smallest float16
		// The float16 counts units of 2^-24.
		shift := 126 - b>>23
		m := b&0x7fffff | 0x800000
		return sign | uint16((m+1<<(shift-1)-1+m>>shift&1)>>shift)
	}
	return sign
}

// f32FromF16 is exact. A NaN becomes quiet, as VCVTPH2PS has it.
func f32FromF16(h uint16) float32 {
	sign, exp, frac := uint32(h&0x8000)<<16, uint32(h>>10&0x1f), uint32(h&0x3ff)
	switch {
	case exp == 0x1f && frac != 0:
		return math.Float32frombits(sign | f32NaN | frac<<13)
	case exp == 0x1f:
		return math.Float32frombits(sign | f32Inf)
	case exp == 0:
		x := float32(frac) * (1.0 / (1 << 24))
		return math.Float32frombits(sign | math.Float32bits(x))
	}
	return math.Float32frombits(sign | (exp+127-15)<<23 | frac<<13)
}

// notFinite returns the float32 for a float16 magnitude that is no number.
func notFinite(magnitude uint16) float32 {
	if magnitude > f16Inf {
		return math.Float32frombits(f32NaN)
	}
	return math.Float32frombits(f32Inf)
}
