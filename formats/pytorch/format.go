package pytorch

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

func init() { formats.Register(Format{}) }

// Kinds of errors beside those of package formats. Test for them with errors.Is.
var (
	// ErrUnsafe says that a pickle names something outside of the closed list of what a state dict needs. It was not run.
	ErrUnsafe = errors.New("not allowed in a state dict")
	// ErrUnsupported says that a file holds what PyTorch reads and lorakit does not, or was to hold what PyTorch does
	// not.
	ErrUnsupported = formats.ErrUnsupported
)

var extensions = []string{".bin", ".pt", ".pth", ".ckpt"}

// Format reads and lays out the files of torch.save. The zero value has the default limits; it is what is registered
// under the name "pytorch".
type Format struct {
	Limits Limits
}

// Limits bound what Open is willing to read, and Layout to write: past one of them they fail with formats.ErrLimit. A
// field that is zero has its default, which is far above any checkpoint known.
type Limits struct {
	PickleBytes    int64 // of one pickle; default 2^26. It bounds the opcodes too
	Memory         int64 // bytes that what a pickle builds may take, about; default 2^28
	StringBytes    int64 // of one string in a pickle; default 2^24
	Nesting        int   // marks within marks in a pickle; default 256
	Entries        int   // of one zip archive; default 2^20
	DirectoryBytes int64 // of one zip archive's directory; default 2^27
	Tensors        int   // in all files together; default 2^20
	Rank           int   // dimensions of a tensor; default 64, which is PyTorch's limit
	ExpandedBytes  int64 // of a tensor that is larger than its storage; default 2^32
	Shards         int   // files named by an index; default 10,000
	IndexBytes     int64 // size of an index; default 2^26
}

func (l Limits) withDefaults() Limits {
	return Limits{
		PickleBytes:    cmp.Or(l.PickleBytes, 1<<26),
		Memory:         cmp.Or(l.Memory, 1<<28),
		StringBytes:    cmp.Or(l.StringBytes, 1<<24),
		Nesting:        cmp.Or(l.Nesting, 256),
		Entries:        cmp.Or(l.Entries, 1<<20),
		DirectoryBytes: cmp.Or(l.DirectoryBytes, 1<<27),
		Tensors:        cmp.Or(l.Tensors, 1<<20),
		Rank:           cmp.Or(l.Rank, 64),
		ExpandedBytes:  cmp.Or(l.ExpandedBytes, 1<<32),
		Shards:         cmp.Or(l.Shards, 10_000),
		IndexBytes:     cmp.Or(l.IndexBytes, 1<<26),
	}
}

// Name returns "pytorch".
func (Format) Name() string { return "pytorch" }

// Extensions returns ".bin", ".pt", ".pth" and ".ckpt".
func (Format) Extensions() []string { return slices.Clone(extensions) }

// ReadOnly returns false.
func (Format) ReadOnly() bool { return false }

// Detect reports whether a file begins as torch.save writes them or is an index of such files, or whether a folder has
// one of them in it. A folder that has a safetensors file too is left to that format.
func (Format) Detect(ctx context.Context, dir storage.Folder, name string) (bool, error) {
	if name != "" {
		if isIndex(name) {
			return true, nil
		}
		return begins(ctx, dir, name, isWeights(name))
	}
	name, err := locate(ctx, dir)
	if errors.Is(err, errSeveral) {
		return true, nil
	}
	return name != "", err
}

// legacyMagic is how an old file begins in the protocol that torch.save has by default: the number
// 0x1950a86a20f9469cfc6c as a pickle.
var legacyMagic = []byte("\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")

// begins looks at the first bytes of a file. A file that has one of the format's extensions need only be a zip
// archive, a pickle or a tar archive.
func begins(ctx context.Context, dir storage.Folder, name string, named bool) (bool, error) {
	f, err := dir.Open(ctx, name)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var start [tarMagicAt + len(tarMagic)]byte
	n, err := f.ReadAt(start[:], 0)
	if n < len(start) && err != io.EOF {
		return false, err
	}
	return looksSaved(start[:n], named), nil
}

func looksSaved(b []byte, named bool) bool {
	switch {
	case bytes.HasPrefix(b, legacyMagic):
		return true
	case isZip(b) && len(b) >= localBytes:
		// PyTorch writes its pickle first.
		name := b[localBytes:]
		name = name[:min(len(name), int(binary.LittleEndian.Uint16(b[26:])))]
		return named || bytes.HasSuffix(name, []byte("/"+pickleName))
	}
	return named && (isPickle(b) || isTar(b))
}

func isZip(b []byte) bool { return bytes.HasPrefix(b, []byte("PK\x03\x04")) }

// isPickle knows a pickle of protocol 2 to 5 by its first two bytes.
func isPickle(b []byte) bool { return len(b) >= 2 && b[0] == opProto && b[1] >= 2 && b[1] <= 5 }

// The oldest files, of PyTorch 0.1, are tar archives.
const (
	tarMagicAt = 257
	tarMagic   = "ustar"
)

func isTar(b []byte) bool {
	return len(b) >= tarMagicAt && bytes.HasPrefix(b[tarMagicAt:], []byte(tarMagic))
}

func isWeights(name string) bool {
	return slices.ContainsFunc(extensions, func(e string) bool { return strings.HasSuffix(name, e) })
}

// isIndex knows the two spellings pytorch_model.bin.index.json and, for a variant, pytorch_model.bin.index.fp16.json.
func isIndex(name string) bool {
	_, rest, ok := strings.Cut(name, ".bin.index.")
	return ok && (rest == "json" || strings.HasSuffix(rest, ".json") && strings.Count(rest, ".") == 1)
}

func malformedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrMalformed)...)
}

func limitf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrLimit)...)
}

func unsupportedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, ErrUnsupported)...)
}

func tensorError(name string, err error) error {
	return fmt.Errorf("tensor %s: %w", tensor.Quote(name), err)
}
