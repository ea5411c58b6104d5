package models

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/tensor"
)

// load reads a config given as JSON.
func load(t testing.TB, config string) *Model {
	t.Helper()
	c, err := ParseConfig([]byte(config))
	require.NoError(t, err)
	m, known := Load(c)
	require.True(t, known, "%s is not known", c.Architecture)
	return m
}

// saved is a checkpoint and what transformers with bitsandbytes made of it.
type saved struct {
	Name    string                       `json:"name"`
	Config  jsontext.Value               `json:"config"`
	Skip    []string                     `json:"skip"`
	Tensors map[string][2]jsontext.Value `json:"tensors"`
}

func TestWhatTransformersQuantised(t *testing.T) {
	b, err := os.ReadFile("testdata/saved.json")
	require.NoError(t, err)
	var cases []saved
	require.NoError(t, json.Unmarshal(b, &cases))
	require.NotEmpty(t, cases)
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			m := load(t, string(c.Config))
			var out []string // modules kept although transformers' defaults take them
			for name, v := range c.Tensors {
				var state string
				var shape tensor.Shape
				require.NoError(t, json.Unmarshal(v[0], &state))
				require.NoError(t, json.Unmarshal(v[1], &shape))
				got := m.Tensor(name, shape)
				assert.True(t, got.Known, name)
				if got.Quantized && slices.Contains(c.Skip, m.Module(name)) {
					out = append(out, m.Module(name))
					continue
				}
				assert.Equal(t, state == "quantized", got.Quantized, "%s: %+v", name, got)
			}
			if c.Skip == nil {
				assert.Empty(t, out)
				return
			}
			got := append(m.Skipped(), out...)
			slices.Sort(got)
			assert.Equal(t, c.Skip, got)
		})
	}
}

// Every file of data is well formed, and each of its patterns is found by itself.
func TestEveryArchitecture(t *testing.T) {
	require.NotEmpty(t, All())
	for _, class := range All() {
		a, err := read(class)
		require.NoError(t, err)
		assert.Equal(t, class, a.Class)
		m, known := Load(&Config{Architecture: class, root: jsontext.Value("{}")})
		require.True(t, known, class)
		for words, lines := range a.Parameters {
			p, err := parseParameter(words)
			require.NoError(t, err, class)
			for _, line := range lines {
				for pattern := range expand(line) {
					name, ranked, _ := strings.Cut(pattern, "[")
					rank := anyRank
					if ranked != "" {
						rank = int(ranked[0] - '0')
					}
					got, ok := m.data.parameter(split(strings.ReplaceAll(name, "#", "1000")), rank)
					if assert.True(t, ok, "%s: %s", class, pattern) {
						assert.Equal(t, p.kind, got.kind, "%s: %s", class, pattern)
					}
				}
			}
		}
		for _, s := range a.Slices {
			got, ok := a.slices(split(strings.ReplaceAll(s.File, "#", "7")))
			require.True(t, ok, "%s: %s", class, s.File)
			_, ok = a.parameter(split(got[0].Param), anyRank)
			assert.True(t, ok, "%s: %s", class, got[0].Param)
		}
	}
	_, known := Load(&Config{Architecture: "../types", root: jsontext.Value("{}")})
	assert.False(t, known)
}

