package gguf

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

func init() { formats.Register(Format{}) }

const extension = ".gguf"

// Format reads and lays out GGUF. The zero value has the default limits; it is what is registered under the name
// "gguf".
type Format struct {
	Limits Limits
}

// Limits bound what Open is willing to read, and Layout to write: past one of them they fail with formats.ErrLimit. A
// field that is zero has its default, which is far above any model known.
type Limits struct {
	HeaderBytes int64 // of one file, all before the data; default 2^26
	Keys        int   // of one file; default 2^16
	Tensors     int   // in all files together; default 2^17
	Files       int   // of one model; default 10,000
}

func (l Limits) withDefaults() Limits {
	return Limits{
		HeaderBytes: cmp.Or(l.HeaderBytes, 1<<26),
		Keys:        cmp.Or(l.Keys, 1<<16),
		Tensors:     cmp.Or(l.Tensors, 1<<17),
		Files:       cmp.Or(l.Files, 10_000),
	}
}

// Name returns "gguf".
func (Format) Name() string { return "gguf" }

// ReadOnly returns false.
func (Format) ReadOnly() bool { return false }

// Extensions returns ".gguf".
func (Format) Extensions() []string { return []string{extension} }

// Detect reports whether a file is named *.gguf or begins as one does, or whether a folder has such a file and no
// weights of another format that is registered.
func (f Format) Detect(ctx context.Context, dir storage.Folder, name string) (bool, error) {
	if name == "" {
		entries, err := dir.List(ctx, "")
		if err != nil {
			return false, err
		}
		found := false
		for _, e := range entries {
			other, ok := formats.Default.ForExtension(e.Name)
			if ok && other.Name() != f.Name() && formats.IsWeights(e.Name) && !hidden(e.Name) {
				return false, nil
			}
			found = found || isWeights(e.Name)
		}
		return found, nil
	}
	if _, ok := stemOf(name); ok {
		return true, nil
	}
	file, err := dir.Open(ctx, name)
	if err != nil {
		return false, err
	}
	defer file.Close()
	var b [len(magic)]byte
	if n, err := file.ReadAt(b[:], 0); n < len(b) && err != io.EOF {
		return false, err
	}
	return string(b[:]) == magic, nil
}

// Holds says of a type that GGUF does not have, of more than four dimensions, of one of 0 and of rows that are no whole
// number of blocks that there is no place for them.
func (Format) Holds(t tensor.Info) error {
	if _, err := numberOf(t); err != nil {
		return err
	}
	if len(t.Shape) > maxRank {
		return unsupportedf("found %d dimensions, expected at most %d", len(t.Shape), maxRank)
	}
	for _, d := range t.Shape {
		if d == 0 {
			return unsupportedf("found the shape %v, expected no dimension of 0", t.Shape)
		}
	}
	return checkRows(t)
}

func isWeights(name string) bool {
	_, ok := stemOf(name)
	return ok && !hidden(name)
}

// stemOf cuts the extension off, in letters of either case.
func stemOf(name string) (string, bool) {
	at := len(name) - len(extension)
	if at < 0 || !strings.EqualFold(name[at:], extension) {
		return name, false
	}
	return name[:at], true
}

// hidden matches what a Mac leaves beside a file that it copies, ._model.gguf.
func hidden(name string) bool { return strings.HasPrefix(name, ".") }

func malformedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrMalformed)...)
}

func limitf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrLimit)...)
}

func unsupportedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrUnsupported)...)
}

func tensorError(name string, err error) error {
	return fmt.Errorf("tensor %s: %w", tensor.Quote(name), err)
}

func keyError(name string, err error) error {
	return fmt.Errorf("key %s: %w", tensor.Quote(name), err)
}
