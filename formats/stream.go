package formats

import (
	"context"
	"fmt"
	"slices"

	"github.com/lorakit/lorakit/tensor"
)

// UnknownSize is the Size of a Shard whose file a Streamer writes.
const UnknownSize = -1

// Streamer is a Format that writes its files itself, since their bytes are not known before the data is: compressed
// ones, or those that a library writes. Its Layout gives shards whose Size is UnknownSize, with no Frame. Their Offsets
// are those of a scratch file in which the data stands tensor after tensor, in the order of Tensors; LayOutStreams
// makes such a Layout.
//
// The same tensors and metadata become the same bytes. Where another version of the format makes others, it says which
// one it is by a method Version() string: what was begun with one is not gone on with by another.
type Streamer interface {
	Format
	// Create begins a file at path, where nothing is yet, of these tensors, to be written in this order. It writes that
	// one file, leaves none beside it, and never renames it. The context holds until the file is finished; where it ends
	// before, Write and Finish return soon, and Abort comes after it.
	Create(ctx context.Context, path string, tensors []tensor.Info, metadata Metadata) (Writer, error)
}

// Writer writes one file. It is used by one goroutine at a time.
type Writer interface {
	// Write takes the bytes of tensor number i that begin at off: tensors in order, each from its first byte to its last.
	// A tensor of no bytes is passed over. p is not kept.
	Write(i int, off int64, p []byte) error
	// Finish completes the file, syncs it, and returns its size. It is called once, after the last byte of the last
	// tensor.
	Finish(ctx context.Context) (int64, error)
	// Abort removes the file, finished or not, and gives up what else is held. It may be called more than once.
	Abort() error
}

// Blamer is a Writer that knows who is to blame where it has not written what it says it has, such as another process.
type Blamer interface {
	// Blame adds that to an error.
	Blame(err error) error
}

// LayOutStreams is LayOut of a Streamer: the same shards, of UnknownSize, and the same index, which is written as it is
// where there are several.
func LayOutStreams(tensors []tensor.Info, o Options, n Naming) (Layout, error) {
	if len(o.Files) > 0 {
		return Layout{}, fmt.Errorf("%s: found a file to be put into the weights' own, expected none: %w",
			tensor.Quote(o.Files[0].Name), ErrUnsupported)
	}
	return LayOut(tensors, o, n, func(name string, members []int, sizes []int64) (Shard, error) {
		s := Shard{Name: name, Size: UnknownSize, Tensors: slices.Clone(members), Offsets: make([]int64, len(members))}
		at := int64(0)
		for i, m := range members {
			s.Offsets[i] = at
			at += sizes[m]
		}
		return s, nil
	})
}
