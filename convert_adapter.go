package lorakit

import (
	"context"
	"fmt"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/tensor"
)

// AdapterOptions say what ConvertAdapter makes of an adapter. The zero value keeps everything.
type AdapterOptions struct {
	// To is one of AdapterDialects. Empty is "gguf" for a destination of that ending, "peft" of a GGUF adapter for any
	// other, and else the adapter's own.
	To string
	// DType is what its tensors are cast to: "f32", "f16", "bf16", or "keep" (or empty), which is f32 to GGUF and from it.
	DType string
	// Experts is "per-expert" for a module an expert, "fused" for one a stack, or "keep" (or empty) for what the dialect
	// has.
	Experts string
	// Base is the folder of the model that an adapter is for, which a GGUF adapter takes its names from: needed to read
	// one, and to write one unless the adapter's config names a folder that is there. Its config.json will do.
	Base string
	// Of a GGUF adapter that is written: Quantize is "q8_0" for its blocks of 8 bits, or "keep" (or empty); TaskName and
	// PromptPrefix, where not empty, are what it says of itself.
	Quantize, TaskName, PromptPrefix string

	Force       bool
	FollowLinks bool // see ReadOptions
}

// AdapterConversion says what ConvertAdapter has done.
type AdapterConversion struct {
	Source      string   `json:"source"`
	Destination string   `json:"destination"`
	From        string   `json:"from"` // dialects
	To          string   `json:"to"`
	Tensors     int      `json:"tensors"`
	Notices     []string `json:"notices"`
}

// AdapterDialects lists the dialects of adapters that are read and written: peft, kohya, diffusers, mlx, loralib, gguf.
func AdapterDialects() []string { return lora.Dialects() }

// ExpertLayouts lists what Adapter.ExpertLayout may be.
func ExpertLayouts() []string { return lora.ExpertLayouts() }

// ExpertChoices lists what AdapterOptions.Experts may be.
func ExpertChoices() []string { return lora.ExpertChoices() }

// ConvertAdapter writes an adapter in another dialect, or with its experts laid out in another way. Its
// delta stays what it is; what a dialect has no place for is an error.
func ConvertAdapter(ctx context.Context, src Adapter, dst string, o AdapterOptions) (*AdapterConversion, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	cast, err := pipeline.CastType(o.DType)
	if err != nil {
		return nil, err
	}
	if src.Weight != 0 && src.Weight != 1 {
		return nil, fmt.Errorf("%w: an adapter is converted with the weight %g, expected 1; combine scales it",
			ErrOption, src.Weight)
	}
	base, err := o.base(ctx, src)
	if err != nil {
		return nil, err
	}
	list, err := openWithoutBase(ctx, forBase([]Adapter{src}, base), o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer list.Close()
	if err := pipeline.CheckSpared(dst, list.Paths()...); err != nil {
		return nil, err
	}
	a := list[0].Adapter
	eo := lora.EncodeOptions{To: o.dialect(a, dst), Experts: o.Experts, Base: base, TaskName: o.TaskName,
		PromptPrefix: o.PromptPrefix}
	if err := o.checkGGUF(a, &eo); err != nil {
		return nil, err
	}
	if eo.To == lora.GGUF && base == nil {
		if eo.Base, err = ownBase(ctx, a, o.FollowLinks); err != nil {
			return nil, err
		}
	}
	if a.Dialect == lora.GGUF && cast == 0 { // where numbers in blocks and plain ones stand side by side
		cast = tensor.F32
	}
	e, err := a.Encode(eo)
	if err != nil {
		return nil, err
	}
	if err := pipeline.WriteAdapter(ctx, e, src.Path, dst, cast, o.Force); err != nil {
		return nil, err
	}
	return &AdapterConversion{
		Source: src.Path, Destination: dst, From: a.Dialect, To: e.Dialect, Tensors: len(e.Tensors),
		Notices: append([]string{}, e.Notices...),
	}, nil
}

// base is what Base names, nil where it is empty.
func (o *AdapterOptions) base(ctx context.Context, src Adapter) (*lora.Base, error) {
	if o.Base == "" {
		return src.Base, nil
	}
	return openBase(ctx, o.Base, o.FollowLinks)
}

// dialect is the one that an adapter is written in.
func (o *AdapterOptions) dialect(a *lora.Adapter, dst string) string {
	f, single := formats.Default.ForExtension(dst)
	switch {
	case o.To != "":
		return o.To
	case single && f.Name() == lora.GGUF:
		return lora.GGUF
	case a.Dialect == lora.GGUF:
		return lora.PEFT
	}
	return a.Dialect
}

// checkGGUF sees to the options that are for GGUF.
func (o *AdapterOptions) checkGGUF(a *lora.Adapter, eo *lora.EncodeOptions) error {
	quantized := o.Quantize != "" && o.Quantize != "keep" && o.Quantize != "none"
	switch {
	case eo.To != lora.GGUF && (quantized || o.TaskName != "" || o.PromptPrefix != ""):
		return fmt.Errorf("%w: quantize, task name and prompt prefix are for a gguf adapter, and a %s one is written",
			ErrOption, eo.To)
	case eo.To != lora.GGUF && a.Dialect != lora.GGUF && o.Base != "":
		return fmt.Errorf("%w: a base is for adapters that are read or written as gguf, and %s is %s and becomes %s",
			ErrOption, a.Path, a.Dialect, eo.To)
	case eo.To != lora.GGUF:
		return nil
	case quantized && o.DType != "" && o.DType != "keep":
		return fmt.Errorf("%w: dtype is %s and quantize %s, expected one of them", ErrOption, o.DType, o.Quantize)
	case quantized:
		eo.Type = o.Quantize
	case o.DType != "keep":
		eo.Type = o.DType
	}
	if known := lora.GGUFTypes(); eo.Type != "" && !slices.Contains(known, eo.Type) {
		return lora.UnknownOption("the type of a gguf adapter", eo.Type, known...)
	}
	return nil
}
