// Package kernels holds the hot loops: blockwise 4-bit quantisation, LLM.int8 rows, the casts between float32, float16
// and bfloat16, the product of float32 matrices, what a merge does to a row, and what a training step does to
// elements.
//
// Each loop exists as plain Go, which is its specification, and for amd64 as AVX2 and AVX-512 assembly that returns
// the same bytes for every input, NaNs and subnormals included. The set is chosen once, by the features of the
// processor. The environment variable LORAKIT_KERNELS (purego, avx2 or avx512) forces one; the build tag purego leaves
// the assembly out.
//
// Tensor data is little-endian bytes exactly as in a file, at any alignment. The functions panic where the lengths of
// their slices do not fit together, always before anything is written.
package kernels

import (
	"fmt"
	"math/bits"
	"os"
	"strings"

	"github.com/lorakit/lorakit/internal/kernels/race"
)

// Float is the type of the elements in a byte slice.
type Float uint8

// The types that weights are stored in.
const (
	F32 Float = iota
	F16
	BF16
	floats = 3
)

// Size returns the bytes of one element.
func (f Float) Size() int {
	if f == F32 {
		return 4
	}
	return 2
}

// String returns the name of the type in a safetensors header.
func (f Float) String() string { return [...]string{"F32", "F16", "BF16"}[f] }

// Set is one implementation of all the loops. Its methods take the slices that the functions of the package take.
//
// An assembly routine works through whole vectors and returns how much it did; nil stands for a routine that does
// nothing. The Go twin does the rest: tails, and blocks and rows that hold a value that is not finite.
type Set struct {
	name string

	// bisect4 and bucket4 quantise blocks of blockSize elements and return how many they finished. They stop before a
	// block that holds a NaN or an infinity. bucket4 is for codes that are bucketed.
	bisect4, bucket4 [floats]func(l *lookup, packed []byte, absmax []float32, src []byte, blockSize int) (done int)
	// dequantize4 decodes whole blocks and returns how many. It stops before a block whose absmax is not finite. The code
	// has to be finite.
	dequantize4 [floats]func(dst, packed []byte, absmax []float32, code *[16]float32, blockSize int) (done int)
	// maxAbs returns the largest magnitude among the first done elements, as bits of the element's own type.
	maxAbs [floats]func(src []byte) (largest uint32, done int)
	// quantize8 rounds the first done elements, cast to float16 and multiplied by scale, to integers. All of them have to
	// be finite after the cast.
	quantize8 [floats]func(q, src []byte, scale float32) (done int)
	// dequantize8 decodes the first done elements of one row. The scale has to be finite.
	dequantize8 [floats]func(dst, q []byte, scale float32) (done int)
	// convert casts the first done elements; the index is [to][from].
	convert [floats][floats]func(dst, src []byte) (done int)
	// mergeRow, addScaled, kept and dot work on the first done elements, a multiple of 16, and give the lanes of their
	// sums; the index is [to][from].
	mergeRow  [floats][floats]func(dst, src []byte, delta []float32, scale float32, share *[2]sums) (done int)
	addScaled func(dst, src, delta []float32, scale float32) (done int)
	kept      func(out, base, total, delta []float32, share *[2]sums) (done int)
	dot       func(x, y []float32) (sum sums, done int)
	// exp, sigmoid, siluMul, siluMulGrad and addProducts do the first done elements, a multiple of 16.
	exp, sigmoid func(dst, src []float32) (done int)
	siluMul      func(dst, gate, up []float32) (done int)
	siluMulGrad  func(dGate, dUp, d, gate, up []float32) (done int)
	addProducts  func(acc []float64, x, y []float32) (done int)
	// searchMinAbsolute, searchMinSquared, searchSym and searchNonLinear search the scales of groups that stand side by
	// side. Of work, the first rows are scales, least values, and the factor and least value that codes were made with.
	searchMinAbsolute, searchMinSquared func(work *[48][Lanes]float32, x, w, trials []float32)
	searchSym, searchNonLinear          func(work *[48][Lanes]float32, x, trials []float32)
	// searchMoving is for two times as many groups, whose scales are the first two rows; the codes are the last 32.
	searchMoving func(work *[48][Lanes]float32, x []float32)
	// roundLatticeFast rounds to vectors, and gives the sums of a search, in the rows that lattice.go names.
	roundLatticeFast func(work *[48][Lanes]float32, x, w *[Lanes * longestGroup]float32, near []uint32,
		lists *[latticeVectors + 1]uint32)
	// encodeQ8 and decodeQ8 do all blocks of 32 elements. The elements and the scales have to be finite.
	encodeQ8 func(dst []byte, src []float32)
	decodeQ8 func(dst []float32, src []byte)
	// scaleCodes, and scaleCodesLess, which takes a minimum off, do all groups of 16 codes.
	scaleCodes     func(dst []float32, codes []byte, scales []float32)
	scaleCodesLess func(dst []float32, codes []byte, scales, mins []float32)
	// quantizeCodes does all groups of 16 elements.
	quantizeCodes func(codes []byte, x, scales, mins []float32, least, most int32)
	// extremes and dequantizeAffine do the first done groups: extremes those before the first that holds a NaN or an
	// infinity, dequantizeAffine those before the first whose scale or bias is one.
	extremes         [floats]func(lo, hi []float32, src []byte, group int) (done int)
	dequantizeAffine [floats]func(dst, codes []byte, scales, biases []float32, group int) (done int)
	// quantizeAffine does all groups.
	quantizeAffine [floats]func(codes, src []byte, scales, biases []float32, group int, most float32)
	// ranks does a multiple of 32 numbers; divide does all groups.
	ranks  func(codes []byte, x []float32, limits *[8]float32)
	divide func(x, divisors []float32, group int)
	// encodeE4M3 and encodeE2M1 do all elements but for what is no whole 32; the others all groups of 16.
	encodeE4M3, encodeE2M1 func(dst []byte, x []float32, plus float32)
	magnitudes             func(dst []uint32, x []float32)
	multiply               func(x, by []float32)
	nibbles                func(dst []float32, codes []byte, values *[16]float32, by []float32)
	// tiles multiplies matrices.
	tiles *tiles
}

