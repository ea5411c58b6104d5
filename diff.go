package lorakit

import (
	"context"

	"github.com/lorakit/lorakit/checkpoint"
)

// Diff compares two checkpoints weight by weight, each read through its format and
// scheme, so that a quantised one can be held against its source.
func Diff(ctx context.Context, a, b string) (*Comparison, error) {
	ca, err := checkpoint.Open(ctx, a)
	if err != nil {
		return nil, err
	}
	defer ca.Close()
	cb, err := checkpoint.Open(ctx, b)
	if err != nil {
		return nil, err
	}
	defer cb.Close()
	return checkpoint.Compare(ctx, ca, cb)
}
