// Command _generate writes the assembly of package kernels and its Go
// declarations. It is a module of its own, so that avo is no dependency of the
// library.
//
// Every function works on the whole vectors of what it is given; the callers in
// Go have checked all lengths and do what is left over.
package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// float is an element type: its name in Go, and its bytes.
type float struct {
	name string
	size int
}

var (
	f32  = float{"F32", 4}
	f16  = float{"F16", 2}
	bf16 = float{"BF16", 2}

	floats = []float{f32, f16, bf16}
)

// infinity is the least magnitude that is not finite, as bits.
func (f float) infinity() U32 {
	return map[float]U32{f32: 0x7f800000, f16: 0x7c00, bf16: 0x7f80}[f]
}

// Bits of float32.
const (
	infinity   = 0x7f800000
	tiny       = 0x006ce3ee // 1e-38
	one        = 0x3f800000
	nan        = 0x7fc00000
	oneOver127 = 0x3c010204
)

// Predicates of VCMPPS that are false for a NaN and true for one.
const (
	greater   = 0x1e
	unordered = 0x03
)

func main() {
	ConstraintExpr("!purego")
	for _, f := range floats {
		avx512{}.quantize4(f, true)
		avx512{}.quantize4(f, false)
		avx2{}.quantize4(f)
	}
	for _, f := range floats {
		avx512{}.dequantize4(f)
		avx2{}.dequantize4(f)
	}
	for _, f := range floats {
		avx512{}.maxAbs(f)
		avx2{}.maxAbs(f)
	}
	for _, f := range floats {
		avx512{}.quantize8(f)
		avx2{}.quantize8(f)
	}
	for _, f := range floats {
		avx512{}.dequantize8(f)
		avx2{}.dequantize8(f)
	}
	for _, to := range floats {
		for _, from := range floats {
			if to != from {
				avx512{}.convert(to, from)
				avx2{}.convert(to, from)
			}
		}
	}
	for _, vectors := range []int{3, 2, 1} {
		mulAdd(avx512{}, fmt.Sprintf("mulAddEdge%dAVX512", vectors), vectors, true)
		mulAdd(avx2{}, fmt.Sprintf("mulAddEdge%dAVX2", vectors), vectors, true)
	}
	mulAdd(avx512{}, "mulAddAVX512", 3, false)
	mulAdd(avx2{}, "mulAddAVX2", 3, false)
	avx2{}.transpose()
	for _, to := range floats {
		for _, from := range floats {
			mergeRow(avx512{}, "AVX512", to, from)
			mergeRow(avx2{}, "AVX2", to, from)
		}
	}
	addScaled(avx512{}, "AVX512")
	addScaled(avx2{}, "AVX2")
	hide()
	kept(avx512{}, "AVX512")
	kept(avx2{}, "AVX2")
	dot(avx512{}, "AVX512")
	dot(avx2{}, "AVX2")
	for set, s := range []wide{avx512{}, avx2{}} {
		set := []string{"AVX512", "AVX2"}[set]
		mapped(s, "exp"+set, exponential)
		mapped(s, "sigmoid"+set, sigmoid)
		siluMul(s, set)
		siluMulGrad(s, set)
		addProducts(s, set)
	}
	searches()
	avx2{}.encodeQ8()
	searchMoving()
	roundLattice()
	avx2{}.decodeQ8()
	avx2{}.quantizeCodes()
	avx2{}.scaleCodes("scaleCodesAVX2", false)
	avx2{}.scaleCodes("scaleCodesLessAVX2", true)
	for _, f := range floats {
		avx2{}.extremes(f)
		avx2{}.quantizeAffine(f)
		avx2{}.dequantizeAffine(f)
	}
	avx2{}.ranks()
	avx2{}.divide()
	avx2{}.encodeMinifloat(e4m3)
	avx2{}.encodeMinifloat(e2m1)
	avx2{}.magnitudes()
	avx2{}.byGroups("multiplyAVX2", func(m, x, r Op) { VMULPS(m, x, r) })
	avx2{}.nibbles()
	Generate()
}

// The tables of kernels.lookup, by their offsets in bytes.
const (
	above1    = 4 * 0
	above2    = 4 * 16
	above4    = 4 * 32
	middle    = above1 + 4*7
	high      = 4 * 48
	low       = 4 * 64
	negative4 = 4 * 80
	negative2 = 4 * 84
	negative1 = 4 * 88
	negative  = 4 * 96
	bucket    = 4 * 100
	below     = 4 * 132
)

const (
	quantize4Signature = "func(lookup *[164]uint32, packed []byte, absmax []float32, src []byte, " +
		"blockSize int) (done int)"
	dequantize4Signature = "func(dst, packed []byte, absmax []float32, code *[16]float32, blockSize int) (done int)"
	maxAbsSignature      = "func(src []byte) (largest uint32, done int)"
	quantize8Signature   = "func(q, src []byte, scale float32) (done int)"
	dequantize8Signature = "func(dst, q []byte, scale float32) (done int)"
	convertSignature     = "func(dst, src []byte) (done int)"
)

// function begins one.
func function(name, signature string) {
	TEXT(name, NOSPLIT, signature)
	Pragma("noescape")
}

func base(param string) Register { return Load(Param(param).Base(), GP64()) }

func length(param string) Register { return Load(Param(param).Len(), GP64()) }

// at addresses what lies offset bytes past p.
func at(p Register, offset int) Mem { return Mem{Base: p, Disp: offset} }

// bits loads a constant into a general register.
func bits(value uint32) GPVirtual {
	r := GP32()
	MOVL(U32(value), r)
	return r
}

