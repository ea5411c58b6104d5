package compressedtensors

import (
	"math"
	"slices"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/minifloat"
	"github.com/lorakit/lorakit/internal/scaled"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/rows"
	"github.com/lorakit/lorakit/tensor"
)

// encoder writes a weight as compressed-tensors rounds it without data to calibrate with: its arithmetic is in the
// dtype of the weight, and each operation is rounded to that.
type encoder struct {
	*matrix
	global float32      // the scale of scales
	scales [256]float32 // by their codes, over that one
	whole  scale        // that of the tensor, where there is one
}

func newEncoder(m *matrix) quant.Encoder {
	e := &encoder{matrix: m, global: 1}
	if m.strategy == perTensor || m.strategy == grouped {
		return &measured{e}
	}
	return e
}

func (e *encoder) Outputs() []tensor.Info { return e.parts() }

// Unit is as many rows as have scales, or words of zero points, of their own.
func (e *encoder) Unit() int64 {
	rows := int64(1)
	switch {
	case e.zeros >= 0 && e.format == packQuantized && e.padded:
		rows = int64(32 / e.bits)
	case e.zeros >= 0 && e.format == packQuantized:
		rows = 32
	case e.strategy == perBlock:
		rows = e.block[0]
	}
	return min(rows, e.rows) * e.cols
}

// Deferred is nothing.
func (e *encoder) Deferred(int64, int64) int64 { return 0 }

// Tiles leaves the scale of a whole tensor to Finish.
func (e *encoder) Tiles(r []quant.Range, lo, hi int64) []quant.Range {
	n := len(r)
	r = e.ranges(r, lo, hi)
	if e.strategy == perTensor && lo < hi {
		r = r[:n+1]
	}
	return r
}

