package lorakit_test

import (
	"encoding/binary"
	"encoding/json"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/tensor"
)

// badAdapter is a fixture's adapter with something wrong.
type badAdapter struct {
	name    string
	adapter string // of the fixtures
	base    string // where not that of the adapter
	config  map[string]any
	change  func(tensors map[string]entry)
	says    []string
	kind    error
}

const qProj = "base_model.model.model.layers.0.self_attn.q_proj."

// ones is a tensor in float32.
func ones(shape ...int64) entry {
	n := int64(1)
	for _, d := range shape {
		n *= d
	}
	var b []byte
	for range n {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(1))
	}
	return entry{tensor.Info{DType: tensor.F32, Shape: shape}, b}
}

func put(key string, e entry) func(map[string]entry) {
	return func(m map[string]entry) { m[key] = e }
}

func drop(key string) func(map[string]entry) {
	return func(m map[string]entry) { delete(m, key) }
}

func rename(from, to string) func(map[string]entry) {
	return func(m map[string]entry) {
		for _, k := range slices.Collect(maps.Keys(m)) {
			if n := strings.ReplaceAll(k, from, to); n != k {
				m[n] = m[k]
				delete(m, k)
			}
		}
	}
}

func badValue(key string, bits uint32) func(map[string]entry) {
	return func(m map[string]entry) {
		e := m[key]
		e.data = slices.Clone(e.data)
		binary.LittleEndian.PutUint32(e.data[8:], bits)
		m[key] = e
	}
}

