//go:build !linux

package storage

import (
	"io"
	"os"
)

// CopyRange copies n bytes from src at srcOff to dst at dstOff without moving
// either file's position. A source that ends early is an io.ErrUnexpectedEOF.
func CopyRange(dst *os.File, dstOff int64, src io.ReaderAt, srcOff, n int64) error {
	return copyByHand(dst, dstOff, src, srcOff, n)
}

// Preallocate makes f size bytes long.
func Preallocate(f *os.File, size int64) error { return f.Truncate(size) }

// StartWriteback does nothing here: Sync does it all.
func StartWriteback(*os.File) {}