func TestFacts(t *testing.T) {
	matrix := tensor.Shape{64, 32}
	for _, c := range []struct {
		config, name string
		want         Tensor
	}{
		{`{"architectures":["T5ForConditionalGeneration"]}`, "encoder.block.3.layer.1.DenseReluDense.wo.weight",
			Tensor{Kind: Linear, KeepFloat32: true}},
		{`{"architectures":["T5ForConditionalGeneration"]}`,
			"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", Tensor{Kind: Embedding}},
		{`{"architectures":["T5ForConditionalGeneration"]}`, "lm_head.weight", Tensor{Kind: Linear, Tied: "shared.weight"}},
		{`{"architectures":["BertForSequenceClassification"]}`, "classifier.weight", Tensor{Kind: Linear, Quantized: true}},
		{`{"architectures":["LlamaForSequenceClassification"]}`, "score.weight", Tensor{Kind: Linear}},
		{`{"architectures":["LlamaForCausalLM"]}`, "lm_head.weight", Tensor{Kind: Linear}},
		{`{"architectures":["LlamaForCausalLM"],"tie_word_embeddings":true}`, "lm_head.weight",
			Tensor{Kind: Linear, Tied: "model.embed_tokens.weight"}},
		{`{"architectures":["GPT2LMHeadModel"]}`, "transformer.h.11.attn.c_attn.weight",
			Tensor{Kind: Conv1D, Quantized: true}},
		{`{"architectures":["GPT2LMHeadModel"]}`, "lm_head.weight", Tensor{Kind: Linear, Tied: "transformer.wte.weight"}},
		{`{"architectures":["GPT2LMHeadModel"],"tie_word_embeddings":false}`, "lm_head.weight", Tensor{Kind: Linear}},
		{`{"architectures":["Qwen2_5_VLForConditionalGeneration"],"text_config":{"tie_word_embeddings":true}}`,
			"lm_head.weight", Tensor{Kind: Linear, Tied: "model.language_model.embed_tokens.weight"}},
		{`{"architectures":["Qwen2_5_VLForConditionalGeneration"],"tie_word_embeddings":true,"text_config":{"tie_word_embeddings":false}}`, "lm_head.weight", Tensor{Kind: Linear, Tied: "model.language_model.embed_tokens.weight"}},
		{`{"architectures":["Qwen2_5_VLForConditionalGeneration"]}`, "lm_head.weight", Tensor{Kind: Linear}},
		{`{"architectures":["FalconForCausalLM"]}`, "transformer.h.0.mlp.dense_h_to_4h.weight", Tensor{Kind: Other}},
		{`{"architectures":["Gemma3ForConditionalGeneration"]}`, "vision_tower.head.attention.out_proj.weight",
			Tensor{Kind: Other}},
		{`{"architectures":["Gemma3ForConditionalGeneration"]}`, "vision_tower.head.mlp.fc1.weight",
			Tensor{Kind: Linear, Quantized: true}},
		{`{"architectures":["Mamba2ForCausalLM"]}`, "backbone.layers.5.mixer.out_proj.weight",
			Tensor{Kind: Linear, Stay: Raw}},
		{`{"architectures":["Mamba2ForCausalLM"]}`, "backbone.layers.5.mixer.in_proj.weight",
			Tensor{Kind: Linear, Quantized: true}},
		{`{"architectures":["MixtralForCausalLM"]}`, "model.layers.1.block_sparse_moe.gate.weight", Tensor{Kind: Router}},
		{`{"architectures":["MixtralForCausalLM"]}`, "model.layers.1.block_sparse_moe.experts.7.w2.weight",
			Tensor{Kind: Expert}},
		{`{"architectures":["Qwen3MoeForCausalLM"]}`, "model.layers.1.mlp.gate_proj.weight",
			Tensor{Kind: Linear, Quantized: true}},
	} {
		got := load(t, c.config).Tensor(c.name, matrix)
		assert.NotEmpty(t, got.Runtime, c.name)
		got.Runtime = nil
		c.want.Known = true
		assert.Equal(t, c.want, got, c.name)
	}
}

