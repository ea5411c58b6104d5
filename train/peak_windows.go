package train

import (
	"unsafe"

	"golang.org/x/sys/windows"
)

var processMemory = windows.NewLazySystemDLL("kernel32.dll").NewProc("K32GetProcessMemoryInfo")

// peakMemory is the most memory that the process has had at once, in bytes, by the system's count; 0 where that is not
// known.
func peakMemory() int64 {
	var counters struct { // PROCESS_MEMORY_COUNTERS
		size, pageFaults uint32
		peak, set        uintptr
		rest             [6]uintptr
	}
	counters.size = uint32(unsafe.Sizeof(counters))
	ok, _, _ := processMemory.Call(uintptr(windows.CurrentProcess()), uintptr(unsafe.Pointer(&counters)),
		uintptr(counters.size))
	if ok == 0 {
		return 0
	}
	return int64(counters.peak)
}