// Name returns the name that LORAKIT_KERNELS knows the set by.
func (s *Set) Name() string { return s.name }

// Sets returns what this processor can run, the fastest first; the last one is always the plain Go.
func Sets() []*Set { return append(assembly(), &Set{name: "purego"}) }

var active, chosen = choose(os.Getenv("LORAKIT_KERNELS"))

func choose(name string) (*Set, error) {
	sets := Sets()
	if name == "" {
		return sets[0], nil
	}
	for _, s := range sets {
		if s.name == name {
			return s, nil
		}
	}
	return sets[0], fmt.Errorf("LORAKIT_KERNELS=%q: this build and processor have %s", name,
		strings.Join(Available(), ", "))
}

// Err returns an error if LORAKIT_KERNELS names a set that does not exist or that this processor cannot run. A program
// is expected to report it and stop.
func Err() error { return chosen }

// Active returns the name of the set in use.
func Active() string { return active.name }

// Available returns the names of the sets that this processor can run, the fastest first.
func Available() []string {
	var names []string
	for _, s := range Sets() {
		names = append(names, s.name)
	}
	return names
}

// Quantize4 quantises the elements of src, of type from, in blocks of blockSize elements: a power of two from 32 to
// 4096. With n elements, packed gets (n+1)/2 bytes, the first of two codes in the high nibble, and absmax one float32
// a block. Only the last block may be short.
//
// It returns the index of the first element that is a NaN or an infinity, or -1.
func Quantize4(c *Codebook, packed []byte, absmax []float32, src []byte, from Float, blockSize int) (bad int) {
	return active.Quantize4(c, packed, absmax, src, from, blockSize)
}

// Quantize4 is the function Quantize4 by this set.
func (s *Set) Quantize4(c *Codebook, packed []byte, absmax []float32, src []byte, from Float, blockSize int) (bad int) {
	n := elements(src, from)
	checkBlocks(n, packed, absmax, blockSize)
	race.ReadSlice(src)
	race.WriteSlice(packed)
	race.WriteSlice(absmax)
	bad = -1
	f := s.bisect4[from]
	if c.bucketed && s.bucket4[from] != nil {
		f = s.bucket4[from]
	}
	size, full := blockSize*from.Size(), n/blockSize
	for b := 0; b < len(absmax); b++ {
		if f != nil && b < full {
			b += f(&c.lookup, packed[b*blockSize/2:full*blockSize/2], absmax[b:full], src[b*size:full*size], blockSize)
			if b == len(absmax) {
				break
			}
		}
		block := src[b*size : min(b*size+size, len(src))]
		at := c.quantizeBlock(packed[b*blockSize/2:], &absmax[b], block, from, b >= full)
		if at >= 0 && bad < 0 {
			bad = b*blockSize + at
		}
	}
	return bad
}

// Dequantize4 decodes 4-bit codes into dst, whose type is to and whose length says how many elements there are:
// code[index] * absmax[block], rounded to float32 and then, to nearest even, to the type of dst.
func Dequantize4(dst []byte, to Float, packed []byte, absmax []float32, code *[16]float32, blockSize int) {
	active.Dequantize4(dst, to, packed, absmax, code, blockSize)
}

// Dequantize4 is the function Dequantize4 by this set.
func (s *Set) Dequantize4(dst []byte, to Float, packed []byte, absmax []float32, code *[16]float32, blockSize int) {
	n := elements(dst, to)
	checkBlocks(n, packed, absmax, blockSize)
	race.WriteSlice(dst)
	race.ReadSlice(packed)
	race.ReadSlice(absmax)
	f := s.dequantize4[to]
	for _, v := range code {
		if v-v != 0 {
			f = nil
		}
	}
	size, full := blockSize*to.Size(), n/blockSize
	for b := 0; b < len(absmax); b++ {
		if f != nil && b < full {
			b += f(dst[b*size:full*size], packed[b*blockSize/2:full*blockSize/2], absmax[b:full], code, blockSize)
			if b == len(absmax) {
				break
			}
		}
		dequantizeBlock(dst[b*size:min(b*size+size, len(dst))], to, packed[b*blockSize/2:], absmax[b], code)
	}
}

