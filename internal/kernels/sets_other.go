//go:build !amd64 || purego

package kernels

// assembly returns no set: this build is plain Go.
func assembly() []*Set { return nil }
