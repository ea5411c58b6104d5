package storage

import (
	"fmt"
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
	left, err := filepath.Glob(dir + ".*partial")
	require.NoError(t, err)
	require.Empty(t, left)
}

// TestWriteWholeSparesOthers leaves alone what is called as it might call its own file, and what a link there leads to.
func TestWriteWholeSparesOthers(t *testing.T) {
	dir := t.TempDir()
	path, other := filepath.Join(dir, "page.html"), filepath.Join(dir, "other")
	require.NoError(t, os.WriteFile(other, []byte("mine"), 0o666))
	require.NoError(t, os.WriteFile(path+".partial", []byte("mine"), 0o666))
	if err := os.Symlink(other, fmt.Sprintf("%s.%d.partial", path, os.Getpid())); err != nil {
		t.Skipf("this system makes no links: %v", err)
	}
	require.NoError(t, WriteWhole(path, []byte("page"), false))
	for file, want := range map[string]string{path: "page", path + ".partial": "mine", other: "mine"} {
		b, err := os.ReadFile(file)
		require.NoError(t, err)
		require.Equal(t, want, string(b), file)
	}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 3)
}
