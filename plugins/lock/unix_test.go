//go:build unix

package lock

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
)

func TestFoldersThatAreUnsafe(t *testing.T) {
	f, p := installed(t)
	refused := func(path string) {
		t.Helper()
		for _, mode := range []os.FileMode{0o720, 0o702} {
			require.NoError(t, os.Chmod(path, mode))
			_, err := Open(f.Dir(), BuiltIn())
			oneLine(t, err, ErrUnsafe, path, "chmod go-w")
		}
		require.NoError(t, os.Chmod(path, 0o755))
		open(t, f.Dir())
	}
	refused(f.Dir())
	refused(filepath.Join(f.Dir(), lockName))

	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(f.Dir(), link))
	_, err := Open(link, BuiltIn())
	oneLine(t, err, ErrUnsafe, "found a link")
	_, err = (&Folder{dir: link}).Install(t.Context(), packed(t), says(toy()), InstallOptions{})
	oneLine(t, err, ErrUnsafe)

	require.NoError(t, os.Chmod(f.Path(p), 0o777))
	_, err = f.Verify(p)
	oneLine(t, err, ErrUnsafe)
	require.NoError(t, os.Chmod(f.Path(p), 0o700))
	moved := filepath.Join(t.TempDir(), "moved")
	require.NoError(t, os.Rename(f.Path(p), moved))
	require.NoError(t, os.Symlink(moved, f.Path(p)))
	_, err = f.Verify(p)
	oneLine(t, err, ErrUnsafe, "found a link")

	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err = Open(file, BuiltIn())
	oneLine(t, err, formats.ErrMalformed, "found a file")

	if os.Geteuid() == 0 {
		require.NoError(t, os.Lchown(f.Dir(), 12345, -1))
		_, err = Open(f.Dir(), BuiltIn())
		oneLine(t, err, ErrUnsafe, "the owner 12345")
	}
}

func TestLinksAndPipesInPackages(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "plugins"))
	linked := packed(t)
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(linked, "bin", "link")))
	_, err := f.Install(t.Context(), linked, says(toy()), InstallOptions{})
	oneLine(t, err, formats.ErrMalformed, "found a link")

	folder := packed(t)
	require.NoError(t, os.Symlink(t.TempDir(), filepath.Join(folder, "link")))
	_, err = f.Install(t.Context(), folder, says(toy()), InstallOptions{})
	oneLine(t, err, formats.ErrMalformed, "found a link")

	pipe := packed(t)
	require.NoError(t, syscall.Mkfifo(filepath.Join(pipe, "pipe"), 0o600))
	_, err = f.Install(t.Context(), pipe, says(toy()), InstallOptions{})
	oneLine(t, err, formats.ErrMalformed, "found a special file")
	_, err = f.Install(t.Context(), filepath.Join(pipe, "pipe"), says(toy()), InstallOptions{})
	oneLine(t, err, formats.ErrMalformed, "found a special file")

	named := write(t, packed(t), map[string]string{"a\nb": ""})
	_, err = f.Install(t.Context(), named, says(toy()), InstallOptions{})
	oneLine(t, err, formats.ErrMalformed, `"a\nb"`)
	clean(t, f)
}
