package models

import (
	"bytes"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Order is the order in which a model has its modules, which is seldom that of a file: files are sorted by name as a
// rule. All layers have one order, that of the first layer that has a module.
type Order struct {
	root  *orderNode // nil where the architecture is not known
	parts []*Order   // of the models that it is made of
}

// orderNode is a module of an architecture, with the modules in it.
type orderNode struct {
	position int
	below    map[string]*orderNode // by the name's next part, # for a number
}

// Order reads the order of the model's modules.
func (m *Model) Order() *Order {
	o := &Order{}
	if m.data == nil {
		return o
	}
	if m.parts != nil {
		for _, p := range m.parts() {
			o.parts = append(o.parts, p.model.Order())
		}
	}
	o.root = &orderNode{}
	for _, lines := range m.data.inOrder() {
		for _, line := range lines {
			for pattern := range expand(line) {
				pattern, _, _ = strings.Cut(pattern, "[")
				o.root.add(pattern)
			}
		}
	}
	return o
}

// inOrder returns the lists of parameters in the order in which the data has them, which is the model's.
func (a *architecture) inOrder() [][]string {
	b, err := files.ReadFile("data/" + a.Class + ".json")
	var d struct {
		Parameters jsontext.Value `json:"parameters"`
	}
	if err != nil || json.Unmarshal(b, &d) != nil {
		return nil
	}
	var all [][]string
	for dec := jsontext.NewDecoder(bytes.NewReader(d.Parameters)); ; {
		t, err := dec.ReadToken()
		if err != nil {
			return all
		}
		var lines []string
		if t.Kind() == '"' && json.UnmarshalDecode(dec, &lines) == nil {
			all = append(all, lines)
		}
	}
}

// add takes in the name of a parameter.
func (n *orderNode) add(pattern string) {
	for name := range strings.SplitSeq(pattern, ".") {
		next := n.below[anyNumber(name)]
		if next == nil {
			next = &orderNode{position: len(n.below)}
			if n.below == nil {
				n.below = map[string]*orderNode{}
			}
			n.below[anyNumber(name)] = next
		}
		n = next
	}
}

func anyNumber(name string) string {
	if isNumber(name) {
		return "#"
	}
	return name
}

// Place tells where a run-time parameter stands: of two parameters that which comes first in the model has the smaller
// one, by slices.Compare. What the architecture does not have is placed by its name, as most models have such names.
func (o *Order) Place(param string) []int {
	if o.root == nil {
		return placeByName(param)
	}
	if p, ok := o.root.place(param); ok {
		return append([]int{0}, p...)
	}
	rest := param
	for range 4 { // as Tensor looks for parts
		_, after, ok := strings.Cut(rest, ".")
		if !ok {
			break
		}
		rest = after
		for i, p := range o.parts {
			if place, ok := p.root.place(rest); ok {
				return append([]int{1, i}, place...)
			}
		}
	}
	return placeByName(param)
}

func (n *orderNode) place(param string) ([]int, bool) {
	if n == nil {
		return nil, false
	}
	var place []int
	for name := range strings.SplitSeq(param, ".") {
		next := n.below[anyNumber(name)]
		if next == nil {
			return nil, false
		}
		n = next
		place = append(place, n.position)
	}
	return place, true
}

// The names that most models give to their modules, in the order in which most have them: embeddings, attention, what
// follows it in a layer, heads.
var (
	usualEmbeddings = strings.Fields("embed_tokens tok_embeddings word_embeddings wte embed_in shared " +
		"token_type_embeddings position_embeddings embed_positions wpe")
	usualAttention = strings.Fields("query_key_value qkv_proj qkv c_attn Wqkv W_pack in_proj " +
		"q_a_proj q_b_proj q_proj query q wq to_q q_lin kv_a_proj_with_mqa kv_b_proj " +
		"k_proj key k wk to_k k_lin v_proj value v wv to_v v_lin o_proj out_proj dense c_proj o wo to_out out_lin proj")
	usualLayer = strings.Fields("gate router gate_up_proj gate_proj w1 up_proj w3 fc1 c_fc fc_in dense_h_to_4h " +
		"wi wi_0 wi_1 lin1 down_proj w2 fc2 c_proj fc_out dense_4h_to_h wo lin2 dense")
	usualHeads = strings.Fields("lm_head embed_out score classifier qa_outputs")
)

// placeByName places a parameter of an architecture that is not known.
func placeByName(param string) []int {
	const byName = 2 // after all that the data places
	module := strings.TrimSuffix(param, ".weight")
	leaf := module[strings.LastIndexByte(module, '.')+1:]
	at := func(block int, names []string) []int {
		i := slices.Index(names, leaf)
		if i < 0 {
			i = len(names)
		}
		return []int{byName, block, i}
	}
	lower := strings.ToLower(module)
	switch {
	case slices.Contains(usualEmbeddings, leaf):
		return at(0, usualEmbeddings)
	case slices.Contains(usualHeads, leaf):
		return at(3, usualHeads)
	case strings.Contains(lower, "attn") || strings.Contains(lower, "attention"):
		return at(1, usualAttention)
	case slices.Contains(usualLayer, leaf) || !slices.Contains(usualAttention, leaf):
		return at(2, usualLayer)
	}
	return at(1, usualAttention)
}
