// Package storage has what is read and written. What is read is a File of a Folder, which says its size and its
// version; Local is a folder of this machine, whose names stay in it. Of local files it also has copies made by the
// kernel, space taken before it is filled, write-back that starts early, and one folder put in the place of another.
package storage

import (
	"io"
	"os"
)

// copyByHand is CopyRange through memory.
func copyByHand(dst *os.File, dstOff int64, src io.ReaderAt, srcOff, n int64) error {
	m, err := io.Copy(io.NewOffsetWriter(dst, dstOff), io.NewSectionReader(src, srcOff, n))
	if err == nil && m < n {
		err = io.ErrUnexpectedEOF
		if f, ok := OSFile(src); ok {
			err = &os.PathError{Op: "read", Path: f.Name(), Err: err}
		}
	}
	return err
}
