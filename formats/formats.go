// Package formats defines what a checkpoint container is: something that stores named byte arrays. One sub-package
// implements one container and registers itself, as image decoders do; import it for its effect:
//
//	import _ "github.com/lorakit/lorakit/formats/safetensors"
//
// A container knows nothing of what the arrays mean. That several of them make up one quantised weight is the business
// of package quant.
//
// A format reads files of a storage.Folder and writes none: Layout says where each byte goes. Only a Streamer, whose
// bytes are not known beforehand, writes its files itself. All that goes in and out of the methods of a format are
// values, so that it can live in another process; Failure is an error on its way.
package formats

import (
	"context"
	"errors"
	"io"

	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// Kinds of errors. Test for them with errors.Is.
var (
	// ErrMalformed says that a file breaks the rules of its format.
	ErrMalformed = errors.New("malformed")
	// ErrLimit says that a file is larger, or holds more, than lorakit is willing to read.
	ErrLimit = errors.New("limit exceeded")
	// ErrUnsupported says that a file holds what its format has and lorakit does not, or was to hold what the format does
	// not.
	ErrUnsupported = errors.New("not supported")
	// ErrUnknown says that no registered format reads what is there.
	ErrUnknown = errors.New("unknown format")
	// ErrFailed says that a format, or a scheme, that lives in another process has failed there: the process is gone,
	// hangs, or does not keep to what was agreed. What was done before stands, so that going on from it may help.
	ErrFailed = errors.New("the other process has failed")
	// ErrOutside says that a checkpoint points to a file outside of its folder.
	ErrOutside = storage.ErrOutside
)

// Tensor is one named byte array of a container.
type Tensor struct {
	tensor.Info
	File   string      // base name of the file that holds it
	Data   io.ReaderAt // the file: a storage.OSFile where the kernel can copy the bytes
	Offset int64       // where the bytes begin in Data
	Bytes  int64       // how many there are: Info.Size
}

// Container is an opened container: its headers have been read and checked, its data has not been touched.
type Container interface {
	// Tensors lists what the container holds, in the order of its files and of the data in each. The caller does not
	// change it.
	Tensors() []Tensor
	// Metadata returns what is stored with the tensors. The caller does not change it.
	Metadata() Metadata
	// Files returns the base names of all files the container consists of, an index included.
	Files() []string
	Close() error
}

// Bearer is a Container that has small files of a checkpoint in it, such as its config.json or its tokenizer, which
// other formats have beside the weights.
type Bearer interface {
	Container
	// SmallFiles returns them whole. The caller does not change them.
	SmallFiles() []File
}

// Layout says, before a byte of data is written, which files a set of tensors becomes and where each of them goes.
type Layout struct {
	Shards []Shard `json:"shards"`
	// Extra are small files that are written whole after all shards, such as an index.
	Extra []File `json:"extra,omitempty"`
	// Notices say, in a sentence each, what the format has no place for and is left out.
	Notices []string `json:"notices,omitempty"`
}

// Shard is one file of tensors.
type Shard struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // of the whole file, or UnknownSize
	Frame
	// Tensors holds indices into the slice that was laid out, and for each the absolute offset of its bytes in the file.
	Tensors []int   `json:"tensors"`
	Offsets []int64 `json:"offsets"`
}

// File is a small file with all of its content.
type File struct {
	Name string `json:"name"`
	Data []byte `json:"data"`
}

// Options steer Layout.
type Options struct {
	// MaxShardSize is the most bytes of tensors a shard may hold; a larger tensor gets a shard of its own. Zero means no
	// limit.
	MaxShardSize int64
	// MaxTensors is the most tensors a shard may hold; a larger group gets a shard of its own. Zero means no limit.
	MaxTensors int
	// SingleFile, where not empty, is the name of the one file to write.
	SingleFile string
	Metadata   Metadata
	// Stem, where not empty, is what the names of several files begin with instead of the format's own.
	Stem string
	// Parameters is the number of parameters to state in an index: buffers are not counted, and of a quantised weight the
	// elements it stands for, not the bytes that hold them. Zero stands for the elements of all tensors.
	Parameters int64
	// Files are the small files that the format has claimed, see Claimer.
	Files []File
	// Groups, where not nil, gives for each tensor the number of the group it belongs to: tensors of one group stand in
	// one shard.
	Groups []int
}

// Claimer is a Format that has small files of a checkpoint, such as its config.json, in its own. What it claims is for
// Layout, and not written beside the weights.
type Claimer interface {
	Format
	// Claim chooses from the names of all small files that a checkpoint has beside its weights.
	Claim(ctx context.Context, names []string) ([]string, error)
}

// Format reads and, where it is not ReadOnly, writes one kind of container.
type Format interface {
	// Name is what --to takes, such as "safetensors".
	Name() string
	// Extensions lists the endings of the format's files, with the dot.
	Extensions() []string
	// Detect reports whether the file of that name in a folder, or with no name the folder itself, looks like this
	// format. It reads a few bytes at most.
	Detect(ctx context.Context, dir storage.Folder, name string) (bool, error)
	// Open reads and checks the headers of the file or folder. The context holds until the container is closed.
	Open(ctx context.Context, dir storage.Folder, name string) (Container, error)
	// ReadOnly reports whether Layout always fails.
	ReadOnly() bool
	// Holds says why a tensor of this type and shape has no place in the format, or nothing. What the format
	// has no place for may be written as something else.
	Holds(t tensor.Info) error
	// Layout places the tensors, which all have valid sizes. The result depends on the arguments alone.
	Layout(ctx context.Context, tensors []tensor.Info, o Options) (Layout, error)
}
