package compressedtensors_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant/compressedtensors"
	"github.com/lorakit/lorakit/quant/quanttest"
)

// TestGolden holds every kind of weights against what compressed-tensors makes of them.
func TestGolden(t *testing.T) {
	paths, err := filepath.Glob("../../fixtures/compressed/*.safetensors")
	require.NoError(t, err)
	tested := 0
	for _, path := range paths {
		g := quanttest.Open(t, path)
		if !strings.Contains(string(g.JSON), `"compressed-tensors"`) {
			continue
		}
		tested++
		t.Run(strings.TrimSuffix(filepath.Base(path), ".safetensors"), func(t *testing.T) {
			quanttest.Check(t, compressedtensors.Scheme{}, g)
		})
	}
	require.Greater(t, tested, 30)
}
