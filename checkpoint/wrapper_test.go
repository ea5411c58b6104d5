package checkpoint_test

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
)

// renamed writes the tiny Llama with other names of its tensors.
func renamed(t *testing.T, name func(string) string) *checkpoint.Checkpoint {
	return renamedFrom(t, "../fixtures/adapters/bases/llama", name)
}

func renamedFrom(t *testing.T, src string, name func(string) string) *checkpoint.Checkpoint {
	t.Helper()
	dir := t.TempDir()
	config, err := os.ReadFile(filepath.Join(src, "config.json"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), config, 0o666))
	b, err := os.ReadFile(filepath.Join(src, "model.safetensors"))
	require.NoError(t, err)
	n := binary.LittleEndian.Uint64(b)
	var header, out map[string]jsontext.Value
	require.NoError(t, json.Unmarshal(b[8:8+n], &header))
	out = map[string]jsontext.Value{}
	for k, v := range header {
		if k != "__metadata__" {
			k = name(k)
		}
		out[k] = v
	}
	h, err := json.Marshal(out, json.Deterministic(true))
	require.NoError(t, err)
	file := append(binary.LittleEndian.AppendUint64(nil, uint64(len(h))), h...)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "model.safetensors"), append(file, b[8+n:]...), 0o666))
	c, err := checkpoint.Open(context.Background(), dir)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// TestWrappers: what wrappers put into names is taken off, where what is left are the architecture's names.
func TestWrappers(t *testing.T) {
	layer := regexp.MustCompile(`(layers\.\d+\.)`)
	own := renamed(t, func(s string) string { return s })
	require.Empty(t, own.Notices)
	for what, f := range map[string]func(string) string{
		"compiled": func(s string) string { return "_orig_mod." + s },
		"parallel": func(s string) string { return "module." + s },
		"peft":     func(s string) string { return "base_model.model." + s },
		"several":  func(s string) string { return "module._orig_mod.base_model.model._forward_module." + s },
		"FSDP": func(s string) string {
			return "_fsdp_wrapped_module." + layer.ReplaceAllString(s, "${1}_fsdp_wrapped_module.")
		},
		"activation": func(s string) string {
			return layer.ReplaceAllString(s, "${1}_fsdp_wrapped_module._checkpoint_wrapped_module.")
		},
		"some layers": func(s string) string { return strings.Replace(s, "layers.1.", "layers.1._orig_mod.", 1) },
	} {
		t.Run(what, func(t *testing.T) {
			c := renamed(t, f)
			require.Len(t, c.Notices, 1)
			assert.Contains(t, c.Notices[0], "a wrapper's parts are taken off")
			var names, want []string
			for _, w := range c.Weights {
				names = append(names, w.Name)
				assert.True(t, w.Role.Known, w.Name)
			}
			for _, w := range own.Weights {
				want = append(want, w.Name)
			}
			assert.ElementsMatch(t, want, names)
		})
	}
	for what, f := range map[string]func(string) string{
		"other names are left": func(s string) string { return "module.other." + s },
		"no wrapper":           func(s string) string { return "wrapped." + s },
		"one matrix is no parameter": func(s string) string {
			return "module." + strings.Replace(s, "q_proj", "z_proj", 1)
		},
	} {
		t.Run(what, func(t *testing.T) {
			c := renamed(t, f)
			assert.Empty(t, c.Notices)
			for _, w := range c.Weights {
				assert.False(t, w.Role.Known, w.Name)
			}
		})
	}
}

// TestWrappersOfParts: a wrapper's prefix stands before the names of models that are parts of another, which are known
// behind any name.
func TestWrappersOfParts(t *testing.T) {
	const src = "../fixtures/adapters/bases/qwen2.5-vl"
	var want, names []string
	for _, w := range renamedFrom(t, src, func(s string) string { return s }).Weights {
		want = append(want, w.Name)
	}
	c := renamedFrom(t, src, func(s string) string { return "module._orig_mod." + s })
	require.Len(t, c.Notices, 1)
	for _, w := range c.Weights {
		names = append(names, w.Name)
	}
	assert.ElementsMatch(t, want, names)
}

// TestUnmerged: a model that was saved with its adapter beside it is no model to be read.
func TestUnmerged(t *testing.T) {
	for _, part := range []string{
		"lora_A.default.weight", "lora_embedding_A.default", "lora_E.default", "hada_w1_a.default", "lokr_w2.default",
		"vera_lambda_b.default", "ia3_l.default", "oft_R.default.weight", "oft_embedding_R.default.weight",
		"boft_R.default", "hra_u.default", "miss_block.default", "bone_block.default", "vblora_logits_A.default",
		"fourierft_spectrum.default", "randlora_lambda.default", "ln_tuning_layers.default.weight",
		"token_adapter.trainable_tokens_delta.default",
	} {
		c := renamed(t, func(s string) string {
			s = strings.Replace(s, "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj.base_layer.weight", 1)
			return strings.Replace(s, "layers.0.self_attn.k_proj.weight", "layers.0.self_attn.q_proj."+part, 1)
		})
		err := c.CheckReadable()
		require.ErrorIs(t, err, checkpoint.ErrRefused, part)
		assert.ErrorContains(t, err, "never merged")
	}
	saved := renamed(t, func(s string) string {
		s = strings.Replace(s, "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj.original_module.weight", 1)
		return strings.Replace(s, "layers.0.self_attn.k_proj.weight",
			"layers.0.self_attn.q_proj.modules_to_save.default.weight", 1)
	})
	require.ErrorIs(t, saved.CheckReadable(), checkpoint.ErrRefused)
	assert.NoError(t, renamed(t, func(s string) string { return s }).CheckReadable())
}