// TestTies asks what an output head is tied to, by what, and along with what.
func TestTies(t *testing.T) {
	for _, c := range []struct {
		config, head, source string
		switches, shared     []string
	}{
		{`{"architectures":["LlamaForCausalLM"],"tie_word_embeddings":true}`, "lm_head", "model.embed_tokens.weight",
			[]string{"tie_word_embeddings"}, []string{"lm_head.weight"}},
		{`{"architectures":["LlamaForCausalLM"]}`, "lm_head", "model.embed_tokens.weight", nil, nil},
		{`{"architectures":["WhisperForConditionalGeneration"]}`, "proj_out", "model.decoder.embed_tokens.weight",
			[]string{"tie_word_embeddings"}, []string{"proj_out.weight"}},
		{`{"architectures":["BertForMaskedLM"]}`, "cls.predictions.decoder", "bert.embeddings.word_embeddings.weight",
			[]string{"tie_word_embeddings"}, []string{"cls.predictions.decoder.weight"}},
		{`{"architectures":["T5ForConditionalGeneration"]}`, "lm_head", "shared.weight", nil,
			[]string{"decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight"}},
		{`{"architectures":["SwitchTransformersForConditionalGeneration"],"tie_word_embeddings":true}`, "lm_head",
			"shared.weight", nil, []string{"decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight"}},
		{`{"architectures":["Qwen2_5_VLForConditionalGeneration"],"text_config":{"tie_word_embeddings":true}}`, "lm_head",
			"model.language_model.embed_tokens.weight", []string{"text_config.tie_word_embeddings"}, []string{"lm_head.weight"}},
		{`{"architectures":["Qwen2_5_VLForConditionalGeneration"],"tie_word_embeddings":true,"text_config":{"tie_word_embeddings":true}}`, "lm_head", "model.language_model.embed_tokens.weight", []string{"tie_word_embeddings", "text_config.tie_word_embeddings"}, []string{"lm_head.weight"}},
	} {
		m := load(t, c.config)
		assert.Equal(t, c.head, m.Head(), c.config)
		assert.Equal(t, c.source, m.HeadSource(), c.config)
		assert.Equal(t, c.switches, m.TieSwitches(), c.config)
		assert.Equal(t, c.shared, m.SharedBy(c.source), c.config)
	}
	require.Equal(t, []string{"cls.predictions.decoder.bias"},
		load(t, `{"architectures":["BertForMaskedLM"]}`).SharedBy("cls.predictions.bias"))
}

// TestTransposedExperts tells by the shape how a stack of experts lies.
func TestTransposedExperts(t *testing.T) {
	m := load(t, `{"architectures":["Qwen3VLMoeForConditionalGeneration"],"text_config":{"hidden_size":32}}`)
	for _, c := range []struct {
		name  string
		shape tensor.Shape
		want  bool
	}{
		{"gate_up_proj", tensor.Shape{4, 48, 32}, false},
		{"gate_up_proj", tensor.Shape{4, 32, 48}, true},
		{"gate_up_proj", tensor.Shape{4, 32, 32}, false},
		{"down_proj", tensor.Shape{4, 32, 24}, false},
		{"down_proj", tensor.Shape{4, 24, 32}, true},
	} {
		name := "model.language_model.layers.1.mlp.experts." + c.name
		want := whole(name)
		want.Transposed = c.want
		assert.Equal(t, []Slice{want}, m.Tensor(name, c.shape).Runtime, c.shape)
	}
}

func TestVocabularyPaths(t *testing.T) {
	c,
		err := ParseConfig(
		[]byte(`{"vocab_size": 64, "text_config": {"vocab_size": 64}, "audio_config": {"vocab_size": 32}}`))
	require.NoError(t, err)
	assert.Equal(t, []string{"vocab_size", "text_config.vocab_size"}, c.VocabularyPaths(64))
	assert.Equal(t, []string{"vocab_size"}, c.VocabularyPaths(7))
	c, err = ParseConfig([]byte(`{"vocab_size": 64, "decoder_vocab_size": 64}`))
	require.NoError(t, err)
	assert.Equal(t, []string{"vocab_size", "decoder_vocab_size"}, c.VocabularyPaths(64))
}

func TestLogitsBias(t *testing.T) {
	for class, want := range map[string]string{"BartForConditionalGeneration": "final_logits_bias",
		"MarianMTModel": "final_logits_bias", "LEDForConditionalGeneration": "final_logits_bias",
		"M2M100ForConditionalGeneration": "", "BartForSequenceClassification": "", "LlamaForCausalLM": "", "NotKnown": ""} {
		c, err := ParseConfig([]byte(`{"architectures": ["` + class + `"]}`))
		require.NoError(t, err)
		m, _ := Load(c)
		assert.Equal(t, want, m.LogitsBias(), class)
	}
}

