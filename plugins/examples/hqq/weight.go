package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/tensor"
)

// The first parts of a weight. The settings follow.
const (
	partCodes = iota
	partScale
	partZero
	partSettings
)

// rules say which bytes of the codes, scales and zeros belong to a tile, whose units are groups.
func (p packing) rules() [partSettings]sdk.Rule {
	width := p.dtype.Bits() / 8
	return [...]sdk.Rule{
		partCodes: {Stride: p.group, Wrap: p.rows()}, partScale: {Stride: width}, partZero: {Stride: width},
	}
}

// plan prepares to quantise a weight to nearest, as hqq can.
func plan(t tensor.Info, group int64) (*weight, error) {
	switch {
	case !t.DType.Float():
		return nil, fmt.Errorf("its dtype is %v, expected F32, F16 or BF16", t.DType)
	case len(t.Shape) != 2:
		return nil, fmt.Errorf("its shape is %v, expected two dimensions", t.Shape)
	case t.Name != "weight" && !strings.HasSuffix(t.Name, ".weight"):
		return nil, fmt.Errorf("its name does not end in .weight, which M.W_q is named after")
	}
	w := &weight{info: t, packing: packing{dtype: t.DType, group: group, groups: t.Count() / group}}
	if w.groups == 0 || t.Count()%group != 0 || w.groups%2 != 0 {
		return nil, fmt.Errorf("its shape is %v, expected an even number of groups of %d", t.Shape, group)
	}
	module := strings.TrimSuffix(t.Name, "weight")
	w.parts = []part{
		partCodes: {Info: tensor.Info{Name: codesName, DType: tensor.U8, Shape: tensor.Shape{w.rows(), w.group}}},
		partScale: {Info: tensor.Info{Name: scaleName, DType: w.dtype, Shape: tensor.Shape{w.groups, 1}}},
		partZero:  {Info: tensor.Info{Name: zeroName, DType: w.dtype, Shape: tensor.Shape{w.groups, 1}}},
	}
	w.parts = append(w.parts, w.settings(t.Shape)...)
	for i := range w.parts {
		w.parts[i].Name = module + w.parts[i].Name
	}
	return w, nil
}

// finishCodes is about how many codes of each half finish holds at once.
const finishCodes = 1 << 18

// finish writes what no tile can: the codes, two of which share a byte and are half a weight apart, and the settings.
// carried fills dst from the number i on of those that encode has left.
func (w *weight) finish(
	carried func(dst []float32, i int64) error, write func(part int, off int64, p []byte) error,
) error {
	half := w.rows() * w.group / wordCodes
	words := min(half, finishCodes/wordCodes)
	numbers, packed := make([]float32, 2*words), make([]byte, words*wordCodes)
	for at := int64(0); at < half; at += words {
		n := min(half-at, words)
		upper, lower := numbers[:n], numbers[words:][:n]
		if err := carried(upper, at); err != nil {
			return err
		}
		if err := carried(lower, half+at); err != nil {
			return err
		}
		join(packed, upper, lower)
		if err := write(partCodes, at*wordCodes, packed[:n*wordCodes]); err != nil {
			return err
		}
	}
	for i, p := range w.parts[partSettings:] {
		if err := write(partSettings+i, 0, p.data); err != nil {
			return err
		}
	}
	return nil
}

// defaultSkips is what transformers leaves plain without being told to.
var defaultSkips = []string{"lm_head"}

type weightConfig struct {
	Axis        int   `json:"axis"`
	ChannelWise bool  `json:"channel_wise"`
	GroupSize   int64 `json:"group_size"`
	NBits       int   `json:"nbits"`
	Optimize    bool  `json:"optimize"`
	RoundZero   bool  `json:"round_zero"`
	ViewAsFloat bool  `json:"view_as_float"`
}

type quantConfig struct {
	OffloadMeta bool         `json:"offload_meta"`
	Scale       *struct{}    `json:"scale_quant_params"`
	Weight      weightConfig `json:"weight_quant_params"`
	Zero        *struct{}    `json:"zero_quant_params"`
}

// config is the quantization_config for a loader. skip lists the modules that are plain; nil are those that it leaves
// plain itself.
func config(group int64, skip []string) ([]byte, error) {
	if skip == nil {
		skip = defaultSkips
	}
	return json.Marshal(struct {
		Quant  quantConfig `json:"quant_config"`
		Method string      `json:"quant_method"`
		Skip   []string    `json:"skip_modules"`
	}{
		quantConfig{Weight: weightConfig{Axis: 1, ChannelWise: true, GroupSize: group, NBits: 4, RoundZero: true}},
		"hqq", slices.Clone(skip),
	}, jsontext.AllowInvalidUTF8(true), jsontext.SpaceAfterComma(true), jsontext.SpaceAfterColon(true))
}
