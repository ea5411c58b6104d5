// Package mlx stores weights as MLX does: integers of 1 to 8 bits with a scale and a bias for each group, and floats of
// 4 and 8 bits with a scale for each group (mxfp4, mxfp8, nvfp4).
//
// A module M has M.weight, words of 32 bits with the codes of a row, M.scales, and for integers M.biases. What a code
// is, only config.json says: its quantization, which mlx-lm writes, for all modules and for single ones.
//
// What is written has the bytes of MLX 0.32.4 on a CPU. Earlier releases chose other scales for mxfp4 and mxfp8.
package mlx

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/bitfield"
	"github.com/lorakit/lorakit/tensor"
)

func init() { quant.Register(Scheme{}) }

// Scheme is the quant.Scheme of MLX.
type Scheme struct{}

// Name returns "mlx". MLX's own config has no quant_method.
func (Scheme) Name() string { return "mlx" }

// kind is a type of the scheme.
type kind struct {
	name   string
	mode   string
	bits   int64
	groups []int64 // how many elements may share a scale; the first is the default
	read   bool    // and not written
}

const affine = "affine"

// kinds lists the types.
var kinds = []*kind{
	{name: "mlx1", mode: affine, bits: 1, groups: affineGroups, read: true},
	{name: "mlx2", mode: affine, bits: 2, groups: affineGroups},
	{name: "mlx3", mode: affine, bits: 3, groups: affineGroups},
	defaultKind,
	{name: "mlx5", mode: affine, bits: 5, groups: affineGroups},
	{name: "mlx6", mode: affine, bits: 6, groups: affineGroups},
	{name: "mlx8", mode: affine, bits: 8, groups: affineGroups},
	{name: "mlx-mxfp4", mode: "mxfp4", bits: 4, groups: []int64{32}},
	{name: "mlx-mxfp8", mode: "mxfp8", bits: 8, groups: []int64{32}},
	{name: "mlx-nvfp4", mode: "nvfp4", bits: 4, groups: []int64{16}},
}

// defaultKind is MLX's choice where only the mode is said, of the one that has several.
var defaultKind = &kind{name: "mlx4", mode: affine, bits: 4, groups: affineGroups}

var affineGroups = []int64{64, 32, 128}

// expertLoaders is about mlx-lm 0.32: which architectures join the scales of experts as well as their words.
const expertLoaders = "mlx-lm, which joins them for Mixtral, DeepSeek, Qwen 2 and others, but not for Qwen 3"

// Types lists what is read, and written but for mlx1.
func (Scheme) Types() []quant.Type {
	var types []quant.Type
	for _, k := range kinds {
		types = append(types, quant.Type{Name: k.name, ReadOnly: k.read, Loader: "mlx-lm", ExpertLoaders: expertLoaders,
			Experts: quant.NotTransformers})
	}
	return types
}

// blockSize is the parameter of integers: how many elements share a scale and a bias, which MLX calls group_size.
const blockSize = "block_size"

// Spec makes the spec of a type. Integers have block_size, 32, 64 or 128, by default 64; the others have nothing to
// choose.
func (Scheme) Spec(typ string, asked quant.Params) (quant.Spec, error) {
	k := kindNamed(typ)
	if k == nil {
		return quant.Spec{}, fmt.Errorf("%w %q", quant.ErrUnknown, typ)
	}
	group := k.groups[0]
	if v := asked.Get(blockSize); v != nil && k.mode == affine {
		group = asked.Int(blockSize)
	}
	if !slices.Contains(k.groups, group) {
		return quant.Spec{}, fmt.Errorf("%w: block size %d, expected 32, 64 or 128 for %s", quant.ErrParameter, group, typ)
	}
	return layout{k, group}.spec(), nil
}

func kindNamed(typ string) *kind {
	if i := slices.IndexFunc(kinds, func(k *kind) bool { return k.name == typ }); i >= 0 {
		return kinds[i]
	}
	return nil
}

// layout is how a weight is stored, but for its shape and dtype.
type layout struct {
	*kind
	group int64
}

func (l layout) spec() quant.Spec {
	s := quant.Spec{Type: l.name}
	if l.mode == affine {
		s.Params = quant.Params{{Name: blockSize, Value: l.group}}
	}
	return s
}

// layoutOf reads a spec that Spec has made, or that was saved.
func layoutOf(s quant.Spec) (layout, error) {
	checked, err := Scheme{}.Spec(s.Type, s.Params)
	if err != nil {
		return layout{}, err
	}
	l := layout{kindNamed(s.Type), checked.Params.Int(blockSize)}
	if l.mode != affine {
		l.group = l.groups[0]
	}
	return l, nil
}

// The parts of a weight, in the order in which Parts and Outputs list them.
const (
	partWords = iota
	partScales
	partBiases // of integers
)

// Names of the parts, after that of the module.
const (
	weightSuffix = ".weight"
	scalesSuffix = ".scales"
	biasesSuffix = ".biases"
	globalSuffix = ".global_scale" // of nvfp4, where mlx-lm is asked for it
)

