package models

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestOrder: modules stand as the model has them, whatever the order of the file.
func TestOrder(t *testing.T) {
	layer := func(names ...string) []string {
		for i, n := range names {
			names[i] = "layers.3." + n + ".weight"
		}
		return names
	}
	for class, want := range map[string][]string{
		"LlamaForCausalLM": {
			"model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.weight",
			"model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight",
			"model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.gate_proj.weight",
			"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight",
		},
		"OPTForCausalLM": {
			"model.decoder.layers.0.self_attn.k_proj.weight", "model.decoder.layers.0.self_attn.v_proj.weight",
			"model.decoder.layers.0.self_attn.q_proj.weight", "model.decoder.layers.0.self_attn.out_proj.weight",
			"model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc2.weight",
		},
		"MixtralForCausalLM": {
			"model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.gate.weight",
			"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj",
		},
		// Without data, by the names that most models have.
		"": layer("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
			"mlp.up_proj", "mlp.down_proj", "mlp.strange"),
		"Unheard": {"h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj", "lm_head"},
	} {
		m, _ := Load(&Config{Architecture: class})
		o := m.Order()
		sorted := slices.Sorted(slices.Values(want))
		slices.SortStableFunc(sorted, func(a, b string) int { return slices.Compare(o.Place(a), o.Place(b)) })
		require.Equal(t, want, sorted, class)
	}
}

// TestOrderOfAll: every parameter of every architecture has a place.
func TestOrderOfAll(t *testing.T) {
	for _, class := range All() {
		a, err := read(class)
		require.NoError(t, err)
		o := (&Model{Known: true, data: a}).Order()
		for _, lines := range a.Parameters {
			for _, line := range lines {
				for pattern := range expand(line) {
					_, ok := o.root.place(pattern[:len(pattern)-len(rank(pattern))])
					require.True(t, ok, "%s: %s", class, pattern)
				}
			}
		}
	}
}

// rank is the number of dimensions that a pattern gives in brackets.
func rank(pattern string) string {
	for i := range len(pattern) {
		if pattern[i] == '[' {
			return pattern[i:]
		}
	}
	return ""
}
