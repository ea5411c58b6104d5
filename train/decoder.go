package train

import (
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// The types of layers in layer_types.
const (
	fullAttention    = "full_attention"
	slidingAttention = "sliding_attention"
)

// defaults are what an architecture has where its config is silent.
type defaults struct {
	vocab, hidden, layers, heads int
	width                        int // between the matrices of an MLP
	keyHeads                     int // 0: as many as heads
	headDim                      int // 0: hidden / heads
	activation, activationName   string
	norm                         norm // of the hidden state: kind, eps, bias
	pad                          int  // or -1
	rope                         ropeDefaults
}

// decoder reads what most models have in common, and makes the layers of Llama of it: a norm before attention and one
// before a gated MLP, no biases, q and k rotated in full unless the defaults of rope have no theta. Where the config
// cannot be read there are no layers.
func (f *fields) decoder(d defaults) *spec {
	if f.prefix == "" {
		f.prefix = "model"
	}
	if d.activationName == "" {
		d.activationName = "hidden_act"
	}
	f.causal()
	eps := "rms_norm_eps"
	if d.norm.kind == layerNorm {
		eps = "layer_norm_eps"
	}
	hidden := f.count("hidden_size", d.hidden, 1, mostFeatures)
	width := f.count("intermediate_size", d.width, 1, mostFeatures)
	layers := f.count("num_hidden_layers", d.layers, 1, mostLayers)
	act := f.activation(d.activationName, d.activation)
	heads, keyHeads, headDim := f.heads(d, hidden)
	s := &spec{
		vocab: f.count("vocab_size", d.vocab, 1, mostRows), hidden: hidden,
		embedding: f.prefix + ".embed_tokens", embedScale: 1, logitScale: 1,
		finalNorm: norm{module: f.prefix + ".norm", kind: d.norm.kind, width: hidden, bias: d.norm.bias},
	}
	s.finalNorm.eps = f.number(eps, d.norm.eps)
	s.padToken = f.padToken(s.vocab, d.pad)
	s.head = linear{module: "lm_head", in: hidden, out: s.vocab}
	var turned *rotary
	if d.rope.theta != 0 {
		turned = f.rope(headDim, d.rope)
	}
	if *f.err != nil {
		return s
	}
	matrix := func(module string, in, out int) *linear { return &linear{module: module, in: in, out: out} }
	for i := range layers {
		name := f.prefix + ".layers." + strconv.Itoa(i)
		s.layers = append(s.layers, layer{
			name: name, residual: 1,
			beforeAttention: s.norm(name + ".input_layernorm"), beforeMLP: s.norm(name + ".post_attention_layernorm"),
			attention: attention{
				heads: heads, keyHeads: keyHeads, headDim: headDim, rotary: turned,
				scale: float32(math.Pow(float64(headDim), -0.5)),
				q:     matrix(name+".self_attn.q_proj", hidden, heads*headDim),
				k:     matrix(name+".self_attn.k_proj", hidden, keyHeads*headDim),
				v:     matrix(name+".self_attn.v_proj", hidden, keyHeads*headDim),
				out:   *matrix(name+".self_attn.o_proj", heads*headDim, hidden),
			},
			mlp: &mlp{
				act:  act,
				gate: matrix(name+".mlp.gate_proj", hidden, width),
				up:   matrix(name+".mlp.up_proj", hidden, width),
				down: *matrix(name+".mlp.down_proj", width, hidden),
			},
		})
	}
	return s
}

// causal refuses a model whose tokens see those after them, which any config can say (create_causal_mask in
// transformers).
func (f *fields) causal() {
	if !f.flag("is_causal", true) {
		f.fail("%sis_causal is false: only causal attention is supported", f.path)
	}
}

// heads reads how attention is divided.
func (f *fields) heads(d defaults, hidden int) (heads, keyHeads, headDim int) {
	heads = f.count("num_attention_heads", d.heads, 1, mostHeads)
	if keyHeads = f.countOrNone("num_key_value_heads", d.keyHeads, mostHeads); keyHeads == 0 {
		keyHeads = heads
	}
	if headDim = f.countOrNone("head_dim", d.headDim, mostHeadDim); headDim == 0 {
		if hidden%heads != 0 {
			f.fail("%shidden_size %d is no multiple of num_attention_heads %d", f.path, hidden, heads)
		}
		headDim = max(hidden/heads, 1)
	}
	if heads%keyHeads != 0 {
		f.fail("%snum_attention_heads %d is no multiple of num_key_value_heads %d", f.path, heads, keyHeads)
	}
	return heads, keyHeads, headDim
}

// padToken reads the row of the embedding that is for padding (torch's padding_idx), which may be counted from the end.
func (f *fields) padToken(vocab, missing int) int {
	v, full, ok := f.get("pad_token_id")
	if ok && v.Kind() == 'n' || !ok && missing < 0 {
		return -1
	}
	pad := f.count("pad_token_id", missing, -mostRows, mostRows)
	if pad < -vocab || pad >= vocab {
		f.fail("%s is %d, which is no row of %d", full, pad, vocab)
	}
	if pad < 0 {
		pad += vocab
	}
	return pad
}

// activations are the functions by the names that transformers has for them. gelu_new, gelu_fast and the rest are one
// function in exact arithmetic.
var activations = map[string]activation{
	"silu": silu, "swish": silu, "relu": relu, "gelu": geluErf, "gelu_python": geluErf,
	"gelu_new": geluTanh, "gelu_pytorch_tanh": geluTanh, "gelu_python_tanh": geluTanh, "gelu_fast": geluTanh,
	"gelu_accurate": geluTanh,
}

func (f *fields) activation(name, missing string) activation {
	word := f.word(name, missing)
	act, ok := activations[word]
	if !ok {
		known := strings.Join(slices.Sorted(maps.Keys(activations)), ", ")
		f.fail("%s%s is %q, supported are %s", f.path, name, clip(word), known)
	}
	return act
}

// layerTypes reads layer_types, or takes the layers that slide by default, and gives those the window. It returns the
// type of each layer.
func (f *fields) layerTypes(s *spec, window int, slides func(layer int) bool) []string {
	types := listOf[string](f, "layer_types", "strings")
	if types == nil {
		for i := range s.layers {
			types = append(types, fullAttention)
			if slides(i) {
				types[i] = slidingAttention
			}
		}
	}
	if len(types) != len(s.layers) && *f.err == nil {
		f.fail("%slayer_types has %d, expected one for each of %d layers", f.path, len(types), len(s.layers))
	}
	if *f.err != nil {
		return make([]string, len(s.layers))
	}
	for i, t := range types {
		switch t {
		case slidingAttention:
			if window == 0 {
				f.fail("%slayer_types has %q for layer %d, but there is no sliding_window", f.path, t, i)
			}
			s.layers[i].attention.window = window
		case fullAttention:
		case "attention": // an older name
			types[i] = fullAttention
		default:
			f.fail("%slayer_types has %q for layer %d, supported are %s, %s",
				f.path, clip(t), i, fullAttention, slidingAttention)
		}
	}
	return types
}

// ropeByType gives each layer the frequencies of its type (Gemma 3). Older configs have one base for each type, and a
// scaling that is for full attention alone.
func (f *fields) ropeByType(s *spec, types []string, d ropeDefaults) {
	sets, scaling := f.object("rope_parameters"), f.object("rope_scaling")
	if sets == nil {
		sets = &fields{path: f.path + "rope_parameters.", err: f.err}
	}
	truncate := sets.flag("truncate", true) // the class looks for it here
	turned := map[string]*rotary{}
	for _, kind := range []struct {
		name, base string
		theta      float64
	}{{fullAttention, "rope_theta", 1e6}, {slidingAttention, "rope_local_base_freq", 1e4}} {
		if !slices.Contains(types, kind.name) {
			continue
		}
		p := sets.object(kind.name)
		if p == nil {
			p = &fields{path: sets.path + kind.name + ".", err: f.err}
		}
		if kind.name == fullAttention && scaling != nil {
			p = p.with(scaling)
		}
		turned[kind.name] = p.rotary(f, s.layers[0].attention.headDim, d, truncate, f.number(kind.base, kind.theta))
	}
	for i := range s.layers {
		s.layers[i].attention.rotary = turned[types[i]]
	}
}

// bias sets which linears have biases.
func (s *spec) bias(qkv, out, mlp bool) {
	for i := range s.layers {
		l := &s.layers[i]
		l.attention.q.bias, l.attention.k.bias, l.attention.v.bias, l.attention.out.bias = qkv, qkv, qkv, out
		l.mlp.gate.bias, l.mlp.up.bias, l.mlp.down.bias = mlp, mlp, mlp
	}
}

// window limits the attention of all layers.
func (s *spec) window(window int) {
	for i := range s.layers {
		s.layers[i].attention.window = window
	}
}

// norm is a norm of the hidden state, of the kind of the last.
func (s *spec) norm(module string) *norm {
	n := s.finalNorm
	n.module = module
	return &n
}

// normHeads adds norms of q and k, over the features of a head.
func (s *spec) normHeads(q, k string, n norm) {
	for i := range s.layers {
		l := &s.layers[i]
		n.width = l.attention.headDim
		qNorm, kNorm := n, n
		qNorm.module, kNorm.module = l.name+".self_attn."+q, l.name+".self_attn."+k
		l.attention.qNorm, l.attention.kNorm = &qNorm, &kNorm
	}
}

// parallel has both branches read one norm.
func (s *spec) parallel() {
	for i := range s.layers {
		s.layers[i].parallel, s.layers[i].beforeMLP = true, nil
	}
}

// experts reads how many experts there are, and how many of them a token takes.
func (f *fields) experts(name string, count, least, topK int) experts {
	e := experts{
		count: f.count(name, count, least, mostExperts),
		topK:  f.count("num_experts_per_tok", topK, 1, mostExperts),
	}
	if e.count > 0 && e.topK > e.count {
		f.fail("%snum_experts_per_tok is %d of %d experts", f.path, e.topK, e.count)
	}
	return e
}

// route puts experts of a width in the place of the MLP.
func (l *layer) route(e experts, width int) {
	e.act, e.hidden, e.width = l.mlp.act, l.mlp.up.in, width
	e.router = linear{module: l.name + ".mlp.gate", in: e.hidden, out: e.count}
	e.gateUp, e.down = l.name+".mlp.experts.gate_up_proj", l.name+".mlp.experts.down_proj"
	l.mlp, l.experts = nil, &e
}
