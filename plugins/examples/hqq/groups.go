package main

import (
	"encoding/binary"
	"fmt"
	"math"
	"sync"

	"github.com/lorakit/lorakit/tensor"
)

// packing is how the elements of a weight are divided and packed. hqq takes the weight row-major and cuts it into
// groups, which need not end where a row does. A byte of W_q holds two elements that are half a weight apart: group g
// of the first half has the upper four bits of row g of W_q, group g + rows the lower four.
type packing struct {
	dtype  tensor.DType // that the scales and zeros are stored in, and that hqq computes in
	group  int64        // elements of a group, a multiple of 8
	groups int64        // an even number
}

const (
	maxCode   = 15
	allCodes  = maxCode + 1
	wordCodes = 8   // codes in a number that is carried over
	batch     = 128 // groups that are decoded at once
)

// rows is the number of rows of W_q, a group long each.
func (p packing) rows() int64 { return p.groups / 2 }

// decode writes the values of groups from first on to dst, in p.dtype and each step rounded to it, as hqq computes
// them. codes, scales and zeros are the bytes of these groups.
func (p packing) decode(dst []byte, first int64, codes, scales, zeros []byte) error {
	width := p.dtype.Bits() / 8
	n := int64(len(scales)) / width
	if int64(len(codes)) != n*p.group || int64(len(zeros)) != n*width || int64(len(dst)) != n*p.group*width {
		return fmt.Errorf("found %d bytes of codes, %d of scales and %d of zeros, expected those of %d bytes of values",
			len(codes), len(scales), len(zeros), len(dst))
	}
	m := scratches.Get().(*scratch)
	defer scratches.Put(m)
	for done := int64(0); done < n; done += batch {
		k := min(n-done, batch)
		scale, zero, table := sized(&m.scale, k), sized(&m.zero, k), sized(&m.table, width*allCodes*k)
		products := sized(&m.values, allCodes*k)
		if err := tensor.ToFloats(scale, scales[done*width:(done+k)*width], p.dtype); err != nil {
			return err
		}
		if err := tensor.ToFloats(zero, zeros[done*width:(done+k)*width], p.dtype); err != nil {
			return err
		}
		for g, z := range zero {
			for code := range allCodes {
				products[allCodes*g+code] = float32(code) - z
			}
		}
		if err := round(products, table, p.dtype); err != nil {
			return err
		}
		for g, s := range scale {
			for code := range allCodes {
				products[allCodes*g+code] *= s
			}
		}
		if err := tensor.FromFloats(table[:int64(len(products))*width], p.dtype, products); err != nil {
			return err
		}
		for g := range k {
			shift := 0
			if first+done+g < p.rows() {
				shift = 4
			}
			packed := codes[(done+g)*p.group:][:p.group]
			out := dst[(done+g)*p.group*width:][:p.group*width]
			look(out, table[allCodes*g*width:][:allCodes*width], packed, shift)
		}
	}
	return nil
}

// round rounds x to d. buf has room for it.
func round(x []float32, buf []byte, d tensor.DType) error {
	if d == tensor.F32 {
		return nil
	}
	buf = buf[:int64(len(x))*d.Bits()/8]
	if err := tensor.FromFloats(buf, d, x); err != nil {
		return err
	}
	return tensor.ToFloats(x, buf, d)
}

// look puts what table has for each code into dst. A code is the four bits of a byte from shift on.
func look(dst, table, packed []byte, shift int) {
	if len(dst) == 2*len(packed) {
		for i, b := range packed {
			code := int(b) >> shift & maxCode
			binary.LittleEndian.PutUint16(dst[2*i:], binary.LittleEndian.Uint16(table[2*code:]))
		}
		return
	}
	for i, b := range packed {
		code := int(b) >> shift & maxCode
		binary.LittleEndian.PutUint32(dst[4*i:], binary.LittleEndian.Uint32(table[4*code:]))
	}
}

