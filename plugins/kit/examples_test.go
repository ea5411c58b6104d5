package kit_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/plugins/kit/kittest"
)

// TestExamples: those in Go pass, as processes.
func TestExamples(t *testing.T) {
	t.Parallel()
	const dir = "../examples"
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	found := []string{}
	for _, e := range entries {
		if _, err := os.Stat(filepath.Join(dir, e.Name(), "main.go")); err != nil {
			continue // in another language
		}
		found = append(found, e.Name())
		t.Run(e.Name(), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), e.Name())
			out, err := exec.Command("go", "build", "-o", path, dir+"/"+e.Name()).CombinedOutput()
			require.NoError(t, err, string(out))
			kittest.Test(t, path)
		})
	}
	assert.Contains(t, found, "raw")
}
