package gguf_test

import (
	"encoding/json"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/tensor"
)

// edited is a model of the fixtures with other members in its config; nil drops one.
func edited(t *testing.T, name string, edits map[string]any) checkpoint {
	c := open(t, name)
	b, err := os.ReadFile(filepath.Join(fixtures, name, "config.json"))
	require.NoError(t, err)
	config := map[string]any{}
	require.NoError(t, json.Unmarshal(b, &config))
	maps.Copy(config, edits)
	maps.DeleteFunc(config, func(k string, v any) bool { _, dropped := edits[k]; return dropped && v == nil })
	b, err = json.Marshal(config)
	require.NoError(t, err)
	c.config, err = models.ParseConfig(b)
	require.NoError(t, err)
	return c
}

func (c checkpoint) forward() (*gguf.Model, error) {
	return gguf.Forward(c.config, c.tensors, gguf.Options{Type: gguf.F16, Vocabulary: 320})
}

// without drops the tensors whose names have a part.
func (c *checkpoint) without(part string) {
	c.tensors = slices.DeleteFunc(c.tensors, func(s tensor.Info) bool { return strings.Contains(s.Name, part) })
}

// add adds a tensor of a shape.
func (c *checkpoint) add(name string, shape ...int64) {
	c.tensors = append(c.tensors, tensor.Info{Name: name, DType: tensor.BF16, Shape: shape})
}

// addBytes adds a tensor of bytes.
func (c *checkpoint) addBytes(name string, shape ...int64) {
	c.tensors = append(c.tensors, tensor.Info{Name: name, DType: tensor.U8, Shape: shape})
}

// reshape gives a tensor another shape.
func (c *checkpoint) reshape(name string, shape ...int64) {
	i := slices.IndexFunc(c.tensors, func(s tensor.Info) bool { return s.Name == name })
	c.tensors[i].Shape = shape
}

type edits = map[string]any

