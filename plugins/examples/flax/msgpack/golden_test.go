package msgpack

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

const fixtures = "../../../../fixtures/flax/"

// golden is what flax reads of a file.
type golden struct {
	Tensors []struct {
		Path   []string
		DType  string
		Shape  tensor.Shape
		SHA256 string
	}
	Others []struct {
		Path   []string
		Python string
	}
}

// goldens are those of the single files.
func goldens(t *testing.T) map[string]golden {
	b, err := os.ReadFile(fixtures + "tensors.json")
	require.NoError(t, err)
	var all map[string]golden
	require.NoError(t, json.Unmarshal(b, &all))
	for name := range all {
		if filepath.Ext(name) == "" {
			delete(all, name)
		}
	}
	require.Len(t, all, 9)
	return all
}

func open(t *testing.T, name string) ([]byte, Contents) {
	b, err := os.ReadFile(fixtures + name)
	require.NoError(t, err)
	c, err := Read(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err, name)
	return b, c
}

func data(file []byte, t Tensor) []byte {
	var b []byte
	for _, r := range t.Ranges {
		b = append(b, file[r.Offset:r.Offset+r.Bytes]...)
	}
	return b
}

// assemble writes a file as a layout says.
func assemble(t *testing.T, l Layout, data func(place int) []byte) []byte {
	b := make([]byte, l.Size)
	written := int64(0)
	put := func(at int64, p []byte) {
		written += int64(copy(b[at:], p))
	}
	for _, p := range l.Pieces {
		put(p.Offset, p.Bytes)
	}
	for i, place := range l.Order {
		put(l.Offsets[i], data(place))
	}
	require.Equal(t, l.Size, written, "bytes that are written")
	return b
}

func infos(tensors []Tensor) []tensor.Info {
	all := make([]tensor.Info, len(tensors))
	for i, t := range tensors {
		all[i] = t.Info
	}
	return all
}

func size(t *testing.T, x Tensor) int64 {
	n, err := x.Size()
	require.NoError(t, err)
	return n
}

func numpyName(d tensor.DType) string {
	for _, x := range dtypes {
		if x.dtype == d {
			return x.name
		}
	}
	return ""
}

func TestReadAsFlaxDoes(t *testing.T) {
	for name, want := range goldens(t) {
		file, c := open(t, name)
		require.Len(t, c.Tensors, len(want.Tensors), name)
		for i, w := range want.Tensors {
			got := c.Tensors[i]
			assert.Equal(t, w.Path, Split(got.Name), name)
			assert.Equal(t, w.DType, numpyName(got.DType), "%s: %q", name, got.Name)
			assert.Equal(t, w.Shape, got.Shape, "%s: %q", name, got.Name)
			sum := sha256.Sum256(data(file, got))
			assert.Equal(t, w.SHA256, hex.EncodeToString(sum[:]), "%s: %q", name, got.Name)
			pieces := 1
			if name == "chunked.msgpack" {
				pieces = (int(size(t, got)) + 63) / 64 // as long as the chunks are that it was written with
			}
			assert.Len(t, got.Ranges, max(1, pieces), "%s: %q", name, got.Name)
		}
	}
}

func TestReadMetadata(t *testing.T) {
	_, c := open(t, "leaves.msgpack")
	assert.Equal(t, formats.Metadata{
		{Name: "step", Value: int64(3)}, {Name: "negative", Value: int64(-40000)},
		{Name: "large", Value: uint64(1<<63 + 1)}, {Name: "rate", Value: 0.1}, {Name: "name", Value: "adam"},
		{Name: "done", Value: true}, {Name: "none", Value: "null"}, {Name: "empty", Value: "{}"},
		{Name: "complex", Value: "(1+2i)"}, {Name: "list/1", Value: int64(7)},
	}, c.Metadata)
	require.NoError(t, c.Metadata.Check())
	// A numpy scalar is an array without dimensions.
	assert.Equal(t, tensor.Info{Name: "scalar", DType: tensor.F32, Shape: tensor.Shape{}}, c.Tensors[0].Info)
}

