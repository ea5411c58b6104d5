package pytorch

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/storage/storagetest"
)

// seeds are the files of the fixtures.
func seeds(f *testing.F) [][]byte {
	var all [][]byte
	for _, pattern := range []string{"*.pt", "*.pth", "*.bin", "*.ckpt", "*/*.bin"} {
		paths, err := filepath.Glob(filepath.Join("../../fixtures/pytorch", pattern))
		require.NoError(f, err)
		for _, p := range paths {
			b, err := os.ReadFile(p)
			require.NoError(f, err)
			all = append(all, b)
		}
	}
	require.Greater(f, len(all), 100)
	return all
}

// few are limits that let an input neither fill the memory nor take long.
var few = Limits{Memory: 1 << 22, ExpandedBytes: 1 << 20, Entries: 1 << 10}

func checkError(t *testing.T, err error) {
	one := 0
	for _, kind := range []error{formats.ErrMalformed, formats.ErrLimit, ErrUnsafe, ErrUnsupported} {
		if errors.Is(err, kind) {
			one++
		}
	}
	require.Equal(t, 1, one, "kinds of %v", err)
	require.NotContains(t, err.Error(), "\n")
	require.Less(t, len(err.Error()), 2500)
}

// FuzzPickle runs any bytes as a pickle, and looks for a state dict in what they build.
func FuzzPickle(f *testing.F) {
	for _, b := range seeds(f) {
		// Its pickle, or the first of the old ones.
		if r := bytes.NewReader(b); isZip(b) {
			if a, err := readArchive(r, r.Size(), Limits{}.withDefaults()); err == nil {
				p := a[pickleName]
				f.Add(b[p.offset:p.end()])
			}
			continue
		}
		if i := bytes.Index(b, []byte("uu.")); i > 0 {
			f.Add(b[i+3:])
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		limits := few.withDefaults()
		m := newMachine(newSource(bytes.NewReader(data), 0, int64(len(data))), limits)
		root, err := m.load()
		if err != nil {
			checkError(t, err)
			return
		}
		s, err := readStateDict(root, limits)
		if err != nil {
			checkError(t, err)
			return
		}
		for _, x := range s.tensors {
			require.Contains(t, m.storages, x.storage.key)
			require.Len(t, x.stride, len(x.shape))
			info, at, axes, err := layOut(x.tensorRef, span{0, x.storage.bytes()}, limits)
			if err != nil {
				checkError(t, err)
				continue
			}
			n, err := info.Size()
			require.NoError(t, err)
			if axes == nil {
				require.LessOrEqual(t, at+n, x.storage.bytes())
			}
		}
	})
}

// FuzzOpen opens any bytes as a file. What is accepted can be read, within the file.
func FuzzOpen(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Format{Limits: few}.Open(context.Background(), storagetest.Memory{"x.pt": data}, "x.pt")
		if err != nil {
			checkError(t, err)
			return
		}
		defer c.Close()
		for _, x := range c.Tensors() {
			n, err := x.Size()
			require.NoError(t, err)
			require.Equal(t, n, x.Bytes)
			if x.Bytes > 1<<20 {
				continue // a storage of its own size, in a file of as many bytes
			}
			b := make([]byte, n)
			_, err = x.ReadAt(b, 0)
			if n > 0 {
				require.NoError(t, err)
			}
			if _, ok := x.Data.(storage.File); ok && n > 0 {
				require.Equal(t, data[x.Offset:x.Offset+n], b)
			}
		}
	})
}
