package lorakit

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/train"
)

type (
	// ValidateOptions say what Validate does.
	ValidateOptions = train.Options
	// Validation is what Validate found.
	Validation = train.Result
	// ValidateProgress says how far Validate is.
	ValidateProgress = train.Progress
	// StepBytes are the bytes that a step takes, by what they are for.
	StepBytes = train.Bytes
	// BatchComparison is what the same batch shows of two checkpoints.
	BatchComparison = train.Comparison
	// LayerError is how far the outputs of a block are apart.
	LayerError = train.LayerError
)

// Validate takes real training steps through a checkpoint, to show that it still computes and learns: a frozen base in
// any container and scheme, the adapter of o, AdamW. Without an adapter it computes the loss alone, and with another
// checkpoint in o.Against it compares the two. Frozen weights that have changed meanwhile are no error: the result says
// it.
//
// Errors wrap ErrOption, ErrData, ErrArchitecture, ErrMemory and, for a weight, activation, loss or gradient that is
// not finite, ErrNotFinite. The last names the layer or tensor where it began.
func Validate(ctx context.Context, path string, o ValidateOptions) (*Validation, error) {
	end, err := usePlugins(o.Memory)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := o.Check(); err != nil {
		return nil, err
	}
	for _, p := range []string{path, o.Against} {
		if p == "" {
			continue
		}
		if err := checkCheckpoint(p); err != nil {
			return nil, err
		}
	}
	if err := checkSaved(path, o); err != nil {
		return nil, err
	}
	return train.Validate(ctx, path, o)
}

// checkSaved refuses places that what Validate saves may not be written to, before any work is done.
func checkSaved(path string, o ValidateOptions) error {
	for _, dst := range []string{o.Save, o.SaveGradients} {
		if dst == "" {
			continue
		}
		for _, src := range []string{path, o.Adapter} {
			if err := pipeline.CheckDestination(src, dst, pipeline.RunOptions{Force: o.Force}); err != nil {
				return err
			}
		}
		if err := pipeline.CheckSpared(dst, o.Data); err != nil {
			return err
		}
	}
	if o.SaveGradients == "" {
		return nil
	}
	apart, err := separate(o.Save, o.SaveGradients)
	if err != nil {
		return err
	}
	if o.Save != "" && !apart {
		return fmt.Errorf("%s: %w: one of the adapter and its gradients would be written over the other, or into it",
			o.SaveGradients, ErrRefused)
	}
	return checkFile(path, o.SaveGradients, o.Force)
}

// separate reports whether none of two paths is the other or inside of it.
func separate(a, b string) (bool, error) {
	a, err := filepath.Abs(a)
	if err != nil {
		return false, err
	}
	if b, err = filepath.Abs(b); err != nil {
		return false, err
	}
	inside := func(dir, path string) bool {
		rel, err := filepath.Rel(dir, path)
		return err == nil && filepath.IsLocal(rel)
	}
	return !inside(a, b) && !inside(b, a), nil
}
