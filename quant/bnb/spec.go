package bnb

import (
	"fmt"

	"github.com/lorakit/lorakit/nf4"
	"github.com/lorakit/lorakit/quant"
)

// The parameters of nf4 and fp4: how many elements share one scale, and whether the scales are quantised as well.
const (
	blockSize   = "block_size"
	doubleQuant = "double_quant"
)

const defaultBlockSize = 64

// spec is a quant.Spec of this scheme. Block size and double are zero for int8.
type spec struct {
	Type           string
	BlockSize      int
	DoubleQuant    bool
	AllowNonFinite bool
}

// Spec makes the spec of nf4 or fp4 from block_size (a power of two from 32 to 4096, 64 by default) and double_quant;
// int8 has no parameters.
func (Scheme) Spec(typ string, asked quant.Params) (quant.Spec, error) {
	s := spec{Type: typ}
	switch typ {
	case "int8":
	case "nf4", "fp4":
		s.BlockSize, s.DoubleQuant = defaultBlockSize, asked.Bool(doubleQuant)
		if v := asked.Get(blockSize); v != nil {
			s.BlockSize = int(asked.Int(blockSize))
		}
		if err := nf4.CheckBlockSize(s.BlockSize); err != nil {
			return quant.Spec{}, fmt.Errorf("%w: %w", quant.ErrParameter, err)
		}
	default:
		return quant.Spec{}, fmt.Errorf("%w %q", quant.ErrUnknown, typ)
	}
	return s.public(), nil
}

// public is the spec as others see it.
func (s spec) public() quant.Spec {
	p := quant.Spec{Type: s.Type, AllowNonFinite: s.AllowNonFinite}
	if s.BlockSize > 0 {
		p.Params = quant.Params{{Name: blockSize, Value: int64(s.BlockSize)}}
		if s.DoubleQuant {
			p.Params = append(p.Params, quant.Param{Name: doubleQuant, Value: true})
		}
	}
	return p
}

// private reads a spec that Spec has made, or that was saved.
func private(s quant.Spec) (spec, error) {
	checked, err := Scheme{}.Spec(s.Type, s.Params)
	if err != nil {
		return spec{}, err
	}
	return spec{
		Type: s.Type, BlockSize: int(checked.Params.Int(blockSize)), DoubleQuant: checked.Params.Bool(doubleQuant),
		AllowNonFinite: s.AllowNonFinite,
	}, nil
}
