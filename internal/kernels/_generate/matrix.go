package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

const (
	mulAddSignature    = "func(c, a, b []float32, cRow, aRow, aCol, k, rows, cols int)"
	transposeSignature = "func(dst, src []float32, dstRow, srcRow, k int) (done int)"
)

// tile is what a product needs of a set of instructions.
type tile interface {
	// vector returns a new register, of the given number of float32.
	vector() (v VecVirtual, floats int)
	// rows are the numbers of rows that a tile may have, the largest first. With
	// three vectors a row, the largest fills the registers.
	rows() []int
	// mask returns functions that load and store the first last elements of a
	// vector.
	mask(last Register) (load func(m Mem, v VecVirtual), store func(v VecVirtual, m Mem))
	// canonical makes each NaN in v the one.
	canonical(label string, v []VecVirtual)
}

func (avx512) vector() (VecVirtual, int) { return ZMM(), 16 }
func (avx512) rows() []int               { return []int{8, 4, 2, 1} }

func (avx512) mask(last Register) (load func(m Mem, v VecVirtual), store func(v VecVirtual, m Mem)) {
	k, ones := K(), GP32()
	MOVL(U32(0xffff), ones)
	BZHIL(last.(GPVirtual).As32(), ones, ones)
	KMOVW(ones, k)
	return func(m Mem, v VecVirtual) { VMOVUPS_Z(m, k, v) }, func(v VecVirtual, m Mem) { VMOVUPS(v, k, m) }
}

func (s avx512) canonical(label string, v []VecVirtual) {
	any, k := K(), K()
	for i := 0; i < len(v); i += 2 {
		if i == 0 {
			VCMPPS(U8(unordered), v[0], v[len(v)-1], any)
			continue
		}
		VCMPPS(U8(unordered), v[i], v[i-1], k)
		KORW(k, any, any)
	}
	KORTESTW(any, any)
	JEQ(LabelRef(label))
	replacement := s.every(nan)
	for _, v := range v {
		VCMPPS(U8(unordered), v, v, k)
		VMOVDQA32(replacement, k, v)
	}
	Label(label)
}

func (avx2) vector() (VecVirtual, int) { return YMM(), 8 }
func (avx2) rows() []int               { return []int{4, 2, 1} }

func (avx2) mask(last Register) (load func(m Mem, v VecVirtual), store func(v VecVirtual, m Mem)) {
	p := GP64()
	LEAQ(firstOnes(), p)
	SHLQ(U8(2), last)
	SUBQ(last, p)
	load = func(m Mem, v VecVirtual) {
		mask := YMM()
		VMOVDQU(at(p, 32), mask)
		VMASKMOVPS(m, mask, v)
	}
	store = func(v VecVirtual, m Mem) {
		mask := YMM()
		VMOVDQU(at(p, 32), mask)
		VMASKMOVPS(v, mask, m)
	}
	return load, store
}

// firstOnes has at 4*(8-n) a vector whose first n elements are ones.
var firstOnes = data("firstOnes", append(ones(32), make([]byte, 32)...))

func ones(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = 0xff
	}
	return b
}

func (s avx2) canonical(label string, v []VecVirtual) {
	any, t := YMM(), YMM()
	for i := 0; i < len(v); i += 2 {
		if i == 0 {
			VCMPPS(U8(unordered), v[0], v[len(v)-1], any)
			continue
		}
		VCMPPS(U8(unordered), v[i], v[i-1], t)
		VORPS(t, any, any)
	}
	VPTEST(any, any)
	JEQ(LabelRef(label))
	replacement := s.every(nan)
	for _, v := range v {
		VCMPPS(U8(unordered), v, v, t)
		VBLENDVPS(t, replacement, v, v)
	}
	Label(label)
}

