package formats

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// maxOpen is how many files of a container are kept open. The usual limit of a process is 1,024 files.
const maxOpen = 512

// FileReader is what a format knows of its files and OpenFiles does not.
type FileReader interface {
	// Name is that of the format.
	Name() string
	// Locate returns the name of the one file of a folder to begin with: the weights or their index.
	Locate(ctx context.Context, dir storage.Folder) (string, error)
	// IsIndex reports whether a file of this name is an index.
	IsIndex(name string) bool
	// ReadIndex reads an index of one file or more.
	ReadIndex(f storage.File) (Index, error)
	// ReadFile reads and checks the header of a file of tensors. The tensors' Data is of c.Data, not of f, which may be
	// closed when it is done.
	ReadFile(f storage.File, c *Contents) error
}

// Recognizer is a FileReader that can say that a file is of its format, whatever is wrong with it: its own error stands
// then, and what else the file may be is not guessed.
type Recognizer interface {
	Recognizes(f storage.File) bool
}

// PartsReader is a FileReader of files that may be several which make up one container without an index, since the name
// of each tells those of all.
type PartsReader interface {
	FileReader
	// Parts returns the names of all files that the file of this name is one of, in their order, or none where it is one
	// by itself.
	Parts(name string) ([]string, error)
}

// Index says which file has which tensor.
type Index struct {
	Files []string
	// Tensors has, for the name of each tensor, the place of its file in Files.
	Tensors map[string]int32
}

// Contents takes in what is read of the files of a container.
type Contents struct {
	// Data is the file being read, as it can be read until the container is closed.
	Data io.ReaderAt
	// File is the name of the file being read.
	File string

	file int32            // the place of the file being read in c.files
	seen map[string]int32 // from a tensor's name to the place of its file
	said map[string]bool  // the names of the metadata
	c    container
}

// Count is the number of tensors in all files so far.
func (c *Contents) Count() int { return len(c.c.tensors) }

// Claim notes the name of a tensor of the file. It has to be new.
func (c *Contents) Claim(name string) error {
	switch other, ok := c.seen[name]; {
	case ok && other == c.file:
		return tensorError(name, malformedf("found it twice, expected it once"))
	case ok:
		return tensorError(name, malformedf("found it in %s too, expected it in one shard", tensor.Quote(c.c.files[other])))
	}
	c.seen[name] = c.file
	return nil
}

// Add takes in the tensors of the file, all of them claimed, in the order of their data, and its metadata. Where files
// differ in a value of it, the first one's is kept.
func (c *Contents) Add(tensors []Tensor, metadata Metadata) {
	c.c.tensors = append(c.c.tensors, tensors...)
	for _, p := range metadata {
		if !c.said[p.Name] {
			c.said[p.Name] = true
			c.c.metadata = append(c.c.metadata, p)
		}
	}
}

// OpenFiles opens a container: the file of that name in a folder, the files that it names where it is an index, which
// stand beside it, all parts where it is one of several, or with no name the folder that has either. A tensor that is
// in two files, or not where the index says, is ErrMalformed. Other errors are the reader's, ErrOutside,
// storage.ErrNotRegular, fs.ErrNotExist or what the system says.
func OpenFiles(ctx context.Context, dir storage.Folder, name string, r FileReader) (Container, error) {
	if name == "" {
		var err error
		if name, err = r.Locate(ctx, dir); err != nil {
			return nil, err
		}
	}
	o := opener{FileReader: r, ctx: ctx, dir: dir, Contents: Contents{seen: map[string]int32{}, said: map[string]bool{}}}
	if err := o.read(name); err != nil {
		o.c.Close()
		return nil, err
	}
	return &o.c, nil
}

// container is one file, or those of an index.
type container struct {
	tensors  []Tensor
	metadata Metadata
	files    []string
	open     []storage.File
}

func (c *container) Tensors() []Tensor  { return c.tensors }
func (c *container) Metadata() Metadata { return c.metadata }
func (c *container) Files() []string    { return c.files }

func (c *container) Close() error {
	var errs []error
	for _, f := range c.open {
		errs = append(errs, f.Close())
	}
	c.open = nil
	return errors.Join(errs...)
}

// opener opens the files of a container.
type opener struct {
	FileReader
	ctx context.Context
	dir storage.Folder
	Contents
}

// read opens the file of that name and those that belong to it.
func (o *opener) read(name string) error {
	if p, ok := o.FileReader.(PartsReader); ok {
		parts, err := p.Parts(name)
		if err != nil {
			return fmt.Errorf("%s: %w", Display(o.dir.Path(name)), err)
		}
		for _, part := range parts {
			if err := o.shard(part, Display(o.dir.Path(name))); err != nil {
				return err
			}
		}
		if len(parts) > 0 {
			return nil
		}
	}
	f, err := o.dir.Open(o.ctx, name)
	if err != nil {
		return err
	}
	if o.IsIndex(name) {
		return o.index(f, name)
	}
	return o.weights(f, name)
}

