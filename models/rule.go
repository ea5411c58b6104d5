package models

import (
	"strings"

	"github.com/lorakit/lorakit/tensor"
)

// rule answers by name and shape alone, for an architecture that has no data: a linear is a 2-D `.weight` whose name
// is no embedding, norm, head, router, gate, position or bias table and no expert. It would rather leave a linear as
// it is than quantise what is none.
func rule(name string, shape tensor.Shape) Tensor {
	var t Tensor
	parts := strings.Split(strings.ToLower(name), ".")
	leaf, path := parts[len(parts)-1], parts[:len(parts)-1]
	switch {
	case has(path, isExpert) && len(shape) >= 2, strings.Contains(name, stackedIn) && len(shape) == 3:
		t.Kind = Expert
	case has(parts, isEmbedding) && len(shape) == 2:
		t.Kind = Embedding
	case has(path, isRouter) && len(shape) == 2:
		t.Kind = Router
	case leaf != "weight" || len(shape) != 2 || len(path) == 0:
	case has(path, isNorm) || has(path, isTable):
	default:
		t.Kind = Linear
		t.Quantized = !isHead(path)
	}
	return t
}

func has(parts []string, is func(string) bool) bool {
	for _, p := range parts {
		if is(p) {
			return true
		}
	}
	return false
}

func isExpert(p string) bool { return strings.Contains(p, "expert") }

func isEmbedding(p string) bool {
	switch p {
	case "wte", "wpe", "emb", "shared":
		return true
	}
	if strings.HasSuffix(p, "_emb") || strings.HasSuffix(p, "_token") || strings.HasSuffix(p, "_tokens") ||
		p == "reference_points" || strings.HasPrefix(p, "codebook") {
		return true
	}
	return strings.Contains(p, "embed") && !strings.Contains(p, "proj") && p != "embed_out" &&
		!strings.Contains(p, "unembed")
}

// isRouter knows a router's gate from a gate_proj.
func isRouter(p string) bool {
	switch p {
	case "gate", "router", "gating", "wg", "gate_network", "gate_linear":
		return true
	}
	return strings.HasSuffix(p, "_router") || strings.HasPrefix(p, "router_")
}

func isNorm(p string) bool {
	number, ln := strings.CutPrefix(p, "ln")
	return strings.Contains(p, "norm") || ln && (number == "" || isNumber(number)) || strings.HasPrefix(p, "ln_") ||
		strings.HasSuffix(p, "_ln")
}

// isTable knows tables of positions and biases, and what makes positions, from projections of either.
func isTable(p string) bool {
	if strings.HasSuffix(p, "_proj") {
		return false
	}
	return strings.Contains(p, "position") || strings.Contains(p, "bias") || strings.Contains(p, "rotary") ||
		strings.HasPrefix(p, "pos_") || strings.HasPrefix(p, "rel_pos") || strings.Contains(p, "rel_attn")
}

// isHead knows an output head: what stands at the top of a model or is called one.
func isHead(path []string) bool {
	for _, p := range path {
		switch p {
		case "head", "heads", "lm_head", "embed_out", "output_layer", "qa_outputs", "vocab_projector", "vocab_transform",
			"output_projection":
			return true
		}
		if strings.HasSuffix(p, "_head") || strings.HasSuffix(p, "_heads") || strings.Contains(p, "unembed") ||
			strings.Contains(p, "lm_head") {
			return true
		}
	}
	last := path[len(path)-1]
	switch last {
	case "score", "logits", "logits_proj", "final_logits":
		return true
	case "output", "proj_out", "final_proj", "decoder", "pre_logits", "unembedding":
		return len(path) <= 2 || path[0] == "cls" // "output.dense" of a BERT layer is none, nor is a deep "output"
	}
	return strings.Contains(last, "classifier") || path[0] == "cls"
}
