package pipeline

import (
	"context"
	"io"
)

// Sink is where a result goes: file by file, and then all of it in one step. Local files are one, and comparing with
// what is there already, instead of writing, is another.
type Sink interface {
	// Create begins a file of a known size. The name is relative to the destination, with slashes.
	Create(name string, size int64) (File, error)
	// Finished opens a file of that size that an earlier run has committed.
	Finished(name string, size int64) (FinishedFile, bool)
	// Folder makes a folder, with nothing in it, for a format to write the file of that name itself. What is left of it
	// is removed by the caller.
	Folder(name string) (string, error)
	// Adopt takes over a file that has been written so, and synced. It is committed then.
	Adopt(ctx context.Context, path string, f Streamed) error
	// Streamed finds a file of that name that an earlier run has adopted, and that is still what it was.
	Streamed(ctx context.Context, name string) (Streamed, bool)
	// Publish makes what was committed the destination, whole.
	Publish() error
	// Abort gives up. Where keep is set, what was committed stays for a later run to go on with.
	Abort(keep bool) error
	// String names the place where committed files are until Publish.
	String() string
}

// Streamed is a file that its format has written itself, as it is when it is complete.
type Streamed struct {
	Name   string `json:"name"` // relative to the destination
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
	// Kept are the shares that adapters keep of the shard's changed weights. They cannot be measured again: where the
	// weights are in the file is the format's own.
	Kept [][]string `json:"kept,omitempty"`
}

// File is a file on its way into a Sink. Several goroutines may write to it at once.
type File interface {
	FinishedFile
	io.WriterAt
	// CopyAt writes n bytes of src, from its byte from on, to the offset to.
	CopyAt(to int64, src io.ReaderAt, from, n int64) error
	// Allocated waits until the file has its space; an error says that it cannot be had.
	Allocated() error
	// Commit makes the file durable and gives it its name. It is closed then.
	Commit() error
}

// FinishedFile is a file that can be read back.
type FinishedFile interface {
	io.ReaderAt
	// Close gives the file up, where it was not committed. It may be called again.
	io.Closer
}