// shard reads a file that another, shown so, is to have beside it.
func (o *opener) shard(name, shown string) error {
	f, err := o.dir.Open(o.ctx, name)
	system, isSystem := errors.AsType[*fs.PathError](err)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if partial := unfinished(o.ctx, o.dir); partial != "" {
			return fmt.Errorf("%s: found no shard %s beside it, expected one: %w: %s is a download that has not been finished",
				shown, tensor.Quote(name), fs.ErrNotExist, partial)
		}
		return fmt.Errorf("%s: found no shard %s beside it, expected one: %w", shown, tensor.Quote(name), fs.ErrNotExist)
	case isSystem:
		return fmt.Errorf("%s: shard %s: %w", shown, tensor.Quote(name), system.Err)
	case err != nil:
		return fmt.Errorf("%s: %w", shown, err)
	}
	return o.weights(f, name)
}

// index opens the files that an index names, in the order of their names.
func (o *opener) index(f storage.File, name string) error {
	shown := Display(o.dir.Path(name))
	x, err := o.ReadIndex(f)
	if err != nil {
		err = o.explain(err, f, name)
	}
	f.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", shown, err)
	}
	for _, shard := range slices.Sorted(slices.Values(x.Files)) {
		if strings.Contains(shard, "/") && fs.ValidPath(shard) {
			return fmt.Errorf("%s: %w", shown, malformedf("found the file name %s, expected one without a folder",
				tensor.Quote(shard)))
		}
		if err := o.shard(shard, shown); err != nil {
			return err
		}
	}
	if err := o.compare(x); err != nil {
		return fmt.Errorf("%s: %w", shown, err)
	}
	o.c.files = append(o.c.files, name)
	return nil
}

// compare looks for a tensor that is not where the index says. Of several it names the first in the order of names.
func (o *opener) compare(x Index) error {
	first, found := "", false
	for name, want := range x.Tensors {
		if got, ok := o.seen[name]; (!ok || o.c.files[got] != x.Files[want]) && (!found || name < first) {
			first, found = name, true
		}
	}
	if !found {
		return nil
	}
	place := "no shard"
	if got, ok := o.seen[first]; ok {
		place = tensor.Quote(o.c.files[got])
	}
	return tensorError(first, malformedf("found it in %s, expected it in %s as the index says", place,
		tensor.Quote(x.Files[x.Tensors[first]])))
}

// weights reads one file of tensors, known as name in its folder.
func (o *opener) weights(f storage.File, name string) error {
	o.Data, o.File = f, name
	if len(o.c.open) < maxOpen {
		o.c.open = append(o.c.open, f)
	} else {
		o.Data = reopener{o.ctx, o.dir, name, f.Size(), f.Version()}
		defer f.Close()
	}
	o.file = int32(len(o.c.files))
	o.c.files = append(o.c.files, name)
	before := len(o.c.tensors)
	if err := o.ReadFile(f, &o.Contents); err != nil {
		return fmt.Errorf("%s: %w", Display(o.dir.Path(name)), o.explain(err, f, name))
	}
	for i := range o.c.tensors[before:] {
		o.c.tensors[before+i].File = name
	}
	return nil
}

// explain says of a file that breaks the rules of its format what it is instead, where that is known.
func (o *opener) explain(err error, f storage.File, name string) error {
	if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrLimit) && !errors.Is(err, ErrUnsupported) {
		return err
	}
	if r, ok := o.FileReader.(Recognizer); ok && r.Recognizes(f) {
		return err
	}
	for _, other := range Default.All() {
		if ok, failed := other.Detect(o.ctx, nameless{f}, "file"); other.Name() != o.Name() && ok && failed == nil {
			return foreignf(ErrMalformed, "%v: it is a %s file by its content: give it a name that ends in %s",
				ErrForeign, other.Name(), other.Extensions()[0])
		}
	}
	b := start(f)
	if is := foreignTo(o.Name(), b, name); is != nil && b != nil {
		return is
	}
	return err
}

// nameless is a folder with one file, whose name does not tell what it is.
type nameless struct{ storage.File }

func (n nameless) Path(string) string                                    { return "" }
func (n nameless) Open(context.Context, string) (storage.File, error)    { return n, nil }
func (n nameless) List(context.Context, string) ([]storage.Entry, error) { return nil, nil }
func (n nameless) Close() error                                          { return nil }

// reopener reads a file that is not kept open.
type reopener struct {
	ctx     context.Context
	dir     storage.Folder
	name    string
	size    int64
	version string
}

// ReadAt opens the file, which must still be the one whose header was read, reads, and closes it.
func (r reopener) ReadAt(p []byte, off int64) (int, error) {
	f, err := r.dir.Open(r.ctx, r.name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if f.Size() != r.size || f.Version() != r.version {
		return 0, fmt.Errorf("%s: found another file than before, expected it unchanged", Display(r.dir.Path(r.name)))
	}
	return f.ReadAt(p, off)
}
