package lora

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// bound binds an adapter of zeros to a base.
func bound(t *testing.T, model, config string, base map[string]tensor.Shape, order []string,
	adapter map[string][]int64) (*Binding, []Target, error) {
	t.Helper()
	c, err := models.ParseConfig([]byte(model))
	require.NoError(t, err)
	m, known := models.Load(c)
	require.True(t, known)
	var targets []Target
	for _, name := range order {
		targets = append(targets, Target{Name: name, Shape: base[name], Role: m.Tensor(name, base[name])})
	}
	dir := t.TempDir()
	writeFolder(t, dir, config, adapter)
	a, err := Open(dir, OpenOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { a.Close() })
	b, err := Bind([]Weighted{{a, 1}}, targets, m)
	return b, targets, err
}

const (
	prefix     = "base_model.model."
	tiedLlama  = `{"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true}`
	tiedMarian = `{"architectures": ["MarianMTModel"]}`
	tiedT5     = `{"architectures": ["T5ForConditionalGeneration"]}`
	embed      = "model.embed_tokens"
)

// tieEnds are the factors of an embedding of n x 4 and of a head of its shape.
func tieEnds(head, embedding string, n int64) map[string][]int64 {
	shapes := map[string][]int64{}
	if head != "" {
		shapes[prefix+head+".lora_A.weight"], shapes[prefix+head+".lora_B.weight"] = []int64{2, 4}, []int64{n, 2}
	}
	if embedding != "" {
		shapes[prefix+embedding+".lora_embedding_A"], shapes[prefix+embedding+".lora_embedding_B"] = []int64{2, n},
			[]int64{4, 2}
	}
	return shapes
}

func with(shapes map[string][]int64, more map[string][]int64) map[string][]int64 {
	for name, shape := range more {
		shapes[prefix+name] = shape
	}
	return shapes
}

