package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/examples/flax/msgpack"
	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/tensor"
)

const fixtures = "../../../fixtures/flax/"

// golden is what flax reads of a file or folder.
type golden struct {
	Tensors []struct {
		Path   []string
		DType  string
		Shape  tensor.Shape
		SHA256 string
	}
}

func goldens(t *testing.T) map[string]golden {
	b, err := os.ReadFile(fixtures + "tensors.json")
	require.NoError(t, err)
	var all map[string]golden
	require.NoError(t, json.Unmarshal(b, &all))
	return all
}

// open opens a file, or the files of a folder in the order of their names.
func open(t *testing.T, path string) (all []stored) {
	paths := []string{path}
	if filepath.Ext(path) == "" {
		var err error
		paths, err = filepath.Glob(filepath.Join(path, "*.msgpack"))
		require.NoError(t, err)
	}
	for _, path := range paths {
		c, err := format{}.Open(context.Background(), path)
		require.NoError(t, err, path)
		if c.Close != nil {
			t.Cleanup(func() { assert.NoError(t, c.Close()) })
		}
		for _, x := range c.Tensors {
			all = append(all, stored{x, path})
		}
	}
	return all
}

// stored is a tensor of a file.
type stored struct {
	sdk.Tensor
	path string
}

// data reads a tensor as lorakit does.
func (x stored) data(t *testing.T) []byte {
	size, err := x.Size()
	require.NoError(t, err)
	b := make([]byte, size)
	if x.Data != nil {
		require.NoError(t, formats.ReadFull(x.Data, b, 0))
		return b
	}
	f, err := os.Open(x.path)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, formats.ReadFull(f, b, x.Offset))
	return b
}

// write writes a folder as lorakit does.
func write(t *testing.T, l formats.Layout, data func(place int) []byte) string {
	dir := t.TempDir()
	for _, s := range l.Shards {
		f, err := os.Create(filepath.Join(dir, s.Name))
		require.NoError(t, err)
		put := func(b []byte, at int64) {
			_, err := f.WriteAt(b, at)
			require.NoError(t, err)
		}
		for _, p := range s.Pieces {
			put(p.Bytes, p.Offset)
		}
		for i, place := range s.Tensors {
			put(data(place), s.Offsets[i])
		}
		info, err := f.Stat()
		require.NoError(t, err)
		require.Equal(t, s.Size, info.Size())
		require.NoError(t, f.Close())
	}
	for _, x := range l.Extra {
		require.NoError(t, os.WriteFile(filepath.Join(dir, x.Name), x.Data, 0o600))
	}
	return dir
}

func TestOpenAsFlaxDoes(t *testing.T) {
	opaque := 0
	for name, want := range goldens(t) {
		tensors := open(t, fixtures+name)
		require.Len(t, tensors, len(want.Tensors), name)
		for i, w := range want.Tensors {
			got := tensors[i]
			assert.Equal(t, w.Path, msgpack.Split(got.Name), name)
			assert.Equal(t, w.Shape, got.Shape, "%s: %q", name, got.Name)
			sum := sha256.Sum256(got.data(t))
			assert.Equal(t, w.SHA256, hex.EncodeToString(sum[:]), "%s: %q", name, got.Name)
			if got.Data != nil {
				assert.Equal(t, "chunked.msgpack", name, "all else lies in the file as it is")
				opaque++
			}
		}
	}
	assert.Equal(t, 4, opaque)
}

// What transformers has saved is saved again to the same bytes, with the same files in the index.
func TestSameFilesAsTransformers(t *testing.T) {
	for name, most := range map[string]int64{"gpt2": 0, "gpt2-sharded": 6000} {
		tensors := open(t, fixtures+name)
		var infos []tensor.Info
		for _, x := range tensors {
			infos = append(infos, x.Info)
		}
		l, err := format{}.Layout(context.Background(), infos, formats.Options{MaxShardSize: most})
		require.NoError(t, err)
		assert.Empty(t, l.Notices)
		dir := write(t, l, func(place int) []byte { return tensors[place].data(t) })
		files, err := filepath.Glob(fixtures + name + "/flax_model*")
		require.NoError(t, err)
		require.Len(t, files, map[string]int{"gpt2": 1, "gpt2-sharded": 5}[name])
		for _, file := range files {
			want, err := os.ReadFile(file)
			require.NoError(t, err)
			got, err := os.ReadFile(filepath.Join(dir, filepath.Base(file)))
			require.NoError(t, err)
			if filepath.Ext(file) != ".json" {
				assert.True(t, bytes.Equal(want, got), "%s: the same bytes", file)
				continue
			}
			var index [2]struct {
				Metadata struct {
					Size int64 `json:"total_size"`
				}
				Map map[string]string `json:"weight_map"`
			}
			require.NoError(t, json.Unmarshal(want, &index[0]))
			require.NoError(t, json.Unmarshal(got, &index[1]))
			assert.Equal(t, index[0], index[1])
			assert.Len(t, index[1].Map, 28)
		}
	}
}

func TestLayoutOptions(t *testing.T) {
	infos := []tensor.Info{{Name: "b/x", DType: tensor.U8, Shape: tensor.Shape{2}},
		{Name: "a", DType: tensor.U8, Shape: tensor.Shape{2}}, {Name: "b/y", DType: tensor.U8, Shape: tensor.Shape{2}}}
	l, err := format{}.Layout(context.Background(), infos, formats.Options{SingleFile: "x.msgpack", MaxShardSize: 1,
		Metadata: formats.Texts(map[string]string{"format": "pt", "step": "3"})})
	require.NoError(t, err)
	require.Len(t, l.Shards, 1)
	assert.Equal(t, "x.msgpack", l.Shards[0].Name)
	assert.Equal(t, []int{0, 2, 1}, l.Shards[0].Tensors)
	assert.Equal(t, []string{`Flax has no place for metadata: left out are "format", "step"`}, l.Notices)

	l, err = format{}.Layout(context.Background(), infos, formats.Options{MaxShardSize: 4, Stem: "other"})
	require.NoError(t, err)
	require.Len(t, l.Shards, 2)
	assert.Equal(t, "other-00002-of-00002.msgpack", l.Shards[1].Name)
	assert.Equal(t, []int{2}, l.Shards[1].Tensors)

	infos[1].Name = "b"
	_, err = format{}.Layout(context.Background(), infos, formats.Options{})
	assert.ErrorIs(t, err, formats.ErrUnsupported)
}

func TestOpenRefused(t *testing.T) {
	whole, err := os.ReadFile(fixtures + "gpt2/flax_model.msgpack")
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "x.msgpack")
	require.NoError(t, os.WriteFile(path, whole[:len(whole)-3], 0o600))
	_, err = format{}.Open(context.Background(), path)
	assert.EqualError(t, err, `tensor "transformer/ln_f/bias": byte 32206: found an array of 77 bytes, of which the file has `+
		`74: malformed`)
	assert.ErrorIs(t, err, formats.ErrMalformed)
	_, err = format{}.Open(context.Background(), path+".gone")
	assert.ErrorIs(t, err, fs.ErrNotExist)
}

// Several threads read a chunked tensor at once.
func TestConcurrentReads(t *testing.T) {
	for _, x := range open(t, fixtures+"chunked.msgpack") {
		if x.Data == nil {
			continue
		}
		want := x.data(t)
		done := make(chan []byte)
		for range 8 {
			go func() {
				b, _ := io.ReadAll(io.NewSectionReader(x.Data, 0, int64(len(want))))
				done <- b
			}()
		}
		for range 8 {
			assert.Equal(t, want, <-done)
		}
	}
}
