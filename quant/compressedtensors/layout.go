package compressedtensors

import (
	"encoding/binary"
	"fmt"
	"math"
	"sync"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/minifloat"
	"github.com/lorakit/lorakit/internal/scaled"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/rows"
	"github.com/lorakit/lorakit/tensor"
)

// The first parts of a weight M.weight, in the order in which Parts and Outputs list them. What else there is comes
// behind: the shape of packed integers, the scale of the scales of nvfp4, zero points.
const (
	partCodes = iota // M.weight or M.weight_packed
	partScale        // M.weight_scale
	partThird        // M.weight_shape or M.weight_global_scale
)

// Endings of the names of parts, behind the module's.
const (
	weightEnd = ".weight"
	packedEnd = ".weight_packed"
	scaleEnd  = ".weight_scale"
	shapeEnd  = ".weight_shape"
	globalEnd = ".weight_global_scale"
	zeroEnd   = ".weight_zero_point"
	orderEnd  = ".weight_g_idx"
)

// matrix is a weight in a layout.
type matrix struct {
	spec
	module     string
	rows, cols int64
	grid       scaled.Grid
	dtype      tensor.DType // of what is quantised; of most formats of the scales too
	zeros      int          // the part with the zero points, or -1
}

func newMatrix(s spec, module string, shape tensor.Shape, dtype tensor.DType) (*matrix, error) {
	if len(shape) != 2 || min(shape[0], shape[1]) < 1 {
		return nil, fmt.Errorf("its shape is %v, expected two dimensions that are not empty", shape)
	}
	m := &matrix{spec: s, module: module, rows: shape[0], cols: shape[1], dtype: dtype, zeros: -1}
	if _, err := (tensor.Info{DType: tensor.F32, Shape: shape}).Size(); err != nil {
		return nil, err
	}
	var err error
	if m.grid, err = s.grid(m.rows, m.cols); err != nil {
		return nil, err
	}
	switch {
	case s.asymmetric && s.format == packQuantized:
		m.zeros = 3
	case s.asymmetric:
		m.zeros = 2
	}
	return m, nil
}

func (m *matrix) info() tensor.Info {
	return tensor.Info{Name: m.module + weightEnd, DType: m.dtype, Shape: tensor.Shape{m.rows, m.cols}}
}

// parts lists the stored tensors.
func (m *matrix) parts() []tensor.Info {
	part := func(end string, d tensor.DType, shape ...int64) tensor.Info {
		return tensor.Info{Name: m.module + end, DType: d, Shape: shape}
	}
	scaleShape := []int64{m.grid.ScaleRows(), m.grid.ScaleCols()}
	if m.strategy == perTensor {
		scaleShape = []int64{1}
	}
	var list []tensor.Info
	switch m.format {
	case packQuantized:
		list = append(list, part(packedEnd, tensor.I32, m.rows, m.fields().words(m.cols)),
			part(scaleEnd, m.dtype, scaleShape...), part(shapeEnd, tensor.I64, 2))
		if m.asymmetric {
			list = append(list, part(zeroEnd, tensor.I32, m.fields().words(m.rows), m.grid.ScaleCols()))
		}
	case nvfp4Packed:
		list = append(list, part(packedEnd, tensor.U8, m.rows, m.cols/2), part(scaleEnd, tensor.F8E4M3, scaleShape...),
			part(globalEnd, tensor.F32, 1))
	case mxfp4Packed:
		list = append(list, part(packedEnd, tensor.U8, m.rows, m.cols/2), part(scaleEnd, tensor.U8, scaleShape...))
	case mxfp8Quantized:
		list = append(list, part(weightEnd, tensor.F8E4M3, m.rows, m.cols), part(scaleEnd, tensor.U8, scaleShape...))
	case floatQuantized:
		list = append(list, part(weightEnd, tensor.F8E4M3, m.rows, m.cols), part(scaleEnd, m.dtype, scaleShape...))
	default:
		list = append(list, part(weightEnd, tensor.I8, m.rows, m.cols), part(scaleEnd, m.dtype, scaleShape...))
		if m.asymmetric {
			list = append(list, part(zeroEnd, tensor.I8, scaleShape...))
		}
	}
	return list
}

func (m *matrix) fields() fields { return fields{m.bits, m.padded} }

// rowBytes is how many bytes the codes of a row take.
func (m *matrix) rowBytes() int64 {
	switch m.format {
	case packQuantized:
		return 4 * m.fields().words(m.cols)
	case nvfp4Packed, mxfp4Packed:
		return m.cols / 2
	}
	return m.cols
}

