package train

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/models"
)

// ErrArchitecture says that no training step is known for a model's architecture.
var ErrArchitecture = errors.New("no training step for this architecture")

// readers are for the architectures with a step. Each function says what is particular to one, with the defaults of its
// configuration class in transformers; what it does not mention is as in Llama.
var readers = map[string]func(*fields) *spec{
	"Cohere2ForCausalLM":             cohere2,
	"GPT2LMHeadModel":                gpt2,
	"Gemma2ForCausalLM":              gemma2,
	"Gemma3ForCausalLM":              gemma3,
	"Gemma3ForConditionalGeneration": gemma3OfImages,
	"GraniteForCausalLM":             granite,
	"LlamaForCausalLM":               llama,
	"MistralForCausalLM":             mistral,
	"MixtralForCausalLM":             mixtral,
	"Olmo2ForCausalLM":               olmo2,
	"Phi3ForCausalLM":                phi3,
	"PhiForCausalLM":                 phi,
	"Qwen2ForCausalLM":               qwen2,
	"Qwen3ForCausalLM":               qwen3,
	"Qwen3MoeForCausalLM":            qwen3Moe,
	"SmolLM3ForCausalLM":             smolLM3,
	"StableLmForCausalLM":            stableLM,
}

// readSpec reads what a config.json says of a model. An error names the member of the config, or is an
// ErrArchitecture that lists the architectures with a step.
func readSpec(c *models.Config) (*spec, error) {
	read, ok := readers[c.Architecture]
	if !ok {
		return nil, fmt.Errorf("config: %q of model type %q: %w; there is one for %s", clip(c.Architecture),
			clip(c.ModelType), ErrArchitecture, strings.Join(slices.Sorted(maps.Keys(readers)), ", "))
	}
	members, _ := c.Members("")
	var err error
	f := &fields{members: members, err: &err}
	f.refuse("per_layer_config", "layers that differ are not supported")
	s := read(f)
	if err != nil {
		return nil, err
	}
	s.architecture = c.Architecture
	model, _ := models.Load(c)
	s.tied = model.Tensor(s.head.module+".weight", s.head.shape()).Tied != ""
	if n := s.elements(); n > mostElements {
		return nil, fmt.Errorf("config: describes %.3g parameters, at most %.3g are read", n, float64(mostElements))
	}
	return s, nil
}

func llama(f *fields) *spec {
	s := f.decoder(defaults{
		vocab: 32000, hidden: 4096, width: 11008, layers: 32, heads: 32, activation: "silu", pad: -1,
		norm: norm{kind: rmsNorm, eps: 1e-6}, rope: ropeDefaults{positions: 2048, theta: 1e4},
	})
	s.bias(f.flag("attention_bias", false), f.flag("attention_bias", false), f.flag("mlp_bias", false))
	return s
}

func mistral(f *fields) *spec {
	s := f.decoder(defaults{
		vocab: 32000, hidden: 4096, width: 14336, layers: 32, heads: 32, keyHeads: 8, activation: "silu", pad: -1,
		norm: norm{kind: rmsNorm, eps: 1e-6}, rope: ropeDefaults{positions: 131072, theta: 1e4},
	})
	s.window(f.countOrNone("sliding_window", 4096, mostPositions))
	return s
}

func qwen2(f *fields) *spec {
	s := f.decoder(defaults{
		vocab: 151936, hidden: 4096, width: 22016, layers: 32, heads: 32, keyHeads: 32, activation: "silu", pad: -1,
		norm: norm{kind: rmsNorm, eps: 1e-6}, rope: ropeDefaults{positions: 32768, theta: 1e4},
	})
	s.bias(true, false, false)
	f.qwenWindows(s)
	return s
}

