//go:build unix && !linux

package host

import (
	"runtime"
	"syscall"
)

// maxrssUnit is what the kernel counts memory in.
var maxrssUnit = func() int64 {
	if runtime.GOOS == "darwin" || runtime.GOOS == "ios" {
		return 1
	}
	return 1 << 10
}()

// dieWithHost leaves it to the pipe that the plugin reads.
func dieWithHost(*syscall.SysProcAttr) {}
