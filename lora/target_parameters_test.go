package lora

import (
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

func TestStackWays(t *testing.T) {
	t.Parallel()
	either := asStored | transposed
	for _, x := range []struct {
		version             string
		plain, set, unknown orientation // of a module without and with is_transposed, and of one that is not known
	}{
		{"0.17.1", transposed, transposed, transposed},
		{"0.18.0", transposed, transposed, transposed},
		{"0.18.1.dev0@5e8a", transposed, either, either}, // of the main branch between 0.18.0 and 0.19.0
		{"0.19.0", transposed, asStored, either},
		{"0.19.1.dev0", either, either, either},
		{"0.19.1", asStored, transposed, either},
		{"0.21.2", asStored, transposed, either},
		{"0.21.3.dev0@5e8a", asStored, transposed, either},
		{"1.0", asStored, transposed, either},
		{"", either, transposed, either}, // before 0.18, or by another program
		{"main", either, either, either},
		{"0", either, either, either},
	} {
		require.Equal(t, x.plain, stackOrientations(x.version, false, true), x.version)
		require.Equal(t, x.set, stackOrientations(x.version, true, true), x.version)
		require.Equal(t, x.unknown, stackOrientations(x.version, false, false), x.version)
	}
}

// nested are the factors of parameters of a module, two shapes each, the innermost first.
func nested(module string, shapes ...tensor.Shape) map[string]tensor.Shape {
	list := map[string]tensor.Shape{}
	for i := len(shapes) - 2; i >= 0; i -= 2 {
		list[module+".lora_A.weight"], list[module+".lora_B.weight"] = shapes[i], shapes[i+1]
		module += ".base_layer"
	}
	return list
}

// TestNests binds adapters of parameters whose shapes do not tell what they are for.
func TestNests(t *testing.T) {
	t.Parallel()
	type (
		base  map[string]tensor.Shape
		shape = tensor.Shape
	)
	const (
		nemotron, qwen, gptOss, unknownFields = "NemotronHForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "Unheard"
		block, ofQwen, ofUnheard              = "model.layers.0.mixer.experts", "model.layers.0.mlp.experts",
			"layers.0.moe.experts"
		both         = `"target_parameters": ["up_proj", "down_proj"]`
		fused        = `"target_parameters": ["gate_up_proj", "down_proj"]`
		alone        = `"target_parameters": ["up_proj"]`
		third        = `"target_parameters": ["up_proj", "third"]`
		older, newer = `, "peft_version": "0.18.1"`, `, "peft_version": "0.21.2"`
	)
	transposes := base{"up_proj": {2, 3, 5}, "down_proj": {2, 5, 3}}
	squares := base{"up_proj": {2, 4, 4}, "down_proj": {2, 4, 4}}
	nameless := base{"up_proj": {2, 3, 5}, "third": {2, 5, 3}}
	downUp := []string{"down_proj", "up_proj"}
	for name, x := range map[string]struct {
		class, module, config string
		base                  base
		adapter               []shape  // of lora_A and lora_B, the innermost first
		params                []string // what they are for, the outermost first
		says                  string
	}{
		"stacks that are each other's transposes": {
			nemotron, block, both + newer, transposes, []shape{{4, 5}, {3, 4}, {4, 3}, {5, 4}}, downUp, "",
		},
		"as PEFT 0.18 has them": {
			nemotron, block, both + older, transposes, []shape{{4, 3}, {5, 4}, {4, 5}, {3, 4}}, downUp, "",
		},
		"one way and the other": {
			nemotron, block, both + newer, transposes, []shape{{4, 5}, {3, 4}, {4, 5}, {3, 4}}, nil,
			"fit its parameter in one way, and 4 x 5 and 3 x 4 theirs in the other",
		},
		"that do not fit in their order": {
			qwen, ofQwen, fused, base{"gate_up_proj": {2, 6, 4}, "down_proj": {2, 4, 3}},
			[]shape{{4, 3}, {4, 4}, {4, 4}, {6, 4}}, nil,
			`are for "model.layers.0.mlp.experts.gate_up_proj" by the order in which the model has its parameters, and do not`,
		},
		"squares of no version": {
			nemotron, block, both, squares, []shape{{4, 4}, {4, 4}, {4, 4}, {4, 4}}, nil,
			"fit its square matrices both ways round, and adapter_config.json has no peft_version, which does not tell",
		},
		"squares of a version between": {
			nemotron, block, both + `, "peft_version": "0.19.1.dev0"`, squares, []shape{{4, 4}, {4, 4}, {4, 4}, {4, 4}}, nil,
			`has the peft_version "0.19.1.dev0", which does not tell`,
		},
		"a square beside what is none": {
			gptOss, ofQwen, fused, base{"gate_up_proj": {2, 4, 8}, "down_proj": {2, 4, 4}},
			[]shape{{4, 8}, {4, 4}, {4, 4}, {4, 4}}, []string{"down_proj", "gate_up_proj"}, "",
		},
		"fewer than are meant": {
			nemotron, block, both, transposes, []shape{{4, 5}, {3, 4}}, nil,
			"target_parameters means 2 of its parameters (down_proj, 2 of [5, 3]; up_proj, 2 of [3, 5]), " +
				"and the file has lora_A and lora_B of 1",
		},
		"of a model that is not known, by what all have": {
			unknownFields, ofUnheard, both + newer, transposes, []shape{{4, 5}, {3, 4}, {4, 3}, {5, 4}}, downUp, "",
		},
		"of names that none has, that fit in one order": {
			unknownFields, ofUnheard, third, base{"up_proj": {2, 3, 5}, "third": {2, 7, 3}},
			[]shape{{4, 3}, {7, 4}, {4, 5}, {3, 4}},
			[]string{"up_proj", "third"}, "",
		},
		"of names that none has, that fit in two": {
			unknownFields, ofUnheard, third, nameless, []shape{{4, 5}, {3, 4}, {4, 5}, {3, 4}}, nil,
			"fit third, 2 of [5, 3] as well as up_proj, 2 of [3, 5], and the order of the parameters",
		},
		"of names that none has, that fit in none": {
			unknownFields, ofUnheard, third, nameless, []shape{{4, 5}, {3, 4}, {4, 9}, {3, 4}}, nil,
			"and those around them, fit its parameters in no order",
		},
		"a square of a model that is not known": {
			unknownFields, ofUnheard, alone + newer, base{"up_proj": {2, 4, 4}}, []shape{{4, 4}, {4, 4}}, nil, "both ways round",
		},
		"of another rank than the config's": {
			nemotron, block, alone, transposes, []shape{{6, 5}, {3, 6}}, nil,
			"has rank 3 in its tensors and 2 by adapter_config.json",
		},
		"of no whole number of experts": {
			nemotron, block, alone, base{"up_proj": {3, 3, 5}}, []shape{{4, 5}, {3, 4}}, nil, "do not fit it",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, a, err := boundNest(t, x.class, x.module, x.base, x.config, nested(x.module, x.adapter...))
			if x.says != "" {
				require.ErrorContains(t, err, x.says)
				require.NotContains(t, err.Error(), "\n")
				return
			}
			require.NoError(t, err)
			require.NotNil(t, b)
			for _, m := range a.Modules {
				require.Equal(t, x.params[m.WrapDepth], m.Param)
			}
		})
	}
	// In another wrapper, and one that lies too deep.
	within := map[string]tensor.Shape{"up_proj": {2, 3, 5}, "down_proj": {2, 5, 3}}
	adapter := nested(block, shape{4, 5}, shape{3, 4}, shape{4, 3}, shape{5, 4})
	_, a, err := boundNest(t, nemotron, "model.language_model.layers.0.mixer.experts", within, both+newer, adapter)
	require.NoError(t, err)
	require.Equal(t, "up_proj", a.Modules[0].Param)
	_, _, err = boundNest(t, nemotron, block, within, alone, nested(block+".base_layer", shape{4, 5}, shape{3, 4}))
	require.ErrorContains(t, err, "it lies below 1 base_layer, and not all")
}