// encode quantises the groups in src, elements of p.dtype, to nearest: what hqq does with optimize=False and
// round_zero=True. scales and zeros get a number a group, carried the codes, eight in the bits of each number. It
// returns the first element that is not finite, or that is in a group whose range is not; -1 where there is none.
func (p packing) encode(carried []float32, scales, zeros, src []byte) (bad int64, err error) {
	bad = -1
	width := p.dtype.Bits() / 8
	n := int64(len(src)) / (p.group * width)
	words := p.group / wordCodes
	if int64(len(src)) != n*p.group*width || int64(len(carried)) != n*words ||
		int64(len(scales)) != n*width || int64(len(zeros)) != n*width {
		return bad, fmt.Errorf("found room for %d words of codes, %d bytes of scales and %d of zeros, expected that for %d "+
			"bytes of values", len(carried), len(scales), len(zeros), len(src))
	}
	m := scratches.Get().(*scratch)
	defer scratches.Put(m)
	x, scale, zero := sized(&m.values, p.group), sized(&m.scale, n), sized(&m.zero, n)
	for g := range n {
		if err := tensor.ToFloats(x, src[g*p.group*width:][:p.group*width], p.dtype); err != nil {
			return bad, err
		}
		if bad < 0 {
			if i := notFinite(x); i >= 0 {
				bad = g*p.group + i
			}
		}
		scale[g], zero[g] = encodeGroup(carried[g*words:][:words], x)
	}
	if err := tensor.FromFloats(scales, p.dtype, scale); err != nil {
		return bad, err
	}
	return bad, tensor.FromFloats(zeros, p.dtype, zero)
}

// scratch is memory that is used again for every tile.
type scratch struct {
	values, scale, zero []float32
	table               []byte
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// sized is *s with n elements, made longer where it is short.
func sized[T any](s *[]T, n int64) []T {
	if int64(cap(*s)) < n {
		*s = make([]T, n)
	}
	return (*s)[:n]
}

// notFinite is the index of the first element that is not finite; where only the range of all is infinite, that of the
// first; else -1.
func notFinite(x []float32) int64 {
	lo, hi := x[0], x[0]
	for i, v := range x {
		if v-v != 0 {
			return int64(i)
		}
		lo, hi = min(lo, v), max(hi, v)
	}
	if math.IsInf(float64(hi-lo), 0) {
		return 0
	}
	return -1
}

// encodeGroup quantises one group, in float32 and in the order in which hqq and torch compute. The conversions keep
// products from being fused with sums.
func encodeGroup(words, x []float32) (scale, zero float32) {
	// Of zeros of both signs the first counts, and a NaN counts above all.
	lo, hi := x[0], x[0]
	for _, v := range x[1:] {
		if v < lo || v != v {
			lo = v
		}
		if v > hi || v != v {
			hi = v
		}
		if v != v {
			break
		}
	}
	span := hi - lo
	s := float32(1/span) * maxCode // as torch divides a number by a tensor
	if math.Abs(float64(span)) <= float64(float32(1e-4)) {
		s = 1
	}
	if s > 2e4 {
		s = 2e4
	}
	z := float32(math.RoundToEven(float64(float32(-lo * s))))
	for w := range words {
		var word uint32
		for i, v := range x[wordCodes*w:][:wordCodes] {
			word |= code(float32(v*s)+z) << (4 * i)
		}
		words[w] = math.Float32frombits(word)
	}
	return quiet(1 / s), quiet(z)
}

// quiet is x, or of all NaN the one: processors differ in the sign of those that they make.
func quiet(x float32) float32 {
	if x != x {
		return float32(math.NaN())
	}
	return x
}

// code is v to the nearest of 0 to 15, halves to the even one. A NaN is 0.
func code(v float32) uint32 {
	switch {
	case v >= maxCode:
		return maxCode
	case v > 0:
		return math.Float32bits(v+1<<23) & maxCode // the last bits of a number so large are whole
	}
	return 0
}

// join makes bytes of W_q of the carried codes of as many elements of the first half and of the second.
func join(dst []byte, upper, lower []float32) {
	for w := range upper {
		u, l := math.Float32bits(upper[w]), math.Float32bits(lower[w])
		for i := range wordCodes {
			dst[wordCodes*w+i] = byte(u>>(4*i)<<4 | l>>(4*i)&maxCode)
		}
	}
}
