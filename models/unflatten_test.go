package models

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestUnflatten(t *testing.T) {
	names := []string{
		"model_layers_11_self_attn_q_proj", "text_model_encoder_layers_0_mlp_fc1", "transformer_h_3_attn_c_attn",
		"model_layers_x_self_attn_q_proj", "no_such_module_1",
		"model_decoder_project_in", "vision_tower_patch_conv", "encoder_stages_0_layers_1_layer_2_convolution",
		"model_layers_3_self_attn_fc1", "model_layers_q_proj", "_", "", "__q_proj",
	}
	got := Unflatten(names, nil)
	require.Equal(t, []string{"model.layers.11.self_attn.q_proj"}, got[names[0]])
	require.Equal(t, []string{"text_model.encoder.layers.0.mlp.fc1"}, got[names[1]])
	require.Equal(t, []string{"transformer.h.3.attn.c_attn"}, got[names[2]])
	require.Empty(t, got[names[3]])
	require.Empty(t, got[names[4]])
	require.Equal(t, []string{"model.decoder.project_in"}, got[names[5]])
	require.Equal(t, []string{"vision_tower.patch_conv"}, got[names[6]])
	require.Equal(t, []string{"encoder.stages.0.layers.1.layer.2.convolution"}, got[names[7]])
	// no model has it, but both of its parts are known
	require.Equal(t, []string{"model.layers.3.self_attn.fc1"}, got[names[8]])
	for _, name := range names[9:] {
		require.LessOrEqual(t, len(got[name]), 1, name)
	}
}

func BenchmarkUnflatten(b *testing.B) {
	for b.Loop() {
		Unflatten([]string{"model_layers_11_self_attn_q_proj"}, nil)
	}
}