// boundNest binds an adapter to the parameters of one module.
func boundNest(t *testing.T, class, module string, base map[string]tensor.Shape, config string,
	adapter map[string]tensor.Shape) (*Binding, *Adapter, error) {
	t.Helper()
	c, err := models.ParseConfig([]byte(`{"architectures": ["` + class + `"]}`))
	require.NoError(t, err)
	model, _ := models.Load(c)
	var targets []Target
	for _, name := range slices.Sorted(maps.Keys(base)) {
		full := module + "." + name
		targets = append(targets, Target{Name: full, Shape: base[name], Role: model.Tensor(full, base[name])})
	}
	a := peftAdapter(t, []byte(`{"peft_type": "LORA", "r": 2, `+config+`}`), peftPrefix, adapter)
	b, err := Bind([]Weighted{{a, 1}}, targets, model)
	return b, a, err
}

// TestPatternOfStack: PEFT matches its patterns with the whole name of a parameter, so that one for the module does not
// mean a stack that is called weight.
func TestPatternOfStack(t *testing.T) {
	t.Parallel()
	const module = "model.layers.0.mlp.output_linear"
	config := `"lora_alpha": 6, "target_parameters": ["output_linear.weight"], "alpha_pattern": `
	for pattern, scaling := range map[string]float64{`{"output_linear": 8}`: 3, `{"output_linear.weight": 8}`: 4} {
		_, a, err := boundNest(t, "JetMoeForCausalLM", module, map[string]tensor.Shape{"weight": {3, 5, 4}}, config+pattern,
			nested(module, tensor.Shape{6, 4}, tensor.Shape{5, 6}))
		require.NoError(t, err)
		require.InDelta(t, scaling, a.Modules[0].Scaling, 0, pattern)
	}
}

