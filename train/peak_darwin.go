package train

import "golang.org/x/sys/unix"

// peakMemory is the most memory that the process has had at once, in bytes, by the system's count; 0 where that is not
// known.
func peakMemory() int64 {
	var usage unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &usage) != nil {
		return 0
	}
	return usage.Maxrss
}
