package pipeline

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// comparing is a Sink that writes nothing: what would be written is compared with what stands at dst.
type comparing struct {
	dst     string
	single  bool   // dst is the one file
	scratch string // a folder for what a format has to write before it can be compared
}

// different is what a comparing Sink finds.
type different struct{ name, how string }

func (d *different) Error() string { return tensor.Quote(d.name) + " " + d.how }

// Create opens the file that is there, which must have the size.
func (c comparing) Create(name string, size int64) (File, error) {
	f, err := c.open(name, size)
	if err != nil {
		return nil, err
	}
	return comparedFile{f, name}, nil
}

// open opens the file that is there, which must have the size, if that is known.
func (c comparing) open(name string, size int64) (*os.File, error) {
	path := c.dst
	if !c.single {
		path = filepath.Join(c.dst, filepath.FromSlash(name))
	}
	f, err := storage.Open(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, storage.ErrNotRegular) {
		return nil, &different{name, "is missing"}
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && size != formats.UnknownSize && info.Size() != size {
		err = &different{name, "has another size"}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Folder makes a folder beside dst, unless there is nothing to compare with.
func (c comparing) Folder(name string) (string, error) {
	f, err := c.open(name, formats.UnknownSize)
	if err != nil {
		return "", err
	}
	f.Close()
	return os.MkdirTemp(c.scratch, scratchPattern)
}

// Adopt compares what has been written with the file that is there, by their digests.
func (c comparing) Adopt(ctx context.Context, _ string, s Streamed) error {
	f, err := c.open(s.Name, s.Size)
	if err != nil {
		return err
	}
	defer f.Close()
	sum, n, err := digestOf(ctx, f)
	if err == nil && (sum != s.SHA256 || n != s.Size) {
		err = &different{s.Name, "has other content"}
	}
	return err
}

// Streamed reports that nothing is.
func (comparing) Streamed(context.Context, string) (Streamed, bool) { return Streamed{}, false }

// Finished reports that nothing is: an earlier run's files are compared like all.
func (comparing) Finished(string, int64) (FinishedFile, bool) { return nil, false }

// Publish does nothing: dst is there.
func (comparing) Publish() error { return nil }

// Abort does nothing.
func (comparing) Abort(bool) error { return nil }

func (c comparing) String() string { return c.dst }

// comparedFile is a file that is there already.
type comparedFile struct {
	*os.File
	name string
}

// pieceBytes is how much is read at a time where the kernel does not copy.
const pieceBytes = 64 << 10

var buffers = sync.Pool{New: func() any { return new([pieceBytes]byte) }}

// WriteAt compares p with what is there.
func (f comparedFile) WriteAt(p []byte, off int64) (int, error) {
	there := buffers.Get().(*[pieceBytes]byte)
	defer buffers.Put(there)
	for n := 0; n < len(p); {
		k := min(len(p)-n, pieceBytes)
		if _, err := f.ReadAt(there[:k], off+int64(n)); err != nil {
			return n, err
		}
		if !bytes.Equal(p[n:n+k], there[:k]) {
			return n, &different{f.name, "has other content"}
		}
		n += k
	}
	return len(p), nil
}

// CopyAt compares what would be copied with what is there.
func (f comparedFile) CopyAt(to int64, src io.ReaderAt, from, n int64) error {
	return inPieces(src, from, n, func(p []byte, at int64) error {
		_, err := f.WriteAt(p, to+at)
		return err
	})
}

// Allocated says that the space is there.
func (f comparedFile) Allocated() error { return nil }

// Commit closes the file.
func (f comparedFile) Commit() error { return f.Close() }
