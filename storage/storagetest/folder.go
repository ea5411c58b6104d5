package storagetest

import (
	"context"
	"io"
	"io/fs"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/storage"
)

// Check holds a folder, which has exactly these files, against what storage.Folder promises.
func Check(t *testing.T, dir storage.Folder, files Memory) {
	ctx := context.Background()
	for name, want := range files {
		f, err := dir.Open(ctx, name)
		require.NoError(t, err, name)
		assert.Equal(t, int64(len(want)), f.Size(), name)
		got := make([]byte, len(want))
		_, err = f.ReadAt(got, 0)
		if len(want) > 0 {
			require.NoError(t, err, name)
		}
		assert.Equal(t, want, got, name)
		n, err := f.ReadAt(make([]byte, 1), f.Size())
		assert.Zero(t, n, name)
		assert.ErrorIs(t, err, io.EOF, name)
		assert.NotContains(t, f.Version(), "\n", name)
		again, err := dir.Open(ctx, name)
		require.NoError(t, err, name)
		assert.Equal(t, f.Version(), again.Version(), name)
		require.NoError(t, f.Close(), name)
		require.NoError(t, again.Close(), name)
		assert.Contains(t, dir.Path(name), dir.Path(""), name)
	}
	var compare func(name string)
	compare = func(name string) {
		got, err := dir.List(ctx, name)
		require.NoError(t, err, name)
		want, err := files.List(ctx, name)
		require.NoError(t, err, name)
		assert.Equal(t, want, got, name)
		for _, e := range want {
			below := e.Name
			if name != "" {
				below = name + "/" + e.Name
			}
			if e.Folder {
				_, err := dir.Open(ctx, below)
				assert.ErrorIs(t, err, storage.ErrNotRegular, below)
				compare(below)
			}
		}
	}
	compare("")
	for _, name := range []string{"no-such", "no-such/file"} {
		_, err := dir.Open(ctx, name)
		assert.ErrorIs(t, err, fs.ErrNotExist, name)
		assert.ErrorContains(t, err, "no-such")
		_, err = dir.List(ctx, name)
		assert.ErrorIs(t, err, fs.ErrNotExist, name)
	}
	for _, name := range []string{"", ".", "..", "../x", "/etc/passwd", "a/../b", `a\b`, "a\x00"} {
		_, err := dir.Open(ctx, name)
		assert.ErrorIs(t, err, storage.ErrOutside, "%q", name)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	_, err := dir.List(ended, "")
	assert.ErrorIs(t, err, context.Canceled)
	for name := range files {
		_, err := dir.Open(ended, name)
		assert.ErrorIs(t, err, context.Canceled)
	}
}
