//go:build race

// Package race tells the race detector about memory that assembly touches,
// which it does not see by itself. Without -race it does nothing.
package race

import (
	"runtime"
	"unsafe"
)

// Enabled says whether this build has the race detector.
const Enabled = true

// ReadSlice says that all elements of s are read.
func ReadSlice[T any](s []T) {
	if len(s) > 0 {
		runtime.RaceReadRange(unsafe.Pointer(&s[0]), len(s)*int(unsafe.Sizeof(s[0])))
	}
}

// WriteSlice says that all elements of s are written.
func WriteSlice[T any](s []T) {
	if len(s) > 0 {
		runtime.RaceWriteRange(unsafe.Pointer(&s[0]), len(s)*int(unsafe.Sizeof(s[0])))
	}
}
