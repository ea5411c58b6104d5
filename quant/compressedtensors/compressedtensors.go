// Package compressedtensors stores weights as compressed-tensors does, the library that llm-compressor writes with and
// vLLM and transformers read: floats of 8 and 4 bits and integers of 1 to 8, with a scale for a tensor, channel, group
// or block, in one or several groups of a checkpoint.
package compressedtensors

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/internal/scaled"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

func init() { quant.Register(Scheme{}) }

// Scheme is the quant.Scheme of compressed-tensors.
type Scheme struct{}

// Name returns the quant_method of a config.json.
func (Scheme) Name() string { return method }

// Types lists what is read and written.
func (Scheme) Types() []quant.Type {
	list := make([]quant.Type, len(kinds))
	for i, k := range kinds {
		list[i] = quant.Type{Name: k.name, ExpertLoaders: "vLLM", Experts: k.experts()}
	}
	return list
}

// experts is about transformers 5.24. Where it stacks experts as it loads them, it unpacks words without a global
// scale, and multiplies floats of 8 bits by scales that are numbers, one, or one a row. What it does not know there is
// missing to it, and with a global scale it computes wrong values.
func (k kind) experts() quant.ExpertSupport {
	switch k.spec.format {
	case packQuantized, mxfp4Packed:
		return quant.QuantizedExperts
	case floatQuantized:
		if k.spec.strategy == perTensor || k.spec.strategy == perChannel {
			return quant.AnyExperts
		}
		return quant.PlainExperts
	case mxfp8Quantized:
		return quant.PlainExperts
	}
	return quant.NoExperts
}

// Find returns the weights that the quantization_config of a config.json is about.
func (Scheme) Find(ctx context.Context, s quant.Stored) ([]quant.Decoder, error) {
	c, err := readConfig(quant.Quantization(s.Config()))
	if c == nil || err != nil || c.unread() != (quant.Layout{}) {
		return nil, err
	}
	return quant.FindEach(ctx, s, func(t tensor.Info) (quant.Decoder, error) { return find(c, s, t) })
}

// companions are endings of the names of what stands beside codes.
var companions = []string{scaleEnd, shapeEnd, globalEnd, zeroEnd, orderEnd}

// find returns a Decoder of the weight whose codes are in t; nil where there are none.
func find(c *config, s quant.Stored, t tensor.Info) (quant.Decoder, error) {
	if module, ok := strings.CutSuffix(t.Name, packedEnd); ok {
		return open(c, s, t, module)
	}
	if module, ok := strings.CutSuffix(t.Name, weightEnd); ok {
		_, scaled := s.Lookup(module + scaleEnd)
		switch t.DType {
		case tensor.F8E4M3, tensor.I8:
			return open(c, s, t, module)
		case tensor.F8E4M3FNUZ, tensor.F8E5M2, tensor.F8E5M2FNUZ:
			return nil, fmt.Errorf("%w: its dtype is %v, expected F8_E4M3 or I8", quant.ErrMalformed, t.DType)
		}
		if scaled {
			return nil, fmt.Errorf("%w: its dtype is %v beside %s, expected F8_E4M3 or I8", quant.ErrMalformed, t.DType,
				tensor.Quote(module+scaleEnd))
		}
		return nil, nil
	}
	for _, end := range companions {
		module, ok := strings.CutSuffix(t.Name, end)
		if !ok {
			continue
		}
		_, packed := s.Lookup(module + packedEnd)
		_, plain := s.Lookup(module + weightEnd)
		if !packed && !plain {
			return nil, fmt.Errorf("%w: %s is missing, and %s", quant.ErrMalformed, tensor.Quote(module+packedEnd),
				tensor.Quote(module+weightEnd))
		}
	}
	return nil, nil
}

// Calibration names what there is of activations and caches, and what is left of weights: zero points of such as need
// none.
func (Scheme) Calibration(s quant.Stored, weights []quant.Decoder) []string {
	c, err := readConfig(quant.Quantization(s.Config()))
	if c == nil || err != nil {
		return nil
	}
	return quant.Calibration{
		Modules: ofModules, Caches: ofCaches, Activations: c.static, OfCache: c.cache}.Find(s, weights)
}