// mulAdd adds products of k steps to a tile of c with rows of the given number of
// vectors, and to those beside it until there are no columns left: a whole number
// of tiles, or if it is masked one, whose last vector may be short. b is packed:
// the vectors of a row follow those of the row before, and the next tile's those
// of the last row. Strides are in elements.
func mulAdd(s tile, name string, vectors int, masked bool) {
	function(name, mulAddSignature)
	c, a, b := base("c"), base("a"), base("b")
	bytes := func(param string) Register {
		r := Load(Param(param), GP64())
		SHLQ(U8(2), r)
		return r
	}
	cRow, aRow, aCol := bytes("cRow"), bytes("aRow"), bytes("aCol")
	aRow3, aRow5, aRow7 := GP64(), GP64(), GP64()
	LEAQ(Mem{Base: aRow, Index: aRow, Scale: 2}, aRow3)
	LEAQ(Mem{Base: aRow, Index: aRow, Scale: 4}, aRow5)
	LEAQ(Mem{Base: aRow3, Index: aRow, Scale: 4}, aRow7)
	_, width := s.vector()
	cols := Load(Param("cols"), GP64())
	var load func(m Mem, v VecVirtual)
	var store func(v VecVirtual, m Mem)
	if masked {
		SUBQ(U8(width*(vectors-1)), cols)
		load, store = s.mask(cols)
	}

	stack := AllocLocal(16)
	cTile, aTile := stack, stack.Offset(8)
	MOVQ(a, aTile)
	Label("tile")
	MOVQ(c, cTile)
	left := Load(Param("rows"), GP64())
	for _, rows := range s.rows() {
		label := func(what string) string { return fmt.Sprintf("%s%d", what, rows) }
		Label(label("rows"))
		CMPQ(left, U8(rows))
		JLT(LabelRef(label("fewer")))

		// c moves on by the rows twice: for the loads, and for the stores.
		sums := make([]VecVirtual, rows*vectors)
		p := GP64()
		MOVQ(c, p)
		for i := range sums {
			sums[i], _ = s.vector()
			v := i % vectors
			if m := at(p, 4*width*v); masked && v == vectors-1 {
				load(m, sums[i])
			} else {
				VMOVUPS(m, sums[i])
			}
			if v == vectors-1 && i < len(sums)-1 {
				ADDQ(cRow, p)
			}
		}
		pa, pb, k := GP64(), GP64(), Load(Param("k"), GP64())
		MOVQ(a, pa)
		MOVQ(b, pb)
		var ahead Register
		if masked {
			ahead = GP64()
			LEAQ(Mem{Base: pa, Index: aCol, Scale: 8}, ahead)
			LEAQ(Mem{Base: ahead, Index: aCol, Scale: 8}, ahead)
		}
		elements := []Mem{
			{Base: pa}, {Base: pa, Index: aRow, Scale: 1},
			{Base: pa, Index: aRow, Scale: 2}, {Base: pa, Index: aRow3, Scale: 1},
			{Base: pa, Index: aRow, Scale: 4}, {Base: pa, Index: aRow5, Scale: 1},
			{Base: pa, Index: aRow3, Scale: 2}, {Base: pa, Index: aRow7, Scale: 1},
		}
		row := make([]VecVirtual, vectors)
		for v := range row {
			row[v], _ = s.vector()
		}
		Label(label("step"))
		for v := range row {
			VMOVUPS(at(pb, 4*width*v), row[v])
		}
		for r := range rows {
			x, _ := s.vector()
			VBROADCASTSS(elements[r], x)
			for v := range row {
				VFMADD231PS(row[v], x, sums[r*vectors+v])
			}
		}
		if masked {
			PREFETCHT0(Mem{Base: ahead})
			ADDQ(aCol, ahead)
		}
		ADDQ(aCol, pa)
		ADDQ(I32(int32(4*width*vectors)), pb)
		DECQ(k)
		JNE(LabelRef(label("step")))

		s.canonical(label("numbers"), sums)
		for i, sum := range sums {
			v := i % vectors
			if m := at(c, 4*width*v); masked && v == vectors-1 {
				store(sum, m)
			} else {
				VMOVUPS(sum, m)
			}
			if v == vectors-1 {
				ADDQ(cRow, c)
			}
		}
		LEAQ(Mem{Base: a, Index: aRow, Scale: uint8(min(rows, 4))}, a)
		if rows == 8 {
			LEAQ(Mem{Base: a, Index: aRow, Scale: 4}, a)
		}
		SUBQ(U8(rows), left)
		JMP(LabelRef(label("rows")))
		Label(label("fewer"))
	}
	if !masked {
		panel := Load(Param("k"), GP64())
		IMUL3Q(U32(4*width*vectors), panel, panel)
		ADDQ(panel, b)
		MOVQ(cTile, c)
		ADDQ(I32(int32(4*width*vectors)), c)
		MOVQ(aTile, a)
		SUBQ(I32(int32(width*vectors)), cols)
		JNE(LabelRef("tile"))
	}
	VZEROUPPER()
	RET()
}

// transpose sets the element (i, j) of dst to (j, i) of src, whose 8 rows have k
// elements.
func (avx2) transpose() {
	function("transposeAVX2", transposeSignature)
	dst, src := base("dst"), base("src")
	dstRow, srcRow := Load(Param("dstRow"), GP64()), Load(Param("srcRow"), GP64())
	SHLQ(U8(2), dstRow)
	SHLQ(U8(2), srcRow)
	Store(elements(Load(Param("k"), GP64()), 8, func() {
		var v [8]VecVirtual
		p := GP64()
		MOVQ(src, p)
		for i := range v {
			v[i] = YMM()
			VMOVUPS(at(p, 0), v[i])
			if i < 7 {
				ADDQ(srcRow, p)
			}
		}
		// Pairs of rows, then of pairs, then halves.
		var pairs, fours [8]VecVirtual
		for i := range 4 {
			pairs[2*i], pairs[2*i+1] = YMM(), YMM()
			VUNPCKLPS(v[2*i+1], v[2*i], pairs[2*i])
			VUNPCKHPS(v[2*i+1], v[2*i], pairs[2*i+1])
		}
		for i := range 2 {
			for j := range 2 {
				x, y := pairs[4*i+j], pairs[4*i+2+j]
				lo, hi := YMM(), YMM()
				VUNPCKLPD(y, x, lo)
				VUNPCKHPD(y, x, hi)
				fours[4*i+2*j], fours[4*i+2*j+1] = lo, hi
			}
		}
		for half := range 2 {
			for i := range 4 {
				out := YMM()
				VPERM2F128(U8(0x20+0x11*half), fours[4+i], fours[i], out)
				VMOVUPS(out, at(dst, 0))
				ADDQ(dstRow, dst)
			}
		}
		ADDQ(U8(32), src)
	}), Return("done"))
	VZEROUPPER()
	RET()
}
