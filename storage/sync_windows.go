package storage

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"
)

// SyncDir does nothing here: Windows keeps the names in a folder itself.
func SyncDir(string) error { return nil }

// IsDiskError reports whether an error is about the place that is written to, and may be gone when the run is tried
// again: a full or failing disk.
func IsDiskError(err error) bool {
	for _, e := range []error{windows.ERROR_DISK_FULL, windows.ERROR_HANDLE_DISK_FULL, windows.ERROR_WRITE_FAULT,
		windows.ERROR_IO_DEVICE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// IsMountPoint reports false: Windows renames no volume by a path.
func IsMountPoint(string) bool { return false }

// Lock takes the file for this process alone, and reports false where another has it. It ends with the process, or
// when f is closed.
func Lock(f *os.File) (bool, error) { return lock(f, windows.LOCKFILE_EXCLUSIVE_LOCK) }

// LockShared is Lock for several at once: they keep out who would have the file alone, and the other way round.
func LockShared(f *os.File) (bool, error) { return lock(f, 0) }

func lock(f *os.File, how uint32) (bool, error) {
	// far past the end: the lock bars others from reading what it covers
	err := windows.LockFileEx(windows.Handle(f.Fd()), how|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0,
		&windows.Overlapped{OffsetHigh: 0x7fffffff})
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "lock", Path: f.Name(), Err: err}
	}
	return true, nil
}
