package lora

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestConfigRefuses(t *testing.T) {
	for config, says := range map[string]string{
		`{"peft_type": "OTHER", "r": 4}`:                                   "peft_type is \"OTHER\"; known are LORA, ADALORA",
		`{"peft_type": "LORA", "r": 0}`:                                    "r is 0",
		`{"peft_type": "LORA", "r": 4, "use_qalora": true}`:                "use_qalora is \"true\"",
		`{"peft_type": "LORA", "r": 4, "layer_replication": [[0, 2]]}`:     "layer_replication",
		`{"peft_type": "LORA", "r": 4, "lora_B_layout": "other"}`:          "lora_B_layout",
		`{"peft_type": "LORA", "r": 4, "rank_pattern": {"(": 2}}`:          "regular expression",
		`{"peft_type": "LORA", "r": 4, "rank_pattern": {"q_proj": "two"}}`: "is no number",
		`{"peft_type": "LORA", "r": 4, "rank_pattern": ["q_proj"]}`:        "expected a JSON object",
		`{"peft_type": "LORA", "peft_type": "LORA", "r": 4}`:               "malformed",
		`{"peft_type": "LORA", "r": 4`:                                     "malformed",
	} {
		_, err := parseConfig([]byte(config))
		require.ErrorContains(t, err, says, config)
		require.NotContains(t, err.Error(), "\n")
	}
}

// A regular expression that Python refuses is refused in its words, as PEFT gives it to Python; one that Python takes
// is never called malformed.
func TestRegexesAreRefused(t *testing.T) {
	const regex = ": malformed adapter: regular expression "
	for fields, want := range map[string]struct {
		kind error
		says string
	}{
		`"rank_pattern": {"(?i)q_proj": 2}`: {ErrMalformed, `rank_pattern: key "(?i)q_proj"` + regex +
			`"(.*\\.)?((?i)q_proj)$": refused by Python: global flags not at the start of the expression at position 8`},
		`"alpha_pattern": {"q_\\N{DASH}": 2}`: {ErrUnsupported, `alpha_pattern: key "q_\\N{DASH}": not supported: ` +
			`regular expression "(.*\\.)?(q_\\N{DASH})$": not supported: a character by its name, \N{DASH}, at position 10`},
		`"target_modules": "q(?=a*)(?<=a*)"`: {ErrMalformed, "adapter_config.json: target_modules" + regex +
			`"q(?=a*)(?<=a*)": refused by Python: look-behind requires fixed-width pattern`},
		`"target_modules": "(q|v)++_proj\\1"`: {ErrUnsupported,
			"a reference to a group that a possessive quantifier repeats"},
		`"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["(?P<idx>h)"]`: {ErrMalformed,
			"layers_pattern" + regex + `"(?:^|.*?\\.)(?P<idx>h)\\.(?P<idx>\\d+)\\.": refused by Python: ` +
				"redefinition of group name 'idx' as group 2; was group 1"},
		`"target_modules": ["q"], "modules_to_save": ["h["]`: {ErrMalformed, "modules_to_save" + regex +
			`"(^|.*\\.)h[($|\\..*)": refused by Python: unterminated character set at position 9`},
		`"target_modules": ["q"], "exclude_modules": "a|(?i)b"`: {ErrMalformed, "exclude_modules" + regex},
		`"target_modules": "(?i).*(\\w)\\1"`:                    {ErrUnsupported, "ignores case, on what is not ASCII"},
	} {
		c, err := parseConfig([]byte(`{"peft_type": "LORA", ` + fields + `}`))
		for _, name := range []string{"h.0.q", "é.q"} {
			if err == nil {
				_, err = c.selects(name)
			}
		}
		require.ErrorIs(t, err, want.kind, fields)
		require.ErrorContains(t, err, want.says, fields)
		require.NotContains(t, err.Error(), "\n")
	}
}

// The first pattern of the file wins, and one may look ahead, as in Python.
func TestPatterns(t *testing.T) {
	c, err := parseConfig([]byte(`{"peft_type": "LORA", "r": 4, "lora_alpha": 8,
		"rank_pattern": {"layers\\.1\\..*q_proj": 2, "q_proj": 16, "(?!k)\\w_proj": 3}, "alpha_pattern": {"q_proj": 32}}`))
	require.NoError(t, err)
	for name, want := range map[string]float64{
		"model.layers.1.self_attn.q_proj": 2, "model.layers.0.self_attn.q_proj": 16, "model.layers.0.self_attn.v_proj": 3,
		"model.layers.0.self_attn.k_proj": 4,
	} {
		got, err := c.lookup("rank_pattern", c.ranks, name, float64(c.Rank))
		require.NoError(t, err)
		require.Equal(t, want, got, name)
	}
	m := &Module{}
	require.NoError(t, c.scale(m, "model.layers.0.self_attn.q_proj", 16))
	require.Equal(t, 2.0, m.Scaling)
	require.ErrorContains(t, c.scale(m, "model.layers.0.self_attn.q_proj", 4),
		"rank 4 in its tensors and 16 by adapter_config.json")
}

