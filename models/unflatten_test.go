package models

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestUnflatten(t *testing.T) {
	names := []string{
		"model_layers_11_self_attn_q_proj", "text_model_encoder_layers_0_mlp_fc1", "transformer_h_3_attn_c_attn",
		"model_layers_x_self_attn_q_proj", "no_such_module_1",
	}
	got := Unflatten(names)
	require.Equal(t, []string{"model.layers.11.self_attn.q_proj"}, got[names[0]])
	require.Equal(t, []string{"text_model.encoder.layers.0.mlp.fc1"}, got[names[1]])
	require.Equal(t, []string{"transformer.h.3.attn.c_attn"}, got[names[2]])
	require.Empty(t, got[names[3]])
	require.Empty(t, got[names[4]])
}

func BenchmarkUnflatten(b *testing.B) {
	for b.Loop() {
		Unflatten([]string{"model_layers_11_self_attn_q_proj"})
	}
}
