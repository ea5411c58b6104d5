package models

import (
	"cmp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Every entry of order names parameters that the data has, and the table of stacks says what all entries do.
func TestRegisteredOrder(t *testing.T) {
	var found []Stack
	for _, class := range All() {
		a, err := read(class)
		require.NoError(t, err)
		for _, o := range a.Order {
			require.Greater(t, len(o.Parameters), 1, class)
			for _, line := range o.Modules {
				for pattern := range expand(line) {
					experts := false
					for _, p := range o.Parameters {
						name := strings.ReplaceAll(pattern, "#", "7") + "." + p
						got, ok := a.parameter(split(name), anyRank)
						require.True(t, ok, "%s: %s", class, name)
						experts = experts || got.kind == Expert
					}
					if !experts {
						continue
					}
					parts := strings.Split(pattern, ".")
					found = append(found, Stack{Module: strings.Join(parts[len(parts)-2:], "."), Registered: o.Registered,
						Types: []string{cmp.Or(a.ModelType, class)}})
				}
			}
		}
	}
	same := func(x, y Stack) bool {
		return x.Module == y.Module && slices.Equal(x.Parameters, y.Parameters) && x.IsTransposed == y.IsTransposed &&
			x.InputsFirst == y.InputsFirst && x.Interleaved == y.Interleaved
	}
	for _, s := range found {
		i := slices.IndexFunc(allStacks(), func(o Stack) bool { return same(s, o) })
		if assert.GreaterOrEqual(t, i, 0, "%+v", s) {
			assert.Contains(t, allStacks()[i].Types, s.Types[0])
		}
	}
	for _, s := range allStacks() {
		for _, modelType := range s.Types {
			assert.True(t, slices.ContainsFunc(found, func(o Stack) bool { return same(s, o) && o.Types[0] == modelType }),
				"%s %s", s.Module, modelType)
		}
		// What writes adapters goes by these.
		assert.True(t, s.InputsFirst || !s.IsTransposed, s.Module)
		if slices.Contains(s.Parameters, "down_proj") {
			last := slices.DeleteFunc(slices.Clone(s.Parameters), func(p string) bool { return strings.HasSuffix(p, "_bias") })
			assert.Equal(t, "down_proj", last[len(last)-1], s.Module)
		}
	}
}

func TestRegistered(t *testing.T) {
	for _, c := range []struct {
		config, module string
		want           Registered
	}{
		{`{"architectures":["NemotronHForCausalLM"]}`, "model.layers.3.mixer.experts",
			Registered{Parameters: []string{"up_proj", "down_proj"}}},
		{`{"architectures":["Qwen3MoeForCausalLM"]}`, "model.layers.3.mlp.experts",
			Registered{Parameters: []string{"gate_up_proj", "down_proj"}}},
		{`{"architectures":["Llama4ForCausalLM"]}`, "model.layers.3.feed_forward.experts",
			Registered{Parameters: []string{"gate_up_proj", "down_proj"}, InputsFirst: true}},
		{`{"architectures":["GptOssForCausalLM"]}`, "model.layers.0.mlp.experts",
			Registered{Parameters: []string{"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"},
				IsTransposed: true, InputsFirst: true, Interleaved: true}},
		{`{"architectures":["DbrxForCausalLM"]}`, "transformer.blocks.0.ffn.experts.mlp",
			Registered{Parameters: []string{"w1", "v1", "w2"}}},
		// one whose parameters another class has in another order
		{`{"architectures":["DeiTModel"]}`, "embeddings",
			Registered{Parameters: []string{"cls_token", "position_embeddings", "distillation_token"}}},
		// a model of which another is made, by its config
		{`{"architectures":["LlavaForConditionalGeneration"],"text_config":{"model_type":"nemotron_h"}}`,
			"model.language_model.layers.3.mixer.experts", Registered{Parameters: []string{"up_proj", "down_proj"}}},
		{`{"architectures":["Qwen3MoeForCausalLM"]}`, "model.layers.3.mlp.gate", Registered{}},
		{`{"architectures":["Unheard"]}`, "model.layers.3.mlp.experts", Registered{}},
	} {
		config, err := ParseConfig([]byte(c.config))
		require.NoError(t, err)
		m, _ := Load(config)
		got, ok := m.Registered(c.module)
		assert.Equal(t, c.want, got, c.module)
		assert.Equal(t, c.want.Parameters != nil, ok, c.module)
	}
	assert.Len(t, Stacks("model.layers.3.mixer.experts"), 1)
	assert.Greater(t, len(Stacks("model.layers.3.mlp.experts")), 2)
	assert.Empty(t, Stacks("model.layers.3.mlp.expert"))
	order, ok := RegisteredOrder([]string{"down_proj", "up_proj"})
	assert.True(t, ok)
	assert.Equal(t, []string{"up_proj", "down_proj"}, order)
	_, ok = RegisteredOrder([]string{"down_proj", "unheard"})
	assert.False(t, ok)
}
