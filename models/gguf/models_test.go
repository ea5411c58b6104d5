package gguf_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/x448/float16"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

const fixtures = "../../fixtures/gguf-models"

// names lists the models of the fixtures.
func names(t *testing.T) []string {
	entries, err := os.ReadDir(fixtures)
	require.NoError(t, err)
	var list []string
	for _, e := range entries {
		if e.IsDir() {
			list = append(list, e.Name())
		}
	}
	require.Len(t, list, 22)
	return list
}

// checkpoint is a model of the fixtures, whole in memory.
type checkpoint struct {
	config  *models.Config
	tensors []tensor.Info
	data    map[string][]byte
}

func open(t *testing.T, name string) checkpoint {
	dir := filepath.Join(fixtures, name)
	b, err := os.ReadFile(filepath.Join(dir, "config.json"))
	require.NoError(t, err)
	c := checkpoint{data: map[string][]byte{}}
	c.config, err = models.ParseConfig(b)
	require.NoError(t, err)
	container, err := safetensors.Format{}.Open(context.Background(), storage.Local(dir, storage.Options{}), "")
	require.NoError(t, err)
	defer container.Close()
	for _, s := range container.Tensors() {
		data := make([]byte, s.Bytes)
		_, err := s.Data.ReadAt(data, s.Offset)
		require.NoError(t, err)
		c.tensors = append(c.tensors, s.Info)
		c.data[s.Name] = data
	}
	return c
}

func (c checkpoint) info(t *testing.T, name string) tensor.Info {
	i := slices.IndexFunc(c.tensors, func(s tensor.Info) bool { return s.Name == name })
	require.GreaterOrEqual(t, i, 0, name)
	return c.tensors[i]
}

// expected is what llama.cpp's converter makes of a model in one type.
type expected struct {
	Keys    map[string][2]any `json:"keys"`
	Tensors map[string][3]any `json:"tensors"`
}

var types = map[string]gguf.Type{"f32": gguf.F32, "f16": gguf.F16, "bf16": gguf.BF16, "q8_0": gguf.Q8_0}

// expectations are those of all types. The converter's keys differ from those of f32 where a type has its own.
func expectations(t *testing.T, name string) map[string]expected {
	b, err := os.ReadFile(filepath.Join(fixtures, name, "expected.json"))
	require.NoError(t, err)
	all := map[string]expected{}
	require.NoError(t, json.Unmarshal(b, &all))
	require.Len(t, all, len(types))
	for typ, e := range all {
		for k, v := range all["f32"].Keys {
			if _, ok := e.Keys[k]; !ok {
				e.Keys[k] = v
			}
		}
		all[typ] = e
	}
	return all
}

