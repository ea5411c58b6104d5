package pytorch

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

const (
	pickleName = "data.pkl"
	// maxOpen is how many shards are kept open. The usual limit of a process is
	// 1,024 files.
	maxOpen = 512
)

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

// Open reads the pickles of a file, of the shards of an index, or of a folder with
// either, and checks that each tensor is within its storage and each storage within
// the file. No data is read. Errors are ErrUnsafe, ErrUnsupported, formats.ErrMalformed,
// formats.ErrLimit, formats.ErrOutside, storage.ErrNotRegular, fs.ErrNotExist or what the
// system says. Where shards differ in a metadata string, the first shard's is kept.
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
		if name == "" {
			return nil, fmt.Errorf("%s: found no file of torch.save that is not beside safetensors, expected %s: %w", display(dir), preferred[0], fs.ErrNotExist)
		}
		if resolved, err = storage.Within(dir, name); err != nil {
			return nil, err
		}
	}
	o := opener{limits: f.Limits.withDefaults(), dir: dir, seen: map[string]string{}}
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
	seen   map[string]string // from a tensor's name to its file's
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
	for _, shard := range x.shards() {
		path, err := storage.Within(o.dir, shard)
		system, isSystem := errors.AsType[*fs.PathError](err)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("%s: found no shard %s beside it, expected one: %w", shown, tensor.Quote(shard), fs.ErrNotExist)
		case isSystem:
			return fmt.Errorf("%s: shard %s: %w", shown, tensor.Quote(shard), system.Err)
		case err != nil:
			return fmt.Errorf("%s: %w", shown, err)
		case strings.Contains(shard, "/"):
			return fmt.Errorf("%s: %w", shown, malformedf("found the file name %s, expected one without a folder", tensor.Quote(shard)))
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

// compare looks for a tensor that is not where the index says. Of several it names
// the first in the order of names.
func (o *opener) compare(x index) error {
	first, found := "", false
	for name, want := range x {
		if o.seen[name] != want && (!found || name < first) {
			first, found = name, true
		}
	}
	if !found {
		return nil
	}
	place := "no shard"
	if got, ok := o.seen[first]; ok {
		place = tensor.Quote(got)
	}
	return tensorError(first, malformedf("found it in %s, expected it in %s as the index says", place, tensor.Quote(x[first])))
}

// weights opens one file of tensors, known as name in its folder.
func (o *opener) weights(path, name string) error {
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
	if err := o.read(f, info.Size(), data, name); err != nil {
		return fmt.Errorf("%s: %w", display(filepath.Join(o.dir, name)), err)
	}
	o.c.files = append(o.c.files, name)
	return nil
}

// read takes in the tensors of a file, which will be read from data.
func (o *opener) read(f io.ReaderAt, size int64, data io.ReaderAt, name string) error {
	root, places, err := readFile(f, size, o.limits)
	if err != nil {
		return err
	}
	s, err := readStateDict(root, o.limits)
	if err != nil {
		return err
	}
	if n := len(o.c.tensors) + len(s.tensors); n > o.limits.Tensors {
		return limitf("found %d tensors, expected at most %d", n, o.limits.Tensors)
	}
	tensors := make([]formats.Tensor, 0, len(s.tensors))
	starts := make(map[string]int64, len(s.tensors))
	for _, t := range s.tensors {
		if other, ok := o.seen[t.name]; ok {
			return tensorError(t.name, malformedf("found it in %s too, expected it in one shard", tensor.Quote(other)))
		}
		o.seen[t.name] = name
		place, err := places(t.storage)
		if err != nil {
			return tensorError(t.name, err)
		}
		info, offset, axes, err := layOut(t.tensorRef, place, o.limits)
		if err != nil {
			return tensorError(t.name, err)
		}
		info.Name = t.name
		starts[t.name] = offset
		bytes, err := info.Size()
		if err != nil {
			return tensorError(t.name, malformedf("%v", err))
		}
		out := formats.Tensor{Info: info, File: name, Data: data, Offset: offset, Bytes: bytes}
		if axes != nil {
			out.Data, out.Offset = &view{data, offset, axes, bytes}, 0
		}
		tensors = append(tensors, out)
	}
	slices.SortStableFunc(tensors, func(a, b formats.Tensor) int { return cmp.Compare(starts[a.Name], starts[b.Name]) })
	o.c.tensors = append(o.c.tensors, tensors...)
	if len(s.ignored) > 0 {
		s.metadata[ignoredName] = strings.Join(s.ignored, ", ")
	}
	if o.c.metadata == nil {
		o.c.metadata = map[string]string{}
	}
	for k, v := range s.metadata {
		if _, ok := o.c.metadata[k]; !ok {
			o.c.metadata[k] = v
		}
	}
	return nil
}

// readFile reads the pickle of a file of either kind. The function that it returns
// finds a storage in the file.
func readFile(f io.ReaderAt, size int64, limits Limits) (root any, place func(*storageRef) (span, error), err error) {
	start := make([]byte, min(size, tarMagicAt+int64(len(tarMagic))))
	if err := readFull(f, start, 0); err != nil {
		return nil, nil, err
	}
	switch {
	case isZip(start):
		return readZip(f, size, limits)
	case isPickle(start):
		root, places, err := readLegacy(f, size, limits)
		if err != nil {
			return nil, nil, err
		}
		return root, func(s *storageRef) (span, error) {
			at, ok := places[s.key]
			if !ok {
				return span{}, malformedf("found no storage %s in the file, expected one", tensor.Quote(s.key))
			}
			return at, nil
		}, nil
	case isTar(start):
		return nil, nil, unsupportedf("found a tar archive, as PyTorch 0.1 writes it: save it again with a newer one")
	}
	return nil, nil, malformedf("found no zip archive and no pickle, expected a file of torch.save")
}

// readZip reads a file of PyTorch 1.6 and newer.
func readZip(f io.ReaderAt, size int64, limits Limits) (any, func(*storageRef) (span, error), error) {
	a, err := readArchive(f, size, limits)
	if err != nil {
		return nil, nil, err
	}
	if _, ok := a["constants.pkl"]; ok {
		return nil, nil, unsupportedf("found a program of torch.jit.save, expected a state dict: save the state dict of its module with torch.save")
	}
	order, ok, err := a.small(f, "byteorder")
	switch {
	case err != nil:
		return nil, nil, err
	case ok && order == "big":
		return nil, nil, unsupportedf("found a file of a big-endian machine: save it again on a little-endian one")
	case ok && order != "little":
		return nil, nil, malformedf("found the byte order %s, expected \"little\"", tensor.Quote(order))
	}
	p, ok := a[pickleName]
	if !ok {
		return nil, nil, malformedf("found no %s in the zip archive, expected a file of torch.save", pickleName)
	}
	if p.bytes > limits.PickleBytes {
		return nil, nil, limitf("found a pickle of %d bytes, expected at most %d", p.bytes, limits.PickleBytes)
	}
	m := newMachine(newSource(f, p.offset, p.bytes), limits)
	root, err := m.load()
	if err == nil && m.in.left != 0 {
		err = malformedf("found %d bytes behind the pickle, expected none", m.in.left)
	}
	if err != nil {
		return nil, nil, err
	}
	return root, func(s *storageRef) (span, error) {
		data, ok := a["data/"+s.key]
		switch {
		case !ok:
			return span{}, malformedf("found no zip entry for storage %s, expected one", tensor.Quote(s.key))
		case data.bytes/s.elements.bytes != s.count:
			return span{}, malformedf("found %d bytes in storage %s, expected %d as in the pickle", data.bytes, tensor.Quote(s.key), s.bytes())
		}
		return data, nil
	}, nil
}

// reopener reads a file that is not kept open.
type reopener struct {
	path string
	info fs.FileInfo
}

// ReadAt opens the file, which must still be the one whose pickle was read, reads,
// and closes it.
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

// display writes a path, in quotes only where it would not stay on its line.
func display(path string) string {
	if q := strconv.Quote(path); len(q) != len(path)+2 {
		return q
	}
	return path
}