// blocks is the loop over the blocks of 4-bit functions: it ends with the blocks
// or by a jump to blocks_done, and returns the number of those done.
func blocks(body func(done Register)) {
	count, done := length("absmax"), GP64()
	XORQ(done, done)
	Label("block")
	CMPQ(done, count)
	JGE(LabelRef("blocks_done"))
	body(done)
	INCQ(done)
	JMP(LabelRef("block"))
	Label("blocks_done")
	Store(done, ReturnIndex(0))
	VZEROUPPER()
	RET()
}

// within repeats body for each step of the elements of a block, of which there
// is a whole number.
func within(name string, blockSize Register, step int, body func()) {
	left := GP64()
	MOVQ(blockSize, left)
	Label(name)
	body()
	SUBQ(I32(int32(step)), left)
	JNE(LabelRef(name))
}

// elements repeats body as long as step elements are left of count, and returns
// how many it saw.
func elements(count Register, step int, body func()) (done Register) {
	done = GP64()
	MOVQ(count, done)
	ANDQ(I32(int32(-step)), done)
	left := GP64()
	MOVQ(done, left)
	Label("loop")
	TESTQ(left, left)
	JE(LabelRef("done"))
	body()
	SUBQ(I32(int32(step)), left)
	JMP(LabelRef("loop"))
	Label("done")
	return done
}

// count returns the number of elements in a slice of bytes.
func count(param string, f float) Register {
	n := length(param)
	if f.size == 4 {
		SHRQ(U8(2), n)
	} else {
		SHRQ(U8(1), n)
	}
	return n
}

// groups is the loop over groups of blocks of the 4-bit quantisers. First come
// the magnitudes of a group's blocks, by largest, which moves on through the
// source by itself; then all the reciprocals at once; then the codes, by encode.
// So nobody waits for the long way from elements to a reciprocal.
//
// A block with a magnitude that is not finite ends it all.
func groups(
	f float, lanes int, blockSize Register, largest func() GPVirtual, reciprocals func(m Mem), encode func(factor Mem),
) {
	absmax, count, done := base("absmax"), length("absmax"), GP64()
	XORQ(done, done)
	local := AllocLocal(4 * lanes)
	p := GP64()
	LEAQ(local, p)
	for i := range lanes { // those without a block must not hold anything slow to divide by
		MOVL(U32(one), at(p, 4*i))
	}

	// A group has as many blocks as 1024 elements do, if that is a vector's.
	limit, size := GP64(), GP64()
	MOVQ(U32(1024), limit)
	MOVQ(blockSize, size)
	Label("halve")
	SHRQ(U8(1), limit)
	SHRQ(U8(1), size)
	CMPQ(size, U8(1))
	JNE(LabelRef("halve"))
	TESTQ(limit, limit)
	CMOVQEQ(size, limit)
	CMPQ(limit, U8(lanes))
	JLE(LabelRef("group"))
	MOVQ(U32(lanes), limit)

	Label("group")
	n, i := GP64(), GP64()
	MOVQ(count, n)
	SUBQ(done, n)
	JE(LabelRef("end"))
	CMPQ(n, limit)
	CMOVQGT(limit, n)
	XORQ(i, i)

	Label("magnitude")
	r := largest()
	CMPL(r, f.infinity())
	JAE(LabelRef("infinite"))
	switch f {
	case bf16:
		SHLL(U8(16), r)
	case f16:
		x := XMM()
		VMOVD(r, x)
		VCVTPH2PS(x, x)
		VMOVD(x, r)
	}
	MOVL(r, Mem{Base: absmax})
	MOVL(r, Mem{Base: p, Index: i, Scale: 4})
	ADDQ(U8(4), absmax)
	INCQ(i)
	CMPQ(i, n)
	JNE(LabelRef("magnitude"))
	JMP(LabelRef("finite"))

	Label("infinite")
	MOVQ(done, count)
	ADDQ(i, count)
	MOVQ(i, n)
	TESTQ(i, i)
	JE(LabelRef("end"))

	Label("finite")
	reciprocals(Mem{Base: p})
	ADDQ(n, done)
	XORQ(i, i)
	Label("encode")
	encode(Mem{Base: p, Index: i, Scale: 4})
	INCQ(i)
	CMPQ(i, n)
	JNE(LabelRef("encode"))
	JMP(LabelRef("group"))

	Label("end")
	Store(done, Return("done"))
	VZEROUPPER()
	RET()
}

// least16 returns the least of eight unsigned words.
func least16(x VecVirtual) GPVirtual {
	r := GP32()
	VPHMINPOSUW(x, x)
	VMOVD(x, r)
	MOVWLZX(r.As16(), r)
	return r
}

// largest32 returns the largest of four unsigned doublewords.
func largest32(x VecVirtual) GPVirtual {
	y, r := XMM(), GP32()
	VPSHUFD(U8(0x4e), x, y)
	VPMAXUD(y, x, x)
	VPSHUFD(U8(0xb1), x, y)
	VPMAXUD(y, x, x)
	VMOVD(x, r)
	return r
}

// finite loads the absmax of a block into a vector's first element, and jumps to
// blocks_done if that is not finite.
func finite(absmax, done Register) VecVirtual {
	x, r := XMM(), GP32()
	MOVL(Mem{Base: absmax, Index: done, Scale: 4}, r)
	VMOVD(r, x)
	ANDL(U32(0x7fffffff), r)
	CMPL(r, U32(infinity))
	JAE(LabelRef("blocks_done"))
	return x
}

// data declares a table of bytes at its first use.
func data(name string, table []byte) func() Mem {
	var m Mem
	return func() Mem {
		if m.Base == nil {
			m = GLOBL(name, RODATA|NOPTR)
			for i, b := range table {
				DATA(i, U8(b))
			}
		}
		return m
	}
}
