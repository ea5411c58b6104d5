package kernels

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels/race"
)

// blockQ8 is the size of a block of ggml's Q8_0: a float16 and 32 signed bytes.
const blockQ8 = 34

// EncodeQ8 quantises x, whole blocks of 32 finite elements, to ggml's Q8_0. The scale is the largest magnitude over
// 127; elements over it are rounded to integers, halves away from zero.
func EncodeQ8(dst []byte, x []float32) { active.EncodeQ8(dst, x) }

// EncodeQ8 is the function EncodeQ8 by this set.
func (s *Set) EncodeQ8(dst []byte, x []float32) {
	checkQ8(x, dst)
	race.ReadSlice(x)
	race.WriteSlice(dst)
	if s.encodeQ8 != nil {
		s.encodeQ8(dst, x)
		return
	}
	for ; len(x) > 0; dst, x = dst[blockQ8:], x[32:] {
		var d, inverse float32
		for _, v := range x[:32] {
			d = max(d, abs32(v))
		}
		if d /= 127; d != 0 {
			inverse = 1 / d
		}
		binary.LittleEndian.PutUint16(dst, f16FromF32(d))
		for i, v := range x[:32] {
			dst[2+i] = byte(RoundAway(float32(v * inverse)))
		}
	}
}

// DecodeQ8 decodes blocks of ggml's Q8_0 that have finite scales.
func DecodeQ8(dst []float32, src []byte) { active.DecodeQ8(dst, src) }

// DecodeQ8 is the function DecodeQ8 by this set.
func (s *Set) DecodeQ8(dst []float32, src []byte) {
	checkQ8(dst, src)
	race.ReadSlice(src)
	race.WriteSlice(dst)
	if s.decodeQ8 != nil {
		s.decodeQ8(dst, src)
		return
	}
	for ; len(src) > 0; dst, src = dst[32:], src[blockQ8:] {
		d := f32FromF16(binary.LittleEndian.Uint16(src))
		y, q := (*[32]float32)(dst), (*[32]byte)(src[2:])
		for i, b := range q {
			y[i] = float32(int8(b)) * d
		}
	}
}

func checkQ8(x []float32, blocks []byte) {
	if len(x)%32 != 0 || len(blocks) != len(x)/32*blockQ8 {
		panic(fmt.Sprintf("kernels: %d elements in %d bytes of Q8_0", len(x), len(blocks)))
	}
}

// Truncate cuts the fraction off. What is no int32 becomes the least, on every machine.
func Truncate(x float32) int32 {
	if !(x >= math.MinInt32 && x < -math.MinInt32) {
		return math.MinInt32
	}
	return int32(x)
}

// RoundAway rounds to the nearest integer, halves away from zero. What is no int32 becomes the least.
func RoundAway(x float32) int32 {
	n := Truncate(x)
	if n == math.MinInt32 {
		return n
	}
	switch rest := x - float32(n); { // exact
	case rest >= 0.5:
		n++
	case rest <= -0.5:
		n--
	}
	return n
}

// ScaleCodes sets dst to codes, signed bytes, times their scale, less a minimum: each scale, and each of mins, is for
// 16 elements. Without mins nothing is taken off. Scales and minima have to be finite.
func ScaleCodes(dst []float32, codes []byte, scales, mins []float32) {
	active.ScaleCodes(dst, codes, scales, mins)
}

// ScaleCodes is the function ScaleCodes by this set.
func (s *Set) ScaleCodes(dst []float32, codes []byte, scales, mins []float32) {
	if len(codes) != len(dst) || 16*len(scales) != len(dst) || mins != nil && len(mins) != len(scales) {
		panic(fmt.Sprintf("kernels: %d codes with %d scales and %d minima to %d elements", len(codes), len(scales), len(mins),
			len(dst)))
	}
	race.ReadSlice(codes)
	race.ReadSlice(scales)
	race.ReadSlice(mins)
	race.WriteSlice(dst)
	switch {
	case s.scaleCodes != nil && mins == nil:
		s.scaleCodes(dst, codes, scales)
		return
	case s.scaleCodes != nil:
		s.scaleCodesLess(dst, codes, scales, mins)
		return
	}
	for g, scale := range scales {
		y, q := (*[16]float32)(dst[16*g:]), (*[16]byte)(codes[16*g:])
		if mins == nil {
			for i, b := range q {
				y[i] = float32(int8(b)) * scale
			}
			continue
		}
		least := mins[g]
		for i, b := range q {
			y[i] = float32(float32(int8(b))*scale) - least
		}
	}
}

// QuantizeCodes sets codes to the bytes RoundCode((x + min) / scale), within least and most, less least: each scale,
// and each of mins, is for 16 elements. What a scale of zero makes has no meaning.
func QuantizeCodes(codes []byte, x, scales, mins []float32, least, most int32) {
	active.QuantizeCodes(codes, x, scales, mins, least, most)
}

// QuantizeCodes is the function QuantizeCodes by this set.
func (s *Set) QuantizeCodes(codes []byte, x, scales, mins []float32, least, most int32) {
	if len(codes) != len(x) || 16*len(scales) != len(x) || len(mins) != len(scales) || most-least > math.MaxUint8 {
		panic(fmt.Sprintf("kernels: %d scales and %d minima for %d elements to %d codes from %d to %d", len(scales),
			len(mins), len(x), len(codes), least, most))
	}
	race.ReadSlice(x)
	race.ReadSlice(scales)
	race.ReadSlice(mins)
	race.WriteSlice(codes)
	if s.quantizeCodes != nil {
		s.quantizeCodes(codes, x, scales, mins, least, most)
		return
	}
	for g, scale := range scales {
		low, q := mins[g], codes[16*g:][:16]
		for i, v := range x[16*g:][:16] {
			q[i] = byte(max(least, min(RoundCode((v+low)/scale), most)) - least)
		}
	}
}