// parts lists the stored tensors of the weight t of a module.
func (l layout) parts(module string, t tensor.Info) []tensor.Info {
	last := len(t.Shape) - 1
	row := func(suffix string, d tensor.DType, n int64) tensor.Info {
		shape := slices.Clone(t.Shape)
		shape[last] = n
		return tensor.Info{Name: module + suffix, DType: d, Shape: shape}
	}
	groups := t.Shape[last] / l.group
	words := row(weightSuffix, tensor.U32, t.Shape[last]/32*l.bits+t.Shape[last]%32*l.bits/32)
	if l.mode != affine {
		return []tensor.Info{words, row(scalesSuffix, tensor.U8, groups)}
	}
	return []tensor.Info{words, row(scalesSuffix, t.DType, groups), row(biasesSuffix, t.DType, groups)}
}

// weight is a weight as it is stored.
type weight struct {
	layout
	info  tensor.Info
	parts []tensor.Info
}

// Unit is a group, whose codes are whole words.
func (w *weight) Unit() int64 { return w.group }

// ranges appends the bytes of the parts that the elements [lo, hi) have.
func (w *weight) ranges(r []quant.Range, lo, hi int64) []quant.Range {
	for i, p := range w.parts {
		bytes := p.DType.Bits() / 8 // of a group
		if i == partWords {
			bytes = w.groupBytes()
		}
		r = append(r, quant.Range{Part: i, Offset: lo / w.group * bytes, Length: (hi - lo) / w.group * bytes})
	}
	return r
}

// groupBytes is how many bytes of words a group has.
func (l layout) groupBytes() int64 { return l.group * l.bits / 8 }

// Find returns the weights of the modules that have scales. One that config.json has otherwise than it is stored is an
// error.
func (Scheme) Find(ctx context.Context, s quant.Stored) ([]quant.Decoder, error) {
	c, err := readConfig(s.Config())
	if c == nil || err != nil {
		return nil, err
	}
	return quant.FindEach(ctx, s, func(t tensor.Info) (quant.Decoder, error) {
		d, err := c.find(t, s)
		if err != nil {
			err = fmt.Errorf("%w: %w", quant.ErrMalformed, err)
		}
		return d, err
	})
}

// find returns the weight whose words, or whose companion without any, are in t; nil for another tensor.
func (c *config) find(t tensor.Info, s quant.Stored) (quant.Decoder, error) {
	if module, ok := strings.CutSuffix(t.Name, scalesSuffix); ok {
		if _, words := s.Lookup(module + weightSuffix); words {
			return nil, nil
		}
		if _, biases := s.Lookup(module + biasesSuffix); biases {
			return nil, fmt.Errorf("%s is missing beside it and %s", tensor.Quote(module+weightSuffix),
				tensor.Quote(module+biasesSuffix))
		}
		of, _, err := c.of(module)
		if err == nil && of.kind != nil && of.mode != affine && t.DType == tensor.U8 { // which have no biases
			return nil, fmt.Errorf("%s is missing beside it", tensor.Quote(module+weightSuffix))
		}
		return nil, nil
	}
	module, ok := strings.CutSuffix(t.Name, weightSuffix)
	if !ok {
		return nil, nil
	}
	_, scales := s.Lookup(module + scalesSuffix)
	of, listed, err := c.of(module)
	switch {
	case !scales && t.DType != tensor.U32 && !(listed && of.kind != nil):
		return nil, nil // plain
	case err != nil:
		return nil, err
	case of.kind == nil:
		return nil, fmt.Errorf("found %v %v beside scales, expected a plain weight, as the quantization of config.json has "+
			"false for the module", t.DType, t.Shape)
	case t.DType != tensor.U32:
		return nil, fmt.Errorf("found %v %v, expected U32 for %s", t.DType, t.Shape, of)
	}
	return of.open(module, t, s)
}

// String names a layout as config.json has it.
func (l layout) String() string {
	return fmt.Sprintf("mode %s, bits %d, group_size %d, the quantization of config.json", l.mode, l.bits, l.group)
}

