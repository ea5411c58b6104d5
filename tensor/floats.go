package tensor

import (
	"encoding/binary"
	"math"
	"math/bits"
	"unsafe"

	"github.com/lorakit/lorakit/internal/kernels"
)

// littleEndian is whether float32 numbers lie in memory as they do in a file.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// bytesOf returns the memory of numbers.
func bytesOf(x []float32) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(x))), 4*len(x))
}

// ToFloats converts stored elements of type d, little-endian, to len(dst) numbers.
func ToFloats(dst []float32, values []byte, d DType) error {
	return FillFloats(dst, func(b []byte) error { return Convert(b, F32, values, d) })
}

// FillFloats has fill store len(dst) numbers, little-endian, in the memory of dst.
func FillFloats(dst []float32, fill func(b []byte) error) error {
	if err := fill(bytesOf(dst)); err != nil || littleEndian {
		return err
	}
	reverse(dst)
	return nil
}

// FromFloats converts numbers to stored elements of type d, with one rounding to nearest even. It may change x.
func FromFloats(dst []byte, d DType, x []float32) error {
	if !littleEndian {
		reverse(x)
	}
	return Convert(dst, d, bytesOf(x), F32)
}

// Shift adds a number to each of the stored float32 in p.
func Shift(p []byte, by float32) {
	if by == 0 { // -0 stays
		return
	}
	for ; len(p) >= 4; p = p[4:] {
		x := math.Float32frombits(binary.LittleEndian.Uint32(p))
		binary.LittleEndian.PutUint32(p, math.Float32bits(x+by))
	}
}

// Round is the number of type d, a type of at most 32 bits, that is nearest to x, of two the even one. A NaN stays one.
func Round(x float32, d DType) float32 {
	switch d {
	case BF16:
		b := math.Float32bits(x)
		if b&^(1<<31) > 0x7f800000 {
			return x
		}
		return math.Float32frombits((b + 0x7fff + b>>16&1) &^ 0xffff)
	case F16:
		return kernels.FromHalf(kernels.ToHalf(x))
	}
	return x
}

// WithBytes hands the little-endian bytes of x to use. Where numbers lie otherwise in memory, those of x are turned
// round for that time.
func WithBytes(x []float32, use func(b []byte)) {
	if !littleEndian {
		reverse(x)
		defer reverse(x)
	}
	use(bytesOf(x))
}

// reverse turns the bytes of each number round.
func reverse(x []float32) {
	for i := range x {
		x[i] = math.Float32frombits(bits.ReverseBytes32(math.Float32bits(x[i])))
	}
}
