package pytorch

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// pickleName is the entry of a zip archive that holds the state dict.
const pickleName = "data.pkl"

// Open reads the pickles of a file, of the shards of an index, or of a folder with either, and checks that each tensor
// is within its storage and each storage within the file. No data is read. Errors are ErrUnsafe, ErrUnsupported,
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
	name, err := locate(ctx, dir)
	if err == nil && name == "" {
		err = fmt.Errorf("%s: found no file of torch.save that is not beside safetensors, expected %s: %w",
			formats.Display(dir.Path("")), preferred[0], fs.ErrNotExist)
	}
	return name, err
}

func (r reader) ReadIndex(f storage.File) (formats.Index, error) { return readIndexFile(f, r.limits) }

func (r reader) ReadFile(f storage.File, c *formats.Contents) error {
	root, places, err := readFile(f, f.Size(), r.limits)
	if err != nil {
		return err
	}
	s, err := readStateDict(root, r.limits)
	if err != nil {
		return err
	}
	if n := c.Count() + len(s.tensors); n > r.limits.Tensors {
		return limitf("found %d tensors, expected at most %d", n, r.limits.Tensors)
	}
	tensors := make([]formats.Tensor, 0, len(s.tensors))
	starts := make(map[string]int64, len(s.tensors))
	for _, t := range s.tensors {
		if err := c.Claim(t.name); err != nil {
			return err
		}
		place, err := places(t.storage)
		if err != nil {
			return tensorError(t.name, err)
		}
		info, offset, axes, err := layOut(t.tensorRef, place, r.limits)
		if err != nil {
			return tensorError(t.name, err)
		}
		info.Name = t.name
		starts[t.name] = offset
		bytes, err := info.Size()
		if err != nil {
			return tensorError(t.name, malformedf("%v", err))
		}
		out := formats.Tensor{Info: info, Data: c.Data, Offset: offset, Bytes: bytes}
		if axes != nil {
			out.Data, out.Offset = &view{c.Data, offset, axes, bytes}, 0
		}
		tensors = append(tensors, out)
	}
	slices.SortStableFunc(tensors, func(a, b formats.Tensor) int { return cmp.Compare(starts[a.Name], starts[b.Name]) })
	if len(s.ignored) > 0 {
		s.say(ignoredName, strings.Join(s.ignored, ", "))
	}
	c.Add(tensors, s.metadata)
	return nil
}

// readFile reads the pickle of a file of either kind. The function that it returns finds a storage in the file.
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

// errProgram is what TorchScript is refused with.
var errProgram = unsupportedf("found a program of torch.jit.save, expected a state dict: save the state dict of its " +
	"module with torch.save")

// readZip reads a file of PyTorch 1.6 and newer.
func readZip(f io.ReaderAt, size int64, limits Limits) (any, func(*storageRef) (span, error), error) {
	a, err := readArchive(f, size, limits)
	if err != nil {
		return nil, nil, err
	}
	if _, ok := a["constants.pkl"]; ok {
		return nil, nil, errProgram
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
			return span{}, malformedf("found %d bytes in storage %s, expected %d as in the pickle", data.bytes,
				tensor.Quote(s.key), s.bytes())
		}
		return data, nil
	}, nil
}
