//go:build unix

package sdk

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/lorakit/lorakit/plugins/wire"
)

// handshake is the standard output that a host has given, nil where there is none. The descriptor leads to standard
// error from the start, so that nothing that is printed comes before the handshake, or after it.
var handshake = takeStdout()

func takeStdout() *os.File {
	if os.Getenv(wire.Handshake.MagicCookieKey) != wire.Handshake.MagicCookieValue {
		return nil
	}
	fd, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 3)
	if err == nil {
		err = duplicate(2, 1)
	}
	if err != nil {
		panic("sdk: standard output cannot be taken: " + err.Error()) // there is nobody to tell
	}
	return os.NewFile(uintptr(fd), "handshake")
}
