package lorakit_test

import (
	"encoding/binary"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/tensor"
)

// TestExtractTells changes tensors of every kind: each is in the adapter, or said not to be.
func TestExtractTells(t *testing.T) {
	t.Parallel()
	changed := func(n int64) entry {
		v := make([]float32, n*4)
		for i := range v {
			v[i] = 1 + float32(i%7)/8
		}
		return floats(v, n, 4)
	}
	wide := floats(make([]float32, 24), 4, 6)
	vector := floats([]float32{2, 1, 1, 1}, 4)
	for name, x := range map[string]struct {
		config         string
		same           map[string]entry
		tuned          map[string]entry
		modules, whole []string
		left, matrices []string
		targets        []string // of the adapter's config, where not those of modules
		parameters     []string
		ensured        bool
	}{
		"DeBERTa": {
			config: `{"architectures": ["DebertaV2ForMaskedLM"], "model_type": "deberta-v2"}`,
			same:   map[string]entry{"deberta.encoder.layer.0.attention.self.key_proj.weight": ones(4, 4)},
			tuned: map[string]entry{
				"deberta.encoder.layer.0.attention.self.pos_key_proj.weight": changed(4),
				"deberta.encoder.rel_embeddings.weight":                      changed(6),
				"deberta.encoder.LayerNorm.weight":                           vector,
				"deberta.encoder.layer.0.attention.self.pos_key_proj.bias":   vector,
			},
			modules: []string{"deberta.encoder.layer.0.attention.self.pos_key_proj"},
			whole:   []string{"deberta.encoder.rel_embeddings"},
			left:    []string{"deberta.encoder.LayerNorm.weight", "deberta.encoder.layer.0.attention.self.pos_key_proj.bias"},
		},
		"a Mamba's out_proj": {
			config: `{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}`,
			tuned: map[string]entry{"backbone.layers.0.mixer.in_proj.weight": changed(8),
				"backbone.layers.0.mixer.out_proj.weight": changed(4)},
			modules: []string{"backbone.layers.0.mixer.in_proj"}, left: []string{"backbone.layers.0.mixer.out_proj.weight"},
			matrices: []string{"backbone.layers.0.mixer.out_proj.weight"},
		},
		"a tied GPT-2": {
			config:  `{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}`,
			tuned:   map[string]entry{"transformer.wte.weight": changed(6)},
			modules: []string{"transformer.wte"}, targets: []string{"lm_head", "transformer.wte"},
		},
		"a tied Llama": {
			config:  `{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": true}`,
			tuned:   map[string]entry{"model.embed_tokens.weight": changed(6)},
			modules: []string{"model.embed_tokens"}, ensured: true,
		},
		"T5": {
			config:  `{"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}`,
			tuned:   map[string]entry{"shared.weight": changed(6)},
			modules: []string{"shared"}, targets: []string{"decoder.embed_tokens", "encoder.embed_tokens", "lm_head", "shared"},
		},
		"Nemotron-H, whose experts have no gate": {
			config: `{"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"}`,
			same:   map[string]entry{"backbone.layers.1.mixer.experts.0.up_proj.weight": ones(6, 4)},
			tuned: map[string]entry{
				"backbone.layers.1.mixer.experts.1.up_proj.weight":   changed(6),
				"backbone.layers.1.mixer.experts.0.down_proj.weight": wide,
				"backbone.layers.1.mixer.experts.1.down_proj.weight": wide,
				"backbone.layers.1.norm.weight":                      vector,
			},
			modules: []string{"model.layers.1.mixer.experts.0.down_proj", "model.layers.1.mixer.experts.1.down_proj",
				"model.layers.1.mixer.experts.1.up_proj"},
			left:    []string{"backbone.layers.1.norm.weight"},
			targets: []string{}, parameters: []string{"model.layers.1.mixer.experts.down_proj",
				"model.layers.1.mixer.experts.up_proj"},
		},
		"gpt-oss, whose experts lie the other way round": {
			config: `{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}`,
			tuned: map[string]entry{"model.layers.0.mlp.experts.down_proj": floats(make([]float32, 16), 1, 4, 4),
				"model.layers.0.self_attn.q_proj.weight": changed(4)},
			modules: []string{"model.layers.0.self_attn.q_proj"}, left: []string{"model.layers.0.mlp.experts.down_proj"},
			matrices: []string{"model.layers.0.mlp.experts.down_proj"},
		},
		"Aria, whose experts do too": {
			config: `{"architectures": ["AriaForConditionalGeneration"], "model_type": "aria"}`,
			tuned: map[string]entry{"language_model.model.layers.0.mlp.experts.fc2.weight": floats(make([]float32, 32), 2, 4,
				4), "language_model.model.layers.0.self_attn.q_proj.weight": changed(4)},
			modules:  []string{"model.language_model.layers.0.self_attn.q_proj"},
			left:     []string{"language_model.model.layers.0.mlp.experts.fc2.weight"},
			matrices: []string{"language_model.model.layers.0.mlp.experts.fc2.weight"},
		},
		"a dense layer of DeepSeek": {
			config: `{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}`,
			tuned: map[string]entry{"model.layers.0.mlp.gate_proj.weight": changed(4),
				"model.layers.0.self_attn.o_proj.weight": changed(4)},
			modules: []string{"model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.o_proj"},
			targets: []string{"model.layers.0.self_attn.o_proj"}, parameters: []string{"model.layers.0.mlp.gate_proj.weight"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			was := maps.Clone(x.same)
			if was == nil {
				was = map[string]entry{}
			}
			now := maps.Clone(was)
			for tensor, e := range x.tuned {
				was[tensor], now[tensor] = ones(e.Shape...), e
			}
			out := filepath.Join(t.TempDir(), "out")
			r, err := lorakit.Extract(t.Context(), madeFolder(t, x.config, "model.safetensors", was),
				madeFolder(t, x.config, "model.safetensors", now), out, lorakit.ExtractOptions{Energy: 1})
			require.NoError(t, err)
			var modules []string
			for _, m := range r.Modules {
				modules = append(modules, m.Name)
			}
			require.Equal(t, x.modules, modules)
			all, left := 0.0, 0.0 // of the squared norm of the changes
			for tensor, e := range x.tuned {
				for at := 0; at < len(e.data); at += 4 {
					d := float64(math.Float32frombits(binary.LittleEndian.Uint32(e.data[at:]))) - 1
					if all += d * d; slices.Contains(x.left, tensor) {
						left += d * d
					}
				}
			}
			require.InDelta(t, 1-left/all, r.Explained, 1e-6)
			require.Equal(t, x.whole, r.Whole)
			require.Equal(t, append([]string{}, x.left...), r.LeftOut)
			require.Equal(t, x.matrices, r.LeftOutMatrices)
			var config struct {
				Targets    []string `json:"target_modules"`
				Parameters []string `json:"target_parameters"`
				ToSave     []string `json:"modules_to_save"`
				Ensured    bool     `json:"ensure_weight_tying"`
			}
			b, err := os.ReadFile(filepath.Join(out, "adapter_config.json"))
			require.NoError(t, err)
			require.NoError(t, json.Unmarshal(b, &config))
			want := x.targets
			if want == nil {
				want = x.modules
			}
			require.Equal(t, want, config.Targets)
			require.Equal(t, x.parameters, config.Parameters)
			require.Equal(t, x.whole, config.ToSave)
			require.Equal(t, x.ensured, config.Ensured)
		})
	}
}

