package lorakit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/storage"
)

// ReadOptions say how Inspect, InspectAdapter, Diff, Verify and VerifyMerge read.
type ReadOptions struct {
	// FollowLinks takes links that lead out of the folders that are read. It has the same meaning in all options:
	// whoever made the links decides what is read, and with Convert what is copied.
	FollowLinks bool
}

// Adapter is an adapter in any dialect that is known (AdapterDialects), the factor of its delta, and what its files
// leave open.
type Adapter = lora.Source

// IsAdapter reports whether a path looks like an adapter and not like a checkpoint.
func IsAdapter(path string) bool { return lora.IsAdapter(path) }

// open opens the checkpoint at a path.
func open(ctx context.Context, path string, followLinks bool) (*checkpoint.Checkpoint, error) {
	dir, name, err := storage.Resolve(path, storage.Options{FollowLinks: followLinks})
	if err != nil {
		return nil, err
	}
	return checkpoint.OpenIn(ctx, dir, name, checkpoint.OpenOptions{})
}

// openModel opens the checkpoint at a path as transformers names its tensors, also that of a GGUF file.
func openModel(ctx context.Context, path string, followLinks bool) (*checkpoint.Checkpoint, error) {
	dir, name, err := storage.Resolve(path, storage.Options{FollowLinks: followLinks})
	if err != nil {
		return nil, err
	}
	return checkpoint.OpenModel(ctx, dir, name, checkpoint.OpenOptions{})
}

// openCheckpoint is openModel, and refuses an adapter.
func openCheckpoint(ctx context.Context, path string, followLinks bool) (*checkpoint.Checkpoint, error) {
	if err := checkCheckpoint(path); err != nil {
		return nil, err
	}
	return openModel(ctx, path, followLinks)
}

// checkCheckpoint refuses an adapter where a checkpoint is expected. A folder may hold one of each.
func checkCheckpoint(path string) error {
	if _, err := os.Stat(filepath.Join(path, checkpoint.ConfigName)); err != nil && IsAdapter(path) {
		return fmt.Errorf("%s: %w: it is an adapter, expected a checkpoint", path, ErrRefused)
	}
	return nil
}

// openWithoutBase opens adapters that are used without the checkpoint that they are for.
func openWithoutBase(ctx context.Context, adapters []Adapter, followLinks bool) (lora.Several, error) {
	list, err := lora.OpenWithoutBase(ctx, adapters, storage.Options{FollowLinks: followLinks})
	if err != nil && ctx.Err() != nil {
		return nil, ErrInterrupted
	}
	return list, err
}
