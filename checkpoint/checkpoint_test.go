package checkpoint_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
)

// What a server has answered in place of a config.json is JSON, and no config. One that only names no model is.
func TestAnswerInPlaceOfConfig(t *testing.T) {
	dir := t.TempDir()
	b, err := os.ReadFile("../fixtures/adapters/bases/llama/model.safetensors")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "model.safetensors"), b, 0o666))
	for config, says := range map[string]string{
		`{"error": "Access is restricted", "error_type": "GatedRepo"}`: `config.json: not a checkpoint: it is a JSON ` +
			`document ("Access is restricted"): a server has sent it in place of the file: download it again`,
		`{"detail": "Not Found"}`:                         `("Not Found")`,
		`{"error": {"code": 404, "message": "gone"}}`:     `("gone")`,
		`{"message": "hello", "model_type": "llama"}`:     "",
		`{"hidden_size": 4, "task": {"message": "none"}}`: "",
		`{}`: "",
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o666))
		c, err := checkpoint.Open(t.Context(), dir)
		if says == "" {
			require.NoError(t, err, config)
			c.Close()
			continue
		}
		assert.ErrorIs(t, err, formats.ErrForeign, config)
		assert.ErrorContains(t, err, says)
	}
}