// TestForwardRefuses: what does not fit together is an error of one line that says where.
func TestForwardRefuses(t *testing.T) {
	const layer = "model.layers.1."
	for _, c := range []struct {
		model string
		edits edits
		spoil func(c *checkpoint)
		kind  error
		says  []string
	}{

		{"llama", edits{"architectures": []string{"UnheardOfForCausalLM"}, "model_type": "unheard"}, nil,
			formats.ErrUnsupported,
			[]string{`"UnheardOfForCausalLM"`, "LlamaForCausalLM", "Qwen3MoeForCausalLM"}},
		{"llama", nil, func(c *checkpoint) { c.add(layer+"self_attn.gate.weight", 4, 4) }, formats.ErrUnsupported,
			[]string{`"model.layers.1.self_attn.gate.weight"`, "llama"}},
		{"llama", nil, func(c *checkpoint) { c.add("model.layers.01.input_layernorm.weight", 32) }, formats.ErrUnsupported,
			[]string{`"model.layers.01.input_layernorm.weight"`}},
		{"llama", nil, func(c *checkpoint) { c.add("model.norm", 32) }, formats.ErrUnsupported, []string{`"model.norm"`}},
		{"llama", nil, func(c *checkpoint) { c.add("model.layers.2.input_layernorm.weight", 32) }, formats.ErrMalformed,
			[]string{`"model.layers.2.input_layernorm.weight"`, "layer 2"}},
		{"llama", nil, func(c *checkpoint) { c.without(layer + "self_attn.v_proj") }, formats.ErrMalformed,
			[]string{"blk.1.attn_v.weight"}},
		{"llama", nil, func(c *checkpoint) { c.without(layer + "mlp.up_proj") }, formats.ErrMalformed,
			[]string{"blk.1.ffn_up.weight"}},
		{"llama", nil, func(c *checkpoint) { c.without("embed_tokens") }, formats.ErrMalformed,
			[]string{"token_embd.weight"}},
		{"llama", nil, func(c *checkpoint) { c.without("lm_head") }, formats.ErrMalformed, []string{"output.weight"}},
		{"llama", nil, func(c *checkpoint) { c.add(layer+"self_attn.q_proj.bias", 32) }, formats.ErrMalformed,
			[]string{"blk.0.attn_q.bias", "other layers"}},
		{"llama", edits{"num_hidden_layers": 4000000000}, nil, formats.ErrMalformed, []string{"blk.2."}},
		{"llama", nil, func(c *checkpoint) { c.add("language_model.model.norm.weight", 32) }, formats.ErrMalformed,
			[]string{`"language_model.model.norm.weight"`, "output_norm.weight", `"model.norm.weight"`}},
		{"llama", edits{"num_attention_heads": 3}, nil, formats.ErrMalformed,
			[]string{"self_attn.q_proj", "[32, 32]", "3 heads"}},
		{"llama", edits{"num_attention_heads": 0}, nil, formats.ErrMalformed, []string{"num_attention_heads", "above 0"}},
		{"llama", edits{"num_attention_heads": 0, "head_dim": nil}, nil, formats.ErrMalformed,
			[]string{"num_attention_heads"}},
		{"llama", edits{"num_attention_heads": 1.5}, nil, formats.ErrMalformed, []string{"num_attention_heads", "1.5"}},
		{"llama", edits{"hidden_size": nil}, nil, formats.ErrMalformed, []string{"hidden_size", "llama.embedding_length"}},
		{"llama", edits{"num_hidden_layers": nil}, nil, formats.ErrMalformed, []string{"num_hidden_layers"}},
		{"llama", edits{"hidden_size": "32"}, nil, formats.ErrMalformed, []string{"hidden_size", "32"}},
		{"llama", edits{"hidden_size": 1 << 33}, nil, formats.ErrMalformed, []string{"hidden_size"}},
		{"llama", edits{"rms_norm_eps": "small"}, nil, formats.ErrMalformed, []string{"rms_norm_eps"}},
		{"llama", edits{"rope_parameters": 7}, nil, formats.ErrMalformed, []string{"rope_parameters"}},
		{"llama", edits{"rope_parameters": edits{"rope_type": "dynamic"}}, nil, formats.ErrUnsupported,
			[]string{`"dynamic"`}},
		{"llama3", edits{"rope_parameters": edits{"rope_type": "llama3", "factor": 0}}, nil, formats.ErrMalformed,
			[]string{"factor", "above 0"}},
		{"llama3", edits{"head_dim": 1 << 40}, nil, formats.ErrMalformed, []string{"head_dim"}},

		{"phi3", edits{"rope_parameters": edits{"rope_type": "longrope", "long_factor": []int{1}, "short_factor": []int{1}}},
			nil, formats.ErrMalformed, []string{"long_factor", "4 numbers"}},
		{"mixtral", nil, func(c *checkpoint) { c.without("layers.1.block_sparse_moe.experts.2.w1") }, formats.ErrMalformed,
			[]string{"blk.1.ffn_gate_exps.weight", "number 2"}},
		{"mixtral", nil, func(c *checkpoint) { c.add(layer+"block_sparse_moe.experts.4.w1.weight", 64, 32) },
			formats.ErrMalformed, []string{"experts.4.w1", "number 4", "below 4"}},
		{"mixtral", nil, func(c *checkpoint) { c.reshape(layer+"block_sparse_moe.experts.1.w1.weight", 32, 32) },
			formats.ErrMalformed, []string{"[64, 32]", "[32, 32]"}},
		{"llama", edits{"hidden_size": 1000000000}, nil, formats.ErrMalformed,
			[]string{"config.json", "weight", "1000000000"}},
		{"llama", edits{"intermediate_size": 0}, nil, formats.ErrMalformed, []string{"blk.0.ffn_down.weight", "[32, 0]"}},
		{"gemma3", edits{"num_attention_heads": 0}, nil, formats.ErrMalformed,
			[]string{"blk.0.attn_output.weight", "[32, 0]"}},
		{"mixtral", edits{"num_experts_per_tok": 5}, nil, formats.ErrMalformed,
			[]string{"llama.expert_used_count", "5", "4 experts"}},
		{"mixtral", edits{"num_local_experts": nil}, nil, formats.ErrMalformed, []string{"num_local_experts"}},
		{"deepseek3", edits{"qk_nope_head_dim": 15}, nil, formats.ErrMalformed,
			[]string{"kv_b_proj", "4 heads of 31 rows"}},
		{"deepseek3", edits{"scoring_func": "softplus"}, nil, formats.ErrUnsupported, []string{`"softplus"`, "sigmoid"}},
		{"gptoss", nil, func(c *checkpoint) { c.reshape("model.layers.0.mlp.experts.gate_up_proj", 4, 32, 63) },
			formats.ErrMalformed, []string{"gate_up_proj", "2 parts"}},
		{"gptoss", nil, func(c *checkpoint) { c.addBytes("model.layers.0.mlp.experts.down_proj_scales", 4, 32, 1) },
			formats.ErrMalformed, []string{"down_proj_scales", "blocks"}},
		{"gptoss", nil, func(c *checkpoint) {
			c.without("layers.0.mlp.experts.down_proj")
			c.addBytes("model.layers.0.mlp.experts.down_proj_blocks", 4, 32, 1, 16)
		}, formats.ErrMalformed, []string{"down_proj_blocks", "scales"}},
		{"gptoss", nil, func(c *checkpoint) {
			c.without("layers.0.mlp.experts.down_proj")
			c.addBytes("model.layers.0.mlp.experts.down_proj_blocks", 4, 32, 1, 16)
			c.addBytes("model.layers.0.mlp.experts.down_proj_scales", 4, 32, 2)
		}, formats.ErrMalformed, []string{"down_proj_scales", "[4, 32, 2]", "[4, 32, 1]"}},
		{"gptoss", nil, func(c *checkpoint) {
			c.without("layers.0.mlp.experts.down_proj")
			c.addBytes("model.layers.0.mlp.experts.down_proj_blocks", 4, 32, 1, 15)
		}, formats.ErrMalformed, []string{"down_proj_blocks", "16 bytes"}},
		{"gptoss", nil, func(c *checkpoint) { c.add("model.layers.0.mlp.experts.down_proj_blocks", 4, 32, 1, 16) },
			formats.ErrMalformed, []string{"down_proj_blocks", "BF16", "U8"}},
		{"gpt2", edits{"n_inner": 100}, nil, formats.ErrUnsupported, []string{"n_inner", "100", "128"}},
		{"gemma3", edits{"attn_logit_softcapping": 50}, nil, formats.ErrUnsupported,
			[]string{"attn_logit_softcapping", "none"}},
		{"gemma2", edits{"final_logit_softcapping": jsontext.Value("null")}, nil, formats.ErrUnsupported,
			[]string{"final_logit_softcapping", "null"}},
		{"gemma2", edits{"sliding_window": jsontext.Value("null")}, nil, formats.ErrUnsupported,
			[]string{"sliding_window", "null"}},
		{"cohere2", edits{"sliding_window": jsontext.Value("null")}, nil, formats.ErrUnsupported, []string{"sliding_window"}},
		{"deepseek3", edits{"norm_topk_prob": jsontext.Value("null")}, nil, formats.ErrUnsupported,
			[]string{"norm_topk_prob", "null"}},
		{"gemma2", edits{"final_logit_softcapping": true}, nil, formats.ErrMalformed, []string{"final_logit_softcapping"}},
		{"qwen3", nil, func(c *checkpoint) { c.reshape("model.norm.weight", 0) }, formats.ErrUnsupported,
			[]string{`"model.norm.weight"`, "[0]"}},
	} {
		m := edited(t, c.model, c.edits)
		if c.spoil != nil {
			c.spoil(&m)
		}
		_, err := m.forward()
		require.ErrorIs(t, err, c.kind, "%s %v %v", c.model, c.edits, c.says)
		require.NotContains(t, err.Error(), "\n")
		for _, s := range c.says {
			require.ErrorContains(t, err, s)
		}
	}
	_, err := gguf.Forward(nil, nil, gguf.Options{})
	require.ErrorIs(t, err, formats.ErrMalformed)
}

