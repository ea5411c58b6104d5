package lora

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/tensor"
)

func TestInModel(t *testing.T) {
	t.Parallel()
	const want = "model.layers.0.q_proj.lora_A.weight"
	for _, key := range []string{
		want,
		"base_model.model." + want,
		"_orig_mod.base_model.model." + want,
		"module.module._orig_mod.base_model.model." + want,
		"base_model.model._fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.q_proj" +
			".lora_A.weight",
	} {
		require.Equal(t, want, inModel(key), key)
	}
	for _, key := range []string{"module.0.weight", "encoder.module.base_model.model.x", "my_module.x"} {
		require.Equal(t, key, inModel(key))
	}
}

// TestWrapped binds an adapter whose names have what FSDP puts into them.
func TestWrapped(t *testing.T) {
	t.Parallel()
	const q = "model.layers.0.self_attn.q_proj"
	b, _, err := bound(t, `{"architectures": ["LlamaForCausalLM"]}`, plainConfig,
		map[string]tensor.Shape{q + ".weight": {4, 4}}, []string{q + ".weight"}, with(map[string][]int64{},
			map[string][]int64{"model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight": {2, 4},
				"model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_B.weight": {4, 2}}))
	require.NoError(t, err)
	require.Len(t, b.Changes[0].Updates, 1)
}
