package gguf_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/formatstest"
	"github.com/lorakit/lorakit/formats/gguf"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/storage/storagetest"
	"github.com/lorakit/lorakit/tensor"
)

const fixtures = "../../fixtures/gguf"

// expected is what gguf-py reads of a model.
type expected struct {
	Files []string
	Keys  []struct {
		Name, Type string
		List       bool
		Data       []string // little-endian, hexadecimal
	}
	Tensors []struct {
		Name, Type, File, SHA256 string
		Shape                    tensor.Shape
	}
}

func models(t testing.TB) map[string]expected {
	b, err := os.ReadFile(filepath.Join(fixtures, "expected.json"))
	require.NoError(t, err)
	var all map[string]expected
	require.NoError(t, json.Unmarshal(b, &all, json.MatchCaseInsensitiveNames(true)))
	require.NotEmpty(t, all)
	return all
}

// TestOpen reads what gguf-py reads, whichever file of a model is named.
func TestOpen(t *testing.T) {
	for name, want := range models(t) {
		for _, file := range want.Files {
			t.Run(name+"/"+file, func(t *testing.T) {
				c, err := formatstest.Open(gguf.Format{}, filepath.Join(fixtures, file))
				require.NoError(t, err)
				defer c.Close()
				assert.Equal(t, want.Files, c.Files())
				require.Len(t, c.Metadata(), len(want.Keys))
				for i, k := range want.Keys {
					p := c.Metadata()[i]
					assert.Equal(t, k.Name, p.Name)
					assert.Equal(t, k.Type, strings.TrimPrefix(fmt.Sprintf("%T", p.Value), "[]"), k.Name)
					assert.Equal(t, k.List, reflect.TypeOf(p.Value).Kind() == reflect.Slice, k.Name)
					assert.Equal(t, k.Data, hexadecimal(t, p.Value), k.Name)
				}
				require.Len(t, c.Tensors(), len(want.Tensors))
				for i, x := range want.Tensors {
					got := c.Tensors()[i]
					assert.Equal(t, x.Name, got.Name)
					assert.Equal(t, x.File, got.File)
					assert.Equal(t, x.Type, strings.ToUpper(got.Type()), x.Name)
					assert.Equal(t, x.Shape, got.Shape, x.Name)
					data, err := io.ReadAll(io.NewSectionReader(got, 0, got.Bytes))
					require.NoError(t, err)
					size, err := got.Size()
					require.NoError(t, err)
					assert.Len(t, data, int(size))
					assert.Equal(t, x.SHA256, fmt.Sprintf("%x", sha256.Sum256(data)), x.Name)
				}
			})
		}
	}
}

// hexadecimal has the bytes of a value, or of each element of a list.
func hexadecimal(t testing.TB, value any) []string {
	v := reflect.ValueOf(value)
	if v.Kind() == reflect.Slice {
		list := []string{}
		for i := range v.Len() {
			list = append(list, hexadecimal(t, v.Index(i).Interface())...)
		}
		return list
	}
	if s, ok := value.(string); ok {
		return []string{hex.EncodeToString([]byte(s))}
	}
	b, err := binary.Append(nil, binary.LittleEndian, value)
	require.NoError(t, err)
	return []string{hex.EncodeToString(b)}
}

// TestTypes has a file of each type, and no more of them.
func TestTypes(t *testing.T) {
	seen := map[string]bool{}
	for _, x := range models(t)["types.gguf"].Tensors {
		seen[x.Type] = true
	}
	assert.Len(t, seen, 34-1) // all of gguf-py's but Q8_1
}