// open checks a weight against its companions.
func (l layout) open(module string, t tensor.Info, s quant.Stored) (quant.Decoder, error) {
	last := len(t.Shape) - 1
	if last < 1 {
		return nil, fmt.Errorf("its shape is %v, expected two dimensions or more", t.Shape)
	}
	const longest = 1 << 40 // elements of a row, so that nothing overflows
	words := t.Shape[last]
	if words <= 0 || words > longest/32*l.bits || words*32%(l.bits*l.group) != 0 {
		return nil, fmt.Errorf("its shape is %v, expected rows of whole groups by %s", t.Shape, l)
	}
	w := &weight{layout: l, info: tensor.Info{Name: t.Name, Shape: slices.Clone(t.Shape)}}
	w.info.Shape[last] = words * 32 / l.bits
	w.info.DType = s.DType()
	scales, ok := s.Lookup(module + scalesSuffix)
	switch {
	case !ok:
		return nil, fmt.Errorf("%s is missing", tensor.Quote(module+scalesSuffix))
	case l.mode == affine:
		w.info.DType = scales.DType // which they share with what the weight was
	case !w.info.DType.Float():
		w.info.DType = tensor.BF16 // MLX's choice where nobody makes one
	}
	if !w.info.DType.Float() {
		return nil, fmt.Errorf("%s is %v, expected F32, F16 or BF16", tensor.Quote(scales.Name), scales.DType)
	}
	if _, err := w.info.Size(); err != nil {
		return nil, err
	}
	if w.info.Count() == 0 {
		return nil, fmt.Errorf("its shape is %v, expected at least one row", t.Shape)
	}
	w.parts = l.parts(module, w.info)
	for _, want := range w.parts[partScales:] {
		got, ok := s.Lookup(want.Name)
		if !ok {
			return nil, fmt.Errorf("%s is missing", tensor.Quote(want.Name))
		}
		if got.DType != want.DType || !slices.Equal(got.Shape, want.Shape) {
			return nil, fmt.Errorf("%s is %s %v, expected %v %v for words %v by %s", tensor.Quote(want.Name), got.Type(),
				got.Shape, want.DType, want.Shape, t.Shape, l)
		}
	}
	if _, ok := s.Lookup(module + biasesSuffix); ok && l.mode != affine {
		return nil, fmt.Errorf("%s is there, expected none by %s", tensor.Quote(module+biasesSuffix), l)
	}
	if _, ok := s.Lookup(module + globalSuffix); ok {
		return nil, fmt.Errorf("%s is there, one more scale for each of its experts, which is not read",
			tensor.Quote(module+globalSuffix))
	}
	if l.mode == affine {
		return &integers{w}, nil
	}
	return &floats{w, tableOf(l.kind, w.info.DType)}, nil
}

// decoder has what all decoders of the scheme share.
func (w *weight) Info() tensor.Info { return w.info }

// Spec is how the weight is quantised.
func (w *weight) Spec() quant.Spec { return w.spec() }

// Parts names the stored tensors.
func (w *weight) Parts() []string {
	names := make([]string, len(w.parts))
	for i, p := range w.parts {
		names[i] = p.Name
	}
	return names
}

// Values is the dtype of the weight: MLX rounds to it on the way.
func (w *weight) Values() tensor.DType { return w.info.DType }

// Inputs appends what the elements [lo, hi) are decoded from.
func (w *weight) Inputs(r []quant.Range, lo, hi int64) []quant.Range { return w.ranges(r, lo, hi) }

// Encoder prepares to store t, which has float elements.
func (Scheme) Encoder(_ context.Context, s quant.Spec, t tensor.Info) (quant.Encoder, error) {
	l, err := layoutOf(s)
	if err != nil {
		return nil, err
	}
	refused := func(format string, args ...any) (quant.Encoder, error) {
		return nil, fmt.Errorf("%w to %s: "+format, append([]any{quant.ErrUnsupported, s.Type}, args...)...)
	}
	module, ok := strings.CutSuffix(t.Name, weightSuffix)
	last := len(t.Shape) - 1
	switch {
	case l.read:
		return refused("the type is read only")
	case !t.DType.Float():
		return refused("its dtype is %v, expected F32, F16 or BF16", t.DType)
	case !ok:
		return refused("its name does not end in .weight, which M.scales is named after")
	case last < 1:
		return refused("its shape is %v, expected two dimensions or more", t.Shape)
	case t.Count() == 0:
		return refused("it is empty")
	case t.Shape[last]%l.group != 0:
		return nil, fmt.Errorf("%w to %s: its shape is %v, expected rows of a multiple of %d, which share a scale",
			quant.ErrLeftPlain, s.Type, t.Shape, l.group) // as mlx_lm.utils.quantize_model does
	}
	w := &weight{layout: l, info: t, parts: l.parts(module, t)}
	if l.mode == affine {
		return &integerEncoder{encoder{w, s.AllowNonFinite}}, nil
	}
	return &floatEncoder{encoder{w, s.AllowNonFinite}}, nil
}

// encoder has what all encoders of the scheme share.
type encoder struct {
	*weight
	allowNonFinite bool
}

// Outputs lists the stored tensors.
func (e *encoder) Outputs() []tensor.Info { return e.parts }

// Deferred is nothing: a group stands for itself.
func (e *encoder) Deferred(int64, int64) int64 { return 0 }

// Tiles appends what the elements [lo, hi) fill.
func (e *encoder) Tiles(r []quant.Range, lo, hi int64) []quant.Range { return e.ranges(r, lo, hi) }

// pack puts the codes of whole groups, from element first on, into the words of a tile.
func (e *encoder) pack(words []byte, first int, codes []byte) {
	at, n := int64(first)/e.group*e.groupBytes(), int64(len(codes))/e.group*e.groupBytes()
	bitfield.Pack(words[at:at+n], codes, e.bits)
}

// Finish has nothing left to write.
func (e *encoder) Finish(quant.Deferred, func(int, int64, []byte) error) error { return nil }
