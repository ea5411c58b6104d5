package storage

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestLocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	open := func() *os.File {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		require.NoError(t, err)
		t.Cleanup(func() { f.Close() })
		return f
	}
	takes := func(lock func(*os.File) (bool, error), f *os.File, want bool) {
		t.Helper()
		ok, err := lock(f)
		require.NoError(t, err)
		require.Equal(t, want, ok)
	}
	one, two, three := open(), open(), open()
	takes(LockShared, one, true)
	takes(LockShared, two, true)
	takes(Lock, three, false)
	require.NoError(t, one.Close())
	takes(Lock, three, false)
	require.NoError(t, two.Close())
	takes(Lock, three, true)
	takes(LockShared, open(), false)
	takes(Lock, open(), false)
	require.NoError(t, three.Close())
	takes(LockShared, open(), true)
}
