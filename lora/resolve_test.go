package lora

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/tensor"
)

// TestOtherTower binds adapters whose names end as the base's do: those of another class of the model, and those of
// another part of a model, which are for no module of this one.
func TestOtherTower(t *testing.T) {
	t.Parallel()
	const layer, llama, clip = "layers.0.self_attn.q_proj", "LlamaForCausalLM", "CLIPTextModel"
	for _, x := range []struct {
		class, base, adapter string
		binds                bool
	}{
		{llama, "model." + layer, "model.language_model." + layer, true},
		{llama, "model." + layer, "base." + layer, true},
		{llama, "model." + layer, "model.vision_tower.encoder." + layer, false},
		{llama, "model." + layer, "model.audio_tower." + layer, false},
		{llama, "model." + layer, "model.decoder." + layer, false},
		{"OPTForCausalLM", "model.decoder." + layer, "model.vision_tower.vision_model.encoder." + layer, false},
		{clip, "text_model.encoder." + layer, "vision_model.encoder." + layer, false},
		{clip, "text_model.encoder." + layer, "encoder." + layer, true},
	} {
		base := map[string]tensor.Shape{x.base + ".weight": {4, 4}}
		_, _, err := bound(t, `{"architectures": ["`+x.class+`"]}`, plainConfig, base, []string{x.base + ".weight"},
			with(map[string][]int64{}, map[string][]int64{
				x.adapter + ".lora_A.weight": {2, 4}, x.adapter + ".lora_B.weight": {4, 2}}))
		if x.binds {
			require.NoError(t, err, x.adapter)
			continue
		}
		require.ErrorIs(t, err, ErrBase, x.adapter)
		require.ErrorContains(t, err, "the base has no such module", x.adapter)
	}
}
