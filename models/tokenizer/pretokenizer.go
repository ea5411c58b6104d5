package tokenizer

import (
	"cmp"
	_ "embed" // for the data
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/tensor"
)

//go:embed data/pretokenizers.json
var preTokenizersJSON []byte

// preTokenizers are the cuts that llama.cpp knows by name.
type preTokenizers struct {
	Patterns     map[string]string `json:"patterns"` // regular expressions by the names that rows have for them
	Rows         []preRow          `json:"rows"`
	IgnoreMerges []string          `json:"ignore_merges"` // those whose whole words are tokens, whatever the merges
	Others       []string          `json:"others"`        // names for cuts of byte-level BPE that no row spells out
}

// preRow is one cut. Its names are one case in llama.cpp.
type preRow struct {
	Name           string            `json:"name"`
	ByArchitecture map[string]string `json:"by_architecture"` // names that architectures have for it
	Same           []string          `json:"same"`            // further names, which are read alone
	OnlyWith       string            `json:"only_with"`       // the normalizer without which it is another row
	Normalizer     string            `json:"normalizer"`      // the one that its tokenizers have
	Parts          []prePart         `json:"parts"`
}

// prePart is a part of a pre-tokenizer, as far as it decides where text is cut. One that is not known keeps its JSON.
type prePart struct {
	Type             string `json:"type"`
	Pattern          string `json:"pattern,omitzero"`
	UseRegex         *bool  `json:"use_regex,omitzero"`
	IndividualDigits bool   `json:"individual_digits,omitzero"`
	other            string
}

var knownCuts = sync.OnceValue(func() preTokenizers {
	var p preTokenizers
	if err := json.Unmarshal(preTokenizersJSON, &p, json.RejectUnknownMembers(true)); err != nil {
		panic(err) // the data is part of the program
	}
	for _, row := range p.Rows {
		for i, part := range row.Parts {
			if part.Pattern != "" {
				row.Parts[i].Pattern = p.Patterns[part.Pattern]
			}
		}
	}
	return p
})

func (row preRow) names() []string {
	names := append([]string{row.Name}, row.Same...)
	for _, name := range row.ByArchitecture {
		names = append(names, name)
	}
	return names
}

// rowOf finds a row by one of its names.
func rowOf(name string) (preRow, bool) {
	for _, row := range knownCuts().Rows {
		if slices.Contains(row.names(), name) {
			return row, true
		}
	}
	return preRow{}, false
}

// usualCut is the name that stands where a tokenizer has no cut before merges.
const usualCut = "default"

// ofWords reports whether a cut is that of WordPiece, which llama.cpp has no other for.
func (row preRow) ofWords() bool { return row.Parts[0].Type == "BertPreTokenizer" }

// namesFor lists the names that the cut of a kind of tokenizers may have, all or those alone that a tokenizer.json can
// be written for.
func namesFor(model string, spelled bool) []string {
	if model == modelSentencePiece {
		return []string{usualCut}
	}
	var names []string
	for _, row := range knownCuts().Rows {
		if row.ofWords() == (model == modelWordPiece) {
			names = append(names, row.names()...)
		}
	}
	if model == modelBPE && !spelled {
		names = append(names, knownCuts().Others...)
	}
	slices.Sort(names)
	return names
}

// checkAsked refuses a name that was asked for where a kind of tokenizers has no such cut.
func (o Options) checkAsked(model string, spelled bool) error {
	names := namesFor(model, spelled)
	if o.PreTokenizer == "" || slices.Contains(names, o.PreTokenizer) {
		return nil
	}
	return unsupportedf("pre-tokenizer: found %s for a tokenizer of the model %s, expected one of %s",
		tensor.Quote(o.PreTokenizer), tensor.Quote(model), strings.Join(names, ", "))
}

// preTokenizer is llama.cpp's name for what tokenizer.json spells out.
func (r *reader) preTokenizer() (string, error) {
	return r.nameFor(r.json.PreTokenizer, r.json.Normalizer)
}

func (r *reader) nameFor(part, normalizer jsontext.Value) (string, error) {
	if r.o.PreTokenizer != "" {
		return r.o.PreTokenizer, nil
	}
	var raw []jsontext.Value
	if err := flatten(part, maxNesting, "pretokenizers", &raw); err != nil {
		return "", malformedf("%s: pre_tokenizer: %v", tokenizerJSON, err)
	}
	parts := make([]prePart, len(raw))
	for i, p := range raw {
		parts[i] = cutBy(p)
	}
	var before []jsontext.Value
	if err := flatten(normalizer, maxNesting, "normalizers", &before); err != nil {
		return "", malformedf("%s: normalizer: %v", tokenizerJSON, err)
	}
	for _, row := range knownCuts().Rows {
		if !reflect.DeepEqual(row.Parts, parts) {
			continue
		}
		if w := row.OnlyWith; w != "" && !slices.ContainsFunc(before, func(n jsontext.Value) bool { return typeOf(n) == w }) {
			continue
		}
		if name, ok := row.ByArchitecture[r.o.Architecture]; ok {
			return name, nil
		}
		return row.Name, nil
	}
	return "", hint.With(fmt.Errorf("%s: found a pre-tokenizer that llama.cpp has no name for: %s: %w", tokenizerJSON,
		printed(raw), formats.ErrUnsupported),
		hint.Hint{Option: "PreTokenizer", Value: "NAME", Effect: "gives the name of one that cuts the same"})
}

