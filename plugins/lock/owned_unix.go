//go:build unix

package lock

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

func owned(path string, info fs.FileInfo) error {
	if s, ok := info.Sys().(*syscall.Stat_t); ok && int(s.Uid) != os.Geteuid() {
		return fmt.Errorf("%s: %w: found the owner %d, expected %d", path, ErrUnsafe, s.Uid, os.Geteuid())
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return fmt.Errorf("%s: %w: found the mode %04o, expected that neither group nor others may write (chmod go-w)", path,
			ErrUnsafe, mode)
	}
	return nil
}

// executable reports whether a file may be run.
func executable(info fs.FileInfo) bool { return info.Mode()&0o111 != 0 }
