package safetensors

import (
	"cmp"
	"context"
	"encoding/binary"
	"io"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

func init() { formats.Register(Format{}) }

const (
	extension      = ".safetensors"
	indexExtension = ".safetensors.index.json"

	// lengthBytes is the size of the number in front of the header.
	lengthBytes = 8
	// maxHeader is the reference's own limit.
	maxHeader = 100_000_000
)

// Format reads and lays out safetensors. The zero value has the default limits; it is what is registered under the
// name "safetensors".
type Format struct {
	Limits Limits
}

// Limits bound what Open is willing to read: past one of them it fails with formats.ErrLimit. A field that is zero has
// its default, which is far above any checkpoint known.
type Limits struct {
	HeaderBytes int64 // of one file's header; default 100,000,000, the reference's limit
	StringBytes int   // of one string, number or run of white space in a header; default 2^24
	Metadata    int   // strings in the metadata of one file; default 2^20
	Tensors     int   // in all files together; default 2^20
	NameBytes   int   // of a tensor's name; default 2^20
	Rank        int   // dimensions of a shape; default 2^16
	Dimensions  int   // of all shapes of one file together; default 2^23
	Shards      int   // files named by an index; default 10,000
	IndexBytes  int64 // size of an index; default 2^28
}

func (l Limits) withDefaults() Limits {
	return Limits{
		HeaderBytes: cmp.Or(l.HeaderBytes, maxHeader),
		StringBytes: cmp.Or(l.StringBytes, 1<<24),
		Metadata:    cmp.Or(l.Metadata, 1<<20),
		Tensors:     cmp.Or(l.Tensors, 1<<20),
		NameBytes:   cmp.Or(l.NameBytes, 1<<20),
		Rank:        cmp.Or(l.Rank, 1<<16),
		Dimensions:  cmp.Or(l.Dimensions, 1<<23),
		Shards:      cmp.Or(l.Shards, 10_000),
		IndexBytes:  cmp.Or(l.IndexBytes, 1<<28),
	}
}

// Name returns "safetensors".
func (Format) Name() string { return "safetensors" }

// ReadOnly returns false.
func (Format) ReadOnly() bool { return false }

// Extensions returns ".safetensors".
func (Format) Extensions() []string { return []string{extension} }

// Detect reports whether a file is named *.safetensors or *.safetensors.index.json, or begins as one does, or whether
// a folder has such a file in it.
func (Format) Detect(ctx context.Context, dir storage.Folder, name string) (bool, error) {
	if name == "" {
		entries, err := dir.List(ctx, "")
		if err != nil {
			return false, err
		}
		for _, e := range entries {
			if !hidden(e.Name) && (isWeights(e.Name) || isIndex(e.Name)) {
				return true, nil
			}
		}
		return false, nil
	}
	if isWeights(name) || isIndex(name) {
		return true, nil
	}
	f, err := dir.Open(ctx, name)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var start [lengthBytes + 1]byte
	if n, err := f.ReadAt(start[:], 0); n < len(start) {
		if err == io.EOF {
			err = nil
		}
		return false, err
	}
	n := binary.LittleEndian.Uint64(start[:])
	return n <= maxHeader && int64(n) <= f.Size()-lengthBytes && start[lengthBytes] == '{', nil
}

func isWeights(name string) bool { return strings.HasSuffix(name, extension) }

// isIndex knows the two spellings model.safetensors.index.json and, for a variant, model.safetensors.index.fp16.json.
func isIndex(name string) bool {
	if strings.HasSuffix(name, indexExtension) {
		return true
	}
	_, variant, ok := strings.Cut(name, ".safetensors.index.")
	return ok && strings.HasSuffix(variant, ".json") && strings.Count(variant, ".") == 1
}