func TestSlices(t *testing.T) {
	mixtral := load(t, `{"architectures":["MixtralForCausalLM"]}`)
	with := func(f func(*Slice)) []Slice { s := whole(""); f(&s); return []Slice{s} }
	for name, want := range map[string][]Slice{
		"model.layers.11.block_sparse_moe.experts.6.w3.weight": with(func(s *Slice) {
			s.Param, s.Expert, s.Part, s.Parts = "model.layers.11.mlp.experts.gate_up_proj", 6, 1, 2
		}),
		"model.layers.11.block_sparse_moe.experts.6.w2.weight": with(func(s *Slice) {
			s.Param, s.Expert = "model.layers.11.mlp.experts.down_proj", 6
		}),
		"model.layers.0.block_sparse_moe.gate.weight": with(func(s *Slice) { s.Param = "model.layers.0.mlp.gate.weight" }),
		// a base model's file
		"layers.0.block_sparse_moe.gate.weight": with(func(s *Slice) { s.Param = "model.layers.0.mlp.gate.weight" }),
		// run-time names in the file
		"model.layers.0.mlp.gate.weight": with(func(s *Slice) { s.Param = "model.layers.0.mlp.gate.weight" }),
		"model.layers.0.mlp.experts.gate_up_proj": with(
			func(s *Slice) { s.Param = "model.layers.0.mlp.experts.gate_up_proj" }),
		"model.layers.0.self_attn.q_proj.weight": with(
			func(s *Slice) { s.Param = "model.layers.0.self_attn.q_proj.weight" }),
	} {
		got := mixtral.Tensor(name, tensor.Shape{4, 4})
		assert.True(t, got.Known, name)
		assert.Equal(t, want, got.Runtime, name)
	}
	gemma := load(t, `{"architectures":["Gemma3ForConditionalGeneration"]}`)
	assert.Equal(t, "model.language_model.layers.5.mlp.up_proj",
		gemma.Module("language_model.model.layers.5.mlp.up_proj.weight"))
	assert.Equal(t, "model.language_model.layers.5.mlp.up_proj",
		gemma.Module("model.language_model.layers.5.mlp.up_proj.weight"))
	// as on the hub
	assert.Equal(t, "model.vision_tower.encoder.layers.3.mlp.fc1",
		gemma.Module("vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight"))
	assert.False(t, gemma.Tensor("vision_tower.vision_model.head.attention.out_proj.weight",
		tensor.Shape{64, 64}).Quantized)
	clip := load(t, `{"architectures":["CLIPVisionModel"]}`)
	assert.Equal(t, "encoder.layers.3.mlp.fc1", clip.Module("vision_model.encoder.layers.3.mlp.fc1.weight"))
	bert := load(t, `{"architectures":["BertModel"]}`)
	assert.Equal(t, "encoder.layer.5.output.LayerNorm", bert.Module("bert.encoder.layer.5.output.LayerNorm.gamma"))
}

func TestSkipped(t *testing.T) {
	assert.Equal(t, []string{"lm_head", "model.embed_tokens"},
		load(t, `{"architectures":["Qwen2ForCausalLM"],"tie_word_embeddings":true}`).Skipped())
	assert.Equal(t, []string{"lm_head"}, load(t, `{"architectures":["Qwen2ForCausalLM"]}`).Skipped())
	assert.Equal(t, []string{"score"}, load(t, `{"architectures":["LlamaForSequenceClassification"]}`).Skipped())
	assert.Empty(t, load(t, `{"architectures":["BertForSequenceClassification"]}`).Skipped())
	unknown, known := Load(nil)
	assert.False(t, known)
	assert.Empty(t, unknown.Skipped())
}

func BenchmarkTensor(b *testing.B) {
	m := load(b, `{"architectures":["Qwen3MoeForCausalLM"]}`)
	for b.Loop() {
		m.Tensor("model.layers.47.mlp.experts.127.gate_proj.weight", tensor.Shape{768, 2048})
	}
}