func qwen3(f *fields) *spec {
	s := f.decoder(defaults{
		vocab: 151936, hidden: 4096, width: 22016, layers: 32, heads: 32, keyHeads: 32, headDim: 128, activation: "silu",
		pad: -1, norm: norm{kind: rmsNorm, eps: 1e-6}, rope: ropeDefaults{positions: 32768, theta: 1e4},
	})
	s.bias(f.flag("attention_bias", false), f.flag("attention_bias", false), false)
	s.normHeads("q_norm", "k_norm", s.finalNorm)
	f.qwenWindows(s)
	return s
}

// qwenWindows limits the attention of Qwen's upper layers, where the config switches that on.
func (f *fields) qwenWindows(s *spec) {
	window, from := 0, f.count("max_window_layers", 28, 0, mostPositions)
	if f.flag("use_sliding_window", false) {
		window = f.countOrNone("sliding_window", 4096, mostPositions)
	}
	f.layerTypes(s, window, func(i int) bool { return window > 0 && i >= from })
}

func gemma2(f *fields) *spec {
	s := f.gemma(defaults{
		vocab: 256000, hidden: 2304, width: 9216, layers: 26, heads: 8, keyHeads: 4, headDim: 256, pad: 0,
		rope: ropeDefaults{positions: 8192, theta: 1e4},
	})
	s.logitCap = float32(f.numberOrNone("final_logit_softcapping", 30))
	softCap := float32(f.numberOrNone("attn_logit_softcapping", 50))
	for i := range s.layers {
		s.layers[i].attention.softCap = softCap
	}
	f.layerTypes(s, f.countOrNone("sliding_window", 4096, mostPositions), func(i int) bool { return (i+1)%2 != 0 })
	return s
}

// gemma3 has norms of q and k, and frequencies of its own for each type of layer. Its class reads a soft cap of the
// scores too and does not use it.
func gemma3(f *fields) *spec {
	s := f.gemma(defaults{
		vocab: 262208, hidden: 2304, width: 9216, layers: 26, heads: 8, keyHeads: 4, headDim: 256, pad: 0,
	})
	s.logitCap = float32(f.numberOrNone("final_logit_softcapping", 0))
	s.normHeads("q_norm", "k_norm", s.finalNorm)
	pattern := f.count("sliding_window_pattern", 6, 1, mostLayers)
	slides := func(i int) bool { return (i+1)%pattern != 0 }
	types := f.layerTypes(s, f.countOrNone("sliding_window", 4096, mostPositions), slides)
	f.ropeByType(s, types, ropeDefaults{positions: 131072, layerwise: true})
	return s
}

// gemma3OfImages is the model of text and images, of which the step takes text alone: the language model, in
// text_config. Its head has no soft cap.
func gemma3OfImages(f *fields) *spec {
	text := f.object("text_config")
	if text == nil {
		text = &fields{path: "text_config.", err: f.err}
	}
	text.prefix = "model.language_model"
	s := gemma3(text)
	s.logitCap = 0
	return s
}

// gemma is what Gemma 2 and 3 have in common: norms before and after each branch, whose weight counts from one.
func (f *fields) gemma(d defaults) *spec {
	d.norm = norm{kind: rmsNormPlusOne, eps: 1e-6}
	d.activation, d.activationName = "gelu_pytorch_tanh", "hidden_activation"
	f.refuse("use_bidirectional_attention", "only causal attention is supported")
	s := f.decoder(d)
	s.embedScale = float32(math.Sqrt(float64(s.hidden)))
	s.bias(f.flag("attention_bias", false), f.flag("attention_bias", false), false)
	scale := float32(math.Pow(f.number("query_pre_attn_scalar", 256), -0.5))
	for i := range s.layers {
		l := &s.layers[i]
		l.attention.scale = scale
		l.afterAttention = s.norm(l.name + ".post_attention_layernorm")
		l.beforeMLP = s.norm(l.name + ".pre_feedforward_layernorm")
		l.afterMLP = s.norm(l.name + ".post_feedforward_layernorm")
	}
	return s
}

