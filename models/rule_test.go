package models

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/tensor"
)

// Names of checkpoints that are in use, of code that is not in transformers too.
func TestRule(t *testing.T) {
	for name, want := range map[string]struct {
		kind      Kind
		quantized bool
	}{
		// Llama and its kin
		"model.embed_tokens.weight":                          {Embedding, false},
		"model.layers.3.self_attn.q_proj.weight":             {Linear, true},
		"model.layers.3.mlp.gate_proj.weight":                {Linear, true},
		"model.layers.3.mlp.gate_up_proj.weight":             {Linear, true},
		"layers.0.attention.wq.weight":                       {Linear, true},
		"layers.0.feed_forward.w1.weight":                    {Linear, true},
		"tok_embeddings.weight":                              {Embedding, false},
		"output.weight":                                      {Linear, false},
		"lm_head.weight":                                     {Linear, false},
		"score.weight":                                       {Linear, false},
		"model.layers.1.self_attn.q_norm.weight":             {Other, false},
		"model.layers.1.self_attn.kv_a_proj_with_mqa.weight": {Linear, true},
		// experts and routers
		"model.layers.3.mlp.gate.weight":                       {Router, false},
		"model.layers.3.block_sparse_moe.gate.weight":          {Router, false},
		"model.layers.3.block_sparse_moe.experts.0.w1.weight":  {Expert, false},
		"model.layers.3.mlp.shared_expert.gate_proj.weight":    {Expert, false},
		"model.layers.3.mlp.shared_expert_gate.weight":         {Expert, false},
		"model.layers.3.mlp.router.weight":                     {Router, false},
		"model.layers.3.feed_forward.router.classifier.weight": {Router, false},
		"transformer.blocks.0.ffn.router.layer.weight":         {Router, false},
		"model.layers.0.mamba.in_proj.weight":                  {Linear, true},
		"backbone.layers.0.mixer.x_proj.weight":                {Linear, true},
		// GPT and others of its time
		"transformer.wte.weight":                                {Embedding, false},
		"transformer.wpe.weight":                                {Embedding, false},
		"transformer.h.0.attn.c_attn.weight":                    {Linear, true},
		"transformer.h.0.ln_1.weight":                           {Other, false},
		"gpt_neox.embed_in.weight":                              {Embedding, false},
		"gpt_neox.layers.0.attention.query_key_value.weight":    {Linear, true},
		"embed_out.weight":                                      {Linear, false},
		"transformer.word_embeddings.weight":                    {Embedding, false},
		"transformer.word_embeddings_layernorm.weight":          {Embedding, false}, // a 2-D one does not exist
		"transformer.encoder.layers.0.mlp.dense_h_to_4h.weight": {Linear, true},
		"transformer.output_layer.weight":                       {Linear, false},
		// encoders
		"bert.embeddings.position_embeddings.weight":                           {Embedding, false},
		"bert.encoder.layer.0.attention.self.query.weight":                     {Linear, true},
		"bert.encoder.layer.0.attention.output.dense.weight":                   {Linear, true},
		"bert.encoder.layer.0.output.dense.weight":                             {Linear, true},
		"bert.pooler.dense.weight":                                             {Linear, true},
		"cls.predictions.decoder.weight":                                       {Linear, false},
		"cls.predictions.transform.dense.weight":                               {Linear, false},
		"cls.seq_relationship.weight":                                          {Linear, false},
		"classifier.weight":                                                    {Linear, false},
		"roberta.encoder.layer.0.intermediate.dense.weight":                    {Linear, true},
		"lm_head.dense.weight":                                                 {Linear, false},
		"qa_outputs.weight":                                                    {Linear, false},
		"vocab_projector.weight":                                               {Linear, false},
		"deberta.encoder.rel_embeddings.weight":                                {Embedding, false},
		"encoder.layer.0.attention.self.pos_key_proj.weight":                   {Linear, true},
		"encoder.block.0.layer.0.SelfAttention.q.weight":                       {Linear, true},
		"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": {Other, false},
		"shared.weight":                                                        {Embedding, false},
		// vision, audio, several
		"vision_tower.vision_model.embeddings.position_embedding.weight": {Embedding, false},
		"vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight":      {Linear, true},
		"multi_modal_projector.linear_1.weight":                          {Linear, true},
		"visual.blocks.0.attn.qkv.weight":                                {Linear, true},
		"visual.merger.mlp.0.weight":                                     {Linear, true},
		"model.encoder.embed_positions.weight":                           {Embedding, false},
		"proj_out.weight":                                                {Linear, false},
		"heads.head.weight":                                              {Linear, false},
		// no weights of linears
		"model.layers.0.self_attn.q_proj.bias":             {Other, false},
		"multi_modal_projector.mm_input_projection_weight": {Other, false},
		"weight": {Other, false},
	} {
		got := rule(name, tensor.Shape{64, 32})
		assert.Equal(t, want.kind, got.Kind, name)
		assert.Equal(t, want.quantized, got.Quantized, name)
	}
	for _, shape := range []tensor.Shape{nil, {64}, {64, 32, 3}, {64, 32, 3, 3}} {
		assert.False(t, rule("model.layers.3.self_attn.q_proj.weight", shape).Quantized, "%v", shape)
	}
	assert.Equal(t, Expert, rule("model.layers.3.mlp.experts.gate_up_proj", tensor.Shape{8, 64, 32}).Kind)
}

// The rule is held against what is known of all architectures: next to nothing but linears is quantised (tables that
// are called query or w), and few linears are missed.
func TestRuleOnKnownArchitectures(t *testing.T) {
	var linears, found, heads, spared, wrong, others int
	for _, class := range All() {
		a, err := read(class)
		require.NoError(t, err)
		for words, lines := range a.Parameters {
			p, err := parseParameter(words)
			require.NoError(t, err)
			for _, line := range lines {
				for pattern := range expand(line) {
					name, ranked, _ := strings.Cut(pattern, "[")
					if ranked != "" && ranked != "2]" || p.kind == Other {
						continue // no matrix, or one whose shape is not in the data
					}
					shape := tensor.Shape{64, 32}
					if p.kind == Expert {
						shape = tensor.Shape{8, 64, 32}
					}
					quantized := rule(strings.ReplaceAll(name, "#", "0"), shape).Quantized
					switch {
					case p.kind != Linear && p.kind != Conv1D:
						others++
						if quantized {
							wrong++
							t.Logf("%s: %s is %v", class, name, p.kind)
						}
					case p.stays && p.float32:
						// not a head, but too delicate: no rule tells
					case p.stays:
						heads++
						if quantized {
							t.Logf("%s: %s is a head", class, name)
						} else {
							spared++
						}
					default:
						linears++
						if quantized {
							found++
						}
					}
				}
			}
		}
	}
	t.Logf("%d of %d linears are found, %d of %d heads spared, %d of %d others taken", found, linears, spared, heads,
		wrong, others)
	assert.Less(t, float64(wrong), 0.01*float64(others))
	assert.Greater(t, float64(found), 0.8*float64(linears))
	assert.Greater(t, float64(spared), 0.95*float64(heads))
}
