// Package ggml quantises to the block types of ggml, the tensor library of llama.cpp, and back, bit for bit as its
// reference code does where that is compiled without fused multiply-adds. Slices in, slices out: it knows nothing of
// files.
//
// A row of elements is cut into blocks of 32 to 256, each of which is a few bytes by itself: scales, and codes packed
// in 1 to 8 bits. The K types (Q2_K … Q6_K) and IQ4_XS have scales of groups within a block, which are codes too. Codes
// of the IQ1, IQ2 and IQ3 types choose among tabled vectors; all but IQ3_S of these are read only, as ggml makes them
// with an importance matrix.
//
// Rows may be worked through in pieces of whole blocks; the bytes are the same. All data is little-endian.
//
// The functions panic if the lengths of their slices do not fit together: that is a mistake of the program, not of its
// input. Any bytes can be decoded.
package ggml

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

// Type is a block type, by its number in ggml, which GGUF files have.
type Type uint32

// The block types.
const (
	Q4_0   Type = 2
	Q4_1   Type = 3
	Q5_0   Type = 6
	Q5_1   Type = 7
	Q8_0   Type = 8
	Q2K    Type = 10
	Q3K    Type = 11
	Q4K    Type = 12
	Q5K    Type = 13
	Q6K    Type = 14
	IQ2XXS Type = 16
	IQ2XS  Type = 17
	IQ3XXS Type = 18
	IQ1S   Type = 19
	IQ4NL  Type = 20
	IQ3S   Type = 21
	IQ2S   Type = 22
	IQ4XS  Type = 23
	IQ1M   Type = 29
	TQ1_0  Type = 34
	TQ2_0  Type = 35
	MXFP4  Type = 39
	NVFP4  Type = 40
	Q1_0   Type = 41
	Q2_0   Type = 42
)

// block is what is known of a type.
type block struct {
	name            string
	elements, bytes int
	halves          []int // where float16 scales stand, which have to be finite
	// encode fills whole blocks from finite elements, decode does the reverse. One that is nil is not there.
	encode func(dst []byte, x []float32)
	decode func(dst []float32, src []byte)
}

var blocks = [...]block{
	Q4_0:   {"q4_0", 32, 18, []int{0}, each(32, encodeQ4x0), byRuns(32, 18, false, small(18, false, false, 8))},
	Q4_1:   {"q4_1", 32, 20, []int{0, 2}, each(32, encodeQ4x1), byRuns(32, 20, true, small(20, true, false, 0))},
	Q5_0:   {"q5_0", 32, 22, []int{0}, each(32, encodeQ5x0), byRuns(32, 22, false, small(22, false, true, 16))},
	Q5_1:   {"q5_1", 32, 24, []int{0, 2}, each(32, encodeQ5x1), byRuns(32, 24, true, small(24, true, true, 0))},
	Q8_0:   {"q8_0", 32, 34, []int{0}, kernels.EncodeQ8, kernels.DecodeQ8},
	Q2K:    {"q2_K", 256, 84, []int{80, 82}, grouped(encodeQ2K), byRuns(256, 84, true, unpackQ2K)},
	Q3K:    {"q3_K", 256, 110, []int{108}, grouped(encodeQ3K), byRuns(256, 110, false, unpackQ3K)},
	Q4K:    {"q4_K", 256, 144, []int{0, 2}, grouped(encodeQ4K), byRuns(256, 144, true, unpackQ4K)},
	Q5K:    {"q5_K", 256, 176, []int{0, 2}, grouped(encodeQ5K), byRuns(256, 176, true, unpackQ5K)},
	Q6K:    {"q6_K", 256, 210, []int{208}, grouped(encodeQ6K), byRuns(256, 210, false, unpackQ6K)},
	IQ2XXS: {"iq2_xxs", 256, 66, []int{0}, nil, decodeIQ2XXS},
	IQ2XS:  {"iq2_xs", 256, 74, []int{0}, nil, decodeIQ2XS},
	IQ3XXS: {"iq3_xxs", 256, 98, []int{0}, nil, decodeIQ3XXS},
	IQ1S:   {"iq1_s", 256, 50, []int{0}, nil, decodeIQ1S},
	IQ4NL:  {"iq4_nl", 32, 18, []int{0}, encodeIQ4NL, byRuns(32, 18, false, tabled(18, 2, half, nonLinearPairs))},
	IQ3S:   {"iq3_s", 256, 110, []int{0}, grouped(encodeIQ3S), decodeIQ3S},
	IQ2S:   {"iq2_s", 256, 82, []int{0}, nil, decodeIQ2S},
	IQ4XS:  {"iq4_xs", 256, 136, []int{0}, grouped(encodeIQ4XS), byRuns(256, 136, false, unpackIQ4XS)},
	IQ1M:   {"iq1_m", 256, 56, nil, nil, decodeIQ1M},
	TQ1_0:  {"tq1_0", 256, 54, []int{52}, each(256, encodeTQ1x0), decodeTQ1x0},
	TQ2_0:  {"tq2_0", 256, 66, []int{64}, each(256, encodeTQ2x0), byRuns(256, 66, false, unpackTQ2x0)},
	MXFP4:  {"mxfp4", 32, 17, nil, each(32, encodeMXFP4), byRuns(32, 17, false, tabled(17, 1, scaleMXFP4, float4Pairs))},
	NVFP4:  {"nvfp4", 64, 36, nil, each(64, encodeNVFP4), byRuns(64, 36, false, unpackNVFP4)},
	Q1_0:   {"q1_0", 128, 18, []int{0}, each(128, encodeQ1x0), decodeQ1x0},
	Q2_0:   {"q2_0", 64, 18, []int{0}, each(64, encodeQ2x0), decodeQ2x0},
}

