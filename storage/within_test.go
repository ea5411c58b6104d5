package storage_test

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/storage"
)

// tempDir returns a new folder without links in its path.
func tempDir(t *testing.T) string {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	return dir
}

func write(t *testing.T, path string) string {
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(path), 0o644))
	return path
}

func link(t *testing.T, to, path string) {
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.Symlink(to, path))
}

// within is where a folder finds a file.
func within(dir, name string) (string, error) { return withinBy(storage.Options{}, dir, name) }

func withinBy(o storage.Options, dir, name string) (string, error) {
	f, err := storage.Local(dir, o).Open(context.Background(), name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	file, _ := storage.OSFile(f)
	return file.Name(), nil
}

func TestWithin(t *testing.T) {
	top := tempDir(t)
	dir := filepath.Join(top, "model")
	a := write(t, filepath.Join(dir, "a"))
	b := write(t, filepath.Join(dir, "sub", "b"))
	outside := write(t, filepath.Join(top, "outside"))
	write(t, filepath.Join(top, "model-2", "a")) // a folder whose name begins alike
	link(t, "a", filepath.Join(dir, "inner"))
	link(t, a, filepath.Join(dir, "absolute"))
	link(t, "sub/../sub/b", filepath.Join(dir, "crooked"))
	link(t, "../model/a", filepath.Join(dir, "return"))
	link(t, "../outside", filepath.Join(dir, "leaves"))
	link(t, outside, filepath.Join(dir, "leaves-absolute"))
	link(t, "leaves", filepath.Join(dir, "twice"))
	link(t, "../model-2/a", filepath.Join(dir, "beside"))
	link(t, "..", filepath.Join(dir, "up"))
	link(t, ".", filepath.Join(dir, "self"))
	link(t, "nowhere", filepath.Join(dir, "broken"))
	link(t, "loop", filepath.Join(dir, "loop"))
	link(t, dir, filepath.Join(top, "alias"))

	for name, want := range map[string]string{"a": a, "sub/b": b, "inner": a, "absolute": a, "crooked": b, "return": a,
		"self/a": a} {
		for _, d := range []string{dir, filepath.Join(top, "alias"), dir + "/", filepath.Join(dir, "sub") + "/.."} {
			got, err := within(d, name)
			if assert.NoError(t, err, "%s in %s", name, d) {
				assert.Equal(t, want, got)
			}
		}
	}
	for _, name := range []string{
		"", ".", "..", "../outside", "../model/a", "/etc/passwd", a, "sub/../a", "sub//b", "./a", "a/", `sub\b`, `..\outside`,
		"a\x00", "\x00",
		"leaves", "leaves-absolute", "twice", "beside", "up", "up/outside", "up/model/../outside", "self",
		strings.Repeat("../", 1000) + "etc/passwd",
	} {
		_, err := within(dir, name)
		if assert.ErrorIs(t, err, storage.ErrOutside, "%q", name) {
			assert.NotContains(t, err.Error(), "\n")
			assert.Less(t, len(err.Error()), 500+len(dir))
		}
	}
	// A file may be reached through a link to the folder above, once it is resolved: what counts is where it lies.
	got, err := within(dir, "up/model/a")
	require.NoError(t, err)
	assert.Equal(t, a, got)

	for _, name := range []string{"missing", "missing/a"} {
		_, err := within(dir, name)
		assert.ErrorIs(t, err, fs.ErrNotExist, name)
	}
	_, err = within(dir, "loop")
	assert.Error(t, err)
	_, err = within(filepath.Join(top, "no folder"), "a")
	assert.ErrorIs(t, err, fs.ErrNotExist)
}

func TestWithinRelativeFolder(t *testing.T) {
	dir := tempDir(t)
	a := write(t, filepath.Join(dir, "a"))
	t.Chdir(dir)
	for _, d := range []string{"", ".", "./."} {
		got, err := within(d, "a")
		require.NoError(t, err)
		assert.Equal(t, a, got)
	}
}

func TestWithinHubCache(t *testing.T) {
	cache := tempDir(t)
	repo := filepath.Join(cache, "models--a--b")
	snapshot := filepath.Join(repo, "snapshots", "0123abcd")
	blob := write(t, filepath.Join(repo, "blobs", "d1ab"))
	link(t, "../../blobs/d1ab", filepath.Join(snapshot, "m"))
	link(t, "../../../blobs/d1ab", filepath.Join(snapshot, "unet", "m"))
	link(t, blob, filepath.Join(snapshot, "absolute"))
	other := write(t, filepath.Join(cache, "models--c--d", "blobs", "ffff"))
	link(t, other, filepath.Join(snapshot, "other repo"))
	link(t, "../../refs/main", filepath.Join(snapshot, "refs"))
	write(t, filepath.Join(repo, "refs", "main"))
	secret := write(t, filepath.Join(cache, "secret"))
	link(t, secret, filepath.Join(repo, "blobs", "leaves"))
	link(t, "../../blobs/leaves", filepath.Join(snapshot, "leaves"))

	for _, c := range [][2]string{{snapshot, "m"}, {snapshot, "unet/m"}, {filepath.Join(snapshot, "unet"), "m"},
		{snapshot, "absolute"}} {
		got, err := within(c[0], c[1])
		if assert.NoError(t, err, c) {
			assert.Equal(t, blob, got)
		}
	}
	for _, name := range []string{"other repo", "refs", "leaves"} {
		_, err := within(snapshot, name)
		assert.ErrorIs(t, err, storage.ErrOutside, name)
	}

	// The store shared by the whole cache counts only where it is marked.
	shared := write(t, filepath.Join(cache, "blobs", "ab", "abcd"))
	link(t, "../../blobs/ab/abcd", filepath.Join(repo, "blobs", "shared"))
	link(t, "../../blobs/shared", filepath.Join(snapshot, "shared"))
	_, err := within(snapshot, "shared")
	assert.ErrorIs(t, err, storage.ErrOutside)
	write(t, filepath.Join(cache, "blobs", ".huggingface-shared-blobs"))
	got, err := within(snapshot, "shared")
	require.NoError(t, err)
	assert.Equal(t, shared, got)

	// The same link in a folder that is no snapshot leaves it.
	plain := filepath.Join(repo, "copies", "0123abcd")
	link(t, "../../blobs/d1ab", filepath.Join(plain, "m"))
	_, err = within(plain, "m")
	assert.ErrorIs(t, err, storage.ErrOutside)
}

func TestOpenRefusesWhatIsNoFile(t *testing.T) {
	dir := tempDir(t)
	_, err := storage.Open(dir)
	assert.ErrorIs(t, err, storage.ErrNotRegular)
	assert.ErrorContains(t, err, "folder")
	_, err = storage.Open("/dev/null")
	assert.ErrorIs(t, err, storage.ErrNotRegular)
	_, err = storage.Open(filepath.Join(dir, "missing"))
	assert.ErrorIs(t, err, fs.ErrNotExist)

	f, err := storage.Open(write(t, filepath.Join(dir, "a")))
	require.NoError(t, err)
	assert.NoError(t, f.Close())
}

func TestWithinNamesALinkToItself(t *testing.T) {
	dir := t.TempDir()
	err := os.Symlink("loop.bin", filepath.Join(dir, "loop.bin"))
	if runtime.GOOS == "windows" && err != nil {
		t.Skip("a link needs a privilege on Windows: ", err)
	}
	require.NoError(t, err)
	_, err = within(dir, "loop.bin")
	require.ErrorContains(t, err, "loop.bin: found a link that leads to itself")
	require.ErrorIs(t, err, storage.ErrDangling)
}
