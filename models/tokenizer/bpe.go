package tokenizer

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/tensor"
)

// noScore is the score of a token that has none of its own.
const noScore = -1000

// byteLevel reads byte-level BPE from tokenizer.json.
func (r *reader) byteLevel() (*vocabulary, error) {
	v, err := r.tokens(modelBPE)
	if err != nil {
		return nil, err
	}
	if v.merges, err = merges(r.json.Model.Merges); err != nil {
		return nil, err
	}
	r.json.Model.Merges = nil // which is large
	v.pre, err = r.preTokenizer()
	return v, err
}

// tokens puts the tokens of tokenizer.json where they belong, with their types.
func (r *reader) tokens(model string) (*vocabulary, error) {
	n, err := vocabSize(r.config, r.o, r.json.size())
	if err != nil {
		return nil, err
	}
	v, added, err := r.json.byID(model, n)
	if err != nil {
		return nil, err
	}
	for id, a := range added {
		if a.Special || looksSpecial(a.Content) {
			v.types[id] = control
			continue
		}
		v.types[id] = userDefined
		v.tokens[id] = strings.ReplaceAll(a.Content, space, " ")
	}
	return v, nil
}

// looksSpecial reports whether the text is that of a token that ought to be special, whatever the files say.
func looksSpecial(text string) bool {
	switch text {
	case "<pad>", "<mask>", "<2mass>", "[@BOS@]":
		return true
	}
	for _, ends := range [...][2]string{{"<|", "|>"}, {"<｜", "｜>"}, {"<unused", ">"}} {
		if strings.HasPrefix(text, ends[0]) && strings.HasSuffix(text, ends[1]) {
			return true
		}
	}
	return false
}

// merges reads the merges of tokenizer.json, which are pairs or, in older files, pairs joined by a space. In a pair a
// space inside of a token becomes a Ġ.
func merges(v jsontext.Value) ([]string, error) {
	if v == nil || v.Kind() == 'n' {
		return nil, nil
	}
	if v.Kind() != '[' {
		return nil, malformedf("%s: merges: found %s, expected a list", tokenizerJSON, cut(v))
	}
	d := jsontext.NewDecoder(bytes.NewBuffer(v))
	if _, err := d.ReadToken(); err != nil {
		return nil, malformedf("%s: merges: %v", tokenizerJSON, wrongJSON(err))
	}
	var list []string
	for d.PeekKind() != ']' {
		one, err := d.ReadValue()
		if err != nil {
			return nil, malformedf("%s: merges: %v", tokenizerJSON, wrongJSON(err))
		}
		if len(list) == maxTokens {
			return nil, fmt.Errorf("%s: merges: %w", tokenizerJSON, errTokens)
		}
		if one.Kind() == '"' {
			list = append(list, text(one))
			continue
		}
		var pair []string
		if err := json.Unmarshal(one, &pair); err != nil || len(pair) != 2 {
			return nil, malformedf("%s: merge %d: found %s, expected a string or a pair of strings", tokenizerJSON, len(list),
				cut(one))
		}
		for i := range pair {
			pair[i] = strings.ReplaceAll(pair[i], " ", "Ġ")
		}
		list = append(list, pair[0]+" "+pair[1])
	}
	if _, err := d.ReadToken(); err != nil && err != io.EOF {
		return nil, malformedf("%s: merges: %v", tokenizerJSON, wrongJSON(err))
	}
	return list, nil
}

var byteText = regexp.MustCompile(`^<0x[0-9A-Fa-f]{2}>$`)

// byteFallback reads a tokenizer.json that was made of a tokenizer.model which is not there: BPE with bytes as tokens.
// It has no scores, and its added tokens follow the vocabulary without a gap.
func (r *reader) byteFallback() (*vocabulary, error) {
	base, n := len(r.json.vocab), r.json.size()
	if n == 0 {
		return nil, malformedf("%s: found no tokens, expected some", tokenizerJSON)
	}
	v, added, err := r.json.byID(modelSentencePiece, n)
	if err != nil {
		return nil, err
	}
	v.pre, v.lenient = usualCut, true
	v.scores = make([]float32, n)
	special := map[string]bool{}
	for _, text := range r.named.all() {
		special[text] = true
	}
	for id, text := range v.tokens {
		_, isAdded := added[id]
		switch {
		case v.types[id] == unused:
			return nil, malformedf("%s: found no token with the id %d, expected %d tokens without a gap", tokenizerJSON, id, n)
		case id < base && byteText.MatchString(text):
			v.types[id] = byteToken
		case special[text]:
			v.types[id] = control
		case id >= base && isAdded:
			v.types[id] = userDefined
		}
		v.scores[id] = noScore
	}
	return v, nil
}

// checkMerge finds the two tokens of a merge.
func checkMerge(merge string) (left, right string, err error) {
	left, right, ok := strings.Cut(merge, " ")
	if !ok || left == "" || right == "" {
		return "", "", malformedf("merge %s: found no two tokens, expected them with a space between", tensor.Quote(merge))
	}
	return left, right, nil
}
