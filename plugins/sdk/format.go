package sdk

import (
	"context"
	"io"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// Format is a kind of file that holds tensors. It is safe for concurrent use.
type Format interface {
	Info() FormatInfo
	// Open reads and checks the headers of a file. The context holds for the call.
	Open(ctx context.Context, path string) (Container, error)
}

// Layouter is a Format that says where each byte of its files goes, before any is written.
type Layouter interface {
	Format
	// Layout places tensors; the result depends on the arguments alone. formats.LayOut does what most formats have in
	// common.
	Layout(ctx context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error)
}

// Streamer is a Format that writes its files itself, since their bytes are not known before the data is.
type Streamer interface {
	Format
	// Create begins the file at path, and writes nothing anywhere else. The context holds until the file is finished or
	// aborted.
	Create(ctx context.Context, path string, tensors []tensor.Info, m formats.Metadata) (formats.Writer, error)
}

// Sniffer is a Format that has neither extensions, nor file names, nor magic bytes.
type Sniffer interface {
	Format
	// Sniff reports whether a file is of the format. It reads a few bytes.
	Sniff(ctx context.Context, path string) (bool, error)
}

// FormatInfo describes a format. A file is of it if it has one of the extensions or file names, where there are any,
// and one of the magics, where there are any.
type FormatInfo struct {
	Name       string   // what --to takes: lower-case letters, digits, - and _
	Extensions []string // with the dot
	Magic      []Magic
	FileNames  []string // globs of base names, as path.Match has them
	// DTypes are those that the format can hold; none stands for all.
	DTypes []tensor.DType
	// Written are those of the extensions that files are written with, the usual one first; none stands for all.
	Written []string
}

// Magic are bytes of a file by which it is known, within its first 4096.
type Magic struct {
	Offset int64
	Bytes  []byte
}

// Container is an open file. Its names and texts are UTF-8, and all metadata go in one message of at most 4 MiB.
type Container struct {
	Metadata formats.Metadata // is sent as text
	// Files are those that it consists of, relative to the folder of the one that was opened, with slashes; nil stands for
	// that one alone.
	Files []string
	// Tensors are listed in the order of their data.
	Tensors []Tensor
	// Close, where it is not nil, is called when nothing more is read.
	Close func() error
}

// Tensor is a tensor of a container.
type Tensor struct {
	tensor.Info
	File string // one of Files; empty stands for the first
	// Offset is where the data begins in the file, where it lies there as it is.
	Offset int64
	// Data, where it is not nil, gives the data instead, from offset 0 on. It is safe for concurrent use.
	Data io.ReaderAt
}
