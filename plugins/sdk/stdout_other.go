//go:build !unix

package sdk

import (
	"os"

	"github.com/lorakit/lorakit/plugins/wire"
)

// handshake is the standard output that a host has given, nil where there is none. What is printed goes to standard
// error from the start.
var handshake = takeStdout()

func takeStdout() *os.File {
	if os.Getenv(wire.Handshake.MagicCookieKey) != wire.Handshake.MagicCookieValue {
		return nil
	}
	stdout := os.Stdout
	os.Stdout = os.Stderr
	return stdout
}
