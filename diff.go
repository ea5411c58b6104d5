package lorakit

import (
	"context"

	"github.com/lorakit/lorakit/checkpoint"
)

// Diff compares two checkpoints weight by weight, each read through its format and scheme, so that a quantised one can
// be held against its source.
func Diff(ctx context.Context, a, b string, o ReadOptions) (*Comparison, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	ca, err := open(ctx, a, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer ca.Close()
	cb, err := open(ctx, b, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer cb.Close()
	return checkpoint.Compare(ctx, ca, cb)
}