// TestSides binds squares: what a module and its matrix are says which way round its factors are.
func TestSides(t *testing.T) {
	t.Parallel()
	gpt2, llama := `{"architectures": ["GPT2LMHeadModel"]}`, `{"architectures": ["LlamaForCausalLM"]}`
	const conv, word, query = "transformer.h.0.attn.c_proj", "model.embed_tokens", "model.layers.0.self_attn.q_proj"
	const fanInFanOut = `, "fan_in_fan_out": true`
	const parameters = `, "target_parameters": ["embed_tokens.weight", "c_proj.weight"]`
	pair, embedding := []string{".lora_A", ".lora_B"}, []string{".lora_embedding_A", ".lora_embedding_B"}
	peft, kohya := []string{".lora_A.weight", ".lora_B.weight"}, []string{".lora_down.weight", ".lora_up.weight"}
	for name, x := range map[string]struct {
		model, dialect, config, module string
		ends                           []string
		rows                           bool // A and B are for a matrix (out, in) as it lies
		says                           string
	}{
		"a Conv1D":                            {gpt2, PEFT, "", conv, peft, false, ""},
		"a Conv1D as a parameter":             {gpt2, PEFT, parameters, conv, peft, true, ""},
		"a Conv1D of loralib":                 {gpt2, LoRALib, "", conv, pair, false, ""},
		"a linear layer":                      {llama, PEFT, `, "fan_in_fan_out": true`, query, peft, true, ""},
		"an embedding":                        {llama, PEFT, "", word, embedding, false, ""},
		"an embedding as a parameter":         {llama, PEFT, parameters, word, peft, true, ""},
		"an embedding of loralib":             {llama, LoRALib, "", word, pair, false, ""},
		"a layer of a model that is unknown":  {`{}`, PEFT, "", "block.0.fc", peft, true, ""},
		"one of fan_in_fan_out":               {`{}`, PEFT, fanInFanOut, "block.0.fc", peft, false, "both ways round"},
		"a layer that is called an embedding": {`{}`, PEFT, "", "time_embedding.linear_2", peft, true, ""},
		"one of kohya":                        {`{}`, Kohya, "", "time_embedding.linear_2", kohya, true, ""},
		"an embedding of kohya":               {llama, Kohya, "", word, kohya, false, "both ways round"},
		"what may be an embedding":            {`{}`, LoRALib, "", "block.0.unit_embed", pair, false, "both ways round"},
		"a Conv1D of a model that is unknown": {`{}`, LoRALib, "", "h.0.attn.c_proj", pair, false, "both ways round"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := models.ParseConfig([]byte(x.model))
			require.NoError(t, err)
			model, _ := models.Load(c)
			shape := tensor.Shape{4, 4}
			shapes := map[string]tensor.Shape{x.module + x.ends[0]: {2, 4}, x.module + x.ends[1]: {4, 2}}
			var a *Adapter
			switch x.dialect {
			case PEFT:
				a = peftAdapter(t, []byte(`{"peft_type": "LORA", "r": 2`+x.config+`}`), peftPrefix, shapes)
			case Kohya:
				a = &Adapter{Dialect: Kohya}
				require.NoError(t, a.readOneFile(wholeNumbers(shapes, ""), nil))
			case LoRALib:
				a = &Adapter{Dialect: LoRALib}
				require.NoError(t, a.readLoRALib(wholeNumbers(shapes, ""), 4))
			}
			target := Target{Name: x.module + ".weight", Shape: shape, Role: model.Tensor(x.module+".weight", shape)}
			b, err := Bind([]Weighted{{a, 1}}, []Target{target}, model)
			if x.says != "" {
				require.ErrorContains(t, err, x.says)
				return
			}
			require.NoError(t, err)
			require.Equal(t, x.rows, b.Changes[0].Updates[0].Left.T == a.Modules[0].B.T)
		})
	}
}

