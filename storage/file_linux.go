package storage

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// CopyRange copies n bytes from src at srcOff to dst at dstOff, within the kernel where src is an OSFile and the file
// systems can, without moving either file's position. A source that ends early is an io.ErrUnexpectedEOF.
func CopyRange(dst *os.File, dstOff int64, src io.ReaderAt, srcOff, n int64) error {
	from, ok := OSFile(src)
	if !ok {
		return copyByHand(dst, dstOff, src, srcOff, n)
	}
	for n > 0 {
		m, err := unix.CopyFileRange(int(from.Fd()), &srcOff, int(dst.Fd()), &dstOff, int(min(n, 1<<30)), 0)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS),
			errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EBADF), errors.Is(err, unix.EPERM):
			return copyByHand(dst, dstOff, src, srcOff, n)
		case err != nil:
			return &os.PathError{Op: "copy_file_range", Path: dst.Name(), Err: err}
		case m == 0:
			// Some file systems answer 0 where they cannot copy: let a read say whether the source has ended.
			return copyByHand(dst, dstOff, src, srcOff, n)
		}
		n -= int64(m)
	}
	return nil
}

// Allocate takes space for n bytes of f from off on, which are within its length, so that a disk that is too small says
// so now and not at the end. Where that cannot be done it does nothing.
func Allocate(f *os.File, off, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, off, n)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
			return nil
		case err != nil:
			return &os.PathError{Op: "allocate", Path: f.Name(), Err: err}
		}
		return nil
	}
}

// StartWriteback asks the kernel to begin writing what of f is not on disk yet, and does not wait for it, so that a
// later Sync has little left to do.
func StartWriteback(f *os.File) {
	// Only a hint: what it fails to start, Sync does.
	_ = unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
}

// Exchange swaps two folders or files of one file system in one step. It reports whether it did: not every file system
// can.
func Exchange(a, b string) (bool, error) {
	err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
		return false, nil
	}
	if err != nil {
		return false, &os.LinkError{Op: "exchange", Old: a, New: b, Err: err}
	}
	return true, nil
}
