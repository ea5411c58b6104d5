package storage

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestWriteWhole(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "page.html")
	holds := func(want string) {
		t.Helper()
		b, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, want, string(b))
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Len(t, entries, 1) // and nothing beside it
	}
	require.NoError(t, WriteWhole(path, []byte("one"), false))
	holds("one")
	require.ErrorIs(t, WriteWhole(path, []byte("two"), false), fs.ErrExist)
	holds("one")
	require.NoError(t, WriteWhole(path, []byte("three"), true))
	holds("three")
	require.Error(t, WriteWhole(filepath.Join(dir, "no", "page.html"), nil, true))
	require.Error(t, WriteWhole(dir, nil, true)) // a folder is not replaced
	holds("three")
	require.NoFileExists(t, dir+".partial")
}
