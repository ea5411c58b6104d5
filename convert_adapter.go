package lorakit

import (
	"context"
	"fmt"

	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
)

// AdapterOptions say what ConvertAdapter makes of an adapter. The zero value keeps everything.
type AdapterOptions struct {
	// To is one of AdapterDialects; empty keeps the adapter's own.
	To string
	// DType is what its tensors are cast to: "f32", "f16", "bf16", or "keep" (or empty).
	DType string
	// Experts is "per-expert" for a module an expert, "fused" for one a stack, or "keep" (or empty) for what the dialect
	// has.
	Experts     string
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

// AdapterDialects lists the dialects of adapters that are read and written: peft, kohya, diffusers, mlx, loralib.
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
	list, err := openWithoutBase(ctx, []Adapter{src}, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer list.Close()
	if err := pipeline.CheckSpared(dst, list.Paths()...); err != nil {
		return nil, err
	}
	a := list[0].Adapter
	e, err := a.Encode(lora.EncodeOptions{To: o.To, Experts: o.Experts})
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
