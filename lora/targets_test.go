package lora

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/internal/pyregex"
	"github.com/lorakit/lorakit/tensor"
)

// TestSelects selects modules as PEFT does: fixtures/generate/targets.py asks it.
func TestSelects(t *testing.T) {
	b, err := os.ReadFile(fixtures + "/targets.json")
	require.NoError(t, err)
	var golden struct {
		Names    []string
		Cases    []map[string]jsontext.Value
		Patterns []struct {
			Keys  []string
			Found jsontext.Value
		}
	}
	require.NoError(t, json.Unmarshal(b, &golden, json.MatchCaseInsensitiveNames(true)))
	require.NotEmpty(t, golden.Cases)
	for _, x := range golden.Cases {
		var want []int
		refused := json.Unmarshal(x["adapted"], &want) != nil
		delete(x, "adapted")
		x["peft_type"] = jsontext.Value(`"LORA"`)
		config, err := json.Marshal(x, json.Deterministic(true))
		require.NoError(t, err)
		c, err := parseConfig(config)
		got := []int{}
		for i, name := range golden.Names {
			if err != nil {
				break
			}
			var ok bool
			if ok, err = c.selects(name); ok {
				got = append(got, i)
			}
		}
		if refused {
			require.ErrorIs(t, err, pyregex.ErrMalformed, string(config))
			continue
		}
		require.NoError(t, err, string(config))
		require.Equal(t, want, got, string(config))
	}
	require.NotEmpty(t, golden.Patterns)
	for _, x := range golden.Patterns {
		var want []int
		refused := json.Unmarshal(x.Found, &want) != nil
		var list []string
		for i, key := range x.Keys {
			list = append(list, fmt.Sprintf("%q: %d", key, i))
		}
		c, err := parseConfig([]byte(`{"peft_type": "LORA", "rank_pattern": {` + strings.Join(list, ", ") + `}}`))
		if refused {
			require.ErrorIs(t, err, pyregex.ErrMalformed, x.Keys)
			continue
		}
		require.NoError(t, err, x.Keys)
		var got []int
		for _, name := range golden.Names {
			at, err := c.lookup("rank_pattern", c.ranks, name, -1)
			require.NoError(t, err)
			got = append(got, int(at))
		}
		require.Equal(t, want, got, x.Keys)
	}
}

// TestCheckTargets refuses modules that have tensors and that the config leaves out.
func TestCheckTargets(t *testing.T) {
	q, embedding, head := "model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head"
	pair := func(shapes map[string][]int64, name string) map[string][]int64 {
		return with(shapes, map[string][]int64{name + ".lora_A.weight": {2, 4}, name + ".lora_B.weight": {6, 2}})
	}
	query := pair(map[string][]int64{}, q)
	for fields, says := range map[string]string{
		``:                                  "",
		`, "target_modules": null`:          "",
		`, "target_modules": []`:            "",
		`, "target_modules": "all-linear"`:  "",
		`, "target_modules": ["q_proj"]`:    "",
		`, "target_modules": ["` + q + `"]`: "",
		`, "target_modules": "q_proj"`:      `module "model.layers.0.self_attn.q_proj": malformed adapter: it has tensors, and by adapter_config.json's target_modules it is not adapted, expected one of "q_proj"`,
		`, "target_modules": ".*\\.q_proj"`: "",
		`, "target_modules": "layers.*"`:    "", // within another wrapper
		`, "target_modules": ["proj"]`:      `expected one of "proj"`,
		`, "target_modules": ["o_proj", "v_proj", "a", "b", "c", "d"]`: `expected one of "o_proj", "v_proj", "a", "b", and 2 more`,
		`, "target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]`: "target_modules, exclude_modules it is " +
			"not adapted",
		`, "target_modules": ["q_proj"], "exclude_modules": ["` + q +
			`"]`: "target_modules, exclude_modules it is not adapted",
		`, "target_modules": ["q_proj"], "exclude_modules": "model\\.layers\\.0\\..*"`:      "target_modules, exclude_modules it is not adapted",
		`, "target_modules": ["q_proj"], "modules_to_save": ["self_attn"]`:                  "target_modules, modules_to_save it is not adapted",
		`, "target_modules": ["q_proj"], "modules_to_save": ["attn", "q", "proj", "layer"]`: "",
		`, "target_modules": ["q_proj"], "layers_to_transform": [1]`:                        "target_modules, layers_to_transform it is not adapted",
		`, "target_modules": ["q_proj"], "layers_to_transform": [0, 1]`:                     "",
		`, "target_modules": ["v_proj"], "target_parameters": ["self_attn.q_proj.weight"]`:  "",
		`, "target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]`: `expected one of "v_proj", "mlp.experts.gate_up_proj"`,
		`, "target_modules": "(a+)+b|.*_proj"`:                                              "",
		`, "target_modules": {"q_proj": 1}`: "expected a list of names or " +
			"a regular expression",
		`, "target_modules": ["q_proj"], "layers_to_transform": "all"`:                        "layers_to_transform",
		`, "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [1]`:   "layers_pattern",
		`, "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["("]`: "regular expression",
	} {
		a, err := Open(folder(t, `{"peft_type": "LORA", "r": 2`+fields+`}`, query), OpenOptions{})
		if err == nil {
			defer a.Close()
			err = a.CheckTargets()
		}
		if says == "" {
			require.NoError(t, err, fields)
			continue
		}
		require.ErrorContains(t, err, says, fields)
		require.ErrorIs(t, err, ErrMalformed)
		require.NotContains(t, err.Error(), "\n")
	}
	// PEFT names one end of a tie, and adapts both.
	for config, says := range map[string]string{
		`"ensure_weight_tying": true, "target_modules": ["embed_tokens"]`: "",
		`"ensure_weight_tying": true, "target_modules": ["lm_head"]`:      "",
		`"target_modules": ["embed_tokens"]`:                              `module "lm_head"`,
	} {
		a, err := Open(folder(t, `{"peft_type": "LORA", "r": 2, `+config+`}`, tieEnds(head, embedding, 6)), OpenOptions{})
		require.NoError(t, err)
		defer a.Close()
		if err := a.CheckTargets(); says != "" {
			require.ErrorContains(t, err, says)
		} else {
			require.NoError(t, err)
		}
	}
}