// set gives a key another value, or drops it.
func (w *written) set(name string, v any) {
	w.keys = slices.DeleteFunc(slices.Clone(w.keys), func(p formats.Pair) bool { return p.Name == name })
	if v != nil {
		w.keys = append(w.keys, formats.Pair{Name: name, Value: v})
	}
}

// add adds a tensor.
func (w *written) add(name string, shape ...int64) {
	w.tensors = append(w.tensors, tensor.Info{Name: name, DType: tensor.F32, Shape: shape})
}

func (w *written) without(name string) {
	w.tensors = slices.DeleteFunc(w.tensors, func(t tensor.Info) bool { return t.Name == name })
}

func (w *written) reshape(name string, shape ...int64) {
	w.without(name)
	w.add(name, shape...)
}

// TestBackwardRefuses: so are files whose keys and tensors do not fit together.
func TestBackwardRefuses(t *testing.T) {
	for _, c := range []struct {
		model string
		spoil func(w *written)
		kind  error
		says  []string
	}{
		{"llama", func(w *written) { w.set("general.architecture", nil) }, formats.ErrMalformed,
			[]string{"general.architecture"}},
		{"llama", func(w *written) { w.set("general.architecture", "mamba") }, formats.ErrUnsupported,
			[]string{`"mamba"`, "llama", "qwen3moe"}},
		{"llama", func(w *written) { w.set("general.type", "adapter") }, formats.ErrUnsupported,
			[]string{"general.type", "adapter"}},
		{"llama", func(w *written) { w.set("llama.block_count", nil) }, formats.ErrMalformed,
			[]string{"llama.block_count"}},
		{"llama", func(w *written) { w.set("llama.block_count", uint32(3)) }, formats.ErrMalformed, []string{"blk.2."}},
		{"llama", func(w *written) { w.set("llama.block_count", uint32(1)) }, formats.ErrMalformed,
			[]string{"blk.1.", "layer 1"}},
		{"llama", func(w *written) { w.set("llama.rope.freq_base", float32(math.NaN())) }, formats.ErrMalformed,
			[]string{"llama.rope.freq_base", "NaN"}},
		{"phi3", func(w *written) { w.values["rope_factors_long.weight"][0] = float32(math.Inf(1)) },
			formats.ErrMalformed, nil},
		{"llama", func(w *written) { w.set("llama.block_count", uint32(4e9)) }, formats.ErrMalformed, []string{"blk.2."}},
		{"llama", func(w *written) { w.set("llama.block_count", "two") }, formats.ErrMalformed,
			[]string{"llama.block_count"}},
		{"llama", func(w *written) { w.set("llama.attention.head_count", uint32(0)) }, formats.ErrMalformed,
			[]string{`key "llama.attention.head_count": found 0`}},
		{"bert", func(w *written) { w.set("bert.attention.head_count", uint32(0)) }, formats.ErrMalformed,
			[]string{`key "bert.attention.head_count": found 0`}},
		{"gpt2", func(w *written) { w.set("gpt2.attention.head_count", uint32(0)) }, formats.ErrMalformed,
			[]string{`key "gpt2.attention.head_count": found 0`}},
		{"stablelm", func(w *written) {
			w.set("stablelm.attention.head_count_kv", uint32(3))
			for _, name := range []string{"blk.0.attn_k", "blk.1.attn_k", "blk.0.attn_v", "blk.1.attn_v"} {
				w.reshape(name+".weight", 24, 32)
			}
		}, formats.ErrMalformed, []string{`key "stablelm.attention.head_count_kv": found 3`, "4 heads"}},
		{"llama", func(w *written) { w.set("llama.block_count", uint32(0)) }, formats.ErrMalformed,
			[]string{`key "llama.block_count": found 0`}},
		{"mixtral", func(w *written) { w.set("llama.expert_count", nil) }, formats.ErrMalformed,
			[]string{`key "llama.expert_count": found none`}},
		{"deepseek3", func(w *written) { w.set("deepseek2.attention.key_length_mla", uint32(2)) }, formats.ErrMalformed,
			[]string{"attention.key_length_mla", "found -6"}},
		{"gemma3", func(w *written) { w.set("gemma3.rope.freq_base_swa", float32(math.Inf(1))) }, formats.ErrMalformed,
			[]string{"gemma3.rope.freq_base_swa", "+Inf"}},
		{"llama", func(w *written) { w.set("llama.attention.head_count", uint32(3)) }, formats.ErrMalformed,
			[]string{"blk.0.attn_q.weight", "3 heads"}},
		{"llama", func(w *written) { w.set("llama.attention.head_count_kv", []uint32{2, 1}) }, formats.ErrMalformed,
			[]string{"llama.attention.head_count_kv", "[2 1]"}},
		{"llama", func(w *written) { w.set("llama.attention.head_count_kv", []int32{}) }, formats.ErrMalformed,
			[]string{"llama.attention.head_count_kv"}},
		{"llama", func(w *written) { w.set("general.architecture", uint32(3)) }, formats.ErrMalformed,
			[]string{"general.architecture", "uint32"}},
		{"llama", func(w *written) { w.set("general.type", "mmproj") }, formats.ErrUnsupported,
			[]string{"general.type", "mmproj", "model"}},
		{"llama", func(w *written) { w.set("llama.rope.scaling.type", "longrope") }, formats.ErrMalformed,
			[]string{"llama.rope.scaling.type", "rope_factors_long.weight"}},
		{"llama", func(w *written) { w.set("llama.embedding_length", uint32(64)) }, formats.ErrMalformed,
			[]string{"output.weight", "[320, 32]", "[320, 64]", "keys of llama"}},
		{"llama", func(w *written) { w.set("llama.feed_forward_length", uint32(3)) }, formats.ErrMalformed,
			[]string{"blk.0.ffn_down.weight", "[32, 64]", "[32, 3]"}},
		{"llama", func(w *written) { w.set("llama.attention.key_length", uint32(16)) }, formats.ErrMalformed,
			[]string{"blk.0.attn_k.weight", "[32, 32]"}},
		{"llama", func(w *written) { w.reshape("blk.0.attn_q.weight", 32, 4, 8) }, formats.ErrMalformed,
			[]string{"blk.0.attn_q.weight", "[32, 4, 8]", "2 dimensions"}},
		{"llama", func(w *written) { w.reshape("blk.1.attn_norm.weight", 31) }, formats.ErrMalformed,
			[]string{"blk.1.attn_norm.weight", "[31]", "[32]"}},
		{"llama", func(w *written) { w.reshape("output.weight", 100, 32) }, formats.ErrMalformed,
			[]string{"output.weight", "[100, 32]", "[320, 32]"}},
		{"llama", func(w *written) { w.set("tokenizer.ggml.tokens", make([]string, 321)) }, formats.ErrMalformed,
			[]string{"tokenizer.ggml.tokens", "321", "320"}},
		{"llama", func(w *written) {
			w.set("llama.expert_count", uint32(4))
			w.set("llama.expert_used_count", uint32(2))
		}, formats.ErrMalformed, []string{"llama.expert_count", "no tensor of an expert"}},
		{"qwen2", func(w *written) { w.set("qwen2.attention.head_count", uint32(3)) }, formats.ErrMalformed,
			[]string{"blk.0.attn_k.weight", "[16, 32]", "[20, 32]"}},
		{"phi3", func(w *written) { w.reshape("blk.0.ffn_up.weight", 64, 32) }, formats.ErrMalformed,
			[]string{"blk.0.ffn_up.weight", "[128, 32]"}},
		{"gpt2", func(w *written) { w.reshape("blk.0.attn_qkv.weight", 64, 32) }, formats.ErrMalformed,
			[]string{"blk.0.attn_qkv.weight", "[96, 32]"}},
		{"mixtral", func(w *written) { w.set("llama.expert_used_count", uint32(9)) }, formats.ErrMalformed,
			[]string{"llama.expert_used_count", "9", "4 experts"}},
		{"mixtral", func(w *written) { w.set("llama.expert_used_count", nil) }, formats.ErrMalformed,
			[]string{"llama.expert_used_count", "none"}},
		{"gptoss", func(w *written) { w.set("gpt-oss.expert_count", uint32(3)) }, formats.ErrMalformed,
			[]string{"blk.0.ffn_", "[3, 32"}},
		{"deepseek3", func(w *written) { w.set("deepseek2.leading_dense_block_count", uint32(0)) }, formats.ErrMalformed,
			[]string{"deepseek2.leading_dense_block_count", "layer 0"}},
		{"deepseek3", func(w *written) { w.set("deepseek2.leading_dense_block_count", uint32(99)) }, formats.ErrMalformed,
			[]string{"deepseek2.leading_dense_block_count", "layer 1"}},
		{"deepseek3", func(w *written) { w.set("deepseek2.attention.kv_lora_rank", uint32(31)) }, formats.ErrMalformed,
			[]string{"blk.0.attn_", "kv"}},
		{"llama", func(w *written) { w.set("llama.rope.scaling.type", "other") }, formats.ErrUnsupported,
			[]string{"other"}},
		{"llama", func(w *written) { w.set("llama.rope.scaling.type", "yarn") }, formats.ErrMalformed,
			[]string{"llama.rope.scaling.factor"}},
		{"llama", func(w *written) { w.set("tokenizer.ggml.bos_token_id", uint32(320)) }, formats.ErrMalformed,
			[]string{"bos_token_id", "320"}},
		{"llama", func(w *written) { w.add("blk.0.ssm_a", 4) }, formats.ErrUnsupported, []string{`"blk.0.ssm_a"`}},
		{"llama", func(w *written) { w.add("rope_factors_long.weight", 4) }, formats.ErrUnsupported,
			[]string{"rope_factors_long"}},
		{"llama", func(w *written) { w.add("output_norm.weight", 32) }, formats.ErrMalformed,
			[]string{"output_norm.weight", "twice"}},
		{"llama", func(w *written) { w.without("blk.1.attn_k.weight") }, formats.ErrMalformed,
			[]string{"blk.1.attn_k.weight"}},
		{"llama", func(w *written) { w.without("token_embd.weight") }, formats.ErrMalformed, []string{"token_embd.weight"}},
		{"llama3", func(w *written) { w.values["rope_freqs.weight"][3] *= 1.01 }, formats.ErrUnsupported,
			[]string{"rope_freqs.weight"}},
		{"llama3", func(w *written) { w.reshape("rope_freqs.weight", 2, 4) }, formats.ErrMalformed,
			[]string{"rope_freqs.weight"}},
		{"llama3", func(w *written) { w.reshape("rope_freqs.weight", 9) }, formats.ErrMalformed, []string{"8 values", "9"}},
		{"phi3", func(w *written) { w.without("rope_factors_short.weight") }, formats.ErrMalformed,
			[]string{"rope_factors_short"}},
		{"mixtral", func(w *written) { w.reshape("blk.0.ffn_up_exps.weight", 3, 64, 32) }, formats.ErrMalformed,
			[]string{"blk.0.ffn_up_exps.weight", "[3, 64, 32]", "stack of 4"}},
		{"gptoss", func(w *written) { w.reshape("blk.0.ffn_up_exps.weight", 4, 31, 32) }, formats.ErrMalformed,
			[]string{"[4, 31, 32]", "[4, 32, 32]"}},
		{"gptoss", func(w *written) { w.reshape("blk.0.ffn_gate_exps.weight", 32) }, formats.ErrMalformed,
			[]string{"[32]"}},
		{"deepseek3", func(w *written) { w.reshape("blk.0.attn_v_b.weight", 4, 17, 32) }, formats.ErrMalformed,
			[]string{"attn_k_b", "4 heads"}},
		{"deepseek3", func(w *written) { w.reshape("blk.0.attn_k_b.weight", 1<<31, 1<<31, 2) }, formats.ErrMalformed,
			[]string{"attn_k_b"}},
		{"deepseek3", func(w *written) { w.set("deepseek2.attention.kv_lora_rank", nil) }, formats.ErrMalformed,
			[]string{"kv_lora_rank"}},
		{"deepseek3", func(w *written) { w.set("deepseek2.expert_gating_func", uint32(9)) }, formats.ErrUnsupported,
			[]string{"expert_gating_func", "9"}},
	} {
		_, w := write(t, c.model, gguf.F32)
		c.spoil(&w)
		_, err := w.back(tensor.BF16)
		require.ErrorIs(t, err, c.kind, "%s %v", c.model, c.says)
		require.NotContains(t, err.Error(), "\n")
		for _, s := range c.says {
			require.ErrorContains(t, err, s)
		}
	}
}