// TestBigEndianPieces reads any piece of a tensor whose elements are swapped.
func TestBigEndianPieces(t *testing.T) {
	c, err := formatstest.Open(gguf.Format{}, filepath.Join(fixtures, "big.gguf"))
	require.NoError(t, err)
	defer c.Close()
	for _, x := range c.Tensors() {
		whole := make([]byte, x.Bytes)
		_, err := x.ReadAt(whole, 0)
		require.NoError(t, err)
		for off := range x.Bytes {
			for n := range x.Bytes - off + 1 {
				p := make([]byte, n)
				got, err := x.Data.ReadAt(p, x.Offset+off)
				require.NoError(t, err)
				require.Equal(t, whole[off:off+n], p[:got], "%s at %d", x.Name, off)
			}
		}
		if x.DType.Bits() > 8 { // its Data has nothing but the tensor
			require.NoError(t, iotest.TestReader(io.NewSectionReader(x.Data, 0, x.Bytes), whole))
			for _, off := range []int64{-1, x.Bytes} {
				_, err = x.Data.ReadAt(make([]byte, 1), off)
				assert.Error(t, err)
			}
		}
	}
	_, err = formatstest.Open(gguf.Format{}, filepath.Join(fixtures, "big-blocks.gguf"))
	require.ErrorIs(t, err, formats.ErrUnsupported)
	assert.ErrorContains(t, err, `big-blocks.gguf: tensor "q8.weight": found q8_0 in a file of a big-endian machine`)
}

// files reads the fixtures of those names.
func files(t testing.TB, names ...string) storagetest.Memory {
	m := storagetest.Memory{}
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(fixtures, name))
		require.NoError(t, err)
		m[name] = b
	}
	return m
}

func TestDetect(t *testing.T) {
	f, err := formats.Default.Lookup("gguf")
	require.NoError(t, err)
	assert.Equal(t, gguf.Format{}, f)
	one := files(t, "types.gguf")["types.gguf"]
	for _, x := range []struct {
		dir  storagetest.Memory
		name string
		want bool
	}{
		{storagetest.Memory{"a.gguf": nil}, "a.gguf", true},
		{storagetest.Memory{"a": one}, "a", true},
		{storagetest.Memory{"a": []byte("GGU")}, "a", false},
		{storagetest.Memory{"a": []byte("GGML....")}, "a", false},
		{storagetest.Memory{"a.gguf": one, "README.md": nil}, "", true},
		{storagetest.Memory{"._a.gguf": one}, "", false},
		{storagetest.Memory{}, "", false},
		{storagetest.Memory{"a.gguf": one, "model.safetensors": nil}, "", false},
		{storagetest.Memory{"a.gguf": one, "._model.safetensors": nil}, "", true},
	} {
		got, err := f.Detect(t.Context(), x.dir, x.name)
		require.NoError(t, err)
		assert.Equal(t, x.want, got, "%v %s", slices.Collect(maps.Keys(x.dir)), x.name)
	}
	_, err = f.Detect(t.Context(), storagetest.Memory{}, "none")
	assert.Error(t, err)
}

// TestFolder opens the one model of a folder.
func TestFolder(t *testing.T) {
	parts := models(t)["split.gguf"].Files
	dir := files(t, parts...)
	c, err := gguf.Format{}.Open(t.Context(), dir, "")
	require.NoError(t, err)
	assert.Equal(t, parts, c.Files())
	require.NoError(t, c.Close())
	dir["other.gguf"] = nil
	_, err = gguf.Format{}.Open(t.Context(), dir, "")
	require.ErrorIs(t, err, formats.ErrMalformed)
	assert.ErrorContains(t, err, `found "other.gguf", "split-00001-of-00003.gguf", expected one model`)
	_, err = gguf.Format{}.Open(t.Context(), storagetest.Memory{"x": nil}, "")
	assert.ErrorContains(t, err, "found no .gguf file, expected one")
}

// TestManyStrings: a vocabulary takes few pieces of memory, and not much more of it than its file.
func TestManyStrings(t *testing.T) {
	var tokens []string
	for i := range 150_000 {
		tokens = append(tokens, fmt.Sprintf("tok%d", i))
	}
	m := formats.Metadata{{Name: "t", Value: tokens}}
	l, err := gguf.Format{}.Layout(t.Context(), nil, formats.Options{Metadata: m})
	require.NoError(t, err)
	dir := storagetest.Memory{"x.gguf": l.Shards[0].Header}
	open := func() {
		c, err := gguf.Format{}.Open(context.Background(), dir, "x.gguf")
		require.NoError(t, err)
		require.Equal(t, tokens, c.Metadata().Get("t"))
		require.NoError(t, c.Close())
	}
	assert.Less(t, testing.AllocsPerRun(2, open), 300.0)
}
