package gguf

import (
	"context"
	"fmt"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// Open reads the fronts of a file and, where it is one of several, of all of them, or of a folder with one model.
// Errors are formats.ErrMalformed, formats.ErrLimit, formats.ErrUnsupported, storage.ErrNotRegular, fs.ErrNotExist or
// what the system says.
func (f Format) Open(ctx context.Context, dir storage.Folder, name string) (formats.Container, error) {
	r := &reader{limits: f.Limits.withDefaults()}
	c, err := formats.OpenFiles(ctx, dir, name, r)
	if err != nil {
		return nil, err
	}
	if n := len(c.Tensors()); r.several && n != r.tensors {
		defer c.Close()
		return nil, fmt.Errorf("%s: key %s: %w", formats.Display(dir.Path(c.Files()[0])), tensor.Quote(splitTensorsKey),
			malformedf("found %d, expected the %d tensors in all %d files", r.tensors, n, len(c.Files())))
	}
	return c, nil
}

// reader reads files for formats.OpenFiles.
type reader struct {
	limits  Limits
	several bool           // whether the files read so far are some of several
	tensors int            // in all of them, as they say themselves
	first   map[string]any // the keys of the first one
}

func (*reader) Name() string        { return Format{}.Name() }
func (*reader) IsIndex(string) bool { return false }

func (*reader) ReadIndex(storage.File) (formats.Index, error) {
	return formats.Index{}, unsupportedf("found an index, expected none")
}

func (r *reader) ReadFile(f storage.File, c *formats.Contents) error {
	limits := r.limits
	limits.Tensors -= c.Count()
	h, err := readHeader(f, f.Size(), limits)
	if err != nil {
		return err
	}
	metadata, err := r.readSplit(c.File, h.metadata)
	if err != nil {
		return err
	}
	for _, t := range h.tensors {
		if err := c.Claim(t.Name); err != nil {
			return err
		}
	}
	if err := h.check(f.Size()); err != nil {
		return err
	}
	tensors := make([]formats.Tensor, len(h.tensors))
	for i, t := range h.tensors {
		tensors[i] = formats.Tensor{Info: t.Info, Data: c.Data, Offset: h.start + int64(t.offset), Bytes: t.bytes}
		if width := t.DType.Bits() / 8; h.big && width > 1 {
			tensors[i].Data, tensors[i].Offset = &swapped{c.Data, tensors[i].Offset, t.bytes, width}, 0
		}
	}
	c.Add(tensors, metadata)
	return nil
}
