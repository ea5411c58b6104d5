package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// TestHints: what the library names by its options is said with flags, and these flags exist.
func TestHints(t *testing.T) {
	for want, h := range map[string]lorakit.Hint{
		"--force replaces it":                   {Option: "Force", Effect: "replaces it"},
		"--min-kept 0 writes it all the same":   {Option: "MinKept", Value: "0", Effect: "writes it all the same"},
		"--dtype f32 has room for them":         {Option: "DType", Value: "f32", Effect: "has room for them"},
		"--experts per-expert quantises them":   {Option: "PerExpert", Effect: "quantises them"},
		"lorakit verify tells a base that does": {Function: "Verify", Effect: "tells a base that does"},
		"lorakit convert --to mlx makes it":     {Function: "Convert", Option: "To", Value: "mlx", Effect: "makes it"},
		"--allow-non-finite encodes it":         {Option: "AllowNonFinite", Effect: "encodes it"},
		"lorakit plugin verify --accept toy pins it": {Function: "VerifyPlugin", Option: "Accept", Value: "toy",
			Effect: "pins it"},
		"lorakit plugin remove toy makes room": {Function: "RemovePlugin", Value: "toy", Effect: "makes room"},
		"--no-mtls starts it without":          {Option: "NoMTLS", Effect: "starts it without"},
		"--max-shard-size 50GB makes fewer":    {Option: "MaxShardSize", Value: "50GB", Effect: "makes fewer"},
	} {
		require.Equal(t, want, typed(h))
	}
	page := filepath.Join(t.TempDir(), "page.html")
	require.NoError(t, os.WriteFile(page, nil, 0o666))
	base := filepath.Join("..", "..", "fixtures", "tiny-llama")
	_, err := lorakit.Analyze(t.Context(), base, "", lorakit.AnalyzeOptions{HTML: page})
	require.ErrorIs(t, err, lorakit.ErrExists)
	require.Contains(t, withHints(err), "--force replaces it")
}
