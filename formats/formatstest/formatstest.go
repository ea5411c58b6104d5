// Package formatstest opens checkpoints by a path, as tests of formats do.
package formatstest

import (
	"context"
	"path/filepath"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

// Open opens what a path leads to.
func Open(f formats.Format, path string) (formats.Container, error) {
	dir, name, err := storage.Resolve(path, storage.Options{})
	if err != nil {
		return nil, err
	}
	return f.Open(context.Background(), dir, name)
}

// Detect asks for the format of what a path leads to, or would lead to.
func Detect(f formats.Format, path string) bool {
	dir, name, err := storage.Resolve(path, storage.Options{})
	if err != nil {
		dir, name = storage.Local(filepath.Dir(path), storage.Options{}), filepath.Base(path)
	}
	ok, err := f.Detect(context.Background(), dir, name)
	return ok && err == nil
}
