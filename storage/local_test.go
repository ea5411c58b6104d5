package storage_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/storage/storagetest"
)

func TestFolders(t *testing.T) {
	files := storagetest.Memory{"a": []byte("first"), "empty": nil, "sub/b": []byte("second"),
		"sub/deep/c": []byte("third")}
	dir := tempDir(t)
	for name, b := range files {
		path := filepath.Join(dir, filepath.FromSlash(name))
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, b, 0o644))
		files[name] = append([]byte{}, b...)
	}
	storagetest.Check(t, files, files)
	storagetest.Check(t, storage.Local(dir, storage.Options{}), files)
	back, err := storagetest.FromFS(os.DirFS(dir), "sub")
	require.NoError(t, err)
	assert.Equal(t, storagetest.Memory{"b": files["sub/b"], "deep/c": files["sub/deep/c"]}, back)
}

// The version of a local file is its modification time, whatever that is.
func TestVersion(t *testing.T) {
	dir := tempDir(t)
	path := write(t, filepath.Join(dir, "a"))
	for at, want := range map[time.Time]string{
		time.Unix(1700000000, 123456789): "1700000000.123456789",
		time.Unix(1<<33, 0):              "8589934592.000000000",
	} {
		require.NoError(t, os.Chtimes(path, at, at))
		f, err := storage.Local(dir, storage.Options{}).Open(t.Context(), "a")
		require.NoError(t, err)
		assert.Equal(t, want, f.Version())
		require.NoError(t, f.Close())
	}
}

// What is opened stays as it was, whatever becomes of its name.
func TestFileIsThatWhichWasOpened(t *testing.T) {
	dir := tempDir(t)
	path := write(t, filepath.Join(dir, "a"))
	f, err := storage.Local(dir, storage.Options{}).Open(t.Context(), "a")
	require.NoError(t, err)
	defer f.Close()
	size, version := f.Size(), f.Version()
	require.NoError(t, os.Rename(write(t, filepath.Join(dir, "other", "longer")), path))
	assert.Equal(t, size, f.Size())
	assert.Equal(t, version, f.Version())
	b := make([]byte, size)
	_, err = f.ReadAt(b, 0)
	require.NoError(t, err)
	assert.Equal(t, path, string(b))
}

func TestResolve(t *testing.T) {
	dir := tempDir(t)
	a, outside := write(t, filepath.Join(dir, "in", "a")), write(t, filepath.Join(dir, "outside"))
	link(t, "../outside", filepath.Join(dir, "in", "leaves"))
	link(t, "in", filepath.Join(dir, "alias"))
	odd := write(t, filepath.Join(dir, "in", `back\slash`))

	for path, want := range map[string]string{filepath.Join(dir, "in"): "", filepath.Join(dir, "alias") + "/": "",
		a: "a"} {
		folder, name, err := storage.Resolve(path, storage.Options{})
		require.NoError(t, err, path)
		assert.Equal(t, want, name, path)
		assert.Equal(t, path, folder.Path(name))
		resolved, err := filepath.EvalSymlinks(path)
		require.NoError(t, err)
		assert.Equal(t, resolved, storage.LocalPath(folder, name))
		f, err := folder.Open(t.Context(), "a")
		require.NoError(t, err, path)
		require.NoError(t, f.Close())
	}
	// Whoever names a file has chosen it: that one, and none beside it.
	for path, want := range map[string]string{filepath.Join(dir, "in", "leaves"): outside, odd: odd} {
		folder, name, err := storage.Resolve(path, storage.Options{})
		require.NoError(t, err)
		f, err := folder.Open(t.Context(), name)
		require.NoError(t, err, path)
		b := make([]byte, f.Size())
		_, err = f.ReadAt(b, 0)
		require.NoError(t, err)
		assert.Equal(t, want, string(b))
		require.NoError(t, f.Close())
	}
	folder, _, err := storage.Resolve(a, storage.Options{})
	require.NoError(t, err)
	_, err = folder.Open(t.Context(), "leaves")
	assert.ErrorIs(t, err, storage.ErrOutside)

	_, _, err = storage.Resolve(filepath.Join(dir, "missing"), storage.Options{})
	assert.ErrorIs(t, err, fs.ErrNotExist)
	t.Chdir(filepath.Join(dir, "in"))
	folder, name, err := storage.Resolve("a", storage.Options{})
	require.NoError(t, err)
	assert.Equal(t, "a", folder.Path(name))
	entries, err := folder.List(t.Context(), "")
	require.NoError(t, err)
	assert.Equal(t, []storage.Entry{{Name: "a"}, {Name: `back\slash`}, {Name: "leaves", Link: true}}, entries)
	assert.Empty(t, storage.LocalPath(storagetest.Memory{}, ""))
	assert.Empty(t, storage.LocalPath(folder, "leaves"))
	assert.Equal(t, a, storage.LocalPath(folder, "a"))
}

