package mlx

import (
	"fmt"
	"math"
	"sync"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/bitfield"
	"github.com/lorakit/lorakit/quant/internal/rows"
	"github.com/lorakit/lorakit/tensor"
)

// chunk is the number of elements that are worked on at a time, so that they stay in the nearest cache: whole groups of
// any size.
const chunk = 4096

// scratch is what a chunk needs besides its input and output.
type scratch struct {
	codes          [chunk]byte
	x              [chunk]float32
	rounded        [2 * chunk]byte
	scales, biases [chunk / 16]float32
	lo, hi         [chunk / 16]float32
	most           [chunk / kernels.Group]uint32
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// each hands work the elements from lo to hi by chunks: how many there are, and which element and which group each
// begins with, counted from lo.
func (l layout) each(lo, hi int64, work func(s *scratch, n, first, group int) error) error {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	for at := int64(0); at < hi-lo; at += chunk {
		if err := work(s, int(min(hi-lo-at, chunk)), int(at), int(at/l.group)); err != nil {
			return err
		}
	}
	return nil
}

// integers reads weights whose codes are integers.
type integers struct{ *weight }

// Decode writes code * scale + bias, rounded to the weight's dtype after either step, as MLX does.
func (d *integers) Decode(dst []byte, lo, hi int64, in [][]byte) error {
	width, group := int(d.info.DType.Bits()/8), int(d.group)
	return d.each(lo, hi, func(s *scratch, n, first, g int) error {
		bitfield.Unpack(s.codes[:n], in[partWords][first/group*int(d.groupBytes()):], d.bits)
		groups := n / group
		scales, biases := s.scales[:groups], s.biases[:groups]
		err := tensor.ToFloats(scales, in[partScales][width*g:width*(g+groups)], d.info.DType)
		if err == nil {
			err = tensor.ToFloats(biases, in[partBiases][width*g:width*(g+groups)], d.info.DType)
		}
		if err != nil {
			return err
		}
		to := dst[width*first : width*(first+n)]
		kernels.DequantizeAffine(to, rows.Float(d.info.DType), s.codes[:n], scales, biases, group)
		return nil
	})
}

// integerEncoder writes weights whose codes are integers.
type integerEncoder struct{ encoder }

// Encode gives each group the line through its two ends, moved so that the end of the larger magnitude is met, and
// zero by a code.
func (e *integerEncoder) Encode(out [][]byte, _ []float32, lo, hi int64, src []byte) error {
	width, group := int(e.info.DType.Bits()/8), int(e.group)
	most := float32(int(1)<<e.bits - 1)
	return e.each(lo, hi, func(s *scratch, n, first, g int) error {
		values, from, groups := src[width*first:width*(first+n)], rows.Float(e.info.DType), n/group
		scales, biases := s.scales[:groups], s.biases[:groups]
		bad := kernels.Extremes(s.lo[:groups], s.hi[:groups], values, from, group)
		if bad >= 0 && !e.allowNonFinite {
			return &quant.NonFiniteError{Index: lo + int64(first+bad), What: "NaN or infinity"}
		}
		for i := range scales {
			scales[i], biases[i] = line(s.lo[i], s.hi[i], most)
		}
		kernels.QuantizeAffine(s.codes[:n], values, from, scales, biases, group, most)
		e.pack(out[partWords], first, s.codes[:n])
		err := tensor.FromFloats(out[partBiases][width*g:width*(g+groups)], e.info.DType, biases)
		if err != nil {
			return err
		}
		stored := out[partScales][width*g : width*(g+groups)]
		if err := tensor.FromFloats(stored, e.info.DType, scales); err != nil || e.allowNonFinite {
			return err
		}
		if err := tensor.ToFloats(scales, stored, e.info.DType); err != nil {
			return err
		}
		for i, v := range scales {
			if v-v != 0 {
				return &quant.NonFiniteError{Index: lo + int64(first+i*group), What: fmt.Sprintf("a group whose scale %v cannot "+
					"hold, as its values are too far apart,", e.info.DType)}
			}
		}
		return nil
	})
}

// line returns the scale and the bias of a group, by its least and its largest element and the largest code. The scale
// is negative where the largest element has the larger magnitude, or the same.
func line(lo, hi, most float32) (scale, bias float32) {
	const least = 1e-7
	scale = max((hi-lo)/most, least)
	edge := hi
	if abs(lo) > abs(hi) {
		edge = lo
	} else {
		scale = -scale
	}
	code := float32(math.RoundToEven(float64(edge / scale)))
	if code == 0 {
		return scale, 0
	}
	if scale = edge / code; scale != scale {
		scale = float32(math.NaN()) // the same on every machine
	}
	return scale, edge
}

func abs(x float32) float32 { return math.Float32frombits(math.Float32bits(x) &^ (1 << 31)) }