// phi3 has q, k, v in one matrix, and the two of the MLP in another.
func phi3(f *fields) *spec {
	s := f.decoder(defaults{
		vocab: 32064, hidden: 3072, width: 8192, layers: 32, heads: 32, activation: "silu", pad: 32000,
		norm: norm{kind: rmsNorm, eps: 1e-5}, rope: ropeDefaults{positions: 4096, theta: 1e4, partial: 1, original: 4096,
			older: map[string]string{"su": "longrope", "yarn": "longrope"}, only: []string{"default", "longrope"}},
	})
	for i := range s.layers {
		l := &s.layers[i]
		a, m := &l.attention, l.mlp
		rows := a.q.out + a.k.out + a.v.out
		a.fused = &linear{module: l.name + ".self_attn.qkv_proj", in: s.hidden, out: rows}
		a.q, a.k, a.v = nil, nil, nil
		m.gateUp = &linear{module: l.name + ".mlp.gate_up_proj", in: s.hidden, out: 2 * m.up.out}
		m.gate, m.up = nil, nil
	}
	s.window(f.countOrNone("sliding_window", 0, mostPositions))
	return s
}

// gpt2 has learned positions, layer norms, and matrices that are stored the other way round.
func gpt2(f *fields) *spec {
	f.alias = map[string]string{"n_embd": "hidden_size", "n_positions": "max_position_embeddings",
		"n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
	f.refuse("add_cross_attention", "attention to an encoder is not supported")
	f.causal()
	hidden, heads := f.count("n_embd", 768, 1, mostFeatures), f.count("n_head", 12, 1, mostHeads)
	layers := f.count("n_layer", 12, 1, mostLayers)
	width := f.countOrNone("n_inner", 0, mostFeatures)
	if width == 0 {
		width = 4 * hidden
	}
	if hidden%heads != 0 {
		f.fail("n_embd %d is no multiple of n_head %d", hidden, heads)
	}
	act := f.activation("activation_function", "gelu_new")
	scaled, byLayer := f.flag("scale_attn_weights", true), f.flag("scale_attn_by_inverse_layer_idx", false)
	s := &spec{
		vocab: f.count("vocab_size", 50257, 1, mostRows), hidden: hidden, padToken: -1,
		embedding: "transformer.wte", embedScale: 1, logitScale: 1,
		positions: "transformer.wpe", maxPositions: f.count("n_positions", 1024, 1, mostRows),
		finalNorm: norm{module: "transformer.ln_f", kind: layerNorm, width: hidden, bias: true},
	}
	s.finalNorm.eps = f.number("layer_norm_epsilon", 1e-5)
	s.head = linear{module: "lm_head", in: hidden, out: s.vocab}
	if *f.err != nil {
		return s
	}
	conv := func(module string, in, out int) linear {
		return linear{module: module, in: in, out: out, bias: true, conv: true}
	}
	for i := range layers {
		name := "transformer.h." + strconv.Itoa(i)
		scale := 1.0
		if scaled {
			scale = math.Pow(float64(hidden/heads), -0.5)
		}
		if byLayer {
			scale /= float64(i + 1)
		}
		fused, up := conv(name+".attn.c_attn", hidden, 3*hidden), conv(name+".mlp.c_fc", hidden, width)
		s.layers = append(s.layers, layer{
			name: name, residual: 1, beforeAttention: s.norm(name + ".ln_1"), beforeMLP: s.norm(name + ".ln_2"),
			attention: attention{
				heads: heads, keyHeads: heads, headDim: hidden / heads, scale: float32(scale),
				fused: &fused, out: conv(name+".attn.c_proj", hidden, hidden),
			},
			mlp: &mlp{act: act, up: &up, down: conv(name+".mlp.c_proj", width, hidden)},
		})
	}
	return s
}

func mixtral(f *fields) *spec {
	f.alias = map[string]string{"num_local_experts": "num_experts"}
	s := f.decoder(defaults{
		vocab: 32000, hidden: 4096, width: 14336, layers: 32, heads: 32, keyHeads: 8, activation: "silu", pad: -1,
		norm: norm{kind: rmsNorm, eps: 1e-5}, rope: ropeDefaults{positions: 131072, theta: 1e6},
	})
	s.window(f.countOrNone("sliding_window", 0, mostPositions))
	e := f.experts("num_local_experts", 8, 1, 2)
	e.normalise = true
	for i := range s.layers {
		s.layers[i].route(e, s.layers[i].mlp.up.out)
	}
	return s
}

func qwen3Moe(f *fields) *spec {
	f.alias = map[string]string{"num_experts": "num_local_experts"}
	s := f.decoder(defaults{
		vocab: 151936, hidden: 2048, width: 6144, layers: 24, heads: 32, keyHeads: 4, activation: "silu", pad: -1,
		norm: norm{kind: rmsNorm, eps: 1e-6}, rope: ropeDefaults{positions: 32768, theta: 1e4},
	})
	s.bias(f.flag("attention_bias", false), f.flag("attention_bias", false), false)
	s.normHeads("q_norm", "k_norm", s.finalNorm)
	if f.flag("use_sliding_window", false) {
		s.window(f.countOrNone("sliding_window", 4096, mostPositions))
	}
	e := f.experts("num_experts", 128, 0, 8)
	e.normalise = f.flag("norm_topk_prob", false)
	width := f.count("moe_intermediate_size", 768, 1, mostFeatures)
	step, dense := f.count("decoder_sparse_step", 1, 1, mostLayers), listOf[int](f, "mlp_only_layers", "whole numbers")
	for i := range s.layers {
		if e.count > 0 && (i+1)%step == 0 && !slices.Contains(dense, i) {
			s.layers[i].route(e, width)
		}
	}
	return s
}

// smolLM3 does not rotate in some of its layers.
func smolLM3(f *fields) *spec {
	s := f.decoder(defaults{
		vocab: 128256, hidden: 2048, width: 11008, layers: 36, heads: 16, keyHeads: 4, activation: "silu", pad: 128004,
		norm: norm{kind: rmsNorm, eps: 1e-6}, rope: ropeDefaults{positions: 32768, theta: 2e6},
	})
	s.bias(f.flag("attention_bias", false), f.flag("attention_bias", false), f.flag("mlp_bias", false))
	every, rotated := f.count("no_rope_layer_interval", 4, 1, mostPositions), listOf[int](f, "no_rope_layers", "0 and 1")
	if rotated != nil && len(rotated) < len(s.layers) {
		f.fail("no_rope_layers has %d numbers, expected one for each of %d layers", len(rotated), len(s.layers))
		return s
	}
	still := func(i int) bool {
		if rotated != nil {
			return rotated[i] == 0
		}
		return (i+1)%every == 0
	}
	for i := range s.layers {
		if still(i) {
			s.layers[i].attention.rotary = nil
		}
	}
	window, slides := f.countOrNone("sliding_window", 0, mostPositions), f.flag("use_sliding_window", false)
	f.layerTypes(s, window, func(i int) bool { return slides && window > 0 && still(i) })
	return s
}

// granite multiplies: the embedding, the scores, each branch; and it divides the logits.
func granite(f *fields) *spec {
	s := f.decoder(defaults{
		vocab: 32000, hidden: 4096, width: 11008, layers: 32, heads: 32, activation: "silu", pad: -1,
		norm: norm{kind: rmsNorm, eps: 1e-6}, rope: ropeDefaults{positions: 2048, theta: 1e4},
	})
	s.bias(f.flag("attention_bias", false), f.flag("attention_bias", false), f.flag("mlp_bias", false))
	s.embedScale = float32(f.number("embedding_multiplier", 1))
	s.logitScale = float32(1 / f.number("logits_scaling", 1))
	scale, residual := f.number("attention_multiplier", 1), f.number("residual_multiplier", 1)
	for i := range s.layers {
		s.layers[i].attention.scale, s.layers[i].residual = float32(scale), float32(residual)
	}
	return s
}

// olmo2 has norms after each branch alone, and of q and k over all heads together.
func olmo2(f *fields) *spec {
	s := f.decoder(defaults{
		vocab: 50304, hidden: 4096, width: 11008, layers: 32, heads: 32, activation: "silu", pad: 1,
		norm: norm{kind: rmsNorm, eps: 1e-5}, rope: ropeDefaults{positions: 2048, theta: 1e4},
	})
	s.bias(f.flag("attention_bias", false), f.flag("attention_bias", false), false)
	s.normHeads("q_norm", "k_norm", s.finalNorm)
	for i := range s.layers {
		l := &s.layers[i]
		l.attention.qNorm.width, l.attention.kNorm.width = l.attention.q.out, l.attention.k.out
		l.beforeAttention, l.afterAttention = nil, l.beforeMLP
		l.beforeMLP, l.afterMLP = nil, s.norm(l.name+".post_feedforward_layernorm")
	}
	return s
}

func stableLM(f *fields) *spec {
	s := f.decoder(defaults{
		vocab: 50304, hidden: 2560, width: 6912, layers: 32, heads: 32, keyHeads: 32, activation: "silu", pad: -1,
		norm: norm{kind: layerNorm, eps: 1e-5, bias: true}, rope: ropeDefaults{positions: 4096, theta: 1e4, partial: 0.25},
	})
	s.bias(f.flag("use_qkv_bias", false), false, false)
	if f.flag("qk_layernorm", false) {
		s.normHeads("q_layernorm", "k_layernorm", norm{kind: layerNorm, eps: s.finalNorm.eps, perHead: true})
		norms := 0
		for _, l := range s.layers {
			norms += l.attention.heads + l.attention.keyHeads
		}
		if norms > mostNorms {
			f.fail("qk_layernorm asks for %d norms of heads, at most %d are read", norms, mostNorms)
		}
	}
	if f.flag("use_parallel_residual", false) {
		s.parallel()
	}
	return s
}

func phi(f *fields) *spec {
	s := f.decoder(defaults{
		vocab: 51200, hidden: 2048, width: 8192, layers: 24, heads: 32, activation: "gelu_new", pad: -1,
		norm: norm{kind: layerNorm, eps: 1e-5, bias: true}, rope: ropeDefaults{positions: 2048, theta: 1e4, partial: 0.5},
	})
	s.finalNorm.module = "model.final_layernorm"
	s.head.bias = true
	s.bias(true, true, true)
	if f.flag("qk_layernorm", false) {
		s.normHeads("q_layernorm", "k_layernorm", s.finalNorm)
	}
	s.parallel()
	for i := range s.layers {
		l := &s.layers[i]
		l.attention.out.module = l.name + ".self_attn.dense"
		l.mlp.gate, l.mlp.up.module, l.mlp.down.module = nil, l.name+".mlp.fc1", l.name+".mlp.fc2"
	}
	return s
}

// cohere2 rotates neighbours, and only where it looks through a window.
func cohere2(f *fields) *spec {
	s := f.decoder(defaults{
		vocab: 256000, hidden: 8192, width: 22528, layers: 40, heads: 64, activation: "silu", pad: 0,
		norm: norm{kind: layerNorm, eps: 1e-5}, rope: ropeDefaults{positions: 8192, theta: 1e4},
	})
	s.logitScale = float32(f.number("logit_scale", 0.0625))
	s.bias(f.flag("attention_bias", false), f.flag("attention_bias", false), false)
	s.parallel()
	pattern := f.count("sliding_window_pattern", 4, 1, mostLayers)
	slides := func(i int) bool { return (i+1)%pattern != 0 }
	types := f.layerTypes(s, f.countOrNone("sliding_window", 4096, mostPositions), slides)
	for i := range s.layers {
		a := &s.layers[i].attention
		a.rotary.interleaved = true
		if types[i] != slidingAttention {
			a.rotary = nil
		}
	}
	return s
}
