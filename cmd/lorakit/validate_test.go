package main

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestValidateFindsChangedWeights writes to the base while steps are taken: the command exits with 3, says it and
// saves nothing.
func TestValidateFindsChangedWeights(t *testing.T) {
	fixtures := filepath.Join("..", "..", "fixtures", "steps")
	dir := t.TempDir()
	base, batch, save := filepath.Join(dir, "base"), filepath.Join(dir, "batch.jsonl"), filepath.Join(dir, "stepped")
	require.NoError(t, os.CopyFS(base, os.DirFS(filepath.Join(fixtures, "bases", "llama"))))
	require.NoError(t, os.WriteFile(batch, []byte(`{"input_ids": [34, 41, 34, 1, 14, 65, 10, 41, 26]}`), 0o666))
	c := command(nil, "validate", base, "--data", batch, "--adapter", filepath.Join(fixtures, "llama", "all"),
		"--steps", "300", "--lr", "1e-5", "--save", save, "--progress", "json")
	stderr, err := c.StderrPipe()
	require.NoError(t, err)
	var stdout strings.Builder
	c.Stdout = &stdout
	require.NoError(t, c.Start())
	var said string
	changed := false
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		said = lines.Text()
		if !changed && strings.Contains(said, `"stage":"step 1"`) { // the base has been hashed
			changed = true
			flipLowestBit(t, filepath.Join(base, "model.safetensors"))
		}
	}
	require.True(t, changed)
	require.Error(t, c.Wait())
	assert.Equal(t, exitFound, c.ProcessState.ExitCode())
	assert.Equal(t, "lorakit: "+base+": frozen weights are not what they were before the steps; nothing was saved", said)
	assert.Contains(t, stdout.String(), "frozen weights HAVE CHANGED\n")
	assert.NotContains(t, stdout.String(), "stepped")
	assert.NoDirExists(t, save)
}

// flipLowestBit changes the lowest bit of the last float32 of a file.
func flipLowestBit(t *testing.T, file string) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	info, err := f.Stat()
	require.NoError(t, err)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, info.Size()-4)
	require.NoError(t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b, info.Size()-4)
	require.NoError(t, err)
}
