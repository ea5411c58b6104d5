package columns

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/internal/scaled"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/bitfield"
	"github.com/lorakit/lorakit/tensor"
)

// The endings of the names of parts, behind that of a module.
const (
	codesSuffix  = ".qweight"
	scalesSuffix = ".scales"
	zerosSuffix  = ".qzeros"
)

// Module is what has been found of a weight: the name of its module, and the shapes of its codes and of its scales.
type Module struct {
	Name          string
	Codes, Scales tensor.Shape
}

// find makes the decoder of codes, and nil of all other tensors. The config says how they are stored; that all parts
// are so is then checked.
func find(t tensor.Info, s quant.Stored, c Config) (quant.Decoder, error) {
	if module, ok := strings.CutSuffix(t.Name, zerosSuffix); ok {
		if _, ok := s.Lookup(module + codesSuffix); !ok {
			return nil, Missing(module + codesSuffix)
		}
	}
	module, ok := strings.CutSuffix(t.Name, codesSuffix)
	if !ok {
		return nil, nil
	}
	if t.DType != tensor.I32 || len(t.Shape) != 2 {
		return nil, fmt.Errorf("%w: it is %v %v, expected I32 with two dimensions", quant.ErrMalformed, t.DType, t.Shape)
	}
	scales, ok := s.Lookup(module + scalesSuffix)
	if !ok {
		return nil, Missing(module + scalesSuffix)
	}
	if !scales.DType.Float() || len(scales.Shape) != 2 {
		return nil, fmt.Errorf("%w: %s is %v %v, expected F16, BF16 or F32 with two dimensions", quant.ErrMalformed,
			tensor.Quote(scales.Name), scales.DType, scales.Shape)
	}
	d := &Decoder{scale: scales.DType, parts: []string{t.Name, scales.Name, module + zerosSuffix}}
	var err error
	if d.Layout, err = c.Layout(Module{module, t.Shape, scales.Shape}, s); err != nil {
		return nil, err
	}
	if d.Index != "" {
		d.parts = append(d.parts, d.Index)
	}
	d.weight = tensor.Info{Name: module + ".weight", DType: s.DType(), Shape: tensor.Shape{d.Out, d.In}}
	if !d.weight.DType.Float() {
		d.weight.DType = d.scale
	}
	if _, ok := s.Lookup(d.weight.Name); ok {
		return nil, fmt.Errorf("%w: %s is there too", quant.ErrMalformed, tensor.Quote(d.weight.Name))
	}
	if err := d.check(s); err != nil {
		return nil, err
	}
	return d, d.checkIndex(s)
}

// Missing is the error of a part that is not there.
func Missing(name string) error {
	return fmt.Errorf("%w: %s is missing", quant.ErrMalformed, tensor.Quote(name))
}

// CheckGroupSize refuses a group_size of a config that no weight can have.
func CheckGroupSize(n int64) error {
	if n < 1 && n != -1 {
		return fmt.Errorf("%w: quantization_config has group_size %d, expected -1 or at least 1", quant.ErrMalformed, n)
	}
	return nil
}

// GroupsOf is how many groups there are of so many inputs, and how many one has, by the group_size of a config. -1 is
// one for all.
func GroupsOf(inputs, size int64) (groups, each int64) {
	if size < 1 || size > inputs {
		size = max(inputs, 1)
	}
	return (inputs + size - 1) / size, size
}

// check returns an error unless all parts are stored as the layout says.
func (d *Decoder) check(s quant.Stored) error {
	if d.Out <= 0 || d.In <= 0 || d.Groups <= 0 {
		return fmt.Errorf("%w: it is of shape %v in %d groups, expected some of each", quant.ErrMalformed, d.weight.Shape,
			d.Groups)
	}
	if d.In > scaled.MostColumns || d.Groups > d.In {
		return fmt.Errorf("%w: it has %d inputs in %d groups, expected at most %d and no more groups than inputs",
			quant.ErrMalformed, d.In, d.Groups, scaled.MostColumns)
	}
	if _, err := d.weight.Size(); err != nil {
		return fmt.Errorf("%w: %w", quant.ErrMalformed, err)
	}
	codes := tensor.Shape{d.In, bitfield.Words(d.Out, d.Bits)}
	if d.Down {
		codes = tensor.Shape{bitfield.Words(d.In, d.Bits), d.Out}
	}
	want := []tensor.Info{
		partCodes:  {DType: tensor.I32, Shape: codes},
		partScales: {DType: d.scale, Shape: tensor.Shape{d.Groups, d.Out}},
		partZeros:  {DType: tensor.I32, Shape: tensor.Shape{d.Groups, bitfield.Words(d.Out, d.Bits)}},
		partIndex:  {DType: tensor.I32, Shape: tensor.Shape{d.In}},
	}
	for i, name := range d.parts {
		got, ok := s.Lookup(name)
		if !ok {
			return Missing(name)
		}
		if want := want[i]; got.DType != want.DType || !slices.Equal(got.Shape, want.Shape) {
			return fmt.Errorf("%w: %s is %v %v, expected %v %v for a weight of shape %v in %d groups and %d bits",
				quant.ErrMalformed, tensor.Quote(name), got.DType, got.Shape, want.DType, want.Shape, d.weight.Shape, d.Groups,
				d.Bits)
		}
	}
	return nil
}

// checkIndex returns an error where an input has a group that is not there. An index is small beside its codes, so that
// it is read here, and who only looks at a checkpoint is told too.
func (d *Decoder) checkIndex(s quant.Stored) error {
	if d.Index == "" {
		return nil
	}
	b := scratches.Get().(*scratch)
	defer scratches.Put(b)
	const most = int64(len(b.codes)) / 4
	for i := int64(0); i < d.In; i += most {
		p := b.codes[:4*min(d.In-i, most)]
		if err := s.Read(d.Index, p, 4*i); err != nil {
			return err
		}
		for k := int64(0); 4*k < int64(len(p)); k++ {
			if _, err := d.groupAt(p[4*k:], i+k); err != nil {
				return err
			}
		}
	}
	return nil
}

// groupAt is the group of input i, which b has from its index.
func (d *Decoder) groupAt(b []byte, i int64) (int64, error) {
	g := int64(int32(binary.LittleEndian.Uint32(b)))
	if g < 0 || g >= d.Groups {
		return 0, fmt.Errorf("%w: %s has the group %d for input %d, expected 0 to %d", quant.ErrMalformed,
			tensor.Quote(d.Index), g, i, d.Groups-1)
	}
	return g, nil
}
