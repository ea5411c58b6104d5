package tokenizer

import (
	"bytes"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// namedTokens are the special tokens that files beside tokenizer.json name.
type namedTokens struct {
	usual   []string // bos, eos, unk, sep, pad, cls and mask
	further []string
}

func (n namedTokens) all() []string { return slices.Concat(n.usual, n.further) }

// addBeside finds what transformers adds to the tokens of a tokenizer.json, and where it changes whether they are
// special: by added_tokens_decoder, or by the files of older releases where there is none, and by the names of special
// tokens.
func (r *reader) addBeside() error {
	members, old := r.own.members, map[string]jsontext.Value{}
	_, decoder := members["added_tokens_decoder"]
	if b, ok := r.files[specialTokensMap]; ok && !decoder {
		if err := unmarshal(specialTokensMap, b, &old); err != nil {
			return err
		}
	}
	value := func(name string) jsontext.Value {
		if v, ok := old[name]; ok {
			return v
		}
		return members[name]
	}
	for _, kind := range specialKinds {
		if t := namedBy(value(kind + "_token")).content; t != "" {
			r.named.usual = append(r.named.usual, t)
		}
	}
	r.named.further = r.furtherNames(value)

	list := slices.Clone(r.own.decoder)
	if b, ok := r.files[addedTokens]; ok && !decoder {
		more, err := readAdded(b)
		if err != nil {
			return err
		}
		further := make(map[string]bool, len(r.named.further))
		for _, t := range r.named.further {
			further[t] = true
		}
		for _, e := range more {
			list = append(list, decoded{e.id, e.text, further[e.text]})
		}
	}
	known := map[string]bool{}
	for _, a := range r.json.AddedTokens {
		known[a.Content] = true
		if !decoder {
			list = append(list, decoded{int(a.ID), a.Content, a.Special})
		}
	}
	slices.SortStableFunc(list, func(x, y decoded) int { return x.id - y.id })
	add := func(text string, special bool) {
		known[text] = true
		if text != "" {
			special = special || slices.Contains(r.named.usual, text)
			r.json.more = append(r.json.more, addedToken{Content: text, Special: special})
		}
	}
	for i, t := range list {
		if i+1 == len(list) || list[i+1].id != t.id { // the last one of an id counts
			add(t.content, t.special)
		}
	}
	for _, t := range r.named.all() {
		if !known[t] {
			add(t, true)
		}
	}
	return nil
}

// furtherNames are tokens that a model has for itself: members that end in _token, those of an object, and lists.
func (r *reader) furtherNames(value func(string) jsontext.Value) []string {
	var apart, listed []string
	add := func(to *[]string, v jsontext.Value) {
		if t := namedBy(v).content; t != "" {
			*to = append(*to, t)
		}
	}
	for _, name := range [...]string{"extra_special_tokens", "additional_special_tokens"} {
		v := value(name)
		switch {
		case v == nil:
		case v.Kind() == '[':
			var list []jsontext.Value
			_ = json.Unmarshal(v, &list) // it is a list
			for _, v := range list {
				add(&listed, v)
			}
		case v.Kind() == '{':
			_ = eachMember(v, func(_ string, v jsontext.Value) error { add(&apart, v); return nil })
		}
	}
	for _, name := range r.own.order {
		if kind, ok := strings.CutSuffix(name, "_token"); ok && !slices.Contains(specialKinds, kind) {
			add(&apart, value(name))
		}
	}
	return append(apart, listed...)
}

// readAdded reads added_tokens.json, in the order of the file.
func readAdded(b []byte) ([]entry, error) {
	var list []entry
	err := eachMember(bytes.TrimSpace(b), func(text string, value jsontext.Value) error {
		id, err := wholeNumber(value)
		if err != nil {
			return malformedToken(text, value)
		}
		list = append(list, entry{text, id})
		return nil
	})
	if err != nil {
		return nil, malformedf("%s: %v", addedTokens, wrongJSON(err))
	}
	return list, nil
}
