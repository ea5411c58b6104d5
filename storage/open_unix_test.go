//go:build unix

package storage_test

import (
	"net"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/storage"
)

// Opening a pipe without a writer would wait for ever.
func TestOpenDoesNotWaitForAPipe(t *testing.T) {
	dir := tempDir(t)
	require.NoError(t, syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	_, err := storage.Open(filepath.Join(dir, "pipe"))
	assert.ErrorIs(t, err, storage.ErrNotRegular)
	assert.ErrorContains(t, err, "pipe")

	t.Chdir(dir)
	l, err := net.Listen("unix", "socket")
	require.NoError(t, err)
	defer l.Close()
	_, err = storage.Open("socket")
	assert.ErrorIs(t, err, storage.ErrNotRegular)
}
