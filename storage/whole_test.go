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

func TestCreateFolder(t *testing.T) {
	above := t.TempDir()
	path := filepath.Join(above, "a", "b")
	make := func(content string, replace bool) error {
		return CreateFolder(path, replace, func(dir string) error {
			return os.WriteFile(filepath.Join(dir, content), []byte(content), 0o666)
		})
	}
	holds := func(want string) {
		t.Helper()
		entries, err := os.ReadDir(path)
		require.NoError(t, err)
		require.Len(t, entries, 1)
		require.Equal(t, want, entries[0].Name())
		entries, err = os.ReadDir(filepath.Dir(path))
		require.NoError(t, err)
		require.Len(t, entries, 1) // and nothing beside it
	}
	require.NoError(t, make("one", false))
	holds("one")
	require.ErrorIs(t, make("two", false), fs.ErrExist)
	holds("one")
	require.NoError(t, make("three", true))
	holds("three")
	require.Error(t, CreateFolder(path, true, func(string) error { return fs.ErrInvalid }))
	holds("three")
}