// TestNotices: what is computed otherwise, or has no place, is said.
func TestNotices(t *testing.T) {
	c := edited(t, "gemma2", edits{"query_pre_attn_scalar": 24})
	m, err := c.forward()
	require.NoError(t, err)
	require.Equal(t, []string{"query_pre_attn_scalar is 24; GGUF has no key for it, and llama.cpp computes with 16"}, m.Notices)

	c = edited(t, "gemma2", edits{"layer_types": []string{"sliding_attention", "sliding_attention"}})
	m, err = c.forward()
	require.NoError(t, err)
	require.Equal(t, []string{`layer_types has "sliding_attention" in layer 1; GGUF has no key for it, and llama.cpp ` +
		`computes otherwise`}, m.Notices)

	c = open(t, "deepseek3")
	m, err = c.forward()
	require.NoError(t, err)
	require.Equal(t, []string{"config.json has nothing for the key deepseek2.expert_gating_func: llama.cpp takes softmax, " +
		"where transformers computes with sigmoid"}, m.Notices)
	c = edited(t, "deepseek3", edits{"scoring_func": "sigmoid"})
	m, err = c.forward()
	require.NoError(t, err)
	require.Empty(t, m.Notices)

	_, w := write(t, "llama", gguf.F32)
	w.set("llama.vocab_size", uint32(9))
	w.set("llama.rope.something", float32(2))
	back, err := w.back(tensor.BF16)
	require.NoError(t, err)
	require.ElementsMatch(t, []string{`the key "llama.vocab_size" is 9; the config means 320`,
		`the key "llama.rope.something" has no place in the config`}, back.Notices)
}

