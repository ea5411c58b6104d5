package lorakit

import (
	"context"
	"fmt"

	"github.com/lorakit/lorakit/adapt"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
)

// CombineOptions say how Combine makes one adapter of several, as PEFT's add_weighted_adapter does.
type CombineOptions struct {
	// Type is one of linear, cat, svd, ties, ties_svd, dare_linear, dare_ties, dare_linear_svd, dare_ties_svd,
	// magnitude_prune, magnitude_prune_svd.
	Type string
	// Density is the share of values that pruning leaves, for the types that prune.
	Density float64
	// MajoritySign is "total" (or empty) or "frequency", for the ties types.
	MajoritySign string
	// Rank is that of the result of the svd types; 0 is the largest of the adapters.
	Rank int
	// Seed is for the dare types, which drop values at random.
	Seed        uint64
	Force       bool
	FollowLinks bool // see ReadOptions
}

type (
	// Combination says what Combine or Resize has made.
	Combination = adapt.Combination
	// ResizedModule is what a module has become, or an expert of one.
	ResizedModule = adapt.ResizedModule
)

// CombineTypes lists the types of combination.
func CombineTypes() []string { return lora.CombineTypes() }

// Combine writes to out the adapter whose delta is the combination of those of others: a folder, or where
// the first adapter is one file of kohya or diffusers also such a file. It has alpha = rank and no rsLoRA, so
// that its delta is the product of its factors.
func Combine(ctx context.Context, out string, adapters []Adapter, o CombineOptions) (*Combination, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	if len(adapters) == 0 {
		return nil, fmt.Errorf("%w: no adapter is given", ErrOption)
	}
	lo := lora.CombineOptions{
		Type: o.Type, Density: o.Density, MajoritySign: o.MajoritySign, Rank: o.Rank, Seed: o.Seed,
	}
	if err := lo.Check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOption, err)
	}
	if err := pipeline.CheckSpared(out, lora.Paths(adapters)...); err != nil {
		return nil, err
	}
	list, err := openWithoutBase(ctx, adapters, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer list.Close()
	if err := pipeline.CheckSpared(out, list.Paths()...); err != nil {
		return nil, err
	}
	return adapt.Combine(ctx, list, out, lo, o.Force)
}

// ResizeOptions say what rank Resize gives an adapter.
type ResizeOptions struct {
	// Rank of every module; 0 with Energy takes the smallest that keeps that share of each module's squared norm. One of
	// them is set.
	Rank        int
	Energy      float64
	Force       bool
	FollowLinks bool // see ReadOptions
}

// Resize writes an adapter of another rank. It works on the factors alone.
func Resize(ctx context.Context, adapter Adapter, out string, o ResizeOptions) (*Combination, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := adapt.CheckResize(o.Rank, o.Energy); err != nil {
		return nil, err
	}
	list, err := openWithoutBase(ctx, []Adapter{adapter}, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer list.Close()
	if err := pipeline.CheckSpared(out, list.Paths()...); err != nil {
		return nil, err
	}
	return adapt.Resize(ctx, list[0], out, o.Rank, o.Energy, o.Force)
}