// scaleBytes is the width of a scale.
func (m *matrix) scaleBytes() int64 {
	if m.byteScales() {
		return 1
	}
	return m.dtype.Bits() / 8
}

// byteScales reports whether scales have codes of 8 bits, instead of the dtype of the weight.
func (m *matrix) byteScales() bool { return m.format == nvfp4Packed || m.powers() }

// ranges appends where codes, scales and zero points of the elements [lo, hi), whole rows, lie.
func (m *matrix) ranges(r []quant.Range, lo, hi int64) []quant.Range {
	if lo >= hi {
		return r
	}
	r0, r1 := lo/m.cols, hi/m.cols
	r = append(r, quant.Range{Part: partCodes, Offset: r0 * m.rowBytes(), Length: (r1 - r0) * m.rowBytes()})
	first, last := m.grid.Scales(lo, hi)
	w := m.scaleBytes()
	r = append(r, quant.Range{Part: partScale, Offset: first * w, Length: (last - first) * w})
	switch {
	case m.zeros < 0:
	case m.format == packQuantized:
		f, row := m.fields(), 4*m.grid.ScaleCols()
		w0, w1 := f.columnWord(r0), f.words(r1)
		r = append(r, quant.Range{Part: m.zeros, Offset: w0 * row, Length: (w1 - w0) * row})
	default:
		r = append(r, quant.Range{Part: m.zeros, Offset: first, Length: last - first})
	}
	return r
}

// offset is what the fields of an integer have more than the integer.
func (m *matrix) offset() int32 { return 1 << (m.bits - 1) }

// zeroPoints puts those of the elements [lo, hi) into dst, one for each scale, each with the offset.
func (m *matrix) zeroPoints(s *scratch, dst []byte, lo, hi int64, src []byte) {
	if m.format != packQuantized {
		for i, z := range src {
			dst[i] = z + byte(m.offset())
		}
		return
	}
	r0, r1, width := lo/m.cols, hi/m.cols, m.grid.ScaleCols()
	column := rows.Room(&s.column, r1-r0)
	for c := range width {
		m.fields().column(column, src, r0, r1, width, c)
		for r, z := range column {
			dst[int64(r)*width+c] = z
		}
	}
}

// scaleValues converts stored scales to numbers.
func (m *matrix) scaleValues(dst []float32, src []byte, global float32) error {
	switch m.format {
	case nvfp4Packed:
		for i, c := range src {
			dst[i] = minifloat.E4M3[c] / global
		}
	case mxfp4Packed, mxfp8Quantized:
		for i, c := range src {
			dst[i] = minifloat.E8M0[c]
		}
	default:
		return tensor.ToFloats(dst, src, m.dtype)
	}
	return nil
}

