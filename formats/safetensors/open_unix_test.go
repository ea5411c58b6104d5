//go:build unix

package safetensors_test

import (
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats/formatstest"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/storage"
)

// Opening a pipe without a writer would wait for ever.
func TestPipesAreNoFiles(t *testing.T) {
	dir := folder(t, index, `{"weight_map":{"a":"w"}}`)
	for _, name := range []string{"w", "x.safetensors"} {
		require.NoError(t, syscall.Mkfifo(filepath.Join(dir, name), 0o600))
	}
	f := safetensors.Format{}
	_, err := formatstest.Open(f, dir)
	assert.ErrorIs(t, err, storage.ErrNotRegular)
	assert.True(t, formatstest.Detect(f, filepath.Join(dir, "x.safetensors")))
	_, err = formatstest.Open(f, filepath.Join(dir, "x.safetensors"))
	assert.ErrorIs(t, err, storage.ErrNotRegular)
	assert.False(t, formatstest.Detect(f, filepath.Join(dir, "w")))
}
