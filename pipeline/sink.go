package pipeline

import "io"

// Sink is where a result goes: file by file, and then all of it in one step. Local files are one, and comparing with
// what is there already, instead of writing, is another.
type Sink interface {
	// Create begins a file of a known size. The name is relative to the destination, with slashes.
	Create(name string, size int64) (File, error)
	// Finished opens a file of that size that an earlier run has committed.
	Finished(name string, size int64) (FinishedFile, bool)
	// Publish makes what was committed the destination, whole.
	Publish() error
	// Abort gives up. Where keep is set, what was committed stays for a later run to go on with.
	Abort(keep bool) error
	// String names the place where committed files are until Publish.
	String() string
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
