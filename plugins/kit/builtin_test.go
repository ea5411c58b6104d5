package kit_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	_ "github.com/lorakit/lorakit/formats/gguf"
	"github.com/lorakit/lorakit/formats/pytorch"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/plugins/kit"
	"github.com/lorakit/lorakit/quant"
	_ "github.com/lorakit/lorakit/quant/bnb"
	_ "github.com/lorakit/lorakit/quant/ggml"
	_ "github.com/lorakit/lorakit/quant/mlx"
)

// TestBuiltIn: what is built in passes what plugins have to.
func TestBuiltIn(t *testing.T) {
	for _, f := range formats.Default.All() {
		t.Run(f.Name(), func(t *testing.T) {
			builtIn(t, kit.Subject{Name: f.Name(), Formats: []formats.Format{f},
				Kinds: []error{pytorch.ErrUnsafe}}, "shape-0d", "order", "bad-bitflip")
		})
	}
	for _, s := range quant.All() {
		t.Run(s.Name(), func(t *testing.T) {
			builtIn(t, kit.Subject{Name: s.Name(), Schemes: []quant.Scheme{s}}, "scheme-roundtrip", "scheme-tiles-any-split",
				"scheme-bad")
		})
	}
}

// builtIn makes the checks, of which some have to have been made.
func builtIn(t *testing.T, s kit.Subject, passed ...string) {
	r, err := kit.Run(t.Context(), s)
	require.NoError(t, err)
	for _, c := range r.Checks {
		t.Logf("%-8s %-22s %s", c.Status, c.ID, c.Detail)
		assert.NotEqual(t, kit.Failed, c.Status, "%s: %s", c.ID, c.Detail)
	}
	for _, id := range passed {
		c, ok := r.Lookup(id)
		require.True(t, ok, id)
		assert.Equal(t, kit.Passed, c.Status, "%s: %s", id, c.Detail)
	}
}
