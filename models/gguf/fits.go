package gguf

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// sizes are what the keys of an architecture say of its tensors' shapes, as llama.cpp wants them when it loads a file.
// "" is any size. Where a key is missing that an expression needs, its dimension may have any size too.
var sizes = map[string][]string{
	"token_embd.weight":          {"", "embedding_length"},
	"output.weight":              {"rows", "embedding_length"},
	"output_norm.weight":         {"embedding_length"},
	"blk.#.attn_norm.weight":     {"embedding_length"},
	"blk.#.ffn_norm.weight":      {"embedding_length"},
	"blk.#.attn_q.weight":        {"heads*key_width", "embedding_length"},
	"blk.#.attn_k.weight":        {"kv_heads*key_width", "embedding_length"},
	"blk.#.attn_v.weight":        {"kv_heads*value_width", "embedding_length"},
	"blk.#.attn_qkv.weight":      {"heads*key_width+kv_heads*key_width+kv_heads*value_width", "embedding_length"},
	"blk.#.attn_output.weight":   {"embedding_length", "heads*value_width"},
	"blk.#.attn_q_a.weight":      {"attention.q_lora_rank", "embedding_length"},
	"blk.#.attn_q_a_norm.weight": {"attention.q_lora_rank"},
	"blk.#.attn_q_b.weight":      {"heads*key_width", "attention.q_lora_rank"},
	"blk.#.attn_kv_a_mqa.weight": {
		"attention.kv_lora_rank+rope.dimension_count", "embedding_length",
	},
	"blk.#.attn_kv_a_norm.weight": {"attention.kv_lora_rank"},
	"blk.#.ffn_gate.weight":       {"ffn_rows", "embedding_length"},
	"blk.#.ffn_up.weight":         {"ffn_rows", "embedding_length"},
	"blk.#.ffn_down.weight":       {"embedding_length", "feed_forward_length"},
	"blk.#.ffn_gate_inp.weight":   {"expert_count", "embedding_length"},
	"blk.#.ffn_gate_exps.weight":  {"expert_count", "expert_width", "embedding_length"},
	"blk.#.ffn_up_exps.weight":    {"expert_count", "expert_width", "embedding_length"},
	"blk.#.ffn_down_exps.weight":  {"expert_count", "embedding_length", "expert_width"},
}

// derived are names in sizes that are no keys: the first of their alternatives that is there.
var derived = map[string]string{
	"heads":        "attention.head_count",
	"kv_heads":     "attention.head_count_kv|attention.head_count",
	"key_width":    "attention.key_length_mla|attention.key_length|embedding_length//attention.head_count",
	"value_width":  "attention.value_length_mla|attention.value_length|embedding_length//attention.head_count",
	"expert_width": "expert_feed_forward_length|feed_forward_length",
	"ffn_rows":     "feed_forward_length",
}

// fit holds the shapes of a GGUF file's tensors against the keys of its architecture.
func (a *architecture) fit(keys formats.Metadata, tensors []tensor.Info) error {
	rows := int64(0)
	have := make(map[string]bool, len(tensors))
	for _, t := range tensors {
		have[t.Name] = true
		if t.Name == embedding && len(t.Shape) > 0 {
			rows = t.Shape[0]
		}
	}
	var find lookup
	find = func(name string) (any, bool) {
		if name == "rows" {
			return float64(rows), rows > 0
		}
		if expression, ok := derived[name]; ok {
			v, there, err := evaluate(expression, find)
			x, isNumber := v.(float64)
			if name == "ffn_rows" && a.fusesGate() {
				x *= 2
			}
			return x, err == nil && there && isNumber
		}
		x, ok := number(uniform(keys.Get(a.Name + "." + name)))
		return x, ok
	}
	for _, t := range tensors {
		n, ok := split(t.Name)
		expected := sizes[n.pattern]
		if !ok || expected == nil {
			continue
		}
		shape := slices.Clone(t.Shape)
		if len(shape) == len(expected) {
			for i, e := range expected {
				v, there, err := evaluate(e, find)
				if x, isNumber := v.(float64); err == nil && there && isNumber && math.Abs(x) <= maxWhole {
					shape[i] = int64(x)
				}
			}
		}
		if len(shape) != len(expected) || !slices.Equal(shape, t.Shape) {
			want := shape.String()
			if len(shape) != len(expected) {
				want = fmt.Sprintf("%d dimensions", len(expected))
			}
			return tensorError(t.Name, malformedf("found the shape %v, expected %s by the keys of %s", t.Shape, want, a.Name))
		}
	}
	if list, ok := keys.Get(tokensKey).([]string); ok && rows > 0 && int64(len(list)) > rows {
		return keyError(tokensKey, malformedf("found %d tokens, expected at most %d, the rows of %s", len(list), rows,
			embedding))
	}
	if err := a.fitHeads(find); err != nil {
		return err
	}
	return a.fitExperts(keys, find, have)
}

// fitHeads refuses numbers of heads that no model has, where no shape tells.
func (a *architecture) fitHeads(find lookup) error {
	const all, shared = "attention.head_count", "attention.head_count_kv"
	v, counted := find(all)
	heads, _ := v.(float64)
	if counted && heads < 1 {
		return keyError(a.Name+"."+all, malformedf("found %v, expected a head or more", heads))
	}
	v, shares := find(shared)
	if kv, _ := v.(float64); counted && shares && (kv < 1 || math.Mod(heads, kv) != 0) {
		return keyError(a.Name+"."+shared, malformedf("found %v, expected a divisor of the %v heads that there are", kv,
			heads))
	}
	return nil
}

const (
	embedding = "token_embd.weight"
	tokensKey = "tokenizer.ggml.tokens"
)

// fusesGate reports whether ffn_up has the gate too, before its own rows.
func (a *architecture) fusesGate() bool {
	p, ok := a.byName["blk.#.ffn_up"]
	return ok && len(p.row.names) == 1 && strings.HasSuffix(p.row.module, "gate_up_proj")
}

// fitExperts holds what the keys say of experts against each other, and against the layers that have some.
func (a *architecture) fitExperts(keys formats.Metadata, find lookup, have map[string]bool) error {
	const counted, used, dense = "expert_count", "expert_used_count", "leading_dense_block_count"
	v, _ := find(counted)
	experts, _ := v.(float64)
	if experts <= 0 {
		return nil // tensors of experts are refused by their shapes
	}
	found := keys.Get(a.Name + "." + used)
	if x, ok := number(found); !ok || x < 1 || x > experts {
		if found == nil {
			found = "none"
		}
		return keyError(a.Name+"."+used, malformedf("found %v, expected 1 to the %v experts that there are", found, experts))
	}
	v, _ = find(blockCount)
	layers, _ := v.(float64)
	v, leads := find(dense)
	first, _ := v.(float64)
	some := false
	for layer := range int(min(max(layers, 0), maxNumber)) {
		name := fill("blk.#.ffn_gate_exps.weight", layer, -1)
		some = some || have[name]
		if leads && have[name] != (float64(layer) >= first) {
			return keyError(a.Name+"."+dense, malformedf("found %v, which layer %d contradicts, by whether it has %s", first,
				layer, name))
		}
	}
	if !some && !leads {
		return keyError(a.Name+"."+counted, malformedf("found %v, and no tensor of an expert", experts))
	}
	return nil
}
