package train

import (
	"bytes"
	"os"
	"strconv"
)

// peakMemory is the most memory that the process has had at once, in bytes, by the system's count; 0 where that is not
// known. Of Linux it is VmHWM: what getrusage says counts the parent that the process was forked from.
func peakMemory() int64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(status) {
		if rest, ok := bytes.CutPrefix(line, []byte("VmHWM:")); ok {
			fields := bytes.Fields(rest)
			if len(fields) == 2 && string(fields[1]) == "kB" {
				n, _ := strconv.ParseInt(string(fields[0]), 10, 64)
				return n << 10
			}
		}
	}
	return 0
}
