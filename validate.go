package lorakit

import (
	"context"

	"github.com/lorakit/lorakit/train"
)

type (
	// ValidateOptions say what Validate does.
	ValidateOptions = train.Options
	// Validation is what Validate found.
	Validation = train.Result
)

// Validate takes real training steps through a checkpoint, to show that it still computes and learns: a frozen base in
// any container and scheme, the adapter of o, AdamW. Without an adapter it computes the loss alone, and with
// another checkpoint in o.Against compares the two.
//
// Errors wrap train.ErrData, ErrArchitecture, ErrMemory and, for a weight, activation, loss or gradient that is not
// finite, ErrNotFinite.
func Validate(ctx context.Context, path string, o ValidateOptions) (*Validation, error) {
	return train.Validate(ctx, path, o)
}