func TestNames(t *testing.T) {
	_, c := open(t, "names.msgpack")
	var names []string
	for _, x := range c.Tensors {
		if len(x.Name) < 50 {
			names = append(names, x.Name)
		}
	}
	for _, want := range []string{"params/model/layers/10/mlp/kernel", "a.b/c", "ä/重み", "", "e//", `a\/b/c`,
		`mlp\/~\/linear/w`, `back\\/slash`, `back\\\/slash`, `end\`} {
		assert.Contains(t, names, want)
	}
}

// What flax has written is written again to the same bytes, where it is neither in pieces nor has other leaves.
func TestSameBytesAsFlax(t *testing.T) {
	for name, want := range goldens(t) {
		if name == "chunked.msgpack" || name == "leaves.msgpack" {
			continue
		}
		file, c := open(t, name)
		l, err := LayOut(infos(c.Tensors))
		require.NoError(t, err, name)
		require.Len(t, l.Order, len(want.Tensors))
		got := assemble(t, l, func(place int) []byte { return data(file, c.Tensors[place]) })
		assert.True(t, bytes.Equal(file, got), "%s: the same bytes", name)
	}
}

func TestLayoutOfChunked(t *testing.T) {
	file, c := open(t, "chunked.msgpack")
	l, err := LayOut(infos(c.Tensors))
	require.NoError(t, err)
	whole := assemble(t, l, func(place int) []byte { return data(file, c.Tensors[place]) })
	again, err := Read(bytes.NewReader(whole), int64(len(whole)))
	require.NoError(t, err)
	require.Equal(t, infos(c.Tensors), infos(again.Tensors))
	for i, x := range again.Tensors {
		assert.Len(t, x.Ranges, 1)
		assert.Equal(t, data(file, c.Tensors[i]), data(whole, x))
	}
}

// A file that ends anywhere is refused, and so is one with a byte more. Nothing of arrays' data is read.
func TestTruncated(t *testing.T) {
	for name := range goldens(t) {
		file, err := os.ReadFile(fixtures + name)
		require.NoError(t, err)
		step := 1 + len(file)/2000
		for n := 0; n < len(file); n += step {
			_, err := Read(bytes.NewReader(file[:n]), int64(n))
			require.ErrorIs(t, err, formats.ErrMalformed, "%s: %d bytes", name, n)
		}
		_, err = Read(bytes.NewReader(append(file, 0)), int64(len(file)+1))
		require.ErrorContains(t, err, "found 1 bytes behind the map")
		// The size is what was said, and the file has become shorter since.
		if len(file) > 1 {
			_, err = Read(bytes.NewReader(file[:len(file)/2]), int64(len(file)))
			require.ErrorIs(t, err, io.ErrUnexpectedEOF, name)
		}
	}
}

// counted counts what is read of a file.
type counted struct {
	io.ReaderAt
	bytes int
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.bytes += len(p)
	return c.ReaderAt.ReadAt(p, off)
}

// sparse is a file of pieces, and zeros everywhere else.
type sparse []formats.Piece

func (s sparse) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	for _, x := range s {
		if at := x.Offset - off; at >= 0 && at < int64(len(p)) {
			copy(p[at:], x.Bytes)
		} else if at < 0 && -at < int64(len(x.Bytes)) {
			copy(p, x.Bytes[-at:])
		}
	}
	return len(p), nil
}

// Arrays may have all that msgpack has a place for. Their data is not read.
func TestLargest(t *testing.T) {
	const most = 1<<32 - 1 - 18 // 18 bytes of headers
	tensors := []tensor.Info{{Name: "a/large", DType: tensor.U8, Shape: tensor.Shape{most}},
		{Name: "a/small", DType: tensor.I8, Shape: tensor.Shape{1}},
		{Name: "b", DType: tensor.BF16, Shape: tensor.Shape{1 << 15, 1 << 15}}}
	l, err := LayOut(tensors)
	require.NoError(t, err)
	file := &counted{ReaderAt: sparse(l.Pieces)}
	c, err := Read(file, l.Size)
	require.NoError(t, err)
	assert.Equal(t, tensors, infos(c.Tensors))
	assert.Less(t, file.bytes, 20_000)

	tensors[0].Shape[0]++
	_, err = LayOut(tensors)
	require.ErrorIs(t, err, formats.ErrUnsupported)
	assert.EqualError(t, err, `tensor "a/large": found 4294967278 bytes of data, expected at most 4294967277: msgpack has no `+
		`place for a larger array, a type of fewer bits or another format has: not supported`)
}
