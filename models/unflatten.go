package models

import (
	"slices"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
)

// Unflatten finds the modules, of any architecture that has data, whose names become the given ones when underscores
// are written for their dots: for "model_layers_0_self_attn_q_proj" it is "model.layers.0.self_attn.q_proj". A name
// may have none, or several. Linear layers, embeddings, routers and single experts are looked at; for a name that is
// none of theirs all other modules with a weight, as convolutions; and at last a module of any name that occurs, in a
// place where others are, unless the caller knows better what the name is.
func Unflatten(names []string, known func(string) bool) map[string][]string {
	c := catalogue()
	found := map[string][]string{}
	for _, n := range names {
		list := matching(c.linear, n)
		if list == nil {
			list = matching(c.others, n)
		}
		if list == nil && (known == nil || !known(n)) {
			list = c.compose(n)
		}
		if slices.Sort(list); len(list) > 0 {
			found[n] = list
		}
	}
	return found
}

// modules are the names of all modules with a weight that architectures have, with # for numbers, by flatKey.
type modules struct {
	linear map[string][]string // linear layers, embeddings, routers and single experts
	others map[string][]string
	places map[string][]string // what modules are in
	lasts  map[string][]string // the last parts of their names
}

// catalogue reads the data of all architectures, once.
var catalogue = sync.OnceValue(func() *modules {
	linear, others := map[string]bool{}, map[string]bool{}
	note := func(pattern string, to map[string]bool) {
		pattern, _, _ = strings.Cut(pattern, "[")
		if module, ok := strings.CutSuffix(pattern, ".weight"); ok {
			to[module] = true
		}
	}
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
		for words, lines := range a.Parameters {
			to := linear
			if strings.HasPrefix(words, "other") {
				to = others
			}
			for _, line := range lines {
				for pattern := range expand(line) {
					note(pattern, to)
				}
			}
		}
		for _, p := range a.Slices { // single experts
			note(p.File, linear)
		}
	}
	c := &modules{map[string][]string{}, map[string][]string{}, map[string][]string{}, map[string][]string{}}
	add := func(to map[string][]string, name string) {
		if key := flatKey(name); !slices.Contains(to[key], name) {
			to[key] = append(to[key], name)
		}
	}
	for _, of := range []struct {
		modules map[string]bool
		to      map[string][]string
	}{{linear, c.linear}, {others, c.others}} {
		for module := range of.modules {
			add(of.to, module)
			at := strings.LastIndexByte(module, '.')
			add(c.lasts, module[at+1:])
			for ; at > 0; at = strings.LastIndexByte(module[:at], '.') {
				add(c.places, module[:at])
			}
		}
	}
	return c
})

// matching lists what a flat name may be of some modules.
func matching(modules map[string][]string, n string) (list []string) {
	for _, module := range modules[flatKey(n)] {
		if name, ok := unflatten(module, n); ok && !slices.Contains(list, name) {
			list = append(list, name)
		}
	}
	return list
}

// compose takes a name for that of a place and a module in it.
func (c *modules) compose(n string) []string {
	var list []string
	for at := strings.IndexByte(n, '_'); at >= 0 && at < len(n); {
		place, last := n[:at], n[at+1:]
		for _, l := range c.lasts[flatKey(last)] {
			for _, p := range c.places[flatKey(place)] {
				if name, ok := unflatten(p+"."+l, n); ok && !slices.Contains(list, name) {
					list = append(list, name)
				}
			}
		}
		next := strings.IndexByte(last, '_')
		if next < 0 {
			break
		}
		at += 1 + next
	}
	return list
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
