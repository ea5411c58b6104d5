package pipeline

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

// stageFile is a file that is written in a stage. It has the ending .part until it is committed.
type stageFile struct {
	*os.File
	scratch   bool          // it is soon gone, and need not be on the disk
	dirty     atomic.Int64  // bytes written since the last write-back was started
	allocated chan struct{} // closed when its space is taken, or cannot be
	full      error         // why it cannot, once allocated is closed
	closed    atomic.Bool   // committed, or given up
}

// allocatedAtOnce is how much space is taken in one step: while a step is under way the kernel lets nobody write to the
// file.
const allocatedAtOnce = 2 << 20

// Create begins a file of the stage. All its space is taken meanwhile, so that a full disk is known early.
func (s *stage) Create(name string, size int64) (File, error) {
	s.owns(name)
	path := filepath.Join(s.out(), filepath.FromSlash(name)+partSuffix)
	if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o666)
	if err != nil {
		return nil, err
	}
	if err := file.Truncate(size); err != nil {
		file.Close()
		return nil, err
	}
	return newStageFile(file, size), nil
}

// newStageFile takes the space of a file that has its size.
func newStageFile(file *os.File, size int64) *stageFile {
	f := &stageFile{File: file, allocated: make(chan struct{})}
	if size <= allocatedAtOnce {
		f.allocate(size)
	} else {
		go f.allocate(size)
	}
	return f
}

// allocate takes the space of the file, step by step.
func (f *stageFile) allocate(size int64) {
	defer close(f.allocated)
	for off := int64(0); off < size && f.full == nil && !f.closed.Load(); off += allocatedAtOnce {
		f.full = storage.Allocate(f.File, off, min(allocatedAtOnce, size-off))
	}
}

// Allocated waits until the file has its space.
func (f *stageFile) Allocated() error {
	<-f.allocated
	return f.full
}

// Finished opens a file that an earlier run has committed to the stage.
func (s *stage) Finished(name string, size int64) (FinishedFile, bool) {
	path := filepath.Join(s.out(), filepath.FromSlash(name))
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() != size {
		return nil, false
	}
	f, err := os.Open(path)
	s.owns(name)
	return f, err == nil
}

// WriteAt writes, and has the disk begin with what has gathered.
func (f *stageFile) WriteAt(p []byte, off int64) (int, error) {
	select {
	case <-f.allocated:
		if f.full != nil {
			return 0, f.full
		}
	default:
	}
	n, err := f.File.WriteAt(p, off)
	f.wrote(int64(n))
	return n, err
}

// CopyAt copies within the kernel where both are files.
func (f *stageFile) CopyAt(to int64, src io.ReaderAt, from, n int64) error {
	if file, ok := storage.OSFile(src); ok {
		if err := storage.CopyRange(f.File, to, file, from, n); err != nil {
			return err
		}
		f.wrote(n)
		return nil
	}
	return inPieces(src, from, n, func(p []byte, at int64) error {
		_, err := f.WriteAt(p, to+at)
		return err
	})
}

// writeBack is how many bytes of a file are written before the disk is set to work on them.
const writeBack = 16 << 20

func (f *stageFile) wrote(n int64) {
	if f.dirty.Add(n) >= writeBack && !f.scratch {
		f.dirty.Store(0)
		storage.StartWriteback(f.File)
	}
}

// Close gives the file up, and its space back.
func (f *stageFile) Close() error {
	if f.closed.Swap(true) {
		return nil
	}
	<-f.allocated
	return errors.Join(f.File.Close(), os.Remove(f.Name()))
}

// Commit makes the file durable under its name.
func (f *stageFile) Commit() error {
	if err := f.Allocated(); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	f.closed.Store(true)
	if err := f.File.Close(); err != nil {
		return err
	}
	part := f.Name()
	return os.Rename(part, part[:len(part)-len(partSuffix)])
}

// inPieces reads n bytes of src, from its byte from on, and hands them on piece by piece, each with its distance from
// the first. A RangeReader is asked once.
func inPieces(src io.ReaderAt, from, n int64, use func(p []byte, at int64) error) error {
	if r, ok := src.(formats.RangeReader); ok {
		return inOneRange(r, from, n, use)
	}
	b := buffers.Get().(*[pieceBytes]byte)
	defer buffers.Put(b)
	for at := int64(0); at < n; at += pieceBytes {
		p := b[:min(pieceBytes, n-at)]
		if err := formats.ReadFull(src, p, from+at); err != nil {
			return err
		}
		if err := use(p, at); err != nil {
			return err
		}
	}
	return nil
}

// inOneRange is inPieces of a RangeReader, which is held to its word: it may be another process.
func inOneRange(src formats.RangeReader, from, n int64, use func(p []byte, at int64) error) error {
	next := int64(0)
	err := src.ReadRange(from, n, func(p []byte, at int64) error {
		if at != next || int64(len(p)) > n-next {
			return fmt.Errorf("found bytes %d to %d of a range of %d, expected those from %d on: %w", at, at+int64(len(p)), n,
				next, formats.ErrMalformed)
		}
		next += int64(len(p))
		return use(p, at)
	})
	if err == nil && next < n {
		err = fmt.Errorf("read %d of %d bytes at offset %d: %w", next, n, from, io.ErrUnexpectedEOF)
	}
	return err
}