func BenchmarkLoad(b *testing.B) {
	c, err := ParseConfig([]byte(`{"architectures":["Qwen2_5OmniForConditionalGeneration"]}`))
	require.NoError(b, err)
	for b.Loop() {
		if _, known := Load(c); !known {
			b.Fatal("no data")
		}
	}
}

// A model that is made of others than its class by default is answered by them.
func TestParts(t *testing.T) {
	captioner := load(t,
		`{"architectures":["VisionEncoderDecoderModel"],"model_type":"vision-encoder-decoder","encoder":{"model_type":"vit"},"decoder":{"model_type":"gpt2"}}`)
	attn := captioner.Tensor("decoder.transformer.h.0.attn.c_attn.weight", tensor.Shape{64, 192})
	assert.Equal(t, Conv1D, attn.Kind)
	assert.True(t, attn.Quantized && attn.Known)
	assert.Equal(t, "decoder.transformer.h.0.attn.c_attn.weight", attn.Runtime[0].Param)
	head := captioner.Tensor("decoder.lm_head.weight", tensor.Shape{100, 64})
	assert.False(t, head.Quantized)
	assert.Equal(t, "decoder.transformer.wte.weight", head.Tied)
	assert.Subset(t, captioner.Skipped(), []string{"decoder.lm_head", "decoder.transformer.wte"})

	blip := load(t,
		`{"architectures":["Blip2ForConditionalGeneration"],"model_type":"blip-2","text_config":{"model_type":"t5"}}`)
	wo := blip.Tensor("language_model.encoder.block.0.layer.1.DenseReluDense.wo.weight", tensor.Shape{64, 128})
	assert.True(t, wo.Known && wo.KeepFloat32)
	assert.False(t, wo.Quantized)
	assert.True(t, blip.Tensor("language_model.encoder.block.0.layer.1.DenseReluDense.wi.weight",
		tensor.Shape{128, 64}).Quantized)

	llava := load(t,
		`{"architectures":["LlavaForConditionalGeneration"],"model_type":"llava","text_config":{"model_type":"qwen2"},"vision_config":{"model_type":"pixtral"}}`)
	q := llava.Tensor("vision_tower.transformer.layers.0.attention.q_proj.weight", tensor.Shape{64, 64})
	assert.True(t, q.Known && q.Quantized)
	assert.Equal(t, "model.vision_tower.transformer.layers.0.attention.q_proj.weight", q.Runtime[0].Param)
	assert.Equal(t, "model.vision_tower.transformer.layers.0.attention.q_proj",
		llava.Module("vision_tower.transformer.layers.0.attention.q_proj.weight"))
	assert.False(t, llava.Tensor("language_model.model.embed_tokens.weight", tensor.Shape{64, 64}).Quantized)
}

// A class that has gone is what its model type is now, unless it brings its code.
func TestOldClass(t *testing.T) {
	c, err := ParseConfig([]byte(`{"architectures":["T5WithLMHeadModel"],"model_type":"t5"}`))
	require.NoError(t, err)
	assert.True(t, c.Assumed)
	assert.Equal(t, "T5ForConditionalGeneration", c.Architecture)
	c, err = ParseConfig([]byte(`{"architectures":["MyModel"],"model_type":"t5","auto_map":{"AutoModel":"mine.MyModel"}}`))
	require.NoError(t, err)
	assert.False(t, c.Assumed)
	assert.Equal(t, "MyModel", c.Architecture)
	_, known := Load(c)
	assert.False(t, known)
}

// Sections are bounded, and each is looked at once: a config may hold thousands.
func TestManySections(t *testing.T) {
	c, err := ParseConfig([]byte(`{"architectures":["LlamaForCausalLM"],"x":{"b":{"model_type":"nllb-moe"}}}`))
	require.NoError(t, err)
	assert.Len(t, c.sections(), 1)
	var b strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&b, `"s%d":{"model_type":"nllb-moe"},`, i)
	}
	c, err = ParseConfig([]byte(`{"architectures":["LlamaForCausalLM"],` + b.String() + `"end":0}`))
	require.NoError(t, err)
	assert.Len(t, c.sections(), maxSections)
}
