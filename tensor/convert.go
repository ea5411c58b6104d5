package tensor

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// Convert casts the elements of src, of type from, to the type to and puts them into dst; both are little-endian, at
// any alignment, and do not overlap. Each of F64, F32, F16 and BF16 converts to each, rounded once, to nearest even;
// an overflow becomes an infinity and a NaN a quiet NaN. A type converts to itself by a plain copy. Any other pair and
// lengths that do not fit together are errors, and dst is left alone.
func Convert(dst []byte, to DType, src []byte, from DType) error {
	if to != F64 && !to.Float() || from != F64 && !from.Float() {
		return fmt.Errorf("cannot convert %v to %v: only F64, F32, F16 and BF16 convert to each other", from, to)
	}
	wide, narrow := int(from.Bits()/8), int(to.Bits()/8)
	n := len(src) / wide
	if n*wide != len(src) || n*narrow != len(dst) {
		return fmt.Errorf("cannot convert %d bytes of %v into %d bytes of %v", len(src), from, len(dst), to)
	}
	switch {
	case from == to:
		copy(dst, src)
	case from == F64:
		narrowF64(dst, to, src)
	case to == F64:
		widenToF64(dst, src, from)
	default:
		kernels.Convert(dst, kernel[to], src, kernel[from])
	}
	return nil
}

var kernel = [...]kernels.Float{F32: kernels.F32, F16: kernels.F16, BF16: kernels.BF16}

// chunk is the number of elements that pass through float32 at a time, between F64 and a type that the kernels know.
const chunk = 1024

func narrowF64(dst []byte, to DType, src []byte) {
	var buf [4 * chunk]byte
	size := int(to.Bits() / 8)
	for len(src) > 0 {
		n := min(len(src)/8, chunk)
		for i := range n {
			x := math.Float64frombits(binary.LittleEndian.Uint64(src[8*i:]))
			f := float32(x)
			if to != F32 {
				f = roundToOdd(x)
			}
			binary.LittleEndian.PutUint32(buf[4*i:], math.Float32bits(f))
		}
		kernels.Convert(dst[:n*size], kernel[to], buf[:4*n], kernels.F32)
		src, dst = src[8*n:], dst[n*size:]
	}
}

// roundToOdd returns x as a float32 that rounds, to a type of fewer bits, to what x itself rounds to: where it is not
// exact its last bit is odd, so that it cannot be taken for a tie.
func roundToOdd(x float64) float32 {
	f := float32(x)
	if x != x || float64(f) == x {
		return f
	}
	b := math.Float32bits(f)
	if math.Abs(float64(f)) > math.Abs(x) {
		b-- // towards zero, and from infinity to the largest number
	}
	return math.Float32frombits(b | 1)
}

func widenToF64(dst []byte, src []byte, from DType) {
	var buf [4 * chunk]byte
	size := int(from.Bits() / 8)
	for len(src) > 0 {
		n := min(len(src)/size, chunk)
		kernels.Convert(buf[:4*n], kernels.F32, src[:n*size], kernel[from])
		for i := range n {
			x := math.Float32frombits(binary.LittleEndian.Uint32(buf[4*i:]))
			binary.LittleEndian.PutUint64(dst[8*i:], math.Float64bits(float64(x)))
		}
		src, dst = src[n*size:], dst[8*n:]
	}
}