// TestTiedHead binds adapters of either end of a tie, of both, and of what is tied along with them, under the names
// that architectures give them.
func TestTiedHead(t *testing.T) {
	t.Parallel()
	word, bias := "bert.embeddings.word_embeddings", "cls.predictions.bias"
	llama := map[string]tensor.Shape{embed + ".weight": {6, 4}}
	bert := map[string]tensor.Shape{word + ".weight": {6, 4}, bias: {6}}
	t5 := map[string]tensor.Shape{"shared.weight": {6, 4}}
	marian := map[string]tensor.Shape{"model.shared.weight": {6, 4}}
	ends := []string{"decoder.embed_tokens.weight", "encoder.embed_tokens.weight"}
	tokens := func(modules ...string) map[string][]int64 {
		shapes := map[string][]int64{}
		for _, m := range modules {
			shapes[prefix+m+".token_adapter.trainable_tokens_delta"] = []int64{2, 4}
		}
		return shapes
	}
	plain := `{"peft_type": "LORA", "r": 2, "lora_alpha": 4`
	for name, x := range map[string]struct {
		model, config string
		base          map[string]tensor.Shape
		adapter       map[string][]int64
		head          string // that becomes a tensor of its own
		copies        []string
		headTerms     int
		says          string
	}{
		"the head": {tiedLlama, plain + `}`, llama, tieEnds("lm_head", "", 6), "lm_head.weight", nil, 1,
			""},
		"the embedding": {tiedLlama, plain + `}`, llama, tieEnds("", embed, 6), "lm_head.weight", nil, 0,
			""},
		"both, ensured": {tiedLlama, plain + `, "ensure_weight_tying": true}`, llama,
			tieEnds("lm_head", embed, 6), "", nil, 0, ""},
		"both, ensured, other scaling": {tiedLlama,
			plain + `, "ensure_weight_tying": true, "alpha_pattern": {"lm_head": 9}}`, llama, tieEnds("lm_head", embed, 6),
			"lm_head.weight", nil, 1, ""},
		"both, ensured, DoRA": {tiedLlama, plain + `, "ensure_weight_tying": true, "use_dora": true}`, llama,
			with(tieEnds("lm_head", embed, 6), map[string][]int64{"lm_head.lora_magnitude_vector": {6},
				embed + ".lora_magnitude_vector": {4}}), "lm_head.weight", nil, 1, ""},
		"an embedding that PEFT ignores": {`{"architectures": ["GPT2LMHeadModel"]}`, plain + `, "ensure_weight_tying": true}`,
			map[string]tensor.Shape{"transformer.wte.weight": {6, 4}}, tieEnds("", "transformer.wte", 6), "lm_head.weight", nil,
			0, ""},
		"rows for both": {tiedLlama, plain + `, "trainable_token_indices": [1, 5]}`, llama,
			with(tieEnds("", "", 6), map[string][]int64{embed + ".token_adapter.trainable_tokens_delta": {2, 4}}), "", nil, 0,
			""},
		"the head, and rows for both": {tiedLlama, plain + `, "trainable_token_indices": [1, 5]}`, llama,
			with(tieEnds("lm_head", "", 6), map[string][]int64{embed + ".token_adapter.trainable_tokens_delta": {2, 4}}),
			"lm_head.weight", nil, 2, ""},
		"rows of a pair that has grown": {tiedLlama, plain + `, "trainable_token_indices": {"embed_tokens": [1, 7]}}`, llama,
			with(tieEnds("", "", 6), map[string][]int64{
				embed + ".token_adapter.trainable_tokens_delta": {2, 4}, "lm_head.token_adapter.trainable_tokens_delta": {2, 4},
				embed + ".token_adapter.base_layer.weight": {8, 4}, "lm_head.token_adapter.base_layer.weight": {8, 4}}), "", nil, 0,
			""},
		"a head that has grown": {tiedLlama, plain + `}`, llama,
			with(tieEnds("lm_head", "", 8), map[string][]int64{"lm_head.base_layer.weight": {8, 4}}), "lm_head.weight", nil, 1,
			""},
		"BERT's head": {`{"architectures": ["BertForMaskedLM"]}`, plain + `}`, bert,
			tieEnds("cls.predictions.decoder", "", 6), "cls.predictions.decoder.weight",
			[]string{"cls.predictions.decoder.bias"}, 1, ""},
		"BERT's bias, which has two names": {`{"architectures": ["BertForMaskedLM"]}`, plain + `}`, bert,
			with(tieEnds("", "", 6), map[string][]int64{"cls.predictions.decoder.bias": {6}, bias: {6}}), "", nil, 0, ""},
		"T5's head": {tiedT5, plain + `}`, t5, tieEnds("lm_head", "", 6), "lm_head.weight", nil, 1,
			""},
		"T5's embedding": {tiedT5, plain + `}`, t5, tieEnds("", "shared", 6), "lm_head.weight", ends, 0,
			""},
		"T5's encoder": {tiedT5, plain + `}`, t5, tieEnds("", "encoder.embed_tokens", 6),
			"lm_head.weight", ends, 0, ""},
		"T5's rows, for all": {tiedT5, plain + `, "trainable_token_indices": [1, 5]}`, t5, tokens("shared"), "",
			nil, 0, ""},
		"T5's rows, others for the head": {tiedT5,
			plain + `, "trainable_token_indices": {"shared": [1, 5], "lm_head": [0, 2]}}`, t5, tokens("shared", "lm_head"),
			"lm_head.weight", ends, 1, ""},
		"T5's rows, others for an end": {tiedT5,
			plain + `, "trainable_token_indices": {"shared": [1, 5], "encoder.embed_tokens": [0, 2]}}`, t5,
			tokens("shared", "encoder.embed_tokens"), "lm_head.weight", ends, 0, ""},
		"Marian's rows, for all": {tiedMarian, plain + `, "trainable_token_indices": [1, 5]}`, marian,
			tokens("model.encoder.embed_tokens"), "", nil, 0, ""},
		"Marian's rows, others for the head": {tiedMarian,
			plain + `, "trainable_token_indices": {"encoder.embed_tokens": [1, 5], "lm_head": [0, 2]}}`, marian,
			tokens("model.encoder.embed_tokens", "lm_head"), "lm_head.weight",
			[]string{"model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight"}, 1, ""},
		"T5's embedding, trained whole": {tiedT5, plain + `, "modules_to_save": ["shared"]}`, t5,
			map[string][]int64{prefix + "shared.weight": {6, 4}}, "lm_head.weight", ends, 0, ""},
		"T5's embedding, as it has grown": {tiedT5, plain + `, "modules_to_save": ["shared", "lm_head"]}`, t5,
			map[string][]int64{prefix + "shared.weight": {7, 4}, prefix + "lm_head.weight": {7, 4}}, "", nil, 0, ""},
		"T5's embedding, as it was too": {tiedT5, plain + `, "modules_to_save": ["shared"]}`, t5,
			map[string][]int64{prefix + "shared.weight": {7, 4}, prefix + "shared.original_module.weight": {7, 4},
				prefix + "lm_head.weight": {7, 4}}, "lm_head.weight", ends, 0, ""},
		"grown at an end that was tied": {tiedLlama, plain + `, "modules_to_save": ["embed_tokens"]}`, llama,
			map[string][]int64{prefix + embed + ".weight": {8, 4}}, "", nil, 0,
			`"lm_head.weight" has 6 rows with the adapter and "model.embed_tokens.weight" 8`},
		"one that an expression means": {tiedLlama, plain + `, "target_modules": ".*(?<!x)_head|lm_head"}`, llama,
			tieEnds("lm_head", "", 6), "lm_head.weight", nil, 1, ""},
		"grown at one end": {`{"architectures": ["LlamaForCausalLM"]}`, plain + `}`,
			map[string]tensor.Shape{embed + ".weight": {6, 4}, "lm_head.weight": {6, 4}},
			with(tieEnds("lm_head", "", 8), map[string][]int64{"lm_head.base_layer.weight": {8, 4}}), "", nil, 0,
			`"lm_head.weight" has 8 rows with the adapter and "model.embed_tokens.weight" 6`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var order []string
			for _, n := range []string{embed + ".weight", "lm_head.weight", word + ".weight", bias, "shared.weight",
				"model.shared.weight", "transformer.wte.weight"} {
				if x.base[n] != nil {
					order = append(order, n)
				}
			}
			b, targets, err := bound(t, x.model, x.config, x.base, order, x.adapter)
			if x.says != "" {
				require.ErrorContains(t, err, x.says)
				return
			}
			require.NoError(t, err)
			require.Equal(t, x.head != "", b.Untie)
			require.Equal(t, x.head, b.HeadName)
			var copies []string
			for _, c := range b.Copies {
				copies = append(copies, c.Name)
				if c.Change != nil && c.Change.Value != nil { // the adapter says what the others had
					require.Equal(t, prefix+"shared.original_module.weight", c.Change.Value.Name)
				} else if c.Change != nil { // what is another's is not copied
					require.Equal(t, c.Name, c.Change.Updates[0].Module.Name+".weight")
				}
			}
			require.Equal(t, x.copies, copies)
			if x.head == "" {
				require.Nil(t, b.Head)
				return
			}
			require.Len(t, b.Head.Updates, x.headTerms)
			require.Equal(t, order[0], targets[b.HeadFrom].Name)
			if b.Head.Value != nil && b.Head.ValueOf.Module.Base { // and the embedding has it too
				require.Equal(t, b.Head.Value, b.Changes[b.HeadFrom].Value)
			}
		})
	}
}

