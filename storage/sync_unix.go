//go:build unix

package storage

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// SyncDir makes the names in a folder durable.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) { // not every file system syncs folders
		return err
	}
	return nil
}

// IsDiskError reports whether an error is about the place that is written to, and may be gone when the run is tried
// again: a full or failing disk, a lost share.
func IsDiskError(err error) bool {
	for _, e := range []error{unix.ENOSPC, unix.EDQUOT, unix.EIO, unix.EROFS, unix.ESTALE, unix.ETIMEDOUT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// IsMountPoint reports whether something is mounted at the path, so that it cannot be renamed.
func IsMountPoint(path string) bool {
	var at, above unix.Stat_t
	if unix.Lstat(path, &at) != nil || unix.Stat(filepath.Dir(path), &above) != nil {
		return false
	}
	return at.Mode&unix.S_IFMT == unix.S_IFDIR && at.Dev != above.Dev
}

// Lock takes the file for this process alone, and reports false where another has it. It ends with the process, or
// when f is closed.
func Lock(f *os.File) (bool, error) { return lock(f, unix.LOCK_EX) }

// LockShared is Lock for several at once: they keep out who would have the file alone, and the other way round.
func LockShared(f *os.File) (bool, error) { return lock(f, unix.LOCK_SH) }

func lock(f *os.File, how int) (bool, error) {
	err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	if err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.ENOLCK) {
		return false, &os.PathError{Op: "lock", Path: f.Name(), Err: err}
	}
	return true, nil
}
