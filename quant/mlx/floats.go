package mlx

import (
	"encoding/binary"
	"math"
	"sync"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/minifloat"
	"github.com/lorakit/lorakit/internal/scaled"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// table has the values of every byte of words with every scale, as the bits of a dtype, the first lowest: those of byte
// b with scale s are number s<<8 | b. A byte has one code of 8 bits, or two of 4.
type table []uint64

var tables sync.Map // by tableKey

type tableKey struct {
	name  string
	dtype tensor.DType
}

// tableOf makes the table of a kind and a dtype where there is none yet.
func tableOf(k *kind, d tensor.DType) table {
	key := tableKey{k.name, d}
	if t, ok := tables.Load(key); ok {
		return t.(table)
	}
	t := make(table, 0, 256<<8)
	for s := range 256 {
		// A scale beyond the dtype is an infinity, or zero, in MLX too.
		scale := tensor.Round(k.scale(byte(s)), d)
		var values [256]uint64
		for c := range 1 << k.bits {
			v := k.value(byte(c)) * scale
			if v != v {
				v = float32(math.NaN()) // the same on every machine
			}
			values[c] = uint64(bitsOf(v, d))
		}
		for b := range 256 {
			if k.bits == 8 {
				t = append(t, values[b])
			} else {
				t = append(t, values[b&15]|values[b>>4]<<d.Bits())
			}
		}
	}
	kept, _ := tables.LoadOrStore(key, t)
	return kept.(table)
}

// scale is the value of a stored scale. The last of a power of two is an infinity in MLX, and not a NaN.
func (k *kind) scale(s byte) float32 {
	switch {
	case k.mode == "nvfp4":
		return minifloat.E4M3[s]
	case s == minifloat.NaNE8M0:
		return float32(math.Inf(1))
	}
	return minifloat.E8M0[s]
}

// value is that of a code.
func (k *kind) value(c byte) float32 {
	if k.bits == 8 {
		return minifloat.E4M3[c]
	}
	return minifloat.E2M1[c]
}

// bitsOf rounds a number to a dtype, of which it returns the bits.
func bitsOf(x float32, d tensor.DType) uint32 {
	var b [4]byte
	_ = tensor.FromFloats(b[:d.Bits()/8], d, []float32{x}) // the lengths fit
	return binary.LittleEndian.Uint32(b[:])
}

// floats reads weights whose codes are floats.
type floats struct {
	*weight
	table table
}

// Decode writes code * scale, each and their product rounded to the weight's dtype, as MLX does.
func (d *floats) Decode(dst []byte, _, _ int64, in [][]byte) error {
	size, words := int(d.groupBytes()), in[partWords]
	width := int(d.info.DType.Bits()/8*d.group) / size // of the values of a byte
	for g, scale := range in[partScales] {
		values := (*[256]uint64)(d.table[int(scale)<<8:])
		group, to := words[g*size:][:size], dst[g*size*width:][:size*width]
		switch width {
		case 2:
			for i, b := range group {
				binary.LittleEndian.PutUint16(to[2*i:], uint16(values[b]))
			}
		case 4:
			for i, b := range group {
				binary.LittleEndian.PutUint32(to[4*i:], uint32(values[b]))
			}
		default:
			for i, b := range group {
				binary.LittleEndian.PutUint64(to[8*i:], values[b])
			}
		}
	}
	return nil
}

// floatEncoder writes weights whose codes are floats.
type floatEncoder struct{ encoder }

// Encode gives each group the scale that puts its largest magnitude at the end of what codes have, and each element the
// code that is then nearest. What is compared with codes is rounded to the weight's dtype, as MLX does.
func (e *floatEncoder) Encode(out [][]byte, _ []float32, lo, hi int64, src []byte) error {
	width, group, d := int(e.info.DType.Bits()/8), int(e.group), e.info.DType
	return e.each(lo, hi, func(s *scratch, n, first, g int) error {
		x := s.x[:n]
		if err := tensor.ToFloats(x, src[width*first:width*(first+n)], d); err != nil {
			return err
		}
		largest, divisors := s.hi[:n/group], s.scales[:n/group]
		clear(largest)
		bad := scaled.ByRow(1, int64(n), e.group).Largest(largest, x, s.most[:n/kernels.Group])
		if bad >= 0 && !e.allowNonFinite {
			return &quant.NonFiniteError{Index: lo + int64(first+bad), What: "NaN or infinity"}
		}
		for i := range divisors {
			out[partScales][g+i], divisors[i] = e.scaleFor(largest[i])
			if divisors[i] == 0 { // of infinities MLX finds no code nearer than the first
				clear(x[i*group : (i+1)*group])
				divisors[i] = 1
			}
		}
		kernels.Divide(x, divisors, group)
		if d != tensor.F32 {
			b := s.rounded[:width*n]
			if err := tensor.FromFloats(b, d, x); err != nil {
				return err
			}
			if err := tensor.ToFloats(x, b, d); err != nil {
				return err
			}
		}
		if e.bits == 8 {
			for i, v := range x {
				s.codes[i] = minifloat.ToE4M3(v)
			}
		} else {
			kernels.Ranks(s.codes[:n], x, &middlesE2M1)
		}
		e.pack(out[partWords], first, s.codes[:n])
		return nil
	})
}

// middlesE2M1 lie between the values of E2M1; in the middle of two the one nearer to zero is taken, the first when all
// are gone through, and what becomes zero has no sign.
var middlesE2M1 = [8]float32{0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 0.25}

// scaleFor returns the stored scale of a group and its value, by its largest magnitude.
func (e *floatEncoder) scaleFor(largest float32) (byte, float32) {
	most := float32(minifloat.MaxE2M1)
	if e.bits == 8 {
		most = minifloat.MaxE4M3
	}
	a := tensor.Round(largest/most, e.info.DType)
	if e.mode == "nvfp4" {
		s := minifloat.ToE4M3(a)
		return s, minifloat.E4M3[s]
	}
	s := powerAbove(a)
	return s, minifloat.E8M0[s]
}

// powerAbove returns the scale of the least power of two that is not below a; that of 1 where a is zero.
//
// MLX does not stop at the least scale there is: 2^-128 and below run over, and come back as 2^128 times what they
// were. Here they have the least one.
func powerAbove(a float32) byte {
	switch b := math.Float32bits(a); {
	case a == 0:
		return 127
	case b <= 1<<22: // 2^-127
		return 0
	default:
		return byte((b + 1<<23 - 1) >> 23) // one more, unless the exponent is all there is
	}
}