var badAdapters = []badAdapter{
	{name: "another base, other shapes", adapter: "llama/attention", base: "llama-64",
		says: []string{"self_attn.", "lora_A 4 x 32", "do not fit", ", 64]"}, kind: lora.ErrBase},
	{name: "another base, other modules", adapter: "tiny-gpt2/attention", base: "llama",
		says: []string{"h.0.attn.c_attn", "no such module", "nearest"}, kind: lora.ErrBase},
	{name: "a misspelt module", adapter: "llama/attention",
		change: rename("layers.1.self_attn.q_proj", "layers.1.self_attn.q_prj"),
		says:   []string{"q_prj", `the nearest is "model.layers.1.self_attn.q_proj"`}, kind: lora.ErrBase},
	{name: "a layer too many", adapter: "llama/attention", change: rename("layers.1.", "layers.7."),
		says: []string{"layers.7", "nearest"}, kind: lora.ErrBase},
	{name: "a tensor that nothing takes", adapter: "llama/attention",
		change: put("base_model.model.model.layers.0.self_attn.spare.weight", ones(3)),
		says:   []string{"self_attn.spare", "no such module"}, kind: lora.ErrBase},
	{name: "a part of LoRA that is not known", adapter: "llama/attention", change: put(qProj+"lora_C.weight", ones(4, 4)),
		says: []string{qProj + "lora_C.weight", "adapter_model.safetensors"}, kind: lora.ErrUnsupported},
	{name: "a diagonal beside A and B", adapter: "llama/attention", change: put(qProj+"lora_diag.weight", ones(4)),
		says: []string{"lora_diag"}, kind: lora.ErrUnsupported},
	{name: "a rank that is not the config's", adapter: "llama/attention", config: map[string]any{"r": 3},
		says: []string{"rank", "3", "adapter_config.json"}, kind: lora.ErrMalformed},
	{name: "a rank that is not the pattern's", adapter: "llama/attention",
		config: map[string]any{"rank_pattern": map[string]any{"q_proj": 2}}, says: []string{"q_proj", "rank", "2"},
		kind: lora.ErrMalformed},
	{name: "ranks of A and B that differ", adapter: "llama/attention", change: put(qProj+"lora_A.weight", ones(3, 32)),
		says: []string{"q_proj", "[3, 32]", "ranks differ"}, kind: lora.ErrMalformed},
	{name: "another peft_type", adapter: "llama/attention", config: map[string]any{"peft_type": "OTHER"},
		says: []string{"OTHER", "adapter_config.json", "known are LORA"}, kind: lora.ErrUnsupported},
	{name: "no peft_type", adapter: "llama/attention", config: map[string]any{"peft_type": nil},
		says: []string{"peft_type", "known are LORA"}, kind: lora.ErrUnsupported},
	{name: "NaN in A", adapter: "llama/attention", change: badValue(qProj+"lora_A.weight", 0x7fc00000),
		says: []string{"q_proj", "lora_A", "NaN"}, kind: lora.ErrMalformed},
	{name: "infinity in B", adapter: "llama/attention", change: badValue(qProj+"lora_B.weight", 0x7f800000),
		says: []string{"q_proj", "lora_B", "Inf"}, kind: lora.ErrMalformed},
	{name: "NaN in a magnitude", adapter: "llama/dora", change: badValue(qProj+"lora_magnitude_vector", 0x7fc00000),
		says: []string{"q_proj.lora_magnitude_vector", "NaN"}, kind: lora.ErrMalformed},
	{name: "a regular expression that runs away", adapter: "llama/attention",
		config: map[string]any{"rank_pattern": map[string]any{`(\w+\.?)+!`: 2}},
		says:   []string{"takes too long", "self_attn"}, kind: lora.ErrMalformed},
	{name: "a regular expression that is none", adapter: "llama/attention",
		config: map[string]any{"alpha_pattern": map[string]any{`q_(proj`: 2}}, says: []string{"alpha_pattern", "q_(proj"},
		kind: lora.ErrMalformed},
	{name: "no B", adapter: "llama/attention", change: drop(qProj + "lora_B.weight"),
		says: []string{"q_proj", "only one of lora_A and lora_B"}, kind: lora.ErrMalformed},
	{name: "no A", adapter: "llama/attention", change: drop(qProj + "lora_A.weight"),
		says: []string{"q_proj", "only one of lora_A and lora_B"}, kind: lora.ErrMalformed},
	{name: "a magnitude of the wrong length", adapter: "llama/dora", change: put(qProj+"lora_magnitude_vector", ones(7)),
		says: []string{"q_proj", "7", "32"}, kind: lora.ErrMalformed},
	{name: "no magnitude", adapter: "llama/dora", change: drop(qProj + "lora_magnitude_vector"),
		says: []string{"q_proj", "lora_magnitude_vector", "use_dora"}, kind: lora.ErrMalformed},
	{name: "a magnitude without use_dora", adapter: "llama/dora", config: map[string]any{"use_dora": false},
		says: []string{"lora_magnitude_vector", "use_dora"}, kind: lora.ErrMalformed},
	{name: "a bias without lora_bias", adapter: "qwen2/lora-bias", config: map[string]any{"lora_bias": false},
		says: []string{"lora_B.bias", "lora_bias"}, kind: lora.ErrMalformed},
	{name: "a bias of the wrong length", adapter: "qwen2/lora-bias", change: put(qProj+"lora_B.bias", ones(5)),
		says: []string{"q_proj", "5", "32"}, kind: lora.ErrBase},
	{name: "a new value of another shape", adapter: "llama-score/score",
		change: put("base_model.model.score.weight", ones(3, 5)), says: []string{"score", "[3, 5]", "[3, 32]"},
		kind: lora.ErrBase},
	{name: "two names for one tensor", adapter: "llama/attention", change: put(qProj+"lora_A.default.weight", ones(4, 32)),
		says: []string{"lora_A", "says the same"}, kind: lora.ErrMalformed},
	{name: "integers", adapter: "llama/attention", change: func(m map[string]entry) {
		e := m[qProj+"lora_A.weight"]
		e.DType = tensor.I32
		m[qProj+"lora_A.weight"] = e
	}, says: []string{"lora_A", "I32", "expected"}, kind: lora.ErrMalformed},
	{name: "a replaced module without a new value", adapter: "llama/attention",
		config: map[string]any{"modules_to_save": []string{"score", "lm_head"}}, says: []string{"lm_head", "modules_to_save"},
		kind: lora.ErrMalformed},
	{name: "tokens without values", adapter: "llama/attention",
		config: map[string]any{"trainable_token_indices": []int{1, 5}},
		says:   []string{"trainable_token_indices", "trainable_tokens_delta"}, kind: lora.ErrMalformed},
	{name: "tokens past the vocabulary", adapter: "llama/tokens",
		config: map[string]any{"trainable_token_indices": []int{1, 5, 1000000}}, says: []string{"1000000", "embed_tokens"},
		kind: lora.ErrBase},
	{name: "the same token twice", adapter: "llama/tokens",
		config: map[string]any{"trainable_token_indices": []int{1, 5, 5}}, says: []string{"5"}, kind: lora.ErrMalformed},
	{name: "too few tokens", adapter: "llama/tokens", config: map[string]any{"trainable_token_indices": []int{1}},
		says: []string{"trainable_tokens_delta", "1 indices"}, kind: lora.ErrMalformed},
	{name: "experts of another number", adapter: "qwen3-moe/experts", change: func(m map[string]entry) {
		for k := range m {
			if strings.Contains(k, "experts") && strings.HasSuffix(k, "lora_A.weight") {
				m[k] = ones(7, m[k].Shape[1])
			}
			if strings.Contains(k, "experts") && strings.HasSuffix(k, "lora_B.weight") {
				m[k] = ones(m[k].Shape[0], 7)
			}
		}
	}, says: []string{"experts", "7 x "}, kind: lora.ErrBase},
	{name: "a start that is part of the base", adapter: "llama/init-pissa", says: []string{"init_lora_weights", "pissa"},
		kind: lora.ErrUnsupported},
	{name: "NaN in a new value", adapter: "llama-score/score",
		change: badValue("base_model.model.score.weight", 0x7fc00000),
		says:   []string{"score.weight", "NaN", "expected finite"}, kind: lora.ErrMalformed},
	{name: "an alpha that float32 cannot hold", adapter: "llama/attention", config: map[string]any{"lora_alpha": 1e300},
		says: []string{"self_attn", "float32 cannot hold"}, kind: lora.ErrMalformed},
	{name: "an alpha that is null", adapter: "llama/attention", config: map[string]any{"lora_alpha": nil},
		says: []string{"lora_alpha", "expected a number"}, kind: lora.ErrMalformed},
	{name: "no bias", adapter: "qwen2/lora-bias", change: drop(qProj + "lora_B.bias"),
		says: []string{"q_proj", "lora_B.bias", "lora_bias is true"}, kind: lora.ErrMalformed},
	{name: "a pattern of two lines", adapter: "llama/attention",
		config: map[string]any{"rank_pattern": map[string]any{"(\nq": 2}},
		says:   []string{"rank_pattern", "regular expression"}, kind: lora.ErrMalformed},
	{name: "no tensors", adapter: "llama/attention", change: func(m map[string]entry) { clear(m) },
		says: []string{"no tensors"}, kind: lora.ErrMalformed},
}

