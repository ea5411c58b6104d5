//go:build !race

// Package race tells the race detector about memory that assembly touches,
// which it does not see by itself. Without -race it does nothing.
package race

// Enabled says whether this build has the race detector.
const Enabled = false

// ReadSlice says that all elements of s are read.
func ReadSlice[T any](s []T) {}

// WriteSlice says that all elements of s are written.
func WriteSlice[T any](s []T) {}
