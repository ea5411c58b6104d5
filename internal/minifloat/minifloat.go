// Package minifloat has the floats of 8 and 4 bits that quantised weights and their scales are made of: E4M3 (no
// infinities, a NaN for each sign), E2M1 (neither infinities nor NaNs) and E8M0 (powers of two and one NaN), as OCP's
// Microscaling Formats 1.0 have them.
package minifloat

import "math"

var (
	// E4M3 are the values of its codes.
	E4M3 = valuesE4M3()
	// E2M1 are the values of its codes.
	E2M1 = [16]float32{0, 0.5, 1, 1.5, 2, 3, 4, 6, float32(math.Copysign(0, -1)), -0.5, -1, -1.5, -2, -3, -4, -6}
	// E8M0 are the values of its codes, 2^(code-127).
	E8M0 = valuesE8M0()
)

// Codes and limits.
const (
	MaxE4M3 = 448
	NaNE4M3 = 0x7f
	MaxE2M1 = 6
	NaNE8M0 = 0xff
)

func valuesE4M3() (v [256]float32) {
	for b := range v {
		exponent, mantissa := b>>3&15, float64(b&7)
		switch {
		case exponent == 0:
			v[b] = float32(math.Ldexp(mantissa, -9))
		case b&0x7f == NaNE4M3:
			v[b] = float32(math.NaN())
		default:
			v[b] = float32(math.Ldexp(8+mantissa, exponent-10))
		}
		if b >= 0x80 {
			v[b] = -v[b]
		}
	}
	return v
}

func valuesE8M0() (v [256]float32) {
	for b := range v {
		v[b] = float32(math.Ldexp(1, b-127))
	}
	v[NaNE8M0] = float32(math.NaN())
	return v
}

const (
	signBit = 1 << 31
	smallE4 = (127 - 6) << 23 // the bits of 2^-6, the least normal number of E4M3
)

// ToE4M3 returns the code of the nearest value, of two the one with an even code. The sign stays, of zeros too; beyond
// MaxE4M3 it is that of MaxE4M3; NaN becomes NaN.
func ToE4M3(x float32) byte {
	b := math.Float32bits(x)
	sign := byte(b >> 24 & 0x80)
	b &^= signBit
	switch {
	case b > 0x7f800000:
		return sign | NaNE4M3
	case b >= 0x43e00000: // 448
		return sign | 0x7e
	case b < smallE4:
		// In 2^14 the last bit is 2^-9, so that the addition rounds, to even.
		const magic = 1 << 14
		return sign | byte(math.Float32bits(math.Float32frombits(b)+magic))
	}
	return sign | byte((b+1<<19-1+b>>20&1)>>20-(127-7)<<3)
}

// ToE2M1 returns the code of the nearest value, of two the one with an even code. The sign stays, of zeros too; beyond
// MaxE2M1 it is that of MaxE2M1. NaN has no code and becomes MaxE2M1.
func ToE2M1(x float32) byte {
	b := math.Float32bits(x)
	a := b &^ signBit
	// Between 1 and 6 a code is an exponent and the first digit of a mantissa; below are only 0 and 0.5.
	c := min((a+halfE2+a>>22&1)>>22-codesE2, 7)
	if a < one {
		c = over(a, quarter) + over(a, threeQuarters-1)
	}
	return byte(b>>28&8 | c)
}

// Bits of float32, for E2M1: its last digit is bit 22.
const (
	one           = 127 << 23
	quarter       = 125 << 23
	threeQuarters = 126<<23 | 1<<22
	halfE2        = 1<<21 - 1
	codesE2       = 127<<1 - 2 // what codes are less than those bits
)

// over is 1 where a is more than b, which are below 2^31, else 0.
func over(a, b uint32) uint32 { return (b - a) >> 31 }
