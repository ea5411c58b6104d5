package storage

import (
	"context"
	"io"
)

// Folder is a place with files that are read: a folder of this machine, or whatever can stand for one. It is safe for
// concurrent use.
type Folder interface {
	// Open opens a file for reading by its name, a slash-separated path below the folder. A name that leads out of the
	// folder is ErrOutside, what is no file ErrNotRegular, what is not there fs.ErrNotExist, and a link to nothing
	// ErrDangling. An error names the file. The context holds for all reads of the file.
	Open(ctx context.Context, name string) (File, error)
	// List lists what is in the folder, or with a name in that folder below it, in the order of names.
	List(ctx context.Context, name string) ([]Entry, error)
	// Path is what a file of the folder is called in messages, and with an empty name the folder itself.
	Path(name string) string
}

// File is an opened file. What it says of itself is as it was when it was opened.
type File interface {
	io.ReaderAt
	io.Closer
	Size() int64
	// Version is one line that is another when the content is: of a local file its modification time.
	Version() string
}

// Entry is something in a Folder.
type Entry struct {
	Name string
	// Folder says that it can be listed. Of links it is set for those to folders that are followed, but not
	// for one that leads back to a folder around it.
	Folder bool
	// Link says that it is a link. One that leads to nothing is listed as well.
	Link bool
}
