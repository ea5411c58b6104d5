package lorakit_test

import (
	"math"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

func TestInspectAdapter(t *testing.T) {
	r, err := lorakit.InspectAdapter(t.Context(), lorakit.Adapter{Path: filepath.Join(adapterFixtures, "llama/patterns")},
		lorakit.ReadOptions{})
	require.NoError(t, err)
	assert.Equal(t, "peft", r.Dialect)
	assert.Equal(t, "llama", r.Base)
	assert.Equal(t, "0.21.2", r.PeftVersion)
	assert.Equal(t, 4, r.Rank)
	assert.InDelta(t, 8, r.Alpha, 0)
	assert.Equal(t, int64(3600), r.Trained)
	assert.Equal(t, int64(4*3600), r.Bytes)
	assert.Len(t, r.Modules, 14)
	assert.Len(t, r.Patterns, 10)
	assert.Contains(t, r.Patterns, lorakit.PatternedModule{Name: "model.layers.1.self_attn.k_proj", Rank: 6, Alpha: 8})
	m := r.Modules[0]
	assert.Equal(t, "model.layers.0.mlp.down_proj", m.Name)
	assert.Equal(t, tensor.Shape{2, 52}, m.A)
	assert.Equal(t, tensor.Shape{32, 2}, m.B)
	assert.Equal(t, tensor.Shape{32, 52}, m.Shape)
	assert.Equal(t, tensor.F32, m.DType)
	assert.InDelta(t, 4, m.Scaling, 0)

	// The base's own matrices are in the file and are not the adapter's.
	r, err = lorakit.InspectAdapter(t.Context(),
		lorakit.Adapter{Path: filepath.Join(adapterFixtures, "llama/embedding-head")}, lorakit.ReadOptions{})
	require.NoError(t, err)
	var own int64
	bases := 0
	for _, m := range r.Modules {
		if m.Base {
			bases++
			continue
		}
		for _, s := range []tensor.Shape{m.A, m.B} {
			n, err := s.Count()
			require.NoError(t, err)
			own += n
		}
		if m.Form == "embedding" {
			assert.Equal(t, tensor.Shape{64, 32}, m.Shape)
		}
	}
	assert.Positive(t, bases)
	assert.Equal(t, own, r.Trained)

	// The norm of what is stored, by the numbers.
	r, err = lorakit.InspectAdapter(t.Context(), lorakit.Adapter{Path: filepath.Join(adapterFixtures, "llama/saved-head")},
		lorakit.ReadOptions{})
	require.NoError(t, err)
	head := numbers(t, filepath.Join(adapterFixtures,
		"llama/saved-head/adapter_model.safetensors"))["base_model.model.lm_head.weight"]
	i := slices.IndexFunc(r.Modules, func(m lorakit.InspectedModule) bool { return m.Name == "lm_head" })
	require.GreaterOrEqual(t, i, 0)
	assert.Equal(t, "replace", r.Modules[i].Form)
	assert.InEpsilon(t, math.Sqrt(kernels.SquaredNorm(head)), *r.Modules[i].Norm, 1e-12)

	_, err = lorakit.InspectAdapter(t.Context(), lorakit.Adapter{Path: filepath.Join(adapterFixtures, "bases/llama")},
		lorakit.ReadOptions{})
	require.Error(t, err)
}
