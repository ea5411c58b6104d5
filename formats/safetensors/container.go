package safetensors

import (
	"context"
	"encoding/binary"
	"io"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// Open reads the headers of a file, of the shards of an index, or of a folder with either. Errors are
// formats.ErrMalformed, formats.ErrLimit, formats.ErrOutside, storage.ErrNotRegular, fs.ErrNotExist or what the system
// says. Where shards differ in a metadata string, the first shard's is kept.
func (f Format) Open(ctx context.Context, dir storage.Folder, name string) (formats.Container, error) {
	return formats.OpenFiles(ctx, dir, name, reader{f.Limits.withDefaults()})
}

// reader reads files and indices for formats.OpenFiles.
type reader struct{ limits Limits }

func (reader) Name() string             { return Format{}.Name() }
func (reader) IsIndex(name string) bool { return isIndex(name) }

func (reader) Locate(ctx context.Context, dir storage.Folder) (string, error) {
	return locate(ctx, dir)
}

func (r reader) ReadIndex(f storage.File) (formats.Index, error) { return readIndexFile(f, r.limits) }

func (r reader) ReadFile(f storage.File, c *formats.Contents) error {
	limits := r.limits
	limits.Tensors -= c.Count()
	h, start, err := readFile(f, f.Size(), limits)
	if err != nil {
		return err
	}
	for _, t := range h.tensors {
		if err := c.Claim(t.name); err != nil {
			return err
		}
	}
	if err := h.check(uint64(f.Size() - start)); err != nil {
		return err
	}
	tensors := make([]formats.Tensor, len(h.tensors))
	for i, t := range h.tensors {
		tensors[i] = formats.Tensor{
			Info:   tensor.Info{Name: t.name, DType: t.dtype, Shape: t.shape},
			Data:   c.Data,
			Offset: start + int64(t.begin),
			Bytes:  int64(t.end - t.begin),
		}
	}
	c.Add(tensors, h.metadata)
	return nil
}

// readFile reads the header of a file of the given size, and says where the data starts.
func readFile(f io.ReaderAt, size int64, limits Limits) (h header, start int64, err error) {
	if size < lengthBytes {
		return h, 0, malformedf("found %d bytes, expected at least %d", size, lengthBytes)
	}
	var b [lengthBytes]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return h, 0, err
	}
	n := binary.LittleEndian.Uint64(b[:])
	switch {
	case n > uint64(size-lengthBytes) && !brace(f):
		return h, 0, malformedf("found %q, expected the length of a header and the header, as a safetensors file begins",
			b[:])
	case n > uint64(size-lengthBytes):
		return h, 0, malformedf("found a header of %d bytes in a file of %d, expected one that fits", n, size)
	case n > uint64(limits.HeaderBytes):
		return h, 0, limitf("found a header of %d bytes, expected at most %d", n, limits.HeaderBytes)
	}
	start = lengthBytes + int64(n)
	h, err = readHeader(io.NewSectionReader(f, lengthBytes, int64(n)), limits)
	return h, start, err
}

// brace reports whether a header begins behind its length: what has none is another kind of file, and no part of one.
func brace(f io.ReaderAt) bool {
	var b [1]byte
	n, _ := f.ReadAt(b[:], lengthBytes)
	return n == 1 && b[0] == '{'
}