// TestGrownAlone tells where the rows of a module that was trained alone go to others too.
func TestGrownAlone(t *testing.T) {
	const says = "shared was trained alone, in a vocabulary that has grown, and the adapter does not say which rows " +
		"those that share them had: "
	for _, x := range []struct {
		rows    int64
		more    map[string][]int64
		notices []string
	}{
		{7, nil, []string{says + "the trained ones go to decoder.embed_tokens and encoder.embed_tokens too"}},
		{7, map[string][]int64{"encoder.embed_tokens.weight": {7, 4}},
			[]string{says + "the trained ones go to decoder.embed_tokens too"}},
		{7, map[string][]int64{"shared.original_module.weight": {7, 4}}, []string{"no longer tied"}},
		{7, map[string][]int64{"lm_head.base_layer.weight": {7, 4}, "lm_head.lora_A.weight": {2, 4},
			"lm_head.lora_B.weight": {7, 2}}, []string{"no longer tied"}},
		{6, nil, []string{"no longer tied"}},
	} {
		adapter, save := with(map[string][]int64{"shared.weight": {x.rows, 4}, "lm_head.weight": {x.rows, 4}}, x.more),
			"lm_head"
		if x.more["lm_head.base_layer.weight"] != nil {
			delete(adapter, "lm_head.weight")
			save = "score"
		}
		config := `{"peft_type": "LORA", "r": 2, "modules_to_save": ["shared", "embed_tokens", "` + save + `"]}`
		b, _, err := bound(t, tiedT5, config, map[string]tensor.Shape{"shared.weight": {6, 4}}, []string{"shared.weight"},
			adapter)
		require.NoError(t, err)
		require.Len(t, b.Notices, len(x.notices))
		for _, c := range b.Copies {
			if v := c.Change; x.rows > 6 && v != nil && v.Value != nil { // what they had before
				require.Regexp(t, "original_module|base_layer", v.Value.Name)
				require.Equal(t, x.rows, v.Value.Shape[0])
			} else {
				require.Equal(t, int64(6), x.rows)
			}
		}
		for i, notice := range x.notices {
			require.Contains(t, b.Notices[i], notice)
		}
	}
}