// Types lists the types by their numbers.
func Types() (all []Type) {
	for i := range blocks {
		if blocks[i].bytes > 0 {
			all = append(all, Type(i))
		}
	}
	return all
}

// Parse finds a type by its name, in capitals or not, such as q4_K, or by what Unique has for it.
func Parse(name string) (Type, error) {
	for _, t := range Types() {
		if strings.EqualFold(name, blocks[t].name) || name == t.Unique() {
			return t, nil
		}
	}
	return 0, fmt.Errorf("unknown ggml type %s", tensor.Quote(name))
}

// Valid reports whether t is one of the declared block types.
func (t Type) Valid() bool { return int(t) < len(blocks) && blocks[t].bytes > 0 }

// String returns the name that ggml has for the type, such as "q4_K" or "iq4_nl".
func (t Type) String() string {
	switch t {
	case F32:
		return "f32"
	case F16:
		return "f16"
	case BF16:
		return "bf16"
	case Keep:
		return "keep"
	}
	if !t.Valid() {
		return fmt.Sprintf("Type(%d)", uint32(t))
	}
	return blocks[t].name
}

// Name is the name in lower case, such as "q4_k", by which a type is asked for.
func (t Type) Name() string { return strings.ToLower(t.String()) }

// Unique is Name, or where other schemes have a type of that name one with ggml's before it.
func (t Type) Unique() string {
	if t == MXFP4 || t == NVFP4 {
		return "ggml-" + t.Name()
	}
	return t.Name()
}

// Elements is the number of elements in a block.
func (t Type) Elements() int { return blocks[t].elements }

// Bytes is the number of bytes in a block.
func (t Type) Bytes() int { return blocks[t].bytes }

// Encoding is what a tensor of the type is stored as.
func (t Type) Encoding() tensor.Encoding {
	return tensor.Encoding{Name: t.String(), Elements: int64(t.Elements()), Bytes: int64(t.Bytes())}
}

// ReadOnly reports whether nothing is quantised to the type.
func (t Type) ReadOnly() bool { return blocks[t].encode == nil }