// TestBindChecksTargets knows by the base what else a config means.
func TestBindChecksTargets(t *testing.T) {
	at := func(layer, name string) string { return "model.layers." + layer + ".self_attn." + name }
	base, order := map[string]tensor.Shape{}, []string(nil)
	for _, name := range []string{at("0", "q_proj"), at("0", "v_proj"), at("1", "q_proj"), at("1", "v_proj"), "lm_head"} {
		base[name+".weight"] = tensor.Shape{6, 4}
		order = append(order, name+".weight")
	}
	layer := func(name string) map[string][]int64 {
		return with(map[string][]int64{}, map[string][]int64{name + ".lora_A.weight": {2, 4},
			name + ".lora_B.weight": {6, 2}})
	}
	for fields, says := range map[string]string{
		`"target_modules": ["o_proj"]`:                                                   `module "model.layers.0.self_attn.q_proj": malformed adapter: it has tensors, and by adapter_config.json's target_modules it is not adapted, expected one of "o_proj"`,
		`"target_modules": ["q_proj", "v_proj"]`:                                         `module "model.layers.0.self_attn.v_proj": malformed adapter: target_modules means it by "v_proj", and the file has no lora_A and lora_B of any such module`,
		`"target_modules": ["q_proj", "lm_head"]`:                                        `module "lm_head": malformed adapter: target_modules means it by "lm_head"`,
		`"target_modules": ["q_proj", "c_attn"]`:                                         "", // the base has none
		`"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]`:        `module "lm_head": malformed adapter: modules_to_save means it by "lm_head", and the file has no weight`,
		`"target_modules": ["q_proj"], "modules_to_save": ["score"]`:                     "", // nor this
		`"target_modules": ["q_proj", "v_proj"], "exclude_modules": "model.*v_proj"`:     "",
		`"target_modules": ["q_proj", "v_proj"], "exclude_modules": "model.*layers.1.*"`: `means it by "v_proj"`,
	} {
		b, _, err := bound(t, `{"architectures": ["LlamaForCausalLM"]}`, `{"peft_type": "LORA", "r": 2, `+fields+`}`, base,
			order, layer(at("0", "q_proj")))
		if says != "" {
			require.ErrorContains(t, err, says, fields)
			require.ErrorIs(t, err, ErrMalformed)
			continue
		}
		require.NoError(t, err, fields)
		require.Len(t, b.Notices, 1) // layer 1
		require.Contains(t, b.Notices[0], "target_modules also means 1 modules of the base that it has no tensors of, and "+
			"leaves as they are: model.layers.1.self_attn.q_proj")
	}
}

// TestAround finds names within others, on whole parts.
func TestAround(t *testing.T) {
	e := endsOf([]string{"score", "mlp.gate", "model", "gate", "", "a.b.c.d"})
	for name, want := range map[string][]string{
		"score": {"score"}, "model.score.dense": {"model", "score"}, "model.layers.0.mlp.gate": {"gate", "mlp.gate", "model"},
		"scores.gated": nil, "b.c.d": nil, "mlp.gates": nil, "": nil, "a.b.c.d": {"a.b.c.d"}, "a..gate.": {"gate"},
	} {
		require.Equal(t, want, e.around(name), name)
	}
}