// Bytes are copied from anything that can be read, by the kernel from files of the system.
func TestCopyRange(t *testing.T) {
	dir := tempDir(t)
	content := strings.Repeat("0123456789", 1000)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), []byte(content), 0o644))
	local, err := storage.Local(dir, storage.Options{}).Open(t.Context(), "a")
	require.NoError(t, err)
	defer local.Close()
	memory, err := storagetest.Memory{"a": []byte(content)}.Open(t.Context(), "a")
	require.NoError(t, err)
	file, ok := storage.OSFile(local)
	require.True(t, ok)
	again, ok := storage.OSFile(file)
	require.True(t, ok)
	assert.Same(t, file, again)
	_, ok = storage.OSFile(memory)
	assert.False(t, ok)
	for what, src := range map[string]interface {
		ReadAt([]byte, int64) (int, error)
	}{"file": file, "local": local, "memory": memory, "bytes": bytes.NewReader([]byte(content))} {
		out, err := os.Create(filepath.Join(dir, "out"))
		require.NoError(t, err)
		require.NoError(t, storage.CopyRange(out, 3, src, 5, 4000), what)
		got, err := os.ReadFile(out.Name())
		require.NoError(t, err)
		assert.Equal(t, "\x00\x00\x00"+content[5:4005], string(got), what)
		assert.ErrorContains(t, storage.CopyRange(out, 0, src, 9999, 2), "unexpected EOF", what)
		require.NoError(t, out.Close())
	}
}

// A path that is not there is answered with the nearest that is, at the first of its names that is missing.
func TestStatNamesTheNearest(t *testing.T) {
	dir := tempDir(t)
	path := write(t, filepath.Join(dir, "models", "llama", "model.safetensors"))
	for wrong, near := range map[string]string{
		filepath.Join(dir, "models", "llama", "model.safetensor"): path,
		filepath.Join(dir, "models", "lama"):                      filepath.Join(dir, "models", "llama"),
		filepath.Join(dir, "model", "llama", "x") + "/":           filepath.Join(dir, "models"),
	} {
		_, err := storage.Stat(wrong)
		assert.ErrorIs(t, err, fs.ErrNotExist)
		assert.ErrorContains(t, err, "; did you mean "+near+"?")
		_, _, err = storage.Resolve(wrong, storage.Options{})
		assert.ErrorContains(t, err, "did you mean")
	}
	t.Chdir(filepath.Join(dir, "models"))
	_, err := storage.Stat("lama")
	assert.ErrorContains(t, err, "; did you mean llama?")
	for _, far := range []string{"other", filepath.Join(dir, "models", "llama", "x.y"), filepath.Join(path, "x")} {
		_, err := storage.Stat(far)
		assert.Error(t, err)
		assert.NotContains(t, err.Error(), "did you mean")
	}
	info, err := storage.Stat(path)
	require.NoError(t, err)
	assert.Equal(t, int64(len(path)), info.Size())
}
