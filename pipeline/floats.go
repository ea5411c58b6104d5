package pipeline

import (
	"encoding/binary"
	"math"
	"math/bits"
	"unsafe"

	"github.com/lorakit/lorakit/tensor"
)

// littleEndian is whether float32 numbers lie in memory as they do in a file.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// bytesOf returns the memory of numbers.
func bytesOf(x []float32) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(x))), 4*len(x))
}

// toFloats converts stored numbers.
func toFloats(dst []float32, values []byte, d tensor.DType) error {
	if err := tensor.Convert(bytesOf(dst), tensor.F32, values, d); err != nil || littleEndian {
		return err
	}
	for i := range dst {
		dst[i] = math.Float32frombits(bits.ReverseBytes32(math.Float32bits(dst[i])))
	}
	return nil
}

// fromFloats converts numbers to what is stored. It uses x up.
func fromFloats(dst []byte, d tensor.DType, x []float32) error {
	if !littleEndian {
		for i := range x {
			x[i] = math.Float32frombits(bits.ReverseBytes32(math.Float32bits(x[i])))
		}
	}
	return tensor.Convert(dst, d, bytesOf(x), tensor.F32)
}
