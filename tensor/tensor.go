// Package tensor says what a stored tensor is: its name, element type and shape, and the conversion between the
// floating-point types.
package tensor

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"unicode/utf8"
)

// ErrOverflow says that the elements or bytes of a shape do not fit an int64.
var ErrOverflow = errors.New("size overflows 63 bits")

// Shape holds the dimensions of a tensor, the slowest first. A scalar has none.
type Shape []int64

// Count returns the number of elements, 1 for a scalar. A negative dimension is an error, and so is a product past an
// int64, or past 64 bits on the way from left to right: [2^40, 2^40, 0] overflows although it would end at zero.
func (s Shape) Count() (int64, error) {
	n := uint64(1)
	for _, d := range s {
		if d < 0 {
			return 0, fmt.Errorf("shape %v has a negative dimension", s)
		}
		hi, lo := bits.Mul64(n, uint64(d))
		if hi != 0 {
			return 0, fmt.Errorf("shape %v: %w", s, ErrOverflow)
		}
		n = lo
	}
	if n > math.MaxInt64 {
		return 0, fmt.Errorf("shape %v: %w", s, ErrOverflow)
	}
	return int64(n), nil
}

// Transposed returns the shape of a matrix that is turned round. It is for two dimensions.
func (s Shape) Transposed() Shape { return Shape{s[1], s[0]} }

// String writes the shape as [2, 3].
func (s Shape) String() string {
	var b strings.Builder
	b.WriteByte('[')
	for i, d := range s {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(strconv.FormatInt(d, 10))
	}
	b.WriteByte(']')
	return b.String()
}

// Info names a tensor and says how its bytes are to be read: row-major, little-endian, elements of DType, or blocks of
// Encoding. One of the two is set.
type Info struct {
	Name     string   `json:"name"`
	DType    DType    `json:"dtype,omitzero"`
	Shape    Shape    `json:"shape"`
	Encoding Encoding `json:"encoding,omitzero"`
}

// Encoding is a way of a container's own to store elements, some at a time: GGUF's q4_K has blocks of 256 elements in
// 144 bytes. A container knows no more of it; a quantisation scheme that does finds it by its name. Blocks follow one
// another in the order of the elements.
type Encoding struct {
	Name     string `json:"name"`
	Elements int64  `json:"elements"` // of a block
	Bytes    int64  `json:"bytes"`    // of a block
}

// String is the name.
func (e Encoding) String() string { return e.Name }

// Type is what the tensor is stored as: the name of its Encoding, or of its DType.
func (t Info) Type() string {
	if t.Encoding != (Encoding{}) {
		return t.Encoding.Name
	}
	return t.DType.String()
}

// Count returns the number of elements. It is for an Info whose shape has been checked by Size, as every Info of an
// opened checkpoint has.
func (t Info) Count() int64 {
	n := int64(1)
	for _, d := range t.Shape {
		n *= d
	}
	return n
}

// Size returns the number of bytes of the tensor, or an error where that overflows or is no whole number of bytes, or
// of blocks.
func (t Info) Size() (int64, error) {
	n, err := t.Shape.Count()
	if err != nil {
		return 0, err
	}
	if t.Encoding != (Encoding{}) {
		return t.encodedSize(n)
	}
	if !t.DType.Valid() {
		return 0, fmt.Errorf("invalid dtype %d", uint8(t.DType))
	}
	hi, lo := bits.Mul64(uint64(n), uint64(t.DType.Bits()))
	if hi != 0 || lo > math.MaxInt64 {
		return 0, fmt.Errorf("shape %v of %v: %w", t.Shape, t.DType, ErrOverflow)
	}
	if lo%8 != 0 {
		return 0, fmt.Errorf("shape %v of %v is %d bits, no whole number of bytes", t.Shape, t.DType, lo)
	}
	return int64(lo / 8), nil
}

func (t Info) encodedSize(n int64) (int64, error) {
	e := t.Encoding
	switch {
	case t.DType != 0:
		return 0, fmt.Errorf("both a dtype, %v, and an encoding, %s", t.DType, Quote(e.Name))
	case e.Name == "" || e.Elements <= 0 || e.Bytes <= 0:
		return 0, fmt.Errorf("invalid encoding %s with blocks of %d elements in %d bytes", Quote(e.Name), e.Elements, e.Bytes)
	case n%e.Elements != 0:
		return 0, fmt.Errorf("shape %v of %s is %d elements, no whole number of blocks of %d", t.Shape, Quote(e.Name), n,
			e.Elements)
	}
	hi, lo := bits.Mul64(uint64(n/e.Elements), uint64(e.Bytes))
	if hi != 0 || lo > math.MaxInt64 {
		return 0, fmt.Errorf("shape %v of %s: %w", t.Shape, Quote(e.Name), ErrOverflow)
	}
	return int64(lo), nil
}

// Quote writes a name from a file so that it is safe in a one-line message: quoted, escaped, and cut where it is very
// long.
func Quote(name string) string {
	const most = 200
	if len(name) <= most {
		return strconv.Quote(name)
	}
	end := most
	for end > most-utf8.UTFMax && !utf8.RuneStart(name[end]) {
		end--
	}
	return strconv.Quote(name[:end]) + "…"
}