// TestNewExperts replaces a stack of experts: each of the file's tensors takes its own bytes.
func TestNewExperts(t *testing.T) {
	t.Parallel()
	stack := "model.layers.0.mlp.experts."
	base := map[string]tensor.Shape{}
	var order []string
	for _, name := range []string{"0.gate_proj", "0.up_proj", "0.down_proj", "1.gate_proj", "1.up_proj", "1.down_proj"} {
		base[stack+name+".weight"] = tensor.Shape{3, 4}
		if name[2:] == "down_proj" {
			base[stack+name+".weight"] = tensor.Shape{4, 3}
		}
		order = append(order, stack+name+".weight")
	}
	b, _, err := bound(t, `{"architectures": ["Qwen3MoeForCausalLM"]}`, plainConfig, base, order,
		with(map[string][]int64{}, map[string][]int64{stack + "gate_up_proj": {2, 6, 4}, stack + "down_proj": {2, 4, 3}}))
	require.NoError(t, err)
	first := map[bool]int64{}
	for i, want := range []int64{0, 12, 0, 24, 36, 12} { // elements from the first
		v, down := b.Changes[i].Value, i%3 == 2
		if i == 0 || i == 2 {
			first[down] = v.Offset
		}
		require.Equal(t, 4*want, v.Offset-first[down], order[i])
		require.Equal(t, base[order[i]], v.Shape)
		require.EqualValues(t, 48, v.Bytes)
	}
	_, _, err = bound(t, `{"architectures": ["Qwen3MoeForCausalLM"]}`, plainConfig, base, order,
		with(map[string][]int64{}, map[string][]int64{stack + "down_proj": {3, 4, 3}}))
	require.ErrorContains(t, err, "its new value has the shape [3, 4, 3], expected [2, 4, 3]")
}

// TestTiedElsewhere: a module that has no tensor of its own, for it is tied to one that is not the embedding, is not
// another one whose name ends in the same way.
func TestTiedElsewhere(t *testing.T) {
	t.Parallel()
	const source = "luke.entity_embeddings.entity_embeddings.weight"
	base := map[string]tensor.Shape{"lm_head.decoder.weight": {6, 4}, source: {6, 4}}
	_, _, err := bound(t, `{"architectures": ["LukeForMaskedLM"]}`, plainConfig, base,
		[]string{"lm_head.decoder.weight", source},
		tieEnds("entity_predictions.decoder", "", 6))
	require.ErrorIs(t, err, ErrUnsupported)
	require.ErrorContains(t, err, "it shares the values of \""+source)
}

