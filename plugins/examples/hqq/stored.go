package main

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// What is wrong with stored tensors.
var (
	errMalformed   = quant.ErrMalformed
	errUnsupported = formats.ErrUnsupported // of hqq, but of a kind that is not read
)

// Where a weight M.weight is stored: M.W_q, M.scale, M.zero, and M.NAME for each of the settings.
const (
	codesName = "W_q"
	scaleName = "scale"
	zeroName  = "zero"
)

const (
	maxGroup  = 1 << 16 // what a tile may have to hold at once; hqq's group_size None is a whole row
	maxString = 32
)

// The settings that are stored beside a weight, in hqq's order. A number is an I32, a flag and the text of a name are
// U8, as HQQLinear encodes its state for safetensors.
const (
	nbitsName   = "nbits"
	groupName   = "group_size"
	shapeName   = "shape"
	axisName    = "axis"
	packingName = "packing"
	unpackName  = "unpack_view_dtype"
	viewName    = "view_as_float"
	quantScale  = "quant_scale"
	quantZero   = "quant_zero"
	computeName = "compute_dtype"
	offloadName = "offload_meta"
	encodedName = "encoded_state_dict"
	configName  = "stores_quant_config"
	channelName = "channel_wise"
	optimize    = "optimize"
	roundZero   = "round_zero"
)

const (
	packing4  = "4bit_u8"
	unpack4   = "torch.uint8"
	torchName = "torch."
)

// part is a stored tensor. A setting has its value in data.
type part struct {
	tensor.Info
	data []byte
}

func number(name string, x int32) part {
	return part{tensor.Info{Name: name, DType: tensor.I32, Shape: tensor.Shape{}},
		binary.LittleEndian.AppendUint32(nil, uint32(x))}
}

func flag(name string, x byte) part {
	return part{tensor.Info{Name: name, DType: tensor.U8, Shape: tensor.Shape{}}, []byte{x}}
}

func text(name, x string) part {
	return part{tensor.Info{Name: name, DType: tensor.U8, Shape: tensor.Shape{int64(len(x))}}, []byte(x)}
}

func dimensions(name string, x tensor.Shape) part {
	s := part{tensor.Info{Name: name, DType: tensor.I64, Shape: tensor.Shape{int64(len(x))}}, nil}
	for _, d := range x {
		s.data = binary.LittleEndian.AppendUint64(s.data, uint64(d))
	}
	return s
}

// settings are those of a weight that has been quantised to nearest.
func (p packing) settings(shape tensor.Shape) []part {
	return []part{
		number(nbitsName, 4), number(groupName, int32(p.group)), dimensions(shapeName, shape), number(axisName, 1),
		text(packingName, packing4), text(unpackName, unpack4), flag(viewName, 0), flag(quantScale, 0), flag(quantZero, 0),
		text(computeName, torchName+p.dtype.Torch()), flag(offloadName, 0), flag(encodedName, 1), flag(configName, 1),
		flag(channelName, 1), flag(optimize, 0), flag(roundZero, 1),
	}
}

// stored gives the tensors of a checkpoint.
type stored interface {
	Lookup(name string) (tensor.Info, bool)
	Read(name string, p []byte, off int64) error
}

// weight is a weight that is stored in HQQ.
type weight struct {
	packing
	info  tensor.Info
	parts []part // W_q, scale, zero, and the settings
}

// open reads the settings of the weight whose codes are the tensor of that name. It returns nil where this is no weight
// of HQQ: others have a W_q too.
func open(name string, s stored) (*weight, error) {
	module, ok := strings.CutSuffix(name, codesName)
	if !ok || module != "" && !strings.HasSuffix(module, ".") {
		return nil, nil
	}
	known := func(setting string) bool {
		_, found := s.Lookup(module + setting)
		return found
	}
	if !known(nbitsName) && !known(groupName) && !known(packingName) {
		return nil, nil
	}
	r := &settingReader{stored: s, module: module}
	w, err := r.weight()
	if err != nil {
		return nil, fmt.Errorf("tensor %s: %w", tensor.Quote(name), err)
	}
	return w, nil
}

