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
func ToE4M3(x float32) byte { return toE4M3(x, true) }

// ToE4M3Low is ToE4M3 but for two nearest values, where it takes the one nearer to zero, and for zeros, which lose
// their sign: the first of the nearest, where all codes are gone through in order.
func ToE4M3Low(x float32) byte {
	c := toE4M3(x, false)
	if c == 0x80 {
		return 0
	}
	return c
}

func toE4M3(x float32, even bool) byte {
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
		a := math.Float32frombits(b)
		c := math.Float32bits(a+magic) & 0xff
		if !even && math.Float32frombits(math.Float32bits(magic)|c)-magic-a == 0x1p-10 {
			c--
		}
		return sign | byte(c)
	}
	half := uint32(1<<19 - 1)
	if even {
		half += b >> 20 & 1
	}
	return sign | byte((b+half)>>20-(127-7)<<3)
}

// ToE2M1 returns the code of the nearest value, of two the one with an even code. The sign stays, of zeros too; beyond
// MaxE2M1 it is that of MaxE2M1. NaN has no code and becomes MaxE2M1.
func ToE2M1(x float32) byte {
	a := math.Float32bits(x)
	sign := byte(a >> 28 & 8)
	return sign | magnitudesE2M1(math.Float32frombits(a&^signBit), true)
}

// ToE2M1Low is ToE2M1 but for two nearest values, where it takes the one nearer to zero, and for zeros, which lose
// their sign: the first of the nearest, where all codes are gone through in order.
func ToE2M1Low(x float32) byte {
	a := math.Float32bits(x)
	c := magnitudesE2M1(math.Float32frombits(a&^signBit), false)
	if c == 0 {
		return 0
	}
	return byte(a>>28&8) | c
}

// magnitudesE2M1 counts the middles between values that a magnitude is beyond.
func magnitudesE2M1(a float32, even bool) (c byte) {
	for i, m := range [7]float32{0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5} {
		if a > m || a != a || even && a == m && i%2 == 1 {
			c++
		}
	}
	return c
}
