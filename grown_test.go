package lorakit_test

import (
	"encoding/binary"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/tensor"
)

// floats is a tensor in float32.
func floats(values []float32, shape ...int64) entry {
	var b []byte
	for _, x := range values {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(x))
	}
	return entry{tensor.Info{DType: tensor.F32, Shape: shape}, b}
}

// madeFolder writes a folder of a config and tensors: a checkpoint, or an adapter.
func madeFolder(t *testing.T, config, name string, tensors map[string]entry) string {
	t.Helper()
	dir := t.TempDir()
	file := "config.json"
	if name == "adapter_model.safetensors" {
		file = "adapter_config.json"
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte(config), 0o644))
	writeTensors(t, filepath.Join(dir, name), tensors)
	return dir
}

// TestGrownLogitsBias merges adapters that bring a larger vocabulary into models with a bias of the logits that no
// adapter brings: it grows by zeros.
func TestGrownLogitsBias(t *testing.T) {
	t.Parallel()
	bias := []float32{1, 2, 3, 4, 5}
	value := func(rows int64) entry { return ones(rows, 4) }
	for name, x := range map[string]struct {
		config  string
		shape   []int64 // of the bias
		adapter map[string]entry
		want    []float32
		members map[string]any // of the merge's config
	}{
		"BART, both ends": {`{"architectures": ["BartForConditionalGeneration"], "vocab_size": 5}`, []int64{1, 5},
			map[string]entry{"model.shared.weight": value(7), "lm_head.weight": value(7)}, append(bias, 0, 0),
			map[string]any{"vocab_size": 7.}},
		"BART, a copy": {`{"architectures": ["BartForConditionalGeneration"], "vocab_size": 5}`, []int64{1, 5},
			map[string]entry{"model.shared.base_layer.weight": value(7), "model.shared.lora_embedding_A": ones(2, 7),
				"model.shared.lora_embedding_B": ones(4, 2)}, append(bias, 0, 0), map[string]any{"vocab_size": 7.}},
		"Marian": {`{"architectures": ["MarianMTModel"], "vocab_size": 5, "decoder_vocab_size": 5}`, []int64{1, 5},
			map[string]entry{"model.shared.weight": value(6), "lm_head.weight": value(6)}, append(bias, 0),
			map[string]any{"vocab_size": 6., "decoder_vocab_size": 6.}},
		"not grown": {`{"architectures": ["BartForConditionalGeneration"], "vocab_size": 5}`, []int64{1, 5},
			map[string]entry{"model.shared.weight": value(5), "lm_head.weight": value(5)}, bias,
			map[string]any{"vocab_size": 5.}},
		"of another shape": {`{"architectures": ["BartForConditionalGeneration"], "vocab_size": 5}`, []int64{5, 1},
			map[string]entry{"model.shared.weight": value(7), "lm_head.weight": value(7)}, bias,
			map[string]any{"vocab_size": 7.}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			base := madeFolder(t, x.config, "model.safetensors",
				map[string]entry{"model.shared.weight": value(5), "final_logits_bias": floats(bias, x.shape...)})
			parts := map[string]entry{}
			for key, e := range x.adapter {
				parts["base_model.model."+key] = e
			}
			adapter := madeFolder(t, `{"peft_type": "LORA", "r": 2, "lora_alpha": 4}`, "adapter_model.safetensors", parts)
			for _, dtype := range []string{"keep", "bf16"} {
				out := filepath.Join(t.TempDir(), "out")
				_, err := lorakit.Merge(t.Context(), base, []lorakit.Adapter{{Path: adapter}}, out,
					lorakit.ConvertOptions{DType: dtype})
				require.NoError(t, err)
				require.Equal(t, x.want, numbers(t, out)["final_logits_bias"])
				if x.want[len(x.want)-1] == 0 {
					require.Equal(t, tensor.Shape{1, int64(len(x.want))}, shapes(t, out)["final_logits_bias"])
				}
				b, err := os.ReadFile(filepath.Join(out, "config.json"))
				require.NoError(t, err)
				var members map[string]any
				require.NoError(t, json.Unmarshal(b, &members))
				for name, want := range x.members {
					require.Equal(t, want, members[name], name)
				}
			}
		})
	}
}