// settingReader reads the settings of one weight.
type settingReader struct {
	stored
	module string
	parts  []part // the settings that have been read
}

func (r *settingReader) weight() (*weight, error) {
	if _, twice := r.Lookup(r.module + "weight"); twice {
		return nil, fmt.Errorf("%w: %s is there too, expected one of the two", errMalformed,
			tensor.Quote(r.module+"weight"))
	}
	if err := r.kind(); err != nil {
		return nil, err
	}
	var w weight
	w.info.Name = r.module + "weight"
	if err := r.shape(&w); err != nil {
		return nil, err
	}
	if err := r.numbers(&w); err != nil {
		return nil, err
	}
	for _, name := range []string{codesName, scaleName, zeroName} {
		t, _ := r.Lookup(r.module + name)
		w.parts = append(w.parts, part{Info: t})
	}
	w.parts = append(w.parts, r.parts...)
	return &w, nil
}

// kind refuses the kinds of HQQ that are not read.
func (r *settingReader) kind() error {
	for _, want := range []struct {
		name     string
		optional bool
		value    int64
	}{
		{nbitsName, false, 4}, {axisName, false, 1}, {quantScale, false, 0}, {quantZero, false, 0}, {offloadName, true, 0},
		{channelName, true, 1},
	} {
		read := r.flag
		if want.name == nbitsName || want.name == axisName {
			read = r.number
		}
		got, found, err := read(want.name)
		switch {
		case err != nil:
			return err
		case !found && !want.optional:
			return r.missing(want.name)
		case found && got != want.value:
			return fmt.Errorf("%w: %s is %d, expected %d", errUnsupported, r.quoted(want.name), got, want.value)
		}
	}
	for _, want := range []struct {
		name     string
		optional bool
		value    string
	}{{packingName, false, packing4}, {unpackName, true, unpack4}} {
		got, found, err := r.text(want.name)
		switch {
		case err != nil:
			return err
		case !found && !want.optional:
			return r.missing(want.name)
		case found && got != want.value:
			return fmt.Errorf("%w: %s is %s, expected %q", errUnsupported, r.quoted(want.name), tensor.Quote(got), want.value)
		}
	}
	for _, name := range []string{encodedName, configName, optimize, roundZero} { // none says anything of the values
		if _, _, err := r.flag(name); err != nil {
			return err
		}
	}
	return nil
}

// shape reads how the elements are divided.
func (r *settingReader) shape(w *weight) error {
	group, found, err := r.number(groupName)
	switch {
	case err != nil:
		return err
	case !found:
		return r.missing(groupName)
	case checkGroup(group) != nil:
		return fmt.Errorf("%w: %s is %w", errUnsupported, r.quoted(groupName), checkGroup(group))
	}
	w.group = group

	var dims [16]byte
	found, err = r.read(shapeName, tensor.I64, tensor.Shape{2}, dims[:])
	switch {
	case err != nil:
		return err
	case !found:
		return r.missing(shapeName)
	}
	w.info.Shape = tensor.Shape{
		int64(binary.LittleEndian.Uint64(dims[:])), int64(binary.LittleEndian.Uint64(dims[8:]))}
	n, err := w.info.Shape.Count()
	if err != nil {
		return fmt.Errorf("%w: %s: %w", errMalformed, r.quoted(shapeName), err)
	}
	w.groups = n / w.group
	if n == 0 || n%w.group != 0 || w.groups%2 != 0 {
		return fmt.Errorf("%w: %s is %v, expected a number of elements that is an even number of groups of %d", errMalformed,
			r.quoted(shapeName), w.info.Shape, w.group)
	}
	return nil
}

