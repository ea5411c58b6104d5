package lorakit

import (
	"context"
	"fmt"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/storage"
)

// Merge adds the deltas of adapters to the base and writes the result to dst, as Convert does with o. A merge in which
// a module keeps less than o.MinKept of its delta is an error that wraps ErrLost.
func Merge(ctx context.Context, base string, adapters []Adapter, dst string, o ConvertOptions) (*ConvertResult, error) {
	if len(adapters) == 0 {
		return nil, fmt.Errorf("%w: no adapter is given", ErrOption)
	}
	if err := checkCheckpoint(base); err != nil {
		return nil, err
	}
	o.Merge = adapters
	return Convert(ctx, base, dst, o)
}

// Unmerge subtracts adapters that were merged. What rounding has taken when they were merged does not come back;
// Rounding in the result says how much that is to be expected to be. An adapter with a part that cannot be subtracted
// (DoRA, replaced weights, trained rows) is an error.
func Unmerge(
	ctx context.Context, merged string, adapters []Adapter, dst string, o ConvertOptions,
) (*ConvertResult, error) {
	o.subtract = true
	r, err := Merge(ctx, merged, adapters, dst, o)
	if err != nil || o.DryRun {
		return r, err
	}
	return r, r.rounding(ctx, merged, dst, adapters, o.FollowLinks)
}

// rounding works out what the roundings of a merge and of its subtraction may have taken.
func (r *ConvertResult) rounding(
	ctx context.Context, merged, dst string, adapters []Adapter, followLinks bool,
) error {
	c, err := openModel(ctx, merged, followLinks)
	if err != nil {
		return err
	}
	defer c.Close()
	m, list, err := merge(ctx, c, adapters, true, followLinks)
	if err != nil {
		return err
	}
	defer list.Close()
	out, err := openModel(ctx, dst, false)
	if err != nil {
		return err
	}
	defer out.Close()
	r.Rounding, err = pipeline.RoundedTwice(ctx, m, out)
	return err
}

// merge opens adapters and adds them to a checkpoint, or subtracts them.
func merge(
	ctx context.Context, c *checkpoint.Checkpoint, adapters []Adapter, subtract, followLinks bool,
) (*pipeline.Merged, lora.Several, error) {
	list, err := lora.OpenAll(ctx, forBase(adapters, baseOf(ctx, c)), storage.Options{FollowLinks: followLinks})
	if err != nil {
		return nil, nil, err
	}
	if subtract {
		err = list.Negate()
	}
	var m *pipeline.Merged
	if err == nil {
		m, err = pipeline.Merge(ctx, c, list)
	}
	if err != nil {
		list.Close()
		return nil, nil, err
	}
	return m, list, nil
}