// A regular expression that runs away is stopped.
func TestPatternRunsAway(t *testing.T) {
	c, err := parseConfig([]byte(`{"peft_type": "LORA", "r": 4, "rank_pattern": {"(a+)+b": 2}}`))
	require.NoError(t, err)
	_, err = c.lookup("rank_pattern", c.ranks, strings.Repeat("a", 60), 4)
	require.ErrorContains(t, err, "adapter_config.json: rank_pattern: malformed adapter: the regular expression "+
		"\"(a+)+b\" takes too long")
}

func TestKeys(t *testing.T) {
	for key, want := range map[string]struct {
		module string
		role   role
		param  string
	}{
		"base_model.model.model.layers.0.q_proj.lora_A.weight":         {"model.layers.0.q_proj", roleA, "weight"},
		"base_model.model.model.layers.0.q_proj.lora_B.default.weight": {"model.layers.0.q_proj", roleB, "weight"},
		"base_model.model.h.0.c_attn.lora_B.bias":                      {"h.0.c_attn", roleBias, "bias"},
		"base_model.model.wte.lora_embedding_A":                        {"wte", roleEmbeddingA, "weight"},
		"base_model.model.wte.lora_embedding_B.default":                {"wte", roleEmbeddingB, "weight"},
		"base_model.model.q.lora_magnitude_vector":                     {"q", roleMagnitude, "weight"},
		"base_model.model.experts.base_layer.lora_A.weight":            {"experts.base_layer", roleA, "weight"},
		"base_model.model.embed.token_adapter.trainable_tokens_delta":  {"embed", roleTokens, "weight"},
		"base_model.model.score.weight":                                {"score", roleValue, "weight"},
		"base_model.model.lm_head.base_layer.weight":                   {"lm_head.base_layer", roleValue, "weight"},
		"weight": {"", roleValue, "weight"},
	} {
		module, r, param := split(key)
		require.Equal(t, want.module, module, key)
		require.Equal(t, want.role, r, key)
		require.Equal(t, want.param, param, key)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add(
		[]byte(
			`{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "target_modules": "all-linear"}`),
		"model.layers.0.q_proj")
	f.Add([]byte(`{"peft_type": "LORA", "r": 4, "alpha_pattern": {"(?!k).*": 2}}`), "k")
	f.Fuzz(func(t *testing.T, config []byte, name string) {
		c, err := parseConfig(config)
		if err != nil {
			return
		}
		split(name)
		if r, err := c.lookup("rank_pattern", c.ranks, name, 1); err == nil {
			_ = c.scale(&Module{}, name, int64(r))
		}
		stringList(c.Targets)
	})
}

// What a config has besides is told, and an error where it may change the mathematics.
func TestUnheardFields(t *testing.T) {
	c,
		err := parseConfig(
		[]byte(
			`{"peft_type": "LORA", "r": 4, "note": "mine", "lora_dropout": 0.1, "off": null, "none": [], "use_cache": false}`))
	require.NoError(t, err)
	require.Equal(t, []string{"note"}, c.unknownFields)
	for _, field := range []string{`"use_newthing": true`, `"use_dora_too": {"a": 1}`, `"enable_lora": [true, false]`} {
		_, err := parseConfig([]byte(`{"peft_type": "LORA", "r": 4, ` + field + `}`))
		require.ErrorIs(t, err, ErrUnsupported, field)
		require.ErrorContains(t, err, "which changes what the adapter computes")
	}
	a, err := Open(folder(t, `{"peft_type": "LORA", "r": 2, "b": 1, "a": 2, "c": 3, "d": 4, "e": 5}`,
		map[string][]int64{"q.lora_A.weight": {2, 3}, "q.lora_B.weight": {4, 2}}), OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	require.Len(t, a.Notices, 1)
	require.Contains(t, a.Notices[0],
		`has fields that are not known here, and are not looked at: "a", "b", "c", "d", and 1 more`)
}

// TestConfigOfOtherTypes says where a config has another type than it should, in no words of Go.
func TestConfigOfOtherTypes(t *testing.T) {
	for config, says := range map[string]string{
		`{"peft_type": "LORA", "r": "8"}`:               `found a string at "/r", expected another type or value of it`,
		`{"peft_type": "LORA", "use_dora": [1]}`:        `found a list at "/use_dora"`,
		`{"peft_type": "LORA", "lora_alpha": 1e400}`:    `found a number at "/lora_alpha"`,
		`{"peft_type": "LORA", "r": 8, "r": 9}`:         `duplicate object member name "r"`,
		`{"peft_type": "LORA", "layers_pattern": {"a":`: "unexpected EOF",
	} {
		_, err := parseConfig([]byte(config))
		require.ErrorIs(t, err, ErrMalformed, config)
		require.ErrorContains(t, err, says, config)
		require.NotContains(t, err.Error(), "json", config)
	}
}
