//go:build !linux

package storage

import (
	"io"
	"os"
)

// CopyRange copies n bytes from src at srcOff to dst at dstOff without moving either file's position. A source that
// ends early is an io.ErrUnexpectedEOF.
func CopyRange(dst *os.File, dstOff int64, src io.ReaderAt, srcOff, n int64) error {
	return copyByHand(dst, dstOff, src, srcOff, n)
}

// Allocate does nothing here: space is taken as it is written to.
func Allocate(*os.File, int64, int64) error { return nil }

// StartWriteback does nothing here: Sync does it all.
func StartWriteback(*os.File) {}
