package safetensors_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/formatstest"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/storage/storagetest"
)

// FuzzOpen opens any bytes as a file. What is accepted must hold what a container promises, and what is refused must
// say why in one line.
func FuzzOpen(f *testing.F) {
	for _, c := range corpus(f) {
		f.Add(c.Data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		memory := storagetest.Memory{"x.safetensors": data}
		c, err := safetensors.Format{}.Open(context.Background(), memory, "x.safetensors")
		if err != nil {
			assertKind(t, err, "file")
			return
		}
		defer c.Close()
		checkInvariants(t, c, int64(len(data)))
		for _, x := range c.Tensors() {
			_, err := x.ReadAt(make([]byte, x.Bytes), 0)
			require.NoError(t, err)
		}
	})
}

// FuzzIndex opens a folder with any bytes as its index, beside two shards.
func FuzzIndex(f *testing.F) {
	for _, s := range []string{
		`{"metadata":{"total_size":2},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}`,
		`{"weight_map":{"a":"1.safetensors"}}`, `{"weight_map":{"a":"2.safetensors"}}`,
		`{"weight_map":{"c":"1.safetensors"}}`,
		`{"weight_map":{"a":"../1.safetensors"}}`, `{"weight_map":{"a":"/etc/passwd"}}`, `{"weight_map":{"a":"link"}}`,
		`{"weight_map":{"a":"sub"}}`,
		`{"weight_map":{"a":"1.safetensors","a":"1.safetensors"}}`, `{"weight_map":null}`, `[]`, ``, "{",
		`{"weight_map":{"\ud800":"1.safetensors"}}`,
		`{"weight_map":{"a":"model.safetensors.index.json"}}`, `{"weight_map":{"a":"a\u0000b"}}`,
	} {
		f.Add([]byte(s))
	}
	for _, c := range corpus(f) {
		if len(c.Data) > 8 {
			f.Add(c.Data[8:])
		}
	}
	dir := folder(f, "1.safetensors", named("a"), "2.safetensors", named("b"))
	require.NoError(f, os.Symlink("/etc/passwd", filepath.Join(dir, "link")))
	require.NoError(f, os.Mkdir(filepath.Join(dir, "sub"), 0o755))
	f.Fuzz(func(t *testing.T, data []byte) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, index), data, 0o600))
		c, err := formatstest.Open(safetensors.Format{}, dir)
		if err != nil {
			require.NotContains(t, err.Error(), "\n")
			require.Less(t, len(err.Error()), 2000+len(dir))
			if errors.Is(err, formats.ErrMalformed) || errors.Is(err, formats.ErrLimit) || errors.Is(err, formats.ErrOutside) ||
				errors.Is(err, fs.ErrNotExist) {
				return
			}
			require.ErrorContains(t, err, dir)
			return
		}
		defer c.Close()
		for _, x := range c.Tensors() {
			assert.Contains(t, []string{"a in 1.safetensors", "b in 2.safetensors"}, x.Name+" in "+x.File)
		}
	})
}
