package lorakit

import (
	"context"

	"github.com/lorakit/lorakit/pipeline"
)

// Diff compares two checkpoints weight by weight, each read through its format and
// scheme, so that a quantised one can be held against its source.
func Diff(ctx context.Context, a, b string) (*Comparison, error) {
	ca, err := pipeline.Open(a)
	if err != nil {
		return nil, err
	}
	defer ca.Close()
	cb, err := pipeline.Open(b)
	if err != nil {
		return nil, err
	}
	defer cb.Close()
	return pipeline.Compare(ctx, ca, cb)
}
