//go:build !amd64 || purego

package kernels

// assembly returns no set: this build is plain Go.
func assembly() []*Set { return nil }

// mergeRowFast and keptFast do nothing here, and leave share where it is.

func (*Set) mergeRowFast([]byte, Float, []byte, Float, []float32, float32, *[2]sums) int { return 0 }

func (*Set) keptFast(_, _, _, _ []float32, _ *[2]sums) int { return 0 }
