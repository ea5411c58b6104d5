// Package storage reads and writes local files: names that stay in their folder,
// copies made by the kernel, space taken before it is filled, write-back that
// starts early, and one folder put in the place of another.
package storage

import (
	"io"
	"os"
)

// copyByHand is CopyRange through memory.
func copyByHand(dst *os.File, dstOff int64, src *os.File, srcOff, n int64) error {
	m, err := io.Copy(io.NewOffsetWriter(dst, dstOff), io.NewSectionReader(src, srcOff, n))
	if err == nil && m < n {
		err = &os.PathError{Op: "read", Path: src.Name(), Err: io.ErrUnexpectedEOF}
	}
	return err
}
