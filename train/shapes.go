package train

import (
	"fmt"
	"math"
)

// Shape is that of a decoder as most are: blocks of attention and an MLP.
type Shape struct {
	Name         string `json:"name"`
	Layers       int    `json:"layers"`
	Hidden       int    `json:"hidden"`
	Intermediate int    `json:"intermediate"`
	Heads        int    `json:"heads"`
	KeyHeads     int    `json:"key_heads"`
	Vocabulary   int    `json:"vocabulary"`

	tied      bool // the output head is the embedding
	plain     bool // the MLP has no gate, and all linear layers of a block have biases, norms too
	positions int  // learned, or 0
}

// knownShapes are those that a bare size may have: as the models' config.json have them, and GPT-3 as table 2.1 of
// Brown et al. (2020).
var knownShapes = []Shape{
	{"SmolLM2 135M", 30, 576, 1536, 9, 3, 49152, true, false, 0},
	{"SmolLM2 360M", 32, 960, 2560, 15, 5, 49152, true, false, 0},
	{"TinyLlama 1.1B", 22, 2048, 5632, 32, 4, 32000, false, false, 0},
	{"Llama 3.2 1B", 16, 2048, 8192, 32, 8, 128256, true, false, 0},
	{"SmolLM2 1.7B", 24, 2048, 8192, 32, 32, 49152, true, false, 0},
	{"Llama 3.2 3B", 28, 3072, 8192, 24, 8, 128256, true, false, 0},
	{"Llama 7B", 32, 4096, 11008, 32, 32, 32000, false, false, 0},
	{"Llama 3 8B", 32, 4096, 14336, 32, 8, 128256, false, false, 0},
	{"Llama 13B", 40, 5120, 13824, 40, 40, 32000, false, false, 0},
	{"Llama 33B", 60, 6656, 17920, 52, 52, 32000, false, false, 0},
	{"Llama 65B", 80, 8192, 22016, 64, 64, 32000, false, false, 0},
	{"Llama 2 70B", 80, 8192, 28672, 64, 8, 32000, false, false, 0},
	{"GPT-3 175B", 96, 12288, 49152, 96, 96, 50257, true, true, 2048},
	{"Llama 3.1 405B", 126, 16384, 53248, 128, 8, 128256, false, false, 0},
}

// assume finds the known shape whose size is nearest to that of a model, by its logarithm.
func assume(parameters int64) *Shape {
	var nearest *Shape
	least := math.Inf(1)
	for i := range knownShapes {
		s := &knownShapes[i]
		if d := math.Abs(math.Log(float64(parameters) / s.spec().elements())); d < least {
			nearest, least = s, d
		}
	}
	return nearest
}

// spec is a model of that shape, with the names of Llama's modules.
func (s *Shape) spec() *spec {
	kind := rmsNorm
	if s.plain {
		kind = layerNorm
	}
	m := &spec{
		architecture: s.Name, vocab: s.Vocabulary, hidden: s.Hidden, embedding: "model.embed_tokens", embedScale: 1,
		maxPositions: s.positions, padToken: -1, finalNorm: norm{"model.norm", kind, 1e-5, s.Hidden, s.plain, false},
		head: linear{module: "lm_head", in: s.Hidden, out: s.Vocabulary}, tied: s.tied, logitScale: 1,
	}
	if s.positions > 0 {
		m.positions = "model.embed_positions"
	}
	headDim := s.Hidden / s.Heads
	for i := range s.Layers {
		name := fmt.Sprintf("model.layers.%d", i)
		to := func(module string, in, out int) *linear {
			return &linear{module: name + "." + module, in: in, out: out, bias: s.plain}
		}
		normed := func(module string) *norm {
			return &norm{name + "." + module, kind, 1e-5, s.Hidden, s.plain, false}
		}
		l := layer{
			name: name, residual: 1,
			beforeAttention: normed("input_layernorm"), beforeMLP: normed("post_attention_layernorm"),
			attention: attention{
				heads: s.Heads, keyHeads: s.KeyHeads, headDim: headDim,
				q:   to("self_attn.q_proj", s.Hidden, s.Heads*headDim),
				k:   to("self_attn.k_proj", s.Hidden, s.KeyHeads*headDim),
				v:   to("self_attn.v_proj", s.Hidden, s.KeyHeads*headDim),
				out: *to("self_attn.o_proj", s.Heads*headDim, s.Hidden),
			},
			mlp: &mlp{
				up: to("mlp.up_proj", s.Hidden, s.Intermediate), down: *to("mlp.down_proj", s.Intermediate, s.Hidden),
			},
		}
		if !s.plain {
			l.mlp.gate = to("mlp.gate_proj", s.Hidden, s.Intermediate)
		}
		m.layers = append(m.layers, l)
	}
	return m
}
