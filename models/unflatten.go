package models

import (
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
)

// Unflatten finds the modules, of any architecture that has data, whose names become the given
// ones when underscores are written for their dots: for "model_layers_0_self_attn_q_proj" it is
// "model.layers.0.self_attn.q_proj". A name may have none, or several. Linear layers,
// embeddings, routers and single experts are looked at.
func Unflatten(names []string) map[string][]string {
	found := map[string][]string{}
	wanted := map[string][]string{} // by what is left when numbers are #
	for _, n := range names {
		key := flatKey(n)
		if !slices.Contains(wanted[key], n) {
			wanted[key] = append(wanted[key], n)
		}
	}
	seen := map[string]bool{}
	for _, class := range All() {
		b, err := files.ReadFile("data/" + class + ".json")
		if err != nil {
			panic(err) // the folder is part of the program
		}
		var a struct {
			Parameters map[string][]string `json:"parameters"`
			Slices     []piece             `json:"slices"`
		}
		if err := json.Unmarshal(b, &a); err != nil {
			panic(err) // so is its content
		}
		try := func(pattern string) {
			pattern, _, _ = strings.Cut(pattern, "[")
			module, ok := strings.CutSuffix(pattern, ".weight")
			if !ok || seen[module] {
				return
			}
			seen[module] = true
			for _, n := range wanted[flatKey(module)] {
				if name, ok := unflatten(module, n); ok && !slices.Contains(found[n], name) {
					found[n] = append(found[n], name)
				}
			}
		}
		for words, lines := range a.Parameters {
			if strings.HasPrefix(words, "other") {
				continue // norms, biases, buffers
			}
			for _, line := range lines {
				for pattern := range expand(line) {
					try(pattern)
				}
			}
		}
		for _, p := range a.Slices { // single experts
			try(p.File)
		}
	}
	for _, list := range found {
		slices.Sort(list)
	}
	return found
}

// flatKey is a name with underscores for dots and # for numbers.
func flatKey(name string) string {
	parts := strings.FieldsFunc(name, func(r rune) bool { return r == '_' || r == '.' })
	for i, p := range parts {
		if isNumber(p) {
			parts[i] = "#"
		}
	}
	return strings.Join(parts, "_")
}

// unflatten puts the numbers of a flat name into a pattern, where the two agree.
func unflatten(pattern, flat string) (string, bool) {
	parts := strings.Split(pattern, ".")
	rest := flat
	for i, p := range parts {
		if p == "#" {
			n := strings.IndexByte(rest, '_')
			if n < 0 {
				n = len(rest)
			}
			if p = rest[:n]; !isNumber(p) {
				return "", false
			}
			parts[i] = p
		}
		after, ok := strings.CutPrefix(rest, p)
		if !ok {
			return "", false
		}
		if i < len(parts)-1 {
			if after, ok = strings.CutPrefix(after, "_"); !ok {
				return "", false
			}
		}
		rest = after
	}
	return strings.Join(parts, "."), rest == ""
}