// Quantize quantises src, whole blocks of elements, to dst.
//
// It returns the index of the first element that is a NaN or an infinity, or of the first in a block with a scale that
// no float16 holds, and -1 if there is none. The scale of a block with such an element is a NaN (0 for NVFP4, which has
// none); one that no float16 holds is stored as an infinity, as ggml does.
func (t Type) Quantize(dst []byte, src []float32) (bad int) {
	b := &blocks[t]
	if b.encode == nil || len(src)%b.elements != 0 || len(dst) != len(src)/b.elements*b.bytes {
		panic(fmt.Sprintf("ggml: %d elements to %d bytes of %v", len(src), len(dst), t))
	}
	switch {
	case len(src) == 0:
		return -1
	case finite(src):
		b.encode(dst, src)
	default:
		for i := 0; i < len(src); i += b.elements {
			x, out := src[i:i+b.elements], dst[i/b.elements*b.bytes:][:b.bytes]
			if finite(x) {
				b.encode(out, x)
			} else {
				t.spoil(out)
			}
		}
		if len(b.halves) == 0 {
			return firstNonFinite(src)
		}
	}
	for i := 0; i*b.bytes < len(dst); i++ {
		if !t.sound(dst[i*b.bytes:][:b.bytes]) {
			return i*b.elements + max(0, firstNonFinite(src[i*b.elements:][:b.elements]))
		}
	}
	return -1
}

// firstNonFinite returns an index, -1 if all are finite.
func firstNonFinite(x []float32) int {
	return slices.IndexFunc(x, func(v float32) bool { return v-v != 0 })
}

// Dequantize decodes src, whole blocks, to dst. It returns the index of the first block with a scale that is a NaN or
// an infinity, and then decodes nothing; -1 if there is none.
func (t Type) Dequantize(dst []float32, src []byte) (bad int) {
	b := &blocks[t]
	if len(src)%b.bytes != 0 || len(dst) != len(src)/b.bytes*b.elements {
		panic(fmt.Sprintf("ggml: %d bytes of %v to %d elements", len(src), t, len(dst)))
	}
	for i := 0; i < len(src); i += b.bytes {
		if !t.sound(src[i : i+b.bytes]) {
			return i / b.bytes
		}
	}
	b.decode(dst, src)
	return -1
}

// sound reports whether the scales of a block are finite.
func (t Type) sound(p []byte) bool {
	switch t {
	case MXFP4:
		return p[0] != 255
	case IQ1M: // the exponent of a float16 in the upper halves of four words
		return p[55]&0x70 != 0x70 || p[53]&0xc0 != 0xc0
	}
	for _, at := range blocks[t].halves {
		if p[at+1]&0x7c == 0x7c {
			return false
		}
	}
	return true
}

const halfNaN = 0x7e00

// spoil makes a block of NaNs.
func (t Type) spoil(p []byte) {
	clear(p)
	switch t {
	case MXFP4:
		p[0] = 255
	case NVFP4: // NaNs by its definition, but ggml reads them as zeros
		p[0], p[1], p[2], p[3] = 0x7f, 0x7f, 0x7f, 0x7f
	}
	for _, at := range blocks[t].halves {
		binary.LittleEndian.PutUint16(p[at:], halfNaN)
	}
}

func finite(x []float32) (yes bool) {
	tensor.WithBytes(x, func(b []byte) { yes = kernels.MaxAbs(b, kernels.F32) < 0x7f800000 })
	return yes
}

// each makes an encoder of many blocks from that of one of so many elements.
func each(elements int, encode func(p []byte, x []float32)) func(dst []byte, x []float32) {
	return func(dst []byte, x []float32) {
		size := len(dst) / (len(x) / elements)
		for ; len(x) > 0; dst, x = dst[size:], x[elements:] {
			encode(dst[:size:size], x[:elements:elements])
		}
	}
}

// putHalf stores a float16 and returns its value. A NaN is the same on all machines.
func putHalf(p []byte, x float32) float32 {
	h := kernels.ToHalf(x)
	if x != x {
		h = halfNaN
	}
	binary.LittleEndian.PutUint16(p, h)
	return kernels.FromHalf(h)
}

func half(p []byte) float32 { return kernels.FromHalf(binary.LittleEndian.Uint16(p)) }

// inverse is 0 for 0.
func inverse(x float32) float32 {
	if x == 0 {
		return 0
	}
	return 1 / x
}

func abs(x float32) float32 { return math.Float32frombits(math.Float32bits(x) &^ (1 << 31)) }

// largest returns the greatest magnitude.
func largest(x []float32) (m float32) {
	for _, v := range x {
		m = max(m, abs(v))
	}
	return m
}

func clip(v, least, most int32) int32 { return max(least, min(v, most)) }