// Quantize8 quantises rows of cols elements as LLM.int8 does. For each row, scb gets the largest magnitude after a
// cast to float16, q one signed byte an element.
//
// It returns the index of the first element that is a NaN, an infinity or becomes one as a float16, or -1.
func Quantize8(q []byte, scb []float32, src []byte, from Float, cols int) (bad int) {
	return active.Quantize8(q, scb, src, from, cols)
}

// Quantize8 is the function Quantize8 by this set.
func (s *Set) Quantize8(q []byte, scb []float32, src []byte, from Float, cols int) (bad int) {
	n := elements(src, from)
	checkRows(n, q, scb, cols)
	race.ReadSlice(src)
	race.WriteSlice(q)
	race.WriteSlice(scb)
	bad = -1
	for r := range scb {
		row, out := src[r*cols*from.Size():(r+1)*cols*from.Size()], q[r*cols:(r+1)*cols]
		largest, done := uint32(0), 0
		if f := s.maxAbs[from]; f != nil {
			largest, done = f(row)
		}
		largest = max(largest, maxAbs(row[done*from.Size():], from))
		// The cast to float16 is monotone, so the maximum may be cast in place of every element.
		w := f16FromF32(widen(largest, from))
		if w >= f16Inf {
			scb[r] = notFinite(w)
			at := quantizeRow(out, row, from, scb[r])
			if bad < 0 {
				bad = r*cols + at
			}
			continue
		}
		scb[r], done = f32FromF16(w), 0
		if f := s.quantize8[from]; f != nil && w != 0 {
			done = f(out, row, rowScale(scb[r]))
		}
		quantizeRow(out[done:], row[done*from.Size():], from, scb[r])
	}
	return bad
}

// Dequantize8 decodes rows of cols signed bytes: (q * scb) * 0.0078740157 in float32, in this order, rounded to
// nearest even to the type of dst.
func Dequantize8(dst []byte, to Float, q []byte, scb []float32, cols int) {
	active.Dequantize8(dst, to, q, scb, cols)
}

// Dequantize8 is the function Dequantize8 by this set.
func (s *Set) Dequantize8(dst []byte, to Float, q []byte, scb []float32, cols int) {
	n := elements(dst, to)
	checkRows(n, q, scb, cols)
	race.WriteSlice(dst)
	race.ReadSlice(q)
	race.ReadSlice(scb)
	for r := range scb {
		out, row, done := dst[r*cols*to.Size():(r+1)*cols*to.Size()], q[r*cols:(r+1)*cols], 0
		if f := s.dequantize8[to]; f != nil && scb[r]-scb[r] == 0 {
			done = f(out, row, scb[r])
		}
		dequantizeRow(out[done*to.Size():], to, row[done:], scb[r])
	}
}

// Convert casts the elements of src to the type of dst, rounding to nearest even. A NaN stays a quiet NaN, except that
// a cast to the same type copies.
func Convert(dst []byte, to Float, src []byte, from Float) { active.Convert(dst, to, src, from) }

// Convert is the function Convert by this set.
func (s *Set) Convert(dst []byte, to Float, src []byte, from Float) {
	n := elements(src, from)
	if elements(dst, to) != n {
		panic(fmt.Sprintf("kernels: %d elements to convert into %d", n, elements(dst, to)))
	}
	if to == from {
		copy(dst, src)
		return
	}
	race.WriteSlice(dst)
	race.ReadSlice(src)
	done := 0
	if f := s.convert[to][from]; f != nil {
		done = f(dst, src)
	}
	convert(dst[done*to.Size():], to, src[done*from.Size():], from)
}

// elements returns the number of elements in b.
func elements(b []byte, f Float) int {
	if f >= floats || len(b)%f.Size() != 0 {
		panic(fmt.Sprintf("kernels: %d bytes are no whole number of elements of type %d", len(b), f))
	}
	return len(b) / f.Size()
}

// checkBlocks panics unless packed and absmax belong to n elements.
func checkBlocks(n int, packed []byte, absmax []float32, blockSize int) {
	if blockSize < 32 || blockSize > maxBlockSize || bits.OnesCount(uint(blockSize)) != 1 {
		panic(fmt.Sprintf("kernels: block size %d is no power of two from 32 to %d", blockSize, maxBlockSize))
	}
	if len(packed) != (n+1)/2 || len(absmax) != (n+blockSize-1)/blockSize {
		panic(fmt.Sprintf("kernels: %d packed bytes and %d absmax for %d elements in blocks of %d", len(packed), len(absmax),
			n, blockSize))
	}
}

// checkRows panics unless q and scb belong to n elements in rows of cols.
func checkRows(n int, q []byte, scb []float32, cols int) {
	if len(q) != n || cols < 0 || cols == 0 && n > 0 || cols > 0 && (n%cols != 0 || len(scb) != n/cols) {
		panic(fmt.Sprintf("kernels: %d bytes and %d scales for %d elements in rows of %d", len(q), len(scb), n, cols))
	}
}