// TestListedKeys: a number that is there for each layer, and the same for all, is one number. A scaling without a type,
// of old files also by another name, is a linear one.
func TestListedKeys(t *testing.T) {
	for key, value := range map[string]any{"rope.scaling.factor": float32(4), "rope.scale_linear": float32(4)} {
		_, w := write(t, "llama", gguf.F32)
		w.set("llama.attention.head_count_kv", []int32{2, 2})
		w.set("llama.feed_forward_length", []uint32{64, 64})
		w.set("llama."+key, value)
		back, err := w.back(tensor.BF16)
		require.NoError(t, err)
		require.Empty(t, back.Notices)
		config := map[string]any{}
		require.NoError(t, json.Unmarshal(back.Config, &config))
		require.EqualValues(t, 2, config["num_key_value_heads"])
		require.Equal(t, map[string]any{"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
			config["rope_parameters"])
	}
}

// TestGivenScaling: a scaling that is given is taken, and held against the divisors of the file.
func TestGivenScaling(t *testing.T) {
	_, w := write(t, "llama3", gguf.F32)
	for given, notices := range map[string]int{
		`{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":64}`:  0,
		`{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":128}`: 1,
	} {
		o := gguf.BackOptions{DType: tensor.BF16, RopeScaling: jsontext.Value(given)}
		back, err := gguf.Backward(w.keys, w.tensors, w.read, o)
		require.NoError(t, err)
		require.Len(t, back.Notices, notices)
		require.Contains(t, string(back.Config), `"high_freq_factor": 4.0`)
	}
	for _, given := range []string{"7", "null", "{", `{"factor":2}`} {
		o := gguf.BackOptions{DType: tensor.BF16, RopeScaling: jsontext.Value(given)}
		_, err := gguf.Backward(w.keys, w.tensors, w.read, o)
		require.ErrorIs(t, err, formats.ErrMalformed, given)
	}
}

// TestUnknownToken: the id goes into the config where nothing else in the folder says it.
func TestUnknownToken(t *testing.T) {
	for _, c := range []struct {
		id, model, want any
	}{
		{uint32(3), "llama", 3.0},
		{uint32(3), "gpt2", nil},
		{nil, "llama", nil},
	} {
		_, w := write(t, "llama", gguf.BF16)
		w.set("tokenizer.ggml.unknown_token_id", c.id)
		w.set("tokenizer.ggml.model", c.model)
		got, err := w.back(tensor.BF16)
		require.NoError(t, err)
		config := map[string]any{}
		require.NoError(t, json.Unmarshal(got.Config, &config))
		require.Equal(t, c.want, config["unk_token_id"])
	}

	_, w := write(t, "llama", gguf.BF16)
	w.set("tokenizer.ggml.unknown_token_id", uint32(320))
	w.set("tokenizer.ggml.model", "llama")
	_, err := w.back(tensor.BF16)
	require.ErrorIs(t, err, formats.ErrMalformed)
	require.ErrorContains(t, err, "unknown_token_id")
}

// TestAbsentKeys: what a file leaves out is what llama.cpp takes for it, whatever transformers would.
func TestAbsentKeys(t *testing.T) {
	_, w := write(t, "qwen3", gguf.F32)
	for _, k := range []string{"rope.freq_base", "attention.key_length", "attention.value_length"} {
		w.set("qwen3."+k, nil)
	}
	w.set("qwen3.attention.head_count_kv", nil)
	w.set("tokenizer.ggml.eos_token_id", nil)
	for _, layer := range []string{"blk.0.", "blk.1."} {
		for _, name := range []string{"attn_q", "attn_k", "attn_v", "attn_output"} {
			w.reshape(layer+name+".weight", 32, 32)
		}
	}
	back, err := w.back(tensor.F16)
	require.NoError(t, err)
	config := map[string]any{}
	require.NoError(t, json.Unmarshal(back.Config, &config))
	require.EqualValues(t, 4, config["num_key_value_heads"])
	require.EqualValues(t, 8, config["head_dim"])
	require.EqualValues(t, 10000, config["rope_parameters"].(map[string]any)["rope_theta"])
	require.Contains(t, config, "eos_token_id")
	require.Nil(t, config["eos_token_id"])
	require.Equal(t, "float16", config["dtype"])
}

// TestAbsentDimensions: all of a head is turned where no key says how much, as llama.cpp has it.
func TestAbsentDimensions(t *testing.T) {
	for _, name := range []string{"stablelm", "phi3", "cohere2"} {
		_, w := write(t, name, gguf.F32)
		w.set(name+".rope.dimension_count", uint32(8))
		want, err := w.back(tensor.F16)
		require.NoError(t, err)
		w.set(name+".rope.dimension_count", nil)
		got, err := w.back(tensor.F16)
		require.NoError(t, err)
		require.JSONEq(t, string(want.Config), string(got.Config))
	}
}

// TestOtherLayouts: checkpoints that have the same weights otherwise become the same file.
func TestOtherLayouts(t *testing.T) {
	t.Run("fused experts", func(t *testing.T) {
		c := open(t, "qwen3moe")
		want, err := c.forward()
		require.NoError(t, err)
		fused := checkpoint{config: c.config, data: map[string][]byte{}}
		for _, s := range c.tensors {
			if !strings.Contains(s.Name, "experts.") {
				fused.tensors, fused.data[s.Name] = append(fused.tensors, s), c.data[s.Name]
			}
		}
		for _, layer := range []string{"model.layers.0.mlp.experts.", "model.layers.1.mlp.experts."} {
			for _, expert := range []string{"0.", "1.", "2.", "3."} {
				for _, part := range []string{"gate_proj", "up_proj"} {
					name := layer + "gate_up_proj"
					fused.data[name] = append(fused.data[name], c.data[layer+expert+part+".weight"]...)
				}
				fused.data[layer+"down_proj"] = append(fused.data[layer+"down_proj"], c.data[layer+expert+"down_proj.weight"]...)
			}
			fused.add(layer+"gate_up_proj", 4, 64, 32)
			fused.add(layer+"down_proj", 4, 32, 32)
		}
		got, err := fused.forward()
		require.NoError(t, err)
		require.Len(t, got.Tensors, len(want.Tensors))
		for _, g := range got.Tensors {
			i := slices.IndexFunc(want.Tensors, func(w gguf.Tensor) bool { return w.Name == g.Name })
			require.Equal(t, want.Tensors[i].Info, g.Info)
			require.Equal(t, c.contents(t, want.Tensors[i]), fused.contents(t, g), g.Name)
		}
	})
	t.Run("names of older files", func(t *testing.T) {
		for model, rename := range map[string]func(string) string{
			"gpt2":   func(s string) string { return strings.TrimPrefix(s, "transformer.") },
			"gemma3": func(s string) string { return "model.language_" + s },
			"bert": func(s string) string {
				return "bert." + strings.NewReplacer("Norm.weight", "Norm.gamma", "Norm.bias", "Norm.beta").Replace(s)
			},
		} {
			c := open(t, model)
			want, err := c.forward()
			require.NoError(t, err)
			for i := range c.tensors {
				c.tensors[i].Name = rename(c.tensors[i].Name)
			}
			c.add("model.layers.0.self_attn.rotary_emb.inv_freq", 4)
			c.add("h.0.attention.bias", 1, 1, 4, 4)
			got, err := c.forward()
			require.NoError(t, err)
			require.Len(t, got.Tensors, len(want.Tensors))
			for i, g := range got.Tensors {
				require.Equal(t, want.Tensors[i].Info, g.Info)
				require.Equal(t, want.Tensors[i].View, g.View)
				require.Equal(t, want.Tensors[i].Shift, g.Shift)
			}
			require.Len(t, got.Dropped, len(want.Dropped)+2)
		}
	})
	t.Run("norms of heads", func(t *testing.T) {
		c := open(t, "stablelm")
		for _, layer := range []string{"model.layers.0.self_attn.", "model.layers.1.self_attn."} {
			for _, head := range []string{"3", "1", "0", "2"} {
				c.add(layer+"q_layernorm.norms."+head+".weight", 8)
			}
			c.add(layer+"k_layernorm.norms.1.weight", 8)
			c.add(layer+"k_layernorm.norms.0.weight", 8)
		}
		m, err := c.forward()
		require.NoError(t, err)
		i := slices.IndexFunc(m.Tensors, func(g gguf.Tensor) bool { return g.Name == "blk.1.attn_q_norm.weight" })
		g := m.Tensors[i]
		require.Equal(t, tensor.Shape{4, 8}, g.Shape)
		require.Equal(t, tensor.F32, g.DType)
		require.Equal(t, "model.layers.1.self_attn.q_layernorm.norms.2.weight", g.Sources[2])

		w := written{keys: m.Keys}
		for _, g := range m.Tensors {
			w.tensors = append(w.tensors, g.Info)
		}
		back, err := w.back(tensor.BF16)
		require.NoError(t, err)
		require.Len(t, back.Tensors, len(c.tensors))
		require.Contains(t, string(back.Config), `"qk_layernorm": true`)
		j := slices.IndexFunc(back.Tensors, func(r gguf.Restored) bool { return r.Name == g.Sources[2] })
		require.Equal(t, gguf.Piece{Tensor: g.Name, View: g.View.Moved(16, 0)}, back.Tensors[j].Pieces[0])
	})
	t.Run("left out", func(t *testing.T) {
		c := open(t, "deepseek3")
		more := []string{"model.layers.2.eh_proj.weight", "model.layers.2.self_attn.o_proj.weight"}
		for _, name := range more {
			c.add(name, 32, 64)
		}
		m, err := c.forward()
		require.NoError(t, err)
		require.Equal(t, more, m.Dropped)
		c.add("model.layers.1.eh_proj.weight", 32, 64)
		_, err = c.forward()
		require.ErrorIs(t, err, formats.ErrUnsupported)

		c = open(t, "cohere2")
		c.add("model.layers.0.self_attn.q_proj.bias", 64)
		m, err = c.forward()
		require.NoError(t, err)
		require.Equal(t, []string{"model.layers.0.self_attn.q_proj.bias"}, m.Zeros)

		c = edited(t, "deepseek3", edits{"tie_word_embeddings": true})
		m, err = c.forward()
		require.NoError(t, err)
		require.Equal(t, []string{"lm_head.weight"}, m.Dropped)

		c = open(t, "gemma3")
		m, err = gguf.Forward(c.config, c.tensors, gguf.Options{Type: gguf.F16, Vocabulary: 300})
		require.NoError(t, err)
		i := slices.IndexFunc(m.Tensors, func(g gguf.Tensor) bool { return g.Name == "token_embd.weight" })
		require.Equal(t, tensor.Shape{300, 32}, m.Tensors[i].Shape)
		require.True(t, m.Tensors[i].View.Plain())
	})
}

// TestComputedOtherwise: what llama.cpp has built in, or has no factors for, is told of each config that differs.
func TestComputedOtherwise(t *testing.T) {
	llama3 := map[string]any{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
		"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
	longrope := map[string]any{"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0,
		"long_factor": []int{2}, "short_factor": []int{1}, "original_max_position_embeddings": 64}
	linear := edits{"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
	with := func(base, more edits) edits {
		base = maps.Clone(base)
		maps.Copy(base, more)
		return base
	}
	yarn := func(more edits) edits {
		return with(edits{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
			more)
	}
	phi := func(more edits) edits {
		return with(edits{"rope_type": "longrope", "rope_theta": 1e4, "long_factor": slices.Repeat([]float64{2}, 4),
			"short_factor": slices.Repeat([]float64{1}, 4)}, more)
	}
	for _, c := range []struct {
		model string
		edits edits
		says  string
	}{
		{"llama", edits{"hidden_act": "gelu"}, `hidden_act is "gelu"; GGUF has no key for it, and llama.cpp computes with silu`},
		{"llama", edits{"hidden_act": "swish"}, ""},
		{"bert", edits{"hidden_act": "relu"}, `hidden_act is "relu"; GGUF has no key for it, and llama.cpp computes with gelu`},
		{"gemma3", edits{"hidden_activation": "silu"}, `hidden_activation is "silu"`},
		{"mistral", edits{"max_position_embeddings": 64, "sliding_window": 16}, "sliding_window is 16; "},
		{"mistral", edits{"max_position_embeddings": 64, "sliding_window": 64}, ""},
		{"qwen2", edits{"use_sliding_window": true}, "use_sliding_window is true; "},
		{"smollm3", edits{"no_rope_layer_interval": 2}, "no_rope_layer_interval is 2; "},
		{"deepseek3", edits{"rope_interleave": false}, "rope_interleave is false; "},
		{"gemma3", edits{"use_bidirectional_attention": true}, "use_bidirectional_attention is true; "},
		{"gpt2", edits{"scale_attn_by_inverse_layer_idx": true}, "scale_attn_by_inverse_layer_idx is true; "},
		{"qwen3", edits{"rope_parameters": llama3}, "rope_parameters is of the type llama3; GGUF has no place for it in qwen3, and llama.cpp computes without it"},
		{"llama", edits{"rope_parameters": longrope}, "rope_parameters is of the type longrope; "},
		{"stablelm", edits{"rope_parameters": linear}, "the type linear; GGUF has no place for it in stablelm"},
		{"cohere2", edits{"rope_parameters": linear}, "the type linear; GGUF has no place for it in cohere2"},
		{"gemma2", edits{"rope_parameters": yarn(nil)}, "the type yarn; GGUF has no place for it in gemma2"},
		{"qwen2", edits{"rope_parameters": linear}, ""},
		{"qwen2", edits{"rope_parameters": yarn(nil)}, ""},
		{"qwen2", edits{"rope_parameters": yarn(edits{"beta_fast": 32, "beta_slow": nil, "truncate": true,
			"attention_factor": 1.138629436111989, "extrapolation_factor": 2})}, ""},
		{"qwen2", edits{"rope_parameters": yarn(edits{"beta_fast": 16})},
			"rope_parameters.beta_fast is 16; llama.cpp reads no key for it, and computes with 32"},
		{"qwen2", edits{"rope_parameters": yarn(edits{"beta_slow": 2.5})}, "beta_slow is 2.5; "},
		{"qwen2", edits{"rope_parameters": yarn(edits{"truncate": false})}, "truncate is false; "},
		{"qwen2", edits{"rope_parameters": yarn(edits{"attention_factor": 1.0})},
			"attention_factor is 1; llama.cpp reads no key for it, and computes with 1.1386294"},
		{"qwen2", edits{"rope_parameters": yarn(edits{"mscale": 1, "mscale_all_dim": 1})},
			"mscale is 1; llama.cpp reads no key for it, and computes with an attention_factor of 1.1386294 in place of 1"},
		{"qwen2", edits{"rope_parameters": yarn(edits{"mscale": 0.5})}, ""},
		{"deepseek3", edits{"rope_parameters": yarn(edits{"mscale": 0.7, "mscale_all_dim": 1})}, "mscale is 0.7; "},
		{"deepseek3", edits{"rope_parameters": yarn(edits{"mscale_all_dim": 0.5})},
			"mscale is none; llama.cpp reads no key for it, and computes with an attention_factor of 1 in place of 1.1386294"},
		{"deepseek3", edits{"scoring_func": "sigmoid", "rope_parameters": yarn(edits{"mscale": 0.7, "mscale_all_dim": 0.7})},
			""},
		{"deepseek3", edits{"rope_parameters": yarn(nil)}, "mscale_all_dim is none; llama.cpp scales scores as with 1"},
		{"phi3", edits{"rope_parameters": phi(nil), "sliding_window": nil}, ""},
		{"phi3", edits{"rope_parameters": phi(edits{"attention_factor": 1.5})}, "attention_factor is 1.5; "},
		{"phi3", edits{"rope_parameters": phi(edits{"factor": 64})}, "rope_parameters.factor is 64; "},
	} {
		ck := edited(t, c.model, c.edits)
		m, err := ck.forward()
		require.NoError(t, err, "%s %v", c.model, c.edits)
		if c.says == "" {
			require.Empty(t, m.Notices, "%s %v", c.model, c.edits)
		} else {
			require.Contains(t, strings.Join(m.Notices, "\n"), c.says, "%s %v", c.model, c.edits)
		}
	}
}

// TestAsksForScaling: factors that no key explains are an error that names the option which does.
func TestAsksForScaling(t *testing.T) {
	_, w := write(t, "llama3", gguf.F32)
	w.values["rope_freqs.weight"][1] = 3.5
	_, err := w.back(tensor.BF16)
	require.ErrorIs(t, err, formats.ErrUnsupported)
	require.Equal(t, "RopeScaling", hint.Of(err)[0].Option)
}
