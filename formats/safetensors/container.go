package safetensors

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// maxOpen is how many shards are kept open. The usual limit of a process is
// 1,024 files.
const maxOpen = 512

// container is one file, or the shards of an index.
type container struct {
	tensors  []formats.Tensor
	metadata map[string]string
	files    []string
	open     []*os.File
}

func (c *container) Tensors() []formats.Tensor   { return c.tensors }
func (c *container) Metadata() map[string]string { return c.metadata }
func (c *container) Files() []string             { return c.files }

func (c *container) Close() error {
	var errs []error
	for _, f := range c.open {
		errs = append(errs, f.Close())
	}
	c.open = nil
	return errors.Join(errs...)
}

// Open reads the headers of a file, of the shards of an index, or of a folder
// with either. Errors are formats.ErrMalformed, formats.ErrLimit,
// formats.ErrOutside, storage.ErrNotRegular, fs.ErrNotExist or what the system
// says. Where shards differ in a metadata string, the first shard's is kept.
func (f Format) Open(path string) (formats.Container, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	dir, name := filepath.Split(path)
	resolved := path
	if info.IsDir() {
		dir = path
		if name, err = locate(dir); err != nil {
			return nil, err
		}
		if resolved, err = storage.Within(dir, name); err != nil {
			return nil, err
		}
	}
	o := opener{limits: f.Limits.withDefaults(), dir: dir}
	if isIndex(name) {
		err = o.index(resolved, name)
	} else {
		err = o.weights(resolved, name)
	}
	if err != nil {
		o.c.Close()
		return nil, err
	}
	return &o.c, nil
}

// opener fills a container.
type opener struct {
	limits Limits
	dir    string
	seen   map[string]int32 // from a tensor's name to the place of its file in c.files
	c      container
}

// index opens the shards that an index names. They stand beside it.
func (o *opener) index(path, name string) error {
	shown := display(filepath.Join(o.dir, name))
	f, err := storage.Open(path)
	if err != nil {
		return err
	}
	x, err := readIndexFile(f, o.limits)
	f.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", shown, err)
	}
	for _, shard := range x.shards {
		path, err := storage.Within(o.dir, shard)
		var system *fs.PathError
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("%s: found no shard %s beside it, expected one: %w", shown, quote(shard), fs.ErrNotExist)
		case errors.As(err, &system):
			return fmt.Errorf("%s: shard %s: %w", shown, quote(shard), system.Err)
		case err != nil:
			return fmt.Errorf("%s: %w", shown, err)
		case strings.Contains(shard, "/"):
			return fmt.Errorf("%s: %w", shown, malformedf("found the file name %s, expected one without a folder", quote(shard)))
		}
		if err := o.weights(path, shard); err != nil {
			return err
		}
	}
	if err := o.compare(x); err != nil {
		return fmt.Errorf("%s: %w", shown, err)
	}
	o.c.files = append(o.c.files, name)
	return nil
}

// compare looks for a tensor that is not where the index says. Of several it
// names the first in the order of names.
func (o *opener) compare(x index) error {
	first, found := "", false
	for name, want := range x.shard {
		if got, ok := o.seen[name]; (!ok || got != want) && (!found || name < first) {
			first, found = name, true
		}
	}
	if !found {
		return nil
	}
	place := "no shard"
	if got, ok := o.seen[first]; ok {
		place = quote(x.shards[got])
	}
	return tensorError(first, malformedf("found it in %s, expected it in %s as the index says", place, quote(x.shards[x.shard[first]])))
}

// weights opens one file of tensors, known as name in its folder.
func (o *opener) weights(path, name string) error {
	shown := display(filepath.Join(o.dir, name))
	f, err := storage.Open(path)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	var data io.ReaderAt = f
	if len(o.c.open) < maxOpen {
		o.c.open = append(o.c.open, f)
	} else {
		data = reopener{path, info}
		defer f.Close()
	}
	limits := o.limits
	limits.Tensors -= len(o.c.tensors)
	h, start, err := readFile(f, info.Size(), limits)
	if err == nil {
		err = o.claim(h)
	}
	if err == nil {
		err = h.check(uint64(info.Size() - start))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", shown, err)
	}
	o.c.tensors = slices.Grow(o.c.tensors, len(h.tensors))
	for _, t := range h.tensors {
		o.c.tensors = append(o.c.tensors, formats.Tensor{
			Info:   tensor.Info{Name: t.name, DType: t.dtype, Shape: t.shape},
			File:   name,
			Data:   data,
			Offset: start + int64(t.begin),
			Bytes:  int64(t.end - t.begin),
		})
	}
	o.c.files = append(o.c.files, name)
	for k, v := range h.metadata {
		if o.c.metadata == nil {
			o.c.metadata = map[string]string{}
		}
		if _, ok := o.c.metadata[k]; !ok {
			o.c.metadata[k] = v
		}
	}
	return nil
}

// claim notes the names of the next file's tensors, each of which must be new.
func (o *opener) claim(h header) error {
	if o.seen == nil {
		o.seen = make(map[string]int32, len(h.tensors))
	}
	file := int32(len(o.c.files))
	for _, t := range h.tensors {
		switch other, ok := o.seen[t.name]; {
		case ok && other == file:
			return t.errorf("found it twice, expected it once")
		case ok:
			return t.errorf("found it in %s too, expected it in one shard", quote(o.c.files[other]))
		}
		o.seen[t.name] = file
	}
	return nil
}

// readFile reads the header of a file of the given size, and says where the
// data starts.
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
	case n > uint64(size-lengthBytes):
		return h, 0, malformedf("found a header of %d bytes in a file of %d, expected one that fits", n, size)
	case n > uint64(limits.HeaderBytes):
		return h, 0, limitf("found a header of %d bytes, expected at most %d", n, limits.HeaderBytes)
	}
	start = lengthBytes + int64(n)
	h, err = readHeader(io.NewSectionReader(f, lengthBytes, int64(n)), limits)
	return h, start, err
}

// reopener reads a file that is not kept open.
type reopener struct {
	path string
	info fs.FileInfo
}

// ReadAt opens the file, which must still be the one whose header was read,
// reads, and closes it.
func (r reopener) ReadAt(p []byte, off int64) (int, error) {
	f, err := storage.Open(r.path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !os.SameFile(info, r.info) {
		return 0, fmt.Errorf("%s: found another file than before, expected it unchanged", r.path)
	}
	return f.ReadAt(p, off)
}
