package train

import (
	"compress/gzip"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// golden is a config and what transformers makes of it (fixtures/generate/specs.py).
type golden struct {
	Name       string                    `json:"name"`
	Config     jsontext.Value            `json:"config"`
	Refused    string                    `json:"refused"` // by transformers, with this error
	Parameters [][2]jsontext.Value       `json:"parameters"`
	Norms      map[string]jsontext.Value `json:"norms"`
	Tied       bool                      `json:"tied"`
	Pad        int                       `json:"pad"`
	Layers     []struct {
		Window   int            `json:"window"`
		Scale    float64        `json:"scale"`
		SoftCap  float64        `json:"soft_cap"`
		Turned   jsontext.Value `json:"turned"` // features of a head, whether neighbours are pairs; or null
		Heads    int            `json:"heads"`
		KeyHeads int            `json:"key_heads"`
		HeadDim  int            `json:"head_dim"`
	} `json:"layers"`
	Order       []string                    `json:"order"`    // of norms and the last matrix of each branch, in layer 0
	Parallel    bool                        `json:"parallel"` // both branches read the same
	Frequencies map[string][]jsontext.Value `json:"frequencies"`
	Experts     map[string]jsontext.Value   `json:"experts"`
	Activation  float64                     `json:"activation"` // of 1
	EmbedScale  float64                     `json:"embed_scale"`
	Residual    float64                     `json:"residual"`
	LogitScale  float64                     `json:"logit_scale"`
	LogitCap    float64                     `json:"logit_cap"`
}

func goldens(t testing.TB) []golden {
	t.Helper()
	file, err := os.Open("../fixtures/specs.json.gz")
	require.NoError(t, err)
	defer file.Close()
	unpacked, err := gzip.NewReader(file)
	require.NoError(t, err)
	var all []golden
	require.NoError(t, json.UnmarshalRead(unpacked, &all))
	require.NotEmpty(t, all)
	return all
}

// specOf is readSpec of a config as it is in a file.
func specOf(t testing.TB, config string) (*spec, error) {
	t.Helper()
	c, err := models.ParseConfig([]byte(config))
	require.NoError(t, err)
	return readSpec(c)
}

// tuple takes a JSON array apart.
func tuple(t testing.TB, v jsontext.Value, into ...any) {
	t.Helper()
	var parts []jsontext.Value
	require.NoError(t, json.Unmarshal(v, &parts))
	require.Len(t, parts, len(into))
	for i := range into {
		require.NoError(t, json.Unmarshal(parts[i], into[i]))
	}
}

func TestSpecAsTransformers(t *testing.T) {
	architectures := map[string]bool{}
	for _, g := range goldens(t) {
		t.Run(g.Name, func(t *testing.T) {
			s, err := specOf(t, string(g.Config))
			if g.Refused != "" {
				require.Error(t, err, g.Refused)
				assert.NotContains(t, err.Error(), "\n")
				return
			}
			require.NoError(t, err)
			architectures[s.architecture] = true
			sameParameters(t, g, s)
			sameNorms(t, g, s)
			sameLayers(t, g, s)
			assert.Equal(t, g.Order, orderOf(&s.layers[0]))
			assert.Equal(t, g.Parallel, s.layers[0].parallel)
			assert.Equal(t, g.Tied, s.tied)
			assert.Equal(t, g.Pad, s.padToken)
			assert.InEpsilon(t, g.EmbedScale, float64(s.embedScale), 1e-7)
			assert.InEpsilon(t, g.LogitScale, float64(s.logitScale), 1e-7)
			assert.Equal(t, g.LogitCap, float64(s.logitCap))
		})
	}
	assert.Len(t, architectures, len(readers), "every architecture has a config that transformers takes")
}

// sameParameters compares names, shapes and, with the data of package models, kinds.
func sameParameters(t *testing.T, g golden, s *spec) {
	c, err := models.ParseConfig(g.Config)
	require.NoError(t, err)
	model, known := models.Load(c)
	require.True(t, known)
	want, got := map[string]tensor.Shape{}, map[string]tensor.Shape{}
	for _, p := range g.Parameters {
		var name string
		var shape tensor.Shape
		require.NoError(t, json.Unmarshal(p[0], &name))
		require.NoError(t, json.Unmarshal(p[1], &shape))
		want[name] = shape
	}
	for _, p := range s.parameters() {
		require.NotContains(t, got, p.name)
		got[p.name] = p.shape
		known := model.Tensor(p.name, p.shape)
		require.True(t, known.Known, p.name)
		require.Equal(t, known.Kind, p.kind, p.name)
	}
	require.Equal(t, want, got)
}

func sameNorms(t *testing.T, g golden, s *spec) {
	kinds := map[string]normKind{"rms": rmsNorm, "rms+1": rmsNormPlusOne, "layer": layerNorm}
	got := map[string]norm{}
	add := func(n *norm, heads int) {
		if n == nil {
			return
		}
		if !n.perHead {
			got[n.module] = *n
			return
		}
		for h := range heads {
			one := *n
			one.module, one.perHead = n.module+".norms."+strconv.Itoa(h), false
			got[one.module] = one
		}
	}
	for i := range s.layers {
		l := &s.layers[i]
		for _, n := range []*norm{l.beforeAttention, l.afterAttention, l.beforeMLP, l.afterMLP} {
			add(n, 0)
		}
		add(l.attention.qNorm, l.attention.heads)
		add(l.attention.kNorm, l.attention.keyHeads)
	}
	add(&s.finalNorm, 0)
	require.Len(t, got, len(g.Norms))
	for module, v := range g.Norms {
		var kind string
		want := norm{module: module}
		tuple(t, v, &kind, &want.eps, &want.width, &want.bias)
		want.kind = kinds[kind]
		require.Equal(t, want, got[module])
	}
}

// orderOf lists the norms of a layer and the last matrix of each branch as they are used.
func orderOf(l *layer) []string {
	var list []string
	norm := func(n *norm, heads int) {
		switch {
		case n == nil:
		case n.perHead:
			for h := range heads {
				list = append(list, n.module+".norms."+strconv.Itoa(h))
			}
		default:
			list = append(list, n.module)
		}
	}
	norm(l.beforeAttention, 0)
	norm(l.attention.qNorm, l.attention.heads)
	norm(l.attention.kNorm, l.attention.keyHeads)
	list = append(list, l.attention.out.module)
	norm(l.afterAttention, 0)
	norm(l.beforeMLP, 0)
	if l.experts != nil {
		list = append(list, strings.TrimSuffix(l.experts.down, ".down_proj"))
	} else {
		list = append(list, l.mlp.down.module)
	}
	norm(l.afterMLP, 0)
	return list
}

func sameLayers(t *testing.T, g golden, s *spec) {
	// The functions at 1 are far apart, the two of gelu by 1.5e-4.
	acts := map[activation]float64{silu: 0.7310586, geluTanh: 0.8411920, geluErf: 0.8413447, relu: 1}
	require.Len(t, s.layers, len(g.Layers))
	for i, want := range g.Layers {
		l := &s.layers[i]
		a := l.attention
		assert.Equal(t, want.Window, a.window, "layer %d", i)
		assert.InEpsilon(t, want.Scale, float64(a.scale), 1e-7)
		assert.Equal(t, want.SoftCap, float64(a.softCap))
		assert.Equal(t, [3]int{want.Heads, want.KeyHeads, want.HeadDim}, [3]int{a.heads, a.keyHeads, a.headDim})
		assert.InEpsilon(t, g.Residual, float64(l.residual), 1e-7)
		if want.Turned.Kind() == 'n' {
			assert.Nil(t, a.rotary, "layer %d", i)
		} else if assert.NotNil(t, a.rotary, "layer %d", i) {
			var dim int
			var interleaved bool
			tuple(t, want.Turned, &dim, &interleaved)
			assert.Equal(t, dim, a.rotary.dim)
			assert.Equal(t, interleaved, a.rotary.interleaved)
		}
		expert, sparse := g.Experts[strconv.Itoa(i)]
		if !sparse {
			require.Nil(t, l.experts)
			assert.InDelta(t, g.Activation, acts[l.mlp.act], 1e-6)
			continue
		}
		require.Nil(t, l.mlp)
		var count, topK int
		var normalise bool
		tuple(t, expert, &count, &topK, &normalise)
		assert.Equal(t, [2]int{count, topK}, [2]int{l.experts.count, l.experts.topK})
		assert.Equal(t, normalise, l.experts.normalise)
		assert.InDelta(t, g.Activation, acts[l.experts.act], 1e-6)
	}
}

// What torch computes is at most two units in the last place from the nearest float32.
func TestRopeAsTransformers(t *testing.T) {
	const near = 2.4e-7
	for _, g := range goldens(t) {
		if g.Refused != "" {
			continue
		}
		t.Run(g.Name, func(t *testing.T) {
			s, err := specOf(t, string(g.Config))
			require.NoError(t, err)
			for kind, rows := range g.Frequencies {
				r := rotaryOf(s, kind)
				if r == nil {
					continue
				}
				for _, row := range rows {
					var positions int
					var want []float64
					var factor float64
					tuple(t, row, &positions, &want, &factor)
					got, by := r.frequencies(positions)
					require.Len(t, got, len(want))
					assert.InEpsilon(t, factor, by, 1e-7)
					for i := range want {
						assert.InEpsilon(t, want[i], got[i], near, "%s, %d positions, frequency %d", kind, positions, i)
					}
				}
			}
		})
	}
}

// rotaryOf is that of layers which slide, of those which do not, or of any.
func rotaryOf(s *spec, kind string) *rotary {
	for i := range s.layers {
		a := s.layers[i].attention
		if a.rotary != nil && (kind == "" || (kind == slidingAttention) == (a.window > 0)) {
			return a.rotary
		}
	}
	return nil
}

func TestSpecRefuses(t *testing.T) {
	const llama = `"architectures":["LlamaForCausalLM"],"model_type":"llama",`
	const gemma3 = `"architectures":["Gemma3ForCausalLM"],"model_type":"gemma3_text",`
	for config, want := range map[string]string{
		llama + `"hidden_size":"a\nb"`:                                                    `config: hidden_size is "a\nb", expected a whole number from 1 to 2097152`,
		llama + `"hidden_size":-1`:                                                        `config: hidden_size is -1, expected a whole number from 1 to 2097152`,
		llama + `"num_hidden_layers":1e9`:                                                 `config: num_hidden_layers is 1e9, expected a whole number from 1 to 2048`,
		llama + `"num_hidden_layers":99999`:                                               `config: num_hidden_layers is 99999, expected a whole number from 1 to 2048`,
		llama + `"num_attention_heads":0`:                                                 `config: num_attention_heads is 0, expected a whole number from 1 to 2048`,
		llama + `"num_key_value_heads":5`:                                                 `config: num_attention_heads 32 is no multiple of num_key_value_heads 5`,
		llama + `"num_attention_heads":3`:                                                 `config: hidden_size 4096 is no multiple of num_attention_heads 3`,
		llama + `"rms_norm_eps":0`:                                                        `config: rms_norm_eps is 0, expected a number above 0`,
		llama + `"rms_norm_eps":1e400`:                                                    `config: rms_norm_eps is 1e400, expected a number above 0`,
		llama + `"attention_bias":1`:                                                      `config: attention_bias is 1, expected true or false`,
		llama + `"hidden_act":"mish"`:                                                     `config: hidden_act is "mish", supported are gelu, gelu_accurate, gelu_fast, gelu_new, gelu_python, gelu_python_tanh, gelu_pytorch_tanh, relu, silu, swish`,
		llama + `"hidden_act":null`:                                                       `config: hidden_act is null, expected a string`,
		llama + `"pad_token_id":32000`:                                                    `config: pad_token_id is 32000, which is no row of 32000`,
		llama + `"per_layer_config":{"1":{}}`:                                             `config: per_layer_config is {"1":{}}: layers that differ are not supported`,
		llama + `"rope_scaling":{"type":"x"}`:                                             `config: rope_scaling.rope_type is "x", supported are default, dynamic, linear, llama3, longrope, yarn`,
		llama + `"rope_scaling":3`:                                                        `config: rope_scaling is 3, expected an object`,
		llama + `"rope_scaling":{"type":8}`:                                               `config: rope_scaling.type is 8, expected a string`,
		llama + `"rope_theta":1`:                                                          `config: rope_theta is 1, expected a number above 1`,
		llama + `"rope_scaling":{"type":"` + strings.Repeat("x", 5000) + `"}`:             `config: rope_scaling.rope_type is "` + strings.Repeat("x", 40) + `…", supported are default, dynamic, linear, llama3, longrope, yarn`,
		llama + `"rope_theta":null`:                                                       `config: rope_theta is null, expected a number above 0`,
		llama + `"head_dim":15`:                                                           `config: 15 of the 15 features of a head are rotated, expected an even number`,
		llama + `"head_dim":2,"rope_scaling":{"type":"dynamic","factor":2}`:               `config: rope_type dynamic needs more than 2 rotated features a head`,
		llama + `"rope_scaling":{"type":"linear","factor":"2"}`:                           `config: rope_scaling.factor is "2", expected a number above 0`,
		llama + `"rope_scaling":{"type":"linear","factor":2,"partial_rotary_factor":0.5}`: `config: partial_rotary_factor is 0.5, expected 1: the architecture rotates whole heads`,
		llama + `"rope_scaling":{"type":"llama3","factor":8}`:                             `config: rope_scaling.low_freq_factor is missing, which this rope_type needs`,
		llama + `"rope_scaling":{"type":"llama3","factor":8,"low_freq_factor":4,"high_freq_factor":4}`: `config: rope_scaling.high_freq_factor is 4, expected more than low_freq_factor, 4`,
		llama + `"rope_scaling":{"type":"longrope","long_factor":[1]}`:                                 `config: rope_scaling.short_factor has 0 numbers, expected 64, half of the rotated features`,
		llama + `"head_dim":2,"rope_scaling":{"type":"longrope","long_factor":[1],"short_factor":[0]}`: `config: rope_scaling.short_factor has 0 at 0, expected numbers above 0`,
		llama + `"rope_parameters":{"full_attention":{"rope_theta":7}}`:                                `config: rope_parameters.full_attention: this architecture has one set of frequencies for all layers`,
		`"architectures":["PhiForCausalLM"],"model_type":"phi","partial_rotary_factor":1.5`:            `config: partial_rotary_factor is 1.5, expected at most 1`,
		gemma3 + `"layer_types":["full_attention"]`:                                                    `config: layer_types has 1, expected one for each of 26 layers`,
		gemma3 + `"layer_types":5`:                              `config: layer_types is 5, expected a list of strings`,
		gemma3 + `"num_hidden_layers":1,"layer_types":["conv"]`: `config: layer_types has "conv" for layer 0, supported are full_attention, sliding_attention`,
		gemma3 + `"sliding_window":null`:                        `config: layer_types has "sliding_attention" for layer 0, but there is no sliding_window`,
		gemma3 + `"use_bidirectional_attention":true`:           `config: use_bidirectional_attention is true: only causal attention is supported`,
		`"architectures":["Gemma3ForConditionalGeneration"],"model_type":"gemma3","text_config":{"hidden_size":0}`:                                                         `config: text_config.hidden_size is 0, expected a whole number from 1 to 2097152`,
		`"architectures":["MixtralForCausalLM"],"model_type":"mixtral","num_experts_per_tok":9`:                                                                            `config: num_experts_per_tok is 9 of 8 experts`,
		`"architectures":["StableLmForCausalLM"],"model_type":"stablelm","qk_layernorm":true,"num_attention_heads":320,"num_key_value_heads":320,"num_hidden_layers":2000`: `config: qk_layernorm asks for 1280000 norms of heads, at most 262144 are read`,
		`"architectures":["SmolLM3ForCausalLM"],"model_type":"smollm3","no_rope_layers":[1,0]`:                                                                             `config: no_rope_layers has 2 numbers, expected one for each of 36 layers`,
		llama + `"is_causal":false`: `config: is_causal is false: only causal attention is supported`,
		`"architectures":["GPT2LMHeadModel"],"model_type":"gpt2","is_causal":null`:           `config: is_causal is null, expected true or false`,
		`"architectures":["GPT2LMHeadModel"],"model_type":"gpt2","add_cross_attention":true`: `config: add_cross_attention is true: attention to an encoder is not supported`,
		llama + `"hidden_size":2097152,"intermediate_size":2097152,"num_hidden_layers":2048`: `config: describes 6.31e+16 parameters, at most 1.13e+15 are read`,
	} {
		_, err := specOf(t, "{"+config+"}")
		assert.EqualError(t, err, want)
	}
}

func TestSpecOfUnknownArchitecture(t *testing.T) {
	_, err := specOf(t, `{"architectures":["BertModel"],"model_type":"bert"}`)
	require.ErrorIs(t, err, ErrArchitecture)
	assert.ErrorContains(t, err, `config: "BertModel" of model type "bert": no training step for this architecture; there is one for Cohere2ForCausalLM, GPT2LMHeadModel, `)
	_, names, _ := strings.Cut(err.Error(), "there is one for ")
	assert.True(t, slices.IsSorted(strings.Split(names, ", ")))
}

func FuzzSpec(f *testing.F) {
	for _, g := range goldens(f) {
		if len(g.Config) < 1000 {
			f.Add([]byte(g.Config))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := models.ParseConfig(b)
		if err != nil {
			return
		}
		s, err := readSpec(c)
		if err != nil {
			assert.NotContains(t, err.Error(), "\n")
			assert.Less(t, len(err.Error()), 1000)
			return
		}
		require.NotEmpty(t, s.layers)
		for _, p := range s.parameters() {
			for _, d := range p.shape {
				require.Positive(t, d, p.name)
			}
		}
		for _, l := range s.layers {
			a := l.attention
			require.Zero(t, a.heads%a.keyHeads)
			require.Positive(t, a.scale)
			if a.rotary == nil {
				continue
			}
			for _, positions := range []int{1, 1 << 20} {
				angles, factor := a.rotary.frequencies(positions)
				require.Len(t, angles, a.rotary.dim/2)
				require.False(t, math.IsNaN(factor) || math.IsInf(factor, 0))
				for _, x := range angles {
					require.False(t, math.IsNaN(x), "%v", angles)
				}
			}
			break
		}
	})
}