// TestOthersSide refuses factors that fit a matrix the other way round alone, where it is known which way it lies.
func TestOthersSide(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]struct {
		model, module string
		shape         tensor.Shape
	}{
		"a linear layer": {`{"architectures": ["LlamaForCausalLM"]}`, "model.layers.0.self_attn.q_proj", tensor.Shape{4, 6}},
		"a Conv1D":       {`{"architectures": ["GPT2LMHeadModel"]}`, "transformer.h.0.attn.c_attn", tensor.Shape{6, 4}},
	} { // both have six inputs
		c, err := models.ParseConfig([]byte(x.model))
		require.NoError(t, err)
		model, _ := models.Load(c)
		target := Target{Name: x.module + ".weight", Shape: x.shape, Role: model.Tensor(x.module+".weight", x.shape)}
		for in, fits := range map[int64]bool{4: false, 6: true} {
			a := peftAdapter(t, []byte(plainConfig), peftPrefix, nested(x.module, tensor.Shape{2, in}, tensor.Shape{10 - in, 2}))
			_, err := Bind([]Weighted{{a, 1}}, []Target{target}, model)
			if fits {
				require.NoError(t, err, name)
			} else {
				require.ErrorContains(t, err, "do not fit", name)
			}
		}
	}
}

// TestSeveralEndLike refuses a module that may be one of several by its name: their sizes do not say which is meant.
func TestSeveralEndLike(t *testing.T) {
	t.Parallel()
	model, _ := models.Load(nil)
	var targets []Target
	add := func(name string, shape tensor.Shape) {
		targets = append(targets, Target{Name: name, Shape: shape, Role: model.Tensor(name, shape)})
	}
	add("vision.layers.0.fc.weight", tensor.Shape{4, 4})
	add("text.layers.0.fc.weight", tensor.Shape{6, 6})
	factors := []tensor.Shape{{2, 4}, {4, 2}}
	a := peftAdapter(t, []byte(plainConfig), peftPrefix, nested("other.layers.0.fc", factors...))
	_, err := Bind([]Weighted{{a, 1}}, targets, model)
	require.ErrorContains(t, err, "it may be any of 2 modules")
	add("model.language_model.layers.0.fc.weight", tensor.Shape{4, 4})
	a = peftAdapter(t, []byte(plainConfig), peftPrefix, nested("model.layers.0.fc", factors...))
	b, err := Bind([]Weighted{{a, 1}}, targets, model) // which is what another class calls it
	require.NoError(t, err)
	require.NotNil(t, b.Changes[2])
}

// TestTie gives a head the factors of the embedding that it is tied to, and not those of positions of the same size.
func TestTie(t *testing.T) {
	t.Parallel()
	module := func(name string, form Form) *Module {
		shapes := wholeNumbers(map[string]tensor.Shape{name + ".A": {2, 6}, name + ".B": {4, 2}}, "")
		if form == Linear {
			shapes = wholeNumbers(map[string]tensor.Shape{name + ".A": {2, 4}, name + ".B": {6, 2}}, "")
		}
		A, B := matrixOf(&shapes[0]), matrixOf(&shapes[1])
		return &Module{Name: name, Param: "weight", Form: form, A: A, B: B, Rank: 2, Scaling: 1}
	}
	head, word := module("lm_head", Linear), module("model.embed_tokens", Embedding)
	positions := module("model.embed_positions", Embedding)
	New("", Settings{EnsureTie: true}, []*Module{word, positions, head})
	require.Equal(t, word.B.T, head.A.T)
	head, word = module("lm_head", Linear), module("transformer.wte", Embedding)
	New("", Settings{EnsureTie: true}, []*Module{head, word})
	require.Equal(t, word.B.T, head.A.T)
	head = module("lm_head", Linear)
	own := head.A.T
	New("", Settings{EnsureTie: true}, []*Module{head, word, module("transformer.wpe", Embedding)})
	require.Equal(t, own, head.A.T)
}