// scratch is what a tile needs besides its values.
type scratch struct {
	by                    []float32 // for each kernels.Group of a row
	most                  []uint32
	ones                  []float32
	none                  []float32
	values, scales        []float32
	greatest, least       []float32
	found                 []scale
	codes, zeros, rounded []byte
	column, words         []byte // of packed zero points
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// int8s are the values of integers of 8 bits.
var int8s = func() (v [256]float32) {
	for i := range v {
		v[i] = float32(int8(i))
	}
	return v
}()

// nibbles are the values of fields of 4 bits by zero point.
var nibbles = func() (v [16][16]float32) {
	for z := range v {
		for f := range v[z] {
			v[z][f] = float32(f - z)
		}
	}
	return v
}()

// decoder reads a weight.
type decoder struct {
	*matrix
	global float32 // of nvfp4
	dtype  tensor.DType
	names  []string
}

func (d *decoder) Info() tensor.Info {
	t := d.info()
	t.DType = d.dtype
	return t
}

func (d *decoder) Spec() quant.Spec { return d.public() }
func (d *decoder) Parts() []string  { return d.names }

// Unit is a row.
func (d *decoder) Unit() int64 { return d.cols }

// Values is the dtype of the scales, to which compressed-tensors rounds. What is scaled by powers of two is exact as
// BF16, as it has it; what is scaled by the scales of scales is computed in F32.
func (d *decoder) Values() tensor.DType {
	switch d.format {
	case nvfp4Packed:
		return tensor.F32
	case mxfp4Packed, mxfp8Quantized:
		return tensor.BF16
	}
	return d.matrix.dtype
}

func (d *decoder) Inputs(r []quant.Range, lo, hi int64) []quant.Range { return d.ranges(r, lo, hi) }

func (d *decoder) Decode(dst []byte, lo, hi int64, in [][]byte) error {
	if lo >= hi {
		return nil
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	scale := rows.Room(&s.scales, int64(len(in[partScale]))/d.scaleBytes())
	if err := d.scaleValues(scale, in[partScale], d.global); err != nil {
		return err
	}
	var zeros []byte
	if d.zeros >= 0 {
		zeros = rows.Room(&s.zeros, int64(len(scale)))
		d.zeroPoints(s, zeros, lo, hi, in[2])
	}
	cols, stride := int(d.cols), int(d.rowBytes())
	row := rows.Room(&s.values, d.cols)
	fields, plain := d.fields(), d.format == packQuantized && d.bits != 4 && d.bits != 8
	unpacked := rows.Room(&s.codes, d.cols)
	size := int(d.Values().Bits() / 8)
	codes, out := in[partCodes], dst
	if table := d.table(); table != nil {
		return d.decodeNibbles(s, dst, codes, table, scale, lo, hi)
	}
	var failed error
	d.grid.Each(lo, hi, func(from, to, k int) {
		at := from % cols
		n := to - from
		if plain && at == 0 {
			fields.unpack(unpacked, codes[:stride])
		}
		x := row[at : at+n]
		switch d.format {
		case floatQuantized, mxfp8Quantized:
			scaled.Bytes(x, codes[at:], &minifloat.E4M3, scale[k])
		case nvfp4Packed, mxfp4Packed:
			scaled.Nibbles(x, codes[at/2:], &minifloat.E2M1, scale[k])
		case intQuantized:
			if zeros == nil {
				scaled.Bytes(x, codes[at:], &int8s, scale[k])
				break
			}
			zero := int32(zeros[k]) - d.offset()
			for i, c := range codes[at : at+n] {
				x[i] = float32(int32(int8(c))-zero) * scale[k]
			}
		default:
			zero := d.offset()
			if zeros != nil {
				zero = int32(zeros[k])
			}
			if d.bits == 4 && at%2 == 0 && n%2 == 0 {
				scaled.Nibbles(x, codes[at/2:], &nibbles[zero], scale[k])
				break
			}
			run := unpacked[at : at+n]
			switch d.bits {
			case 4:
				for i := range run {
					run[i] = codes[(at+i)/2] >> ((at + i) % 2 * 4) & 15
				}
			case 8:
				run = codes[at : at+n]
			}
			for i, c := range run {
				x[i] = float32(int32(c)-zero) * scale[k]
			}
		}
		if at+n == cols {
			if err := tensor.FromFloats(out[:size*cols], d.Values(), row); err != nil {
				failed = err
			}
			out, codes = out[size*cols:], codes[stride:]
		}
	})
	return failed
}

// table is what values all codes of 4 bits have, where the kernels can decode whole rows of them; else nil.
func (d *decoder) table() *[16]float32 {
	switch {
	case d.grid.Groups() == 0 || d.zeros >= 0:
	case d.format == nvfp4Packed || d.format == mxfp4Packed:
		return &minifloat.E2M1
	case d.format == packQuantized && d.bits == 4:
		return &nibbles[d.offset()]
	}
	return nil
}

// decodeNibbles decodes codes of 4 bits, a row at a time.
func (d *decoder) decodeNibbles(
	s *scratch, dst, codes []byte, table *[16]float32, scales []float32, lo, hi int64,
) error {
	row, by := rows.Room(&s.values, d.cols), rows.Room(&s.by, d.cols/kernels.Group)
	size, stride := d.cols*d.Values().Bits()/8, d.cols/2
	for at := lo; at < hi; at += d.cols {
		d.grid.Spread(by, scales[d.grid.RowScale(lo, at):])
		kernels.Nibbles(row, codes[:stride], table, by)
		if err := tensor.FromFloats(dst[:size], d.Values(), row); err != nil {
			return err
		}
		dst, codes = dst[size:], codes[d.rowBytes():]
	}
	return nil
}

// weightShape is the content of M.weight_shape.
func (m *matrix) weightShape() []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(m.rows))
	return binary.LittleEndian.AppendUint64(b, uint64(m.cols))
}

// checkGlobal refuses a scale of scales that no weight can have.
func checkGlobal(name string, b [4]byte) (float32, error) {
	g := math.Float32frombits(binary.LittleEndian.Uint32(b[:]))
	if !(g > 0) || math.IsInf(float64(g), 0) {
		return 0, fmt.Errorf("%w: %s is %v, expected a finite number above 0", quant.ErrMalformed, tensor.Quote(name), g)
	}
	return g, nil
}
