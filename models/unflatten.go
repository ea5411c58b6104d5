package models

import (
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
)

// Unflatten finds the modules, of any architecture that has data, whose names become the given
// ones when underscores are written for their dots: for "model_layers_0_self_attn_q_proj" it is
// "model.layers.0.self_attn.q_proj". A name may have none, or several. Linear layers,
// embeddings, routers and single experts are looked at; for a name that is none of theirs all other modules with a
// weight, as convolutions; and at last a module of any name that occurs, in a place where others are, unless the caller
// knows better what the name is.
func Unflatten(names []string, known func(string) bool) map[string][]string {
	u := unflattener{found: map[string][]string{}, wanted: map[string][]string{}, others: map[string]bool{}, places: map[string][]string{}, lasts: map[string][]string{}}
	for _, n := range names {
		key := flatKey(n)
		if !slices.Contains(u.wanted[key], n) {
			u.wanted[key] = append(u.wanted[key], n)
		}
	}
	u.read()
	for module := range u.others {
		u.try(module, func(n string) bool { return u.direct[n] })
		u.place(module)
	}
	for _, n := range names {
		if len(u.found[n]) == 0 && (known == nil || !known(n)) {
			u.found[n] = u.compose(n)
		}
	}
	for n, list := range u.found {
		if slices.Sort(list); len(list) == 0 {
			delete(u.found, n)
		}
	}
	return u.found
}

// unflattener finds the names that are wanted.
type unflattener struct {
	found  map[string][]string
	wanted map[string][]string // by what is left when numbers are #
	direct map[string]bool     // those that are linear layers and the like
	others map[string]bool     // modules of other kinds
	places map[string][]string // what modules are in, by flatKey
	lasts  map[string][]string // the last parts of their names, by flatKey
}

// read goes through the data of all architectures.
func (u *unflattener) read() {
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
		note := func(pattern string, other bool) {
			pattern, _, _ = strings.Cut(pattern, "[")
			module, ok := strings.CutSuffix(pattern, ".weight")
			switch {
			case !ok || seen[module]:
			case other:
				u.others[module] = true
			default:
				seen[module] = true
				u.try(module, nil)
				u.place(module)
			}
		}
		for words, lines := range a.Parameters {
			for _, line := range lines {
				for pattern := range expand(line) {
					note(pattern, strings.HasPrefix(words, "other"))
				}
			}
		}
		for _, p := range a.Slices { // single experts
			note(p.File, false)
		}
	}
	u.direct = map[string]bool{}
	for n := range u.found {
		u.direct[n] = true
	}
}

// try takes a module for all that it may be, but for names that are to be passed over.
func (u *unflattener) try(module string, pass func(string) bool) {
	for _, n := range u.wanted[flatKey(module)] {
		if pass != nil && pass(n) {
			continue
		}
		if name, ok := unflatten(module, n); ok && !slices.Contains(u.found[n], name) {
			u.found[n] = append(u.found[n], name)
		}
	}
}

// place keeps the parts of a module's name.
func (u *unflattener) place(module string) {
	add := func(m map[string][]string, name string) {
		if key := flatKey(name); !slices.Contains(m[key], name) {
			m[key] = append(m[key], name)
		}
	}
	at := strings.LastIndexByte(module, '.')
	add(u.lasts, module[at+1:])
	for ; at > 0; at = strings.LastIndexByte(module[:at], '.') {
		add(u.places, module[:at])
	}
}

// compose takes a name for that of a place and a module in it.
func (u *unflattener) compose(n string) []string {
	var list []string
	for at := strings.IndexByte(n, '_'); at >= 0 && at < len(n); {
		place, last := n[:at], n[at+1:]
		for _, l := range u.lasts[flatKey(last)] {
			for _, p := range u.places[flatKey(place)] {
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