// TestExtractRefuses says of which checkpoints a change is, and what of it has no part in an adapter.
func TestExtractRefuses(t *testing.T) {
	t.Parallel()
	const config = `{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}`
	const q, experts = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.down_proj"
	nan := float32(math.NaN())
	was := map[string]entry{q: ones(2, 2), experts: ones(1, 4, 4)}
	base := madeFolder(t, config, "model.safetensors", was)
	for name, x := range map[string]struct {
		tuned map[string]entry
		says  string
	}{
		"NaN": {map[string]entry{q: floats([]float32{1, nan, 1, 1}, 2, 2), experts: ones(1, 4, 4)},
			", less " + base + `: module "model.layers.0.self_attn.q_proj": svd: NaN in row 0, column 1`},
		"experts alone": {map[string]entry{q: ones(2, 2), experts: floats(make([]float32, 16), 1, 4, 4)},
			`that an adapter can have; what differs has no part in one: "` + experts + `"`},
		"nothing": {was, "no linear layer, expert or embedding differs from that of " + base},
	} {
		tuned, out := madeFolder(t, config, "model.safetensors", x.tuned), filepath.Join(t.TempDir(), "out")
		_, err := lorakit.Extract(t.Context(), base, tuned, out, lorakit.ExtractOptions{Rank: 1})
		require.ErrorContains(t, err, tuned, name)
		require.ErrorContains(t, err, x.says, name)
		require.NoFileExists(t, out+".partial")
	}
}

// TestStudiedAsTheyLie keeps extract, analyze and attach from weights that are not the model's as they lie in the file:
// those of a scheme that is not read, those with an adapter beside them.
func TestStudiedAsTheyLie(t *testing.T) {
	t.Parallel()
	const llama, q = `{"architectures": ["LlamaForCausalLM"], "model_type": "llama"`, "model.layers.0.self_attn.q_proj"
	words := entry{tensor.Info{DType: tensor.I32, Shape: tensor.Shape{1, 4}}, make([]byte, 16)}
	plain := madeFolder(t, llama+"}", "model.safetensors", map[string]entry{q + ".weight": ones(4, 8)})
	packed := madeFolder(t, llama+`, "quantization_config": {"quant_method": "aqlm"}}`, "model.safetensors",
		map[string]entry{q + ".codes": words})
	unmerged := madeFolder(t, llama+"}", "model.safetensors", map[string]entry{q + ".base_layer.weight": ones(4, 8),
		q + ".lora_A.default.weight": ones(2, 8), q + ".lora_B.default.weight": ones(4, 2)})
	for dir, says := range map[string]string{
		packed: `weights are stored as `, unmerged: "an adapter that was never merged",
	} {
		out := filepath.Join(t.TempDir(), "out")
		_, err := lorakit.Extract(t.Context(), plain, dir, out, lorakit.ExtractOptions{Rank: 1})
		require.ErrorContains(t, err, says)
		_, err = lorakit.Extract(t.Context(), dir, plain, out, lorakit.ExtractOptions{Rank: 1})
		require.ErrorContains(t, err, says)
		_, err = lorakit.Analyze(t.Context(), dir, "", lorakit.AnalyzeOptions{})
		require.ErrorContains(t, err, says)
		_, err = lorakit.Analyze(t.Context(), plain, dir, lorakit.AnalyzeOptions{})
		require.ErrorContains(t, err, says)
		_, err = lorakit.Attach(t.Context(), dir, out, lorakit.AttachOptions{Rank: 1, Alpha: 1})
		require.ErrorContains(t, err, says)
		require.NoFileExists(t, out)
	}
}
