package storage

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// Exchange swaps two folders or files of one file system in one step. It reports whether it did: not every file system
// can.
func Exchange(a, b string) (bool, error) {
	err := unix.RenamexNp(a, b, unix.RENAME_SWAP)
	if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EINVAL) {
		return false, nil
	}
	if err != nil {
		return false, &os.LinkError{Op: "exchange", Old: a, New: b, Err: err}
	}
	return true, nil
}