// contents computes the bytes of a tensor of a GGUF file.
func (c checkpoint) contents(t *testing.T, g gguf.Tensor) []byte {
	x := slices.Clone(g.Values)
	for _, name := range g.Sources {
		s := c.info(t, name)
		all := make([]float32, s.Count())
		require.NoError(t, tensor.ToFloats(all, c.data[name], s.DType))
		for from := range g.View.Elements() {
			sum := all[from] + g.Shift
			if g.Shift != 0 && s.DType == tensor.F16 {
				sum = float16.Fromfloat32(sum).Float32()
			}
			x = append(x, sum)
		}
	}
	require.EqualValues(t, g.Count(), len(x), g.Name)
	if g.Encoding.Name != "" {
		return q8(x)
	}
	size, err := g.Size()
	require.NoError(t, err)
	b := make([]byte, size)
	require.NoError(t, tensor.FromFloats(b, g.DType, x))
	return b
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// q8 stores numbers as Q8_0, in blocks of a scale and 32 bytes.
func q8(x []float32) []byte {
	var out []byte
	for block := range slices.Chunk(x, 32) {
		most := float32(0)
		for _, v := range block {
			most = max(most, float32(math.Abs(float64(v))))
		}
		scale := most / 127
		inverse := float32(0)
		if scale != 0 {
			inverse = 1 / scale
		}
		out = binary.LittleEndian.AppendUint16(out, float16.Fromfloat32(scale).Bits())
		for _, v := range block {
			out = append(out, byte(int8(math.Round(float64(v*inverse)))))
		}
	}
	return out
}

// free are the name, which is that of a folder, and the keys of the tokenizer.
func free(key string) bool {
	return key == "general.name" ||
		strings.HasPrefix(key, "tokenizer.") && key != "tokenizer.ggml.add_space_prefix"
}

// plain is a value of a key as the expectations have it.
func plain(v any) [2]any {
	switch v := v.(type) {
	case string:
		return [2]any{"string", v}
	case bool:
		return [2]any{"bool", v}
	case float32:
		return [2]any{"float32", float64(v)}
	case uint32:
		return [2]any{"uint32", float64(v)}
	}
	return [2]any{"another type", v}
}

// notices are those of the models.
var notices = map[string][]string{
	"qwen3moe": {"norm_topk_prob is false; GGUF has no key for it, and llama.cpp computes with true"},
	"deepseek3": {"config.json has nothing for the key deepseek2.expert_gating_func: llama.cpp takes softmax, where " +
		"transformers computes with sigmoid"},
	"phi3":   {"sliding_window is 64; llama.cpp does not heed the key for it, and computes with 256"},
	"gptoss": {"rope_parameters.truncate is false; llama.cpp reads no key for it, and computes with true"},
}

// TestForward: every model becomes what llama.cpp's converter makes of it: keys and their types, names, types, shapes
// and bytes of tensors.
func TestForward(t *testing.T) {
	for _, name := range names(t) {
		c := open(t, name)
		for typ, want := range expectations(t, name) {
			t.Run(name+"/"+typ, func(t *testing.T) {
				m, err := gguf.Forward(c.config, c.tensors, gguf.Options{Type: types[typ], Vocabulary: 320})
				require.NoError(t, err)
				require.NoError(t, m.Keys.Check())
				require.Equal(t, notices[name], m.Notices)
				keys := map[string][2]any{}
				for _, p := range m.Keys {
					keys[p.Name] = plain(p.Value)
				}
				for k, v := range want.Keys {
					if !free(k) {
						require.Equal(t, v, keys[k], k)
						delete(keys, k)
					}
				}
				require.Empty(t, keys)
				for _, g := range m.Tensors {
					w, ok := want.Tensors[g.Name]
					require.True(t, ok, g.Name)
					require.Equal(t, w[0], strings.ToUpper(g.Type()), g.Name)
					shape := w[1].([]any)
					require.Len(t, g.Shape, len(shape), g.Name)
					for i, d := range shape {
						require.EqualValues(t, d, g.Shape[len(shape)-1-i], g.Name)
					}
					require.Equal(t, w[2], digest(c.contents(t, g)), g.Name)
					delete(want.Tensors, g.Name)
				}
				require.Empty(t, want.Tensors)
			})
		}
	}
}

// ids are the keys of the tokenizer that Backward reads.
func ids(e expected) formats.Metadata {
	var keys formats.Metadata
	for k, v := range e.Keys {
		if strings.HasSuffix(k, "_token_id") {
			keys = append(keys, formats.Pair{Name: k, Value: uint32(v[1].(float64))})
		}
	}
	return keys
}

// written is a GGUF file in memory.
type written struct {
	keys    formats.Metadata
	tensors []tensor.Info
	values  map[string][]float32
}

func (w written) read(name string) ([]float32, error) { return w.values[name], nil }

func (w written) back(dtype tensor.DType) (*gguf.Checkpoint, error) {
	return gguf.Backward(w.keys, w.tensors, w.read, gguf.BackOptions{DType: dtype})
}

// write makes a file of a model of the fixtures.
func write(t *testing.T, name string, typ gguf.Type) (checkpoint, written) {
	c := open(t, name)
	m, err := gguf.Forward(c.config, c.tensors, gguf.Options{Type: typ, Vocabulary: 320})
	require.NoError(t, err)
	w := written{keys: append(m.Keys, ids(expectations(t, name)["f32"])...), values: map[string][]float32{}}
	for _, g := range m.Tensors {
		x := make([]float32, g.Count())
		require.NoError(t, tensor.ToFloats(x, c.contents(t, g), g.DType))
		w.tensors, w.values[g.Name] = append(w.tensors, g.Info), x
	}
	return c, w
}

// restored computes the bytes of a tensor of a checkpoint.
func (w written) restored(t *testing.T, r gguf.Restored, d tensor.DType) []byte {
	count, err := r.Shape.Count()
	require.NoError(t, err)
	x := make([]float32, count)
	for _, p := range r.Pieces {
		for from, to := range p.View.Elements() {
			x[to] = w.values[p.Tensor][from] + r.Shift
		}
	}
	b := make([]byte, count*d.Bits()/8)
	require.NoError(t, tensor.FromFloats(b, d, x))
	return b
}

// compared are the members of a config that have to come back.
var compared = strings.Fields(`hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
	vocab_size max_position_embeddings rms_norm_eps layer_norm_eps rope_parameters tie_word_embeddings num_local_experts
	num_experts num_experts_per_tok moe_intermediate_size n_embd n_layer n_head n_positions n_ctx bos_token_id
	eos_token_id pad_token_id hidden_act hidden_activation activation_function attention_bias mlp_bias use_qkv_bias
	qkv_bias query_pre_attn_scalar attention_multiplier embedding_multiplier residual_multiplier logits_scaling
	logit_scale rotary_pct use_parallel_residual attn_logit_softcapping final_logit_softcapping
	original_max_position_embeddings shared_expert_intermediate_size type_vocab_size first_k_dense_replace n_group
	topk_group n_routed_experts n_shared_experts q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
	routed_scaling_factor scoring_func dtype architectures model_type sliding_window head_dim`)

// changed are members that do not come back, for a reason.
var changed = map[string][]string{
	"mistral":   {"architectures", "model_type", "sliding_window"}, // the same model as a Llama
	"gemma3vl":  {"architectures", "model_type", "sliding_window"}, // its text part alone
	"deepseek3": {"head_dim"},                                      // means qk_rope_head_dim
	"bert":      {"bos_token_id", "eos_token_id"},                  // the tokenizer's [CLS] and [SEP]
	"qwen2moe":  {"sliding_window"},                                // 0, and not used
}

// TestBackward: every model comes back as it was, its tensors byte for byte.
func TestBackward(t *testing.T) {
	for _, name := range names(t) {
		t.Run(name, func(t *testing.T) {
			typ := gguf.BF16
			if name == "gpt2" {
				typ = gguf.F16
			}
			c, w := write(t, name, typ)
			got, err := w.back(typ.DType)
			require.NoError(t, err)
			require.Empty(t, got.Notices)
			if dir := os.Getenv("LORAKIT_CONFIGS"); dir != "" {
				require.NoError(t, os.WriteFile(filepath.Join(dir, name+".json"), got.Config, 0o666))
			}

			source := map[string]any{}
			b, err := os.ReadFile(filepath.Join(fixtures, name, "config.json"))
			require.NoError(t, err)
			require.NoError(t, json.Unmarshal(b, &source))
			if inner, ok := source["text_config"].(map[string]any); ok {
				for k, v := range inner {
					source[k] = v
				}
			}
			config := map[string]any{}
			require.NoError(t, json.Unmarshal(got.Config, &config))
			for _, member := range compared {
				v, there := source[member]
				if there && !slices.Contains(changed[name], member) && (v != nil || config[member] != nil) {
					require.Equal(t, v, config[member], member)
				}
			}

			left := map[string]bool{}
			for _, s := range c.tensors {
				if !strings.Contains(s.Name, "vision") && !strings.Contains(s.Name, "multi_modal") &&
					!strings.HasPrefix(s.Name, "pooler.") {
					left[strings.TrimPrefix(s.Name, "language_model.")] = true
				}
			}
			for _, r := range got.Tensors {
				require.True(t, left[r.Name], r.Name)
				delete(left, r.Name)
				name := r.Name
				if c.data[name] == nil {
					name = "language_model." + name
				}
				s := c.info(t, name)
				require.Equal(t, s.Shape, r.Shape, r.Name)
				require.Equal(t, c.data[name], w.restored(t, r, s.DType), r.Name)
			}
			require.Empty(t, left)
		})
	}
}