func (e *encoder) Encode(out [][]byte, _ []float32, lo, hi int64, src []byte) error {
	if lo >= hi {
		return nil
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	first, last := e.grid.Scales(lo, hi)
	n := last - first
	list := rows.Room(&s.found, n)
	if e.strategy == perTensor {
		list[0] = e.whole
	} else {
		greatest, least := rows.Room(&s.greatest, n), rows.Room(&s.least, n)
		if err := e.extremes(s, greatest, least, lo, hi, src); err != nil {
			return err
		}
		for i := range list {
			list[i] = e.scaleOf(greatest[i], least[i])
			if e.powers() && list[i].code == minifloat.NaNE8M0 && !e.allowNonFinite {
				return &quant.NonFiniteError{Index: lo + int64(i)*e.group, What: "a group too large for its scale"}
			}
		}
		if err := e.putScales(s, out[1:], list, lo, hi); err != nil {
			return err
		}
	}
	return e.putCodes(s, out[partCodes], list, lo, hi, src)
}

// extremes finds, for each scale, the greatest value that is not below zero and the least that is not above, or only
// the largest magnitude where no more is needed.
func (e *encoder) extremes(s *scratch, greatest, least []float32, lo, hi int64, src []byte) error {
	if e.asymmetric && e.grid.Ranges(least, greatest, src, rows.Float(e.dtype)) {
		return nil
	}
	clear(greatest)
	clear(least)
	at := lo
	return rows.Each(&s.values, src, e.dtype, e.cols, func(x []float32) error {
		first := e.grid.RowScale(lo, at)
		if !e.asymmetric {
			err := rows.Largest(&s.most, greatest[first:], e.grid, at, x, e.allowNonFinite)
			at += e.cols
			return err
		}
		good := true
		e.grid.Each(at, at+e.cols, func(from, to, k int) {
			k += first
			a, b, finite := scaled.Range(x[from:to])
			least[k], greatest[k] = min(least[k], a), max(greatest[k], b)
			good = good && finite
		})
		if !good && !e.allowNonFinite {
			return &quant.NonFiniteError{Index: at + int64(scaled.NonFinite(x)), What: "NaN or infinity"}
		}
		at += e.cols
		return nil
	})
}

// powers reports whether scales are powers of two.
func (m *matrix) powers() bool { return m.format == mxfp4Packed || m.format == mxfp8Quantized }

// scale is that of a block: what values are divided by, its code where that has 8 bits, and a zero point.
type scale struct {
	value float32
	code  byte
	zero  int32
}

// scaleOf makes the scale of a block from its greatest and its least value.
func (e *encoder) scaleOf(greatest, least float32) scale {
	t := e.dtype
	switch {
	case e.powers():
		return e.powerOf(greatest)
	case e.format == nvfp4Packed:
		code := minifloat.ToE4M3(float32(tensor.Round(greatest/minifloat.MaxE2M1, t) * e.global))
		if code == 0 {
			code = 0x20 // 0.125
		}
		return scale{value: e.scales[code], code: code}
	case e.asymmetric:
		steps := float32(int32(1)<<e.bits - 1)
		v := tensor.Round(tensor.Round(greatest-least, t)/steps, t)
		zero := roundToEven(clip(tensor.Round(-float32(e.offset())-tensor.Round(least/v, t), t), -e.offset(), e.offset()-1))
		return scale{value: orEpsilon(v, t), zero: zero}
	}
	half := float32(minifloat.MaxE4M3)
	if e.format != floatQuantized {
		half = float32(int32(1)<<e.bits-1) / 2
	}
	return scale{value: orEpsilon(tensor.Round(greatest/half, t), t)}
}

// powerOf makes a scale that is a power of two: that of the greatest value, rounded up from 1.75 of it on, over the
// greatest that a code has.
func (e *encoder) powerOf(greatest float32) scale {
	mantissa, below := 23, 2
	switch e.dtype {
	case tensor.BF16:
		mantissa = 7
	case tensor.F16:
		mantissa = 10
	}
	if e.format == mxfp8Quantized {
		below = 8
	}
	var power float32 // greatest without its mantissa, 0 for what has no other bits
	half := uint32(1) << (mantissa - 2)
	if e.dtype == tensor.F16 {
		power = kernels.FromHalf((kernels.ToHalf(greatest) + uint16(half)) &^ (1<<mantissa - 1))
	} else {
		shift := 23 - mantissa
		power = math.Float32frombits((math.Float32bits(greatest)>>shift + half) >> mantissa << 23)
	}
	if power == 0 {
		if e.dtype == tensor.F16 { // which has no 2^-127: the scale becomes the one that stands for 0
			return scale{value: 1, code: 127}
		}
		return scale{value: minifloat.E8M0[0]}
	}
	code := max(0, int(math.Float32bits(power)>>23)-below)
	if power-power != 0 {
		code = minifloat.NaNE8M0
	}
	return scale{value: minifloat.E8M0[code], code: byte(code)}
}

// orEpsilon is a scale that can be divided by.
func orEpsilon(v float32, t tensor.DType) float32 {
	if v != 0 {
		return v
	}
	switch t {
	case tensor.BF16:
		return 0x1p-7
	case tensor.F16:
		return 0x1p-10
	}
	return 0x1p-23
}

// clip is x within two integers; NaN is 0.
func clip(x float32, lo, hi int32) float32 {
	if x != x {
		return 0
	}
	return min(max(x, float32(lo)), float32(hi))
}

// roundToEven rounds a number of a few bits to an integer, halves to the even one.
func roundToEven(x float32) int32 {
	const magic = 3 << 22 // its last bit is 1
	return int32(math.Float32bits(x+magic)) - int32(math.Float32bits(magic))
}

// putScales writes scales and zero points.
func (e *encoder) putScales(s *scratch, out [][]byte, list []scale, lo, hi int64) error {
	if e.byteScales() {
		for i := range list {
			out[0][i] = list[i].code
		}
	} else {
		values := rows.Room(&s.greatest, int64(len(list)))
		for i := range list {
			values[i] = list[i].value
		}
		if err := tensor.FromFloats(out[0], e.dtype, values); err != nil {
			return err
		}
	}
	if e.zeros < 0 {
		return nil
	}
	if e.format != packQuantized {
		for i := range list {
			out[1][i] = byte(list[i].zero)
		}
		return nil
	}
	width := e.grid.ScaleCols()
	n := (hi - lo) / e.cols
	column := rows.Room(&s.column, n)
	words := rows.Room(&s.words, 4*e.fields().words(n))
	for c := range width {
		for r := range column {
			column[r] = byte(list[int64(r)*width+c].zero + e.offset())
		}
		e.fields().pack(words, column)
		for k := int64(0); 4*k < int64(len(words)); k++ {
			copy(out[1][(k*width+c)*4:][:4], words[4*k:])
		}
	}
	return nil
}

// putCodes writes the codes of whole rows.
func (e *encoder) putCodes(s *scratch, out []byte, list []scale, lo, hi int64, src []byte) error {
	at, stride := lo, int(e.rowBytes())
	codes := rows.Room(&s.codes, e.cols)
	arithmetic := e.dtype
	if e.format == nvfp4Packed {
		arithmetic = tensor.F32
	}
	return rows.Each(&s.values, src, e.dtype, e.cols, func(x []float32) error {
		scales := list[e.grid.RowScale(lo, at):]
		finite := false
		if e.grid.Groups() > 0 {
			finite = e.divide(s, x, scales)
		} else {
			e.grid.Each(at, at+e.cols, func(from, to, k int) {
				v := scales[k].value
				for i := from; i < to; i++ {
					x[i] /= v
				}
			})
		}
		if err := e.roundRow(s, x, arithmetic); err != nil {
			return err
		}
		switch e.format {
		case nvfp4Packed, mxfp4Packed:
			kernels.EncodeE2M1(out[:stride], x, 0) // -0 becomes 0, but what is rounded to it keeps its sign
		case floatQuantized, mxfp8Quantized:
			kernels.EncodeE4M3(out[:stride], x, 0)
		default:
			if err := e.putIntegers(s, codes, x, scales, at, finite); err != nil {
				return err
			}
			if e.format == packQuantized {
				e.fields().pack(out[:stride], codes)
				break
			}
			for i, c := range codes {
				out[i] = c - byte(e.offset())
			}
		}
		out = out[stride:]
		at += e.cols
		return nil
	})
}

func add(x []float32, v float32) {
	for i := range x {
		x[i] += v
	}
}

// putIntegers rounds a row of quotients to integers, and puts them into codes with the offset. finite says that
// QuantizeCodes takes them.
func (e *encoder) putIntegers(s *scratch, codes []byte, x []float32, scales []scale, at int64, finite bool) error {
	if e.zeros >= 0 {
		e.grid.Each(at, at+e.cols, func(from, to, k int) {
			add(x[from:to], float32(scales[k].zero))
		})
		if err := e.roundRow(s, x, e.dtype); err != nil {
			return err
		}
	}
	half := e.offset()
	if finite {
		kernels.QuantizeCodes(codes, x, s.ones, s.none, -half, half-1)
		return nil
	}
	for i, y := range x {
		codes[i] = byte(roundToEven(clip(y, -half, half-1)) + half)
	}
	return nil
}

// roundRow rounds a row to a type.
func (e *encoder) roundRow(s *scratch, x []float32, t tensor.DType) error {
	if t == tensor.F32 {
		return nil
	}
	b := rows.Room(&s.rounded, e.cols*t.Bits()/8)
	if err := tensor.FromFloats(b, t, x); err != nil {
		return err
	}
	return tensor.ToFloats(x, b, t)
}

// divide divides a row by its scales. It reports whether all of it is a number that QuantizeCodes takes.
func (e *encoder) divide(s *scratch, x []float32, scales []scale) (finite bool) {
	n := e.cols / kernels.Group
	by := rows.Room(&s.by, n)
	each := e.grid.Groups()
	for i := range by {
		by[i] = scales[i/each].value
	}
	kernels.Divide(x, by, kernels.Group)
	if !e.integer() {
		return false
	}
	if int64(len(s.ones)) != n {
		s.ones, s.none = slices.Repeat([]float32{1}, int(n)), make([]float32, n)
	}
	most := rows.Room(&s.most, n)
	kernels.Magnitudes(most, x)
	return slices.Max(most) < math.Float32bits(1<<20)
}

func (e *encoder) Finish(_ quant.Deferred, write func(part int, off int64, p []byte) error) error {
	if e.strategy == perTensor {
		var b [4]byte
		p := b[:e.dtype.Bits()/8]
		if err := tensor.FromFloats(p, e.dtype, []float32{e.whole.value}); err != nil {
			return err
		}
		if err := write(partScale, 0, p); err != nil {
			return err
		}
	}
	switch e.format {
	case packQuantized:
		return write(partThird, 0, e.weightShape())
	case nvfp4Packed:
		var b [4]byte
		if err := tensor.FromFloats(b[:], tensor.F32, []float32{e.global}); err != nil {
			return err
		}
		return write(partThird, 0, b[:])
	}
	return nil
}

// measured is an encoder that has to know the largest magnitude first.
type measured struct{ *encoder }

// Statistics is the largest magnitude.
func (m *measured) Statistics() int { return 1 }

func (m *measured) Measure(numbers []float32, lo, _ int64, src []byte) error {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	at := lo
	return rows.Each(&s.values, src, m.dtype, m.cols, func(x []float32) error {
		err := rows.Largest(&s.most, numbers, scaled.Whole(m.rows, m.cols), at, x, m.allowNonFinite)
		at += m.cols
		return err
	})
}

func (m *measured) Join(numbers, others []float32) { numbers[0] = max(numbers[0], others[0]) }

func (m *measured) Begin(numbers []float32) error {
	if m.strategy == perTensor {
		m.whole = m.scaleOf(numbers[0], 0)
		return nil
	}
	tiny := float32(0x1p-126) // the least normal number
	if m.dtype == tensor.F16 {
		tiny = 0x1p-14
	}
	g := tensor.Round(float32(minifloat.MaxE4M3*minifloat.MaxE2M1*tensor.Round(1/max(numbers[0], tiny), m.dtype)), m.dtype)
	if g-g != 0 {
		g = 1
	}
	m.global = g
	for code, v := range minifloat.E4M3 {
		m.scales[code] = v / g
	}
	return nil
}
