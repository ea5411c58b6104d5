package storage

import "io/fs"

// Links is how many names a file has, which is not looked at here.
func Links(fs.FileInfo) uint64 { return 1 }