// printed writes parts on one line, all but the end of very long ones.
func printed(parts []jsontext.Value) string {
	const most = 4096
	list := make([]string, len(parts))
	for i, p := range parts {
		p = slices.Clone(p)
		if p.Compact() != nil {
			return "?"
		}
		list[i] = string(p)
	}
	text := "[" + strings.Join(list, ",") + "]"
	if len(text) > most {
		return strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}

// flatten lists the parts of a Sequence, and those of the Sequences in it.
func flatten(part jsontext.Value, depth int, member string, to *[]jsontext.Value) error {
	if part == nil || part.Kind() == 'n' {
		return nil
	}
	if typeOf(part) != "Sequence" {
		*to = append(*to, part)
		return nil
	}
	var s map[string]jsontext.Value
	var list []jsontext.Value
	if json.Unmarshal(part, &s) != nil || json.Unmarshal(s[member], &list) != nil || depth == 0 {
		return fmt.Errorf("found %s, expected a Sequence with a list of parts", cut(part))
	}
	for _, p := range list {
		if err := flatten(p, depth-1, member, to); err != nil {
			return err
		}
	}
	return nil
}

// cutBy reads a part as the table has it. Split that keeps what is between the matches is the same as one that removes
// it, inverted: all of a text is matched by the expressions there are.
func cutBy(raw jsontext.Value) prePart {
	var p struct {
		Type             string                    `json:"type"`
		UseRegex         *bool                     `json:"use_regex"`
		IndividualDigits bool                      `json:"individual_digits"`
		Pattern          map[string]jsontext.Value `json:"pattern"`
		Behavior         string                    `json:"behavior"`
		Invert           bool                      `json:"invert"`
	}
	other := prePart{other: string(raw)}
	if json.Unmarshal(raw, &p) != nil {
		return other
	}
	switch p.Type {
	case "ByteLevel":
		if p.UseRegex == nil {
			yes := true
			p.UseRegex = &yes
		}
		return prePart{Type: p.Type, UseRegex: p.UseRegex}
	case "Digits":
		return prePart{Type: p.Type, IndividualDigits: p.IndividualDigits}
	case "BertPreTokenizer":
		return prePart{Type: p.Type}
	case "Split":
		pattern := text(p.Pattern["Regex"])
		if pattern != "" && (p.Behavior == "Isolated" && !p.Invert || p.Behavior == "Removed" && p.Invert) {
			return prePart{Type: p.Type, Pattern: pattern}
		}
	}
	return other
}

// parts spells a row out for a tokenizer.json.
func (row preRow) spelled() any {
	type regex struct {
		Regex string `json:"Regex"`
	}
	type split struct {
		Type     string `json:"type"`
		Pattern  regex  `json:"pattern"`
		Behavior string `json:"behavior"`
		Invert   bool   `json:"invert"`
	}
	type digits struct {
		Type       string `json:"type"`
		Individual bool   `json:"individual_digits"`
	}
	var list []any
	for _, p := range row.Parts {
		switch p.Type {
		case "Split":
			list = append(list, split{p.Type, regex{p.Pattern}, "Isolated", false})
		case "Digits":
			list = append(list, digits{p.Type, p.IndividualDigits})
		case "ByteLevel":
			list = append(list, byteLevelPart{p.Type, false, true, *p.UseRegex})
		default:
			list = append(list, typed{p.Type})
		}
	}
	if len(list) == 1 {
		return list[0]
	}
	return sequence[any]{Type: "Sequence", PreTokenizers: list}
}

// rowFor is the row that a GGUF file, or its user, names.
func rowFor(pre string, o Options) (preRow, string, error) {
	name := cmp.Or(o.PreTokenizer, pre)
	row, ok := rowOf(name)
	if !ok {
		found := "none"
		if name != "" {
			found = tensor.Quote(name)
		}
		err := unsupportedf("%s: found %s, expected one of %s", keyPre, found, strings.Join(namesFor(modelBPE, true), ", "))
		return row, "", hint.With(err,
			hint.Hint{Option: "PreTokenizer", Value: "NAME", Effect: "takes one of these that cuts the same"})
	}
	return row, name, nil
}