// What is named after a module, and after attention. Older writers had the scale of a cache in output_scale of k_proj.
var (
	ofModules = []string{"input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
		"output_global_scale"}
	ofCaches = []string{"q_scale", "k_scale", "v_scale", "kv_scale", "q_zero_point", "k_zero_point", "v_zero_point",
		"q_global_scale", "k_global_scale", "v_global_scale"}
)

func open(c *config, s quant.Stored, codes tensor.Info, module string) (quant.Decoder, error) {
	g, err := c.groupOf(module)
	if err != nil {
		return nil, err
	}
	sp, err := g.spec(codes)
	if err != nil {
		return nil, err
	}
	if _, ok := s.Lookup(module + orderEnd); ok {
		return nil, fmt.Errorf("%w: it has %s: groups in the order of activations are not read", quant.ErrMalformed,
			tensor.Quote(module+orderEnd))
	}
	if _, ok := s.Lookup(module + zeroEnd); ok && !sp.asymmetric {
		return nil, fmt.Errorf("%w: %s is there, and its group %s of config.json is symmetric, which has none",
			quant.ErrMalformed, tensor.Quote(module+zeroEnd), tensor.Quote(g.name))
	}
	shape, err := shapeOf(s, sp, codes, module)
	if err != nil {
		return nil, err
	}
	scale, ok := s.Lookup(module + scaleEnd)
	if !ok {
		return nil, fmt.Errorf("%w: %s is missing", quant.ErrMalformed, tensor.Quote(module+scaleEnd))
	}
	if sp.format == packQuantized && 32%sp.bits != 0 {
		width, dense := codes.Shape[1], fields{bits: sp.bits}
		sp.padded = width != dense.words(shape[1]) && width == fields{bits: sp.bits, padded: true}.words(shape[1])
	}
	m, err := newMatrix(sp, module, shape, scale.DType)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", quant.ErrMalformed, err)
	}
	if m.cols > scaled.MostColumns {
		return nil, fmt.Errorf("%w: its rows have %d elements, expected at most %d", quant.ErrMalformed, m.cols,
			scaled.MostColumns)
	}
	d := &decoder{matrix: m, global: 1, dtype: m.dtype}
	if m.byteScales() {
		d.dtype = s.DType()
		if !d.dtype.Float() {
			d.dtype = tensor.BF16 // as compressed-tensors decodes such weights
		}
	} else if !m.dtype.Float() {
		return nil, fmt.Errorf("%w: %s is %v, expected F32, F16 or BF16", quant.ErrMalformed,
			tensor.Quote(module+scaleEnd), m.dtype)
	}
	for i, want := range m.parts() {
		got, ok := s.Lookup(want.Name)
		switch {
		case !ok:
			return nil, fmt.Errorf("%w: %s is missing", quant.ErrMalformed, tensor.Quote(want.Name))
		case i == partCodes && (got.DType != want.DType || !slices.Equal(got.Shape, want.Shape)) && m.format == packQuantized:
			return nil, fmt.Errorf("%w: %s says %v, and %s is %v %v, expected %v %v for %d bits", quant.ErrMalformed,
				tensor.Quote(module+shapeEnd), shape, tensor.Quote(want.Name), got.DType, got.Shape, want.DType, want.Shape,
				m.bits)
		case got.DType != want.DType || !sameShape(got.Shape, want.Shape, i != partCodes):
			return nil, fmt.Errorf("%w: %s is %v %v, expected %v %v for a weight of shape %v in %s", quant.ErrMalformed,
				tensor.Quote(want.Name), got.DType, got.Shape, want.DType, want.Shape, shape, m.public())
		}
		d.names = append(d.names, want.Name)
	}
	if m.format == nvfp4Packed {
		var b [4]byte
		name := module + globalEnd
		if err := s.Read(name, b[:], 0); err != nil {
			return nil, err
		}
		if d.global, err = checkGlobal(name, b); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// sameShape reports whether a shape is the one expected, where loose also without dimensions of one.
func sameShape(got, want tensor.Shape, loose bool) bool {
	if slices.Equal(got, want) || !loose {
		return slices.Equal(got, want)
	}
	long := func(s tensor.Shape) (r tensor.Shape) {
		for _, n := range s {
			if n != 1 {
				r = append(r, n)
			}
		}
		return r
	}
	return slices.Equal(long(got), long(want))
}

// shapeOf is the shape of a weight, by its codes; what is packed in words says it.
func shapeOf(s quant.Stored, sp spec, codes tensor.Info, module string) (tensor.Shape, error) {
	if len(codes.Shape) != 2 {
		return nil, fmt.Errorf("%w: its shape is %v, expected two dimensions", quant.ErrMalformed, codes.Shape)
	}
	rows, cols := codes.Shape[0], codes.Shape[1]
	switch sp.format {
	case nvfp4Packed, mxfp4Packed:
		if cols > 1<<62-1 {
			return nil, fmt.Errorf("%w: its shape is %v", quant.ErrMalformed, codes.Shape)
		}
		return tensor.Shape{rows, 2 * cols}, nil
	case packQuantized:
	default:
		return codes.Shape, nil
	}
	name := module + shapeEnd
	t, ok := s.Lookup(name)
	if !ok {
		return nil, fmt.Errorf("%w: %s is missing", quant.ErrMalformed, tensor.Quote(name))
	}
	if t.DType != tensor.I64 || len(t.Shape) != 1 || t.Shape[0] != 2 {
		return nil, fmt.Errorf("%w: %s is %v %v, expected I64 [2]", quant.ErrMalformed, tensor.Quote(name), t.DType, t.Shape)
	}
	var b [16]byte
	if err := s.Read(name, b[:], 0); err != nil {
		return nil, err
	}
	shape := tensor.Shape{int64(binary.LittleEndian.Uint64(b[:])), int64(binary.LittleEndian.Uint64(b[8:]))}
	if shape[0] != rows || shape[1] < 1 {
		return nil, fmt.Errorf("%w: %s says %v, expected %d rows and columns for words of shape %v", quant.ErrMalformed,
			tensor.Quote(name), shape, rows, codes.Shape)
	}
	return shape, nil
}

// Encoder prepares to store t, which has float elements.
func (Scheme) Encoder(_ context.Context, public quant.Spec, t tensor.Info) (quant.Encoder, error) {
	s, err := private(public)
	if err != nil {
		return nil, err
	}
	if !t.DType.Float() {
		return nil, fmt.Errorf("%w to %s: its dtype is %v, expected F32, F16 or BF16", quant.ErrUnsupported, public.Type,
			t.DType)
	}
	module, ok := strings.CutSuffix(t.Name, weightEnd)
	if !ok {
		return nil, fmt.Errorf("%w to %s: its name does not end in .weight, which M.weight_scale is named after",
			quant.ErrUnsupported, public.Type)
	}
	m, err := newMatrix(s, module, t.Shape, t.DType)
	if err != nil {
		return nil, fmt.Errorf("%w to %s: %w", quant.ErrUnsupported, public.Type, err)
	}
	return newEncoder(m), nil
}

// fused are the ends of the names of modules that engines join into one matrix, which has one scale of scales.
var fused = [][]string{
	{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"q_a_proj", "kv_a_proj_with_mqa"}, {"w1", "w3"},
}

// Groups lists the weights of nvfp4 that engines join.
func (Scheme) Groups(s quant.Spec, names []string) [][]string {
	if s.Type != "nvfp4" {
		return nil
	}
	type place struct {
		parent string
		set    int
	}
	members := map[place][]string{}
	var order []place
	for _, name := range names {
		module := strings.TrimSuffix(name, weightEnd)
		dot := strings.LastIndexByte(module, '.') + 1
		for i, set := range fused {
			for _, end := range set {
				if module[dot:] == end {
					p := place{module[:dot], i}
					if members[p] == nil {
						order = append(order, p)
					}
					members[p] = append(members[p], name)
				}
			}
		}
	}
	var groups [][]string
	for _, p := range order {
		if len(members[p]) > 1 {
			groups = append(groups, members[p])
		}
	}
	return groups
}
