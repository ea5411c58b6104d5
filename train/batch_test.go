package train

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestBatchWithNull is refused: null is no token, and json.Unmarshal would take it for 0.
func TestBatchWithNull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "batch.jsonl")
	for row, want := range map[string]string{
		`{"input_ids": [3, null, 5]}`:                        "line 1: wrong data: input_ids is no list of integers: it has a null",
		`{"input_ids": [3, 4, 5], "labels": [3, null, 5]}`:   "line 1: wrong data: labels is no list of integers: it has a null",
		`{"input_ids": [3, 4], "attention_mask": [1, null]}`: "attention_mask is no list of integers: it has a null",
	} {
		require.NoError(t, os.WriteFile(path, []byte(row), 0o600))
		_, err := ReadBatch(path, 8, 0)
		require.ErrorIs(t, err, ErrData, row)
		require.ErrorContains(t, err, want)
	}
}