// numbers checks what the codes, scales and zeros are stored as.
func (r *settingReader) numbers(w *weight) error {
	scale, ok := r.Lookup(r.module + scaleName)
	if !ok {
		return r.missing(scaleName)
	}
	if !scale.DType.Float() {
		return fmt.Errorf("%w: %s is %s, expected F32, F16 or BF16", errMalformed, r.quoted(scaleName), scale.Type())
	}
	w.dtype, w.info.DType = scale.DType, scale.DType
	if _, err := w.info.Size(); err != nil {
		return fmt.Errorf("%w: %s: %w", errMalformed, r.quoted(shapeName), err)
	}
	compute, found, err := r.text(computeName)
	if err != nil {
		return err
	}
	if want := torchName + w.dtype.Torch(); found && compute != want {
		return fmt.Errorf("%w: %s is %s, expected %q as %s is %v", errMalformed, r.quoted(computeName), tensor.Quote(compute),
			want, r.quoted(scaleName), w.dtype)
	}
	view, _, err := r.flag(viewName)
	if err != nil {
		return err
	}
	codes := tensor.Info{Name: codesName, DType: tensor.U8, Shape: tensor.Shape{w.rows(), w.group}}
	if view != 0 { // the same bytes in rows, as numbers
		codes.DType = w.dtype
		codes.Shape[1] = w.group / (w.dtype.Bits() / 8)
	}
	for _, want := range []tensor.Info{codes,
		{Name: scaleName, DType: w.dtype, Shape: tensor.Shape{w.groups, 1}},
		{Name: zeroName, DType: w.dtype, Shape: tensor.Shape{w.groups, 1}}} {
		got, ok := r.Lookup(r.module + want.Name)
		if !ok {
			return r.missing(want.Name)
		}
		if got.Type() != want.Type() || !slices.Equal(got.Shape, want.Shape) {
			return fmt.Errorf("%w: %s is %s %v, expected %v %v for a weight of shape %v with groups of %d", errMalformed,
				r.quoted(want.Name), got.Type(), got.Shape, want.DType, want.Shape, w.info.Shape, w.group)
		}
	}
	return nil
}

// number reads a setting that is a number, and whether it is there.
func (r *settingReader) number(name string) (int64, bool, error) {
	var b [4]byte
	found, err := r.read(name, tensor.I32, tensor.Shape{}, b[:])
	return int64(int32(binary.LittleEndian.Uint32(b[:]))), found, err
}

func (r *settingReader) flag(name string) (int64, bool, error) {
	var b [1]byte
	found, err := r.read(name, tensor.U8, tensor.Shape{}, b[:])
	if err == nil && b[0] > 1 {
		err = fmt.Errorf("%w: %s is %d, expected 0 or 1", errMalformed, r.quoted(name), b[0])
	}
	return int64(b[0]), found, err
}

func (r *settingReader) text(name string) (string, bool, error) {
	t, ok := r.Lookup(r.module + name)
	if !ok {
		return "", false, nil
	}
	if t.Type() != tensor.U8.String() || len(t.Shape) != 1 || t.Shape[0] > maxString {
		return "", true, fmt.Errorf("%w: %s is %s %v, expected U8 and one dimension up to %d", errMalformed, r.quoted(name),
			t.Type(), t.Shape, maxString)
	}
	b := make([]byte, t.Shape[0])
	found, err := r.read(name, tensor.U8, t.Shape, b)
	return string(b), found, err
}

// read fills b from a setting, where it is there, and notes it as a part of the weight.
func (r *settingReader) read(name string, d tensor.DType, shape tensor.Shape, b []byte) (found bool, err error) {
	t, ok := r.Lookup(r.module + name)
	if !ok {
		return false, nil
	}
	if t.Type() != d.String() || !slices.Equal(t.Shape, shape) {
		return true, fmt.Errorf("%w: %s is %s %v, expected %v %v", errMalformed, r.quoted(name), t.Type(), t.Shape, d, shape)
	}
	r.parts = append(r.parts, part{t, b})
	return true, r.Read(t.Name, b, 0)
}

func (r *settingReader) missing(name string) error {
	return fmt.Errorf("%w: %s is missing", errMalformed, r.quoted(name))
}

func (r *settingReader) quoted(name string) string { return tensor.Quote(r.module + name) }

// checkGroup refuses a group size that hqq's config cannot have, or that is too large to be read in tiles. The error
// begins with the number.
func checkGroup(n int64) error {
	if n < wordCodes || n > maxGroup || n%wordCodes != 0 {
		return fmt.Errorf("%d, expected a multiple of 8 up to %d", n, maxGroup)
	}
	return nil
}