func init() {
	for field, v := range map[string]any{
		"alora_invocation_tokens": []int{1, 2}, "use_qalora": true, "velora_config": map[string]any{"rank": 1},
		"monteclora_config": map[string]any{"n": 1},
		"use_bdlora":        true, "arrow_config": map[string]any{"top_k": 1}, "kasa_config": map[string]any{"k": 1},
		"layer_replication": [][2]int{{0, 2}},
	} {
		badAdapters = append(badAdapters, badAdapter{name: field, adapter: "llama/attention",
			config: map[string]any{field: v},
			says:   []string{field, "adapter_config.json", "changes what the adapter computes"}, kind: lora.ErrUnsupported})
	}
}

// TestMergeBadAdapter merges adapters that cannot be: the error is one line that names what is wrong, and nothing is
// left where the result was to be.
func TestMergeBadAdapter(t *testing.T) {
	t.Parallel()
	for _, x := range badAdapters {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			source, dir := filepath.Join(adapterFixtures, x.adapter), filepath.Join(t.TempDir(), "adapter")
			require.NoError(t, os.Mkdir(dir, 0o755))
			b, err := os.ReadFile(filepath.Join(source, "adapter_config.json"))
			require.NoError(t, err)
			config := map[string]any{}
			require.NoError(t, json.Unmarshal(b, &config))
			maps.Copy(config, x.config)
			b, err = json.Marshal(config)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, "adapter_config.json"), b, 0o644))
			tensors := load(t, filepath.Join(source, "adapter_model.safetensors"))
			if x.change != nil {
				before := maps.Clone(tensors)
				x.change(tensors)
				require.NotEqual(t, before, tensors, "the case changes something")
			}
			writeTensors(t, filepath.Join(dir, "adapter_model.safetensors"), tensors)
			if x.base == "" {
				x.base = strings.Split(x.adapter, "/")[0]
			}
			for _, o := range []lorakit.ConvertOptions{{}, {Quantize: "nf4", MinKept: -1}} {
				at := t.TempDir()
				_, err = lorakit.Merge(t.Context(), baseOf(x.base), []lorakit.Adapter{{Path: dir}}, filepath.Join(at, "out"), o)
				require.Error(t, err)
				for _, s := range append(x.says, filepath.Base(dir)) {
					require.ErrorContains(t, err, s)
				}
				require.NotContains(t, err.Error(), "\n")
				if x.kind != nil {
					require.ErrorIs(t, err, x.kind)
				}
				left, err := os.ReadDir(at)
				require.NoError(t, err)
				require.Empty(t, left)
			}
		})
	}
}