// Transpose writes the transpose of src, rows x cols elements of elem bytes (1, 2, 4 or 8) in row-major order, to dst,
// which is cols x rows and does not overlap it. It panics if elem or a length is anything else.
func Transpose(dst, src []byte, rows, cols int, elem int) {
	if elem != 1 && elem != 2 && elem != 4 && elem != 8 {
		panic(fmt.Sprintf("tensor: cannot transpose elements of %d bytes", elem))
	}
	if rows < 0 || cols < 0 || len(src) != len(dst) || !isProduct(len(src)/elem, rows, cols) || len(src)%elem != 0 {
		panic(fmt.Sprintf("tensor: cannot transpose %d x %d elements of %d bytes from %d bytes to %d", rows, cols, elem,
			len(src), len(dst)))
	}
	// Tiles go through a buffer, as the lines that one touches may all fall into the same set of the cache. Squares of 8
	// bytes a side are turned in registers.
	var buf [64 * 64 * 4]byte
	side, square := min(64, 256/elem), 8/elem
	for r := 0; r < rows; r += side {
		for c := 0; c < cols; c += side {
			h, w := min(side, rows-r), min(side, cols-c)
			for i := range h {
				copy(buf[i*side*elem:], src[((r+i)*cols+c)*elem:][:w*elem])
			}
			out := dst[(c*rows+r)*elem:]
			for j := 0; j < w; j += square {
				for i := 0; i < h; i += square {
					from, to := buf[(i*side+j)*elem:], out[(j*rows+i)*elem:]
					if i+square <= h && j+square <= w {
						turn(to, from, rows*elem, side*elem, elem)
						continue
					}
					for k := range min(square, w-j) {
						for l := range min(square, h-i) {
							copy(to[(k*rows+l)*elem:][:elem], from[(l*side+k)*elem:])
						}
					}
				}
			}
		}
	}
}

// turn transposes the square at the start of src, whose rows are srcStride bytes apart, to the start of dst.
func turn(dst, src []byte, dstStride, srcStride, elem int) {
	var w [8]uint64
	switch elem {
	case 1:
		for i := range 8 {
			w[i] = binary.LittleEndian.Uint64(src[i*srcStride:])
		}
		for i := range 4 {
			w[i], w[i+4] = exchange(w[i], w[i+4], 32, 0x00000000ffffffff)
		}
		for _, i := range [4]int{0, 1, 4, 5} {
			w[i], w[i+2] = exchange(w[i], w[i+2], 16, 0x0000ffff0000ffff)
		}
		for i := 0; i < 8; i += 2 {
			w[i], w[i+1] = exchange(w[i], w[i+1], 8, 0x00ff00ff00ff00ff)
		}
		for i := range 8 {
			binary.LittleEndian.PutUint64(dst[i*dstStride:], w[i])
		}
	case 2:
		a, b := binary.LittleEndian.Uint64(src), binary.LittleEndian.Uint64(src[srcStride:])
		c, d := binary.LittleEndian.Uint64(src[2*srcStride:]), binary.LittleEndian.Uint64(src[3*srcStride:])
		a, c = exchange(a, c, 32, 0x00000000ffffffff)
		b, d = exchange(b, d, 32, 0x00000000ffffffff)
		a, b = exchange(a, b, 16, 0x0000ffff0000ffff)
		c, d = exchange(c, d, 16, 0x0000ffff0000ffff)
		binary.LittleEndian.PutUint64(dst, a)
		binary.LittleEndian.PutUint64(dst[dstStride:], b)
		binary.LittleEndian.PutUint64(dst[2*dstStride:], c)
		binary.LittleEndian.PutUint64(dst[3*dstStride:], d)
	case 4:
		a, b := binary.LittleEndian.Uint64(src), binary.LittleEndian.Uint64(src[srcStride:])
		a, b = exchange(a, b, 32, 0x00000000ffffffff)
		binary.LittleEndian.PutUint64(dst, a)
		binary.LittleEndian.PutUint64(dst[dstStride:], b)
	case 8:
		binary.LittleEndian.PutUint64(dst, binary.LittleEndian.Uint64(src))
	}
}

// exchange swaps the upper halves of the parts of a, 2*shift bits each, with the lower halves of those of b. The mask
// covers the lower halves.
func exchange(a, b uint64, shift uint, mask uint64) (uint64, uint64) {
	return a&mask | b&mask<<shift, a>>shift&mask | b&^mask
}

// isProduct reports whether n = a*b, all of them non-negative, without overflow.
func isProduct(n, a, b int) bool {
	if a == 0 || b == 0 {
		return n == 0
	}
	return n%a == 0 && n/a == b
}