// TestReplacedLater: new values of what an adapter before them changes would be changed too, or not, by which way round
// the two are taken.
func TestReplacedLater(t *testing.T) {
	t.Parallel()
	const q = "model.layers.0.self_attn.q_proj"
	c, err := models.ParseConfig([]byte(`{"architectures": ["LlamaForCausalLM"]}`))
	require.NoError(t, err)
	model, _ := models.Load(c)
	shape := tensor.Shape{4, 4}
	targets := []Target{{Name: q + ".weight", Shape: shape, Role: model.Tensor(q+".weight", shape)}}
	open := func(shapes map[string][]int64) Weighted {
		dir := t.TempDir()
		writeFolder(t, dir, plainConfig, with(map[string][]int64{}, shapes))
		a, err := Open(dir, OpenOptions{})
		require.NoError(t, err)
		t.Cleanup(func() { a.Close() })
		return Weighted{a, 1}
	}
	factors := open(map[string][]int64{q + ".lora_A.weight": {2, 4}, q + ".lora_B.weight": {4, 2}})
	value := open(map[string][]int64{q + ".weight": {4, 4}})
	_, err = Bind([]Weighted{factors, value}, targets, model)
	require.ErrorIs(t, err, ErrUnsupported)
	require.ErrorContains(t, err, "its new value takes the place of what "+factors.Path+" before it changes")
	b, err := Bind([]Weighted{value, factors}, targets, model)
	require.NoError(t, err)
	require.NotNil(t, b.Changes[0].Value)
	require.Len(t, b.Changes[0].Updates, 1)
}

// TestSavedWithBiases reads the copies of a classifier that PEFT stores along with the biases of all modules, whose
// names have that of the adapter in them.
func TestSavedWithBiases(t *testing.T) {
	t.Parallel()
	const config = `{"peft_type": "LORA", "r": 2, "bias": "all", "modules_to_save": ["classifier"]}`
	base := map[string]tensor.Shape{"classifier.dense.weight": {4, 4}, "classifier.dense.bias": {4}}
	order := []string{"classifier.dense.weight", "classifier.dense.bias"}
	shapes := with(map[string][]int64{}, map[string][]int64{"classifier.dense.weight": {4, 4},
		"classifier.dense.bias": {4}, "classifier.modules_to_save.default.dense.bias": {4},
		"classifier.original_module.dense.bias": {4}})
	b, _, err := bound(t, `{"architectures": ["RobertaForSequenceClassification"]}`, config, base, order, shapes)
	require.NoError(t, err)
	require.NotNil(t, b.Changes[0].Value)
	require.NotNil(t, b.Changes[1].Value)
	shapes[prefix+"classifier.modules_to_save.default.dense.bias"] = []int64{5}
	dir := t.TempDir()
	writeFolder(t, dir, config, shapes)
	_, err = Open(dir, OpenOptions{})
	require.ErrorContains(t, err, "it differs from")
}

// TestTunedEmbedding: beside the copy of an embedding that LN tuning has trained stands the base's own, which PEFT
// stores of every embedding that is a target.
func TestTunedEmbedding(t *testing.T) {
	t.Parallel()
	const config = `{"peft_type": "LN_TUNING", "target_modules": ["embed_tokens"]}`
	base := map[string]tensor.Shape{embed + ".weight": {6, 4}}
	b, _, err := bound(t, `{"architectures": ["LlamaForCausalLM"]}`, config, base, []string{embed + ".weight"},
		with(map[string][]int64{}, map[string][]int64{embed + ".base_layer.weight": {6, 4},
			embed + ".ln_tuning_layers.weight": {6, 4}}))
	require.NoError(t, err)
	require.Equal(t, prefix+embed+".ln_tuning_layers.weight", b.Changes[0].Value.Name)
}

