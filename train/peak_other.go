//go:build !linux && !darwin && !windows

package train

// peakMemory is not known on other systems.
func peakMemory() int64 { return 0 }
