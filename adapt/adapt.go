// Package adapt makes and studies adapters: new ones for a checkpoint (Attach), the one that leads from a checkpoint to
// another (Extract), those that are made of others (Combine, Resize), and the singular values of adapters, changes and
// weights (AnalyzeAdapter, AnalyzeChange, AnalyzeWeights).
//
// What an adapter can have a module for is a Target; Targets lists those of a checkpoint.
package adapt

import (
	"context"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/lora"
)

// Kinds of errors. Test for them with errors.Is; those of checkpoint, pipeline and lora may be met too.
var (
	ErrRefused     = checkpoint.ErrRefused     // what was asked for contradicts itself or the checkpoint
	ErrInterrupted = checkpoint.ErrInterrupted // the context was cancelled
	ErrOption      = lora.ErrOption            // an option has a value that is wrong whatever the checkpoint is
)

// orInterrupted is an error of a run, or that the run was cancelled.
func orInterrupted(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return ErrInterrupted
	}
	return err
}