// FuzzBind binds adapters to bases that anyone may have written: names and shapes of both. What it finds lies within
// the tensors of both.
func FuzzBind(f *testing.F) {
	architectures := []string{"LlamaForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "GPT2LMHeadModel",
		"Phi3ForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration", "BartForConditionalGeneration",
		"Gemma3ForConditionalGeneration", "GptOssForCausalLM", "MarianMTModel", "Unheard", "NemotronHForCausalLM"}
	var loaded []*models.Model
	for _, name := range architectures {
		c, err := models.ParseConfig([]byte(`{"architectures": ["` + name + `"], "tie_word_embeddings": true}`))
		require.NoError(f, err)
		m, _ := models.Load(c)
		loaded = append(loaded, m)
	}
	for i, s := range []struct{ config, base, baseShapes, adapter, shapes string }{
		{`{"peft_type": "LORA", "r": 2}`, "model.embed_tokens.weight\nmodel.layers.0.self_attn.q_proj.weight", "54|44",
			"model.layers.0.self_attn.q_proj.lora_A.weight\nmodel.layers.0.self_attn.q_proj.lora_B.weight", "24|42"},
		{`{"peft_type": "LORA", "r": 2}`,
			"model.layers.0.block_sparse_moe.experts.0.w1.weight\nmodel.layers.0.block_sparse_moe.experts.1.w1.weight", "54|54",
			"model.layers.0.mlp.experts.0.w1.lora_A.weight\nmodel.layers.0.mlp.experts.0.w1.lora_B.weight", "24|52"},
		{`{"peft_type": "LORA", "r": 2, "target_parameters": ["experts.gate_up_proj"]}`,
			"model.layers.0.mlp.experts.0.gate_proj.weight\nmodel.layers.0.mlp.experts.0.up_proj.weight", "54|54",
			"model.layers.0.mlp.experts.lora_A.weight\nmodel.layers.0.mlp.experts.lora_B.weight", "24|:2"},
		{`{"peft_type": "LORA", "r": 2, "use_dora": true}`, "transformer.wte.weight\ntransformer.h.0.attn.c_attn.weight",
			"54|4:",
			"transformer.h.0.attn.c_attn.lora_A.weight\ntransformer.h.0.attn.c_attn.lora_B.weight\ntransformer.h.0.attn.c_attn.lora_magnitude_vector", "24|:2|:"},
		{`{"peft_type": "LORA", "r": 2}`, "model.layers.0.mlp.gate_up_proj.weight", ":4",
			"model.layers.0.mlp.gate_up_proj.lora_A.weight\nmodel.layers.0.mlp.gate_up_proj.lora_B.weight", "24|:2"},
		{`{"peft_type": "LORA", "r": 2}`, "bert.embeddings.word_embeddings.weight\ncls.predictions.bias", "54|5",
			"cls.predictions.decoder.lora_A.weight\ncls.predictions.decoder.lora_B.weight\ncls.predictions.bias", "24|52|5"},
		{`{"peft_type": "LORA", "r": 2, "trainable_token_indices": {"shared": [1], "lm_head": [2]}}`, "shared.weight", "54",
			"shared.token_adapter.trainable_tokens_delta\nlm_head.token_adapter.trainable_tokens_delta", "14|14"},
		{`{"peft_type": "LORA", "r": 2, "modules_to_save": ["shared"]}`, "model.shared.weight\nfinal_logits_bias", "54|15",
			"model.shared.weight\nmodel.encoder.embed_tokens.lora_embedding_A\nmodel.encoder.embed_tokens.lora_embedding_B",
			"74|27|42"},
		{`{"lora_parameters": {"scale": 2}, "fine_tune_type": "lora"}`,
			"model.language_model.layers.0.mlp.experts.0.gate_proj.weight", "54",
			"model.layers.0.mlp.switch_mlp.gate_proj.lora_a\nmodel.layers.0.mlp.switch_mlp.gate_proj.lora_b", "124|152"},
		{`{"peft_type": "IA3", "feedforward_modules": ["q"]}`, "q.weight\nq.bias", "54|5", "q.ia3_l", "14"},
		{`{"peft_type": "LORA", "r": 2, "trainable_token_indices": [1]}`, "model.embed_tokens.weight", "",
			"model.embed_tokens.token_adapter.trainable_tokens_delta", "14"},
		{`{"peft_type": "VERA", "r": 2}`, "q.weight", "54", "q.vera_lambda_b\nq.vera_lambda_d\nvera_A\nvera_B", "5|2|24|52"},
		{`{"peft_type": "LORA", "r": 2, "target_parameters": ["up_proj", "down_proj"], "peft_version": "0.21.2"}`,
			"model.layers.0.mixer.experts.up_proj\nmodel.layers.0.mixer.experts.down_proj", "244|244",
			"model.layers.0.mixer.experts.base_layer.lora_A.weight\nmodel.layers.0.mixer.experts.base_layer.lora_B.weight\n" +
				"model.layers.0.mixer.experts.lora_A.weight\nmodel.layers.0.mixer.experts.lora_B.weight", "44|44|44|44"},
	} {
		f.Add(byte(i), []byte(s.config), s.base, s.baseShapes, s.adapter, s.shapes)
	}
	tensors := func(names, shapes string) (order []string, all map[string][]int64) {
		all = map[string][]int64{}
		list := strings.Split(shapes, "|")
		for i, name := range strings.Split(names, "\n") {
			shape := []int64{}
			if i < len(list) {
				for _, d := range []byte(list[i][:min(4, len(list[i]))]) {
					shape = append(shape, int64(d-'0')%11)
				}
			}
			if name != "" && len(all) < 8 && all[name] == nil {
				all[name] = shape
				order = append(order, name)
			}
		}
		return order, all
	}
	f.Fuzz(func(t *testing.T, model byte, config []byte, baseNames, baseShapes, names, shapes string) {
		order, base := tensors(baseNames, baseShapes)
		_, adapter := tensors(names, shapes)
		m := loaded[int(model)%len(loaded)]
		var targets []Target
		for _, name := range order {
			targets = append(targets, Target{Name: name, Shape: base[name], Role: m.Tensor(name, base[name])})
		}
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dir, configName), config, 0o644))
		file := adapterFiles[0]
		if !strings.Contains(string(config), "peft_type") {
			file = mlxFile
		}
		writeTensors(t, filepath.Join(dir, file), adapter)
		a, err := Open(dir, OpenOptions{})
		if err != nil {
			return
		}
		defer a.Close()
		b, err := Bind([]Weighted{{a, 1}}, targets, m)
		if err != nil {
			require.NotContains(t, err.Error(), "\n")
			return
		}
		elements := func(t Target) int64 {
			n := int64(1)
			for _, d := range t.Shape {
				n *= d
			}
			return n
		}
		inside := func(c *Change, count int64) {
			if c.Value != nil {
				count = c.Value.Count()
			}
			for _, x := range c.Updates {
				require.LessOrEqual(t, (x.Row+x.Rows-1)*c.Width+x.Col+x.Cols, max(count, 1), x.Name)
				if x.Hadamard == nil && x.Module.Form != Rows && x.Module.Form != Scale {
					require.True(t, within(x.Left) && within(x.Right), x.Name)
					require.True(t, x.Left.T == nil || x.Left.Rows == x.Rows && x.Left.Cols == x.Rank, x.Name)
					require.True(t, x.Right.T == nil || x.Right.Cols == x.Cols && x.Right.Rows == x.Rank, x.Name)
				}
			}
		}
		for i, c := range b.Changes {
			if c != nil {
				inside(c, elements(targets[i]))
			}
		}
		if b.Head != nil {
			inside(b.Head, elements(targets[b.HeadFrom]))
		}
	})
}
