package gguf

import (
	"strconv"
	"strings"
)

// numbered is a tensor's name with its numbers apart.
type numbered struct {
	pattern string // # for the first number, @ for the second
	layer   int    // the first number, -1 where there is none
	index   int    // the second number, -1 where there is none
}

// maxNumber is more than any model has layers, experts or heads.
const maxNumber = 1 << 20

// split puts the numbers of a name apart. It is false where a number is too large, has a zero before it, or is a third
// one.
func split(name string) (numbered, bool) {
	n := numbered{layer: -1, index: -1}
	parts := strings.Split(name, ".")
	for i, p := range parts {
		if p == "" || strings.Trim(p, "0123456789") != "" {
			continue
		}
		number, err := strconv.Atoi(p)
		switch {
		case err != nil || number > maxNumber || strconv.Itoa(number) != p || n.index >= 0:
			return n, false
		case n.layer < 0:
			n.layer, parts[i] = number, "#"
		default:
			n.index, parts[i] = number, "@"
		}
	}
	n.pattern = strings.Join(parts, ".")
	return n, true
}

// fill puts numbers into a pattern.
func fill(pattern string, layer, index int) string {
	return strings.NewReplacer("#", strconv.Itoa(layer), "@", strconv.Itoa(index)).Replace(pattern)
}

// ending is the .weight or .bias at the end of a name, or "".
func ending(name string) string {
	for _, e := range [...]string{".weight", ".bias"} {
		if strings.HasSuffix(name, e) {
			return e
		}
	}
	return ""
}

// unused ends names of tensors that checkpoints have and models compute by themselves.
var unused = [...]string{".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"}

// otherParts begin parts of names of what is no language model: llama.cpp has it in a file of its own.
var otherParts = [...]string{"vision_", "vision.", "visual.", "audio_", "audio.", "multi_modal_projector", "projector."}

// languageModel stands in the names of the text part of a model that has others besides.
const languageModel = "language_model."

// ofOther reports whether a tensor belongs to another part of the model than its text.
func ofOther(name string) bool {
	for at := 0; ; {
		for _, p := range otherParts {
			if strings.HasPrefix(name[at:], p) {
				return true
			}
		}
		dot := strings.IndexByte(name[at:], '.')
		if dot < 0 {
			return false
		}
		at += dot + 1
	}
}

// find is the row of a checkpoint's tensor, its numbers, and the ending of its name that the row does not have. It is
// nil where the architecture has none, or the tensor has no place in GGUF; only the former is unknown.
func (a *architecture) find(name string) (r *row, n numbered, end string, known bool) {
	for _, e := range unused {
		if strings.HasSuffix(name, e) {
			return nil, n, "", true
		}
	}
	if ofOther(name) {
		return nil, n, "", true
	}
	name = strings.ReplaceAll(name, languageModel, "")
	name = strings.TrimPrefix(name, a.Cut)
	for old, e := range a.Endings {
		if stem, ok := strings.CutSuffix(name, old); ok {
			name = stem + e
		}
	}
	for _, s := range a.Skip {
		if strings.HasPrefix(name, s) {
			return nil, n, "", true
		}
	}
	n, ok := split(name)
	if !ok {
		return nil, n, "", false
	}
	if r, end = a.row(n.pattern); r == nil && a.Prefix != "" {
		r, end = a.row(a.Prefix + n.pattern)
	}
	if r == nil {
		return nil, n, "", false
	}
	if len(r.names) == 0 {
		return nil, n, "", true
	}
	return r, n, end, true
}

// row finds a row by a pattern, and the ending that is carried over.
func (a *architecture) row(pattern string) (*row, string) {
	if r := a.byModule[pattern]; r != nil && r.entire() {
		return r, ""
	}
	end := ending(pattern)
	r := a.byModule[strings.TrimSuffix(pattern, end)]
	if end == "" || r == nil || r.entire() && len(r.names) > 0 {
		return nil, ""
	}
	return r, end
}

// entire reports whether the row is for a parameter that is called so by itself: its GGUF name has the ending.
func (r *row) entire() bool {
	return len(r.names) == 0 || ending(r.names[0]) != ""
}
