package tokenizer

import (
	"bytes"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/tensor"
)

// inside begins a token that is not the first of its word, in Hugging Face's files. In GGUF it is the other way round:
// the first of a word begins with ▁.
const inside = "##"

// wordPiece reads WordPiece from tokenizer.json.
func (r *reader) wordPiece() (*vocabulary, error) {
	if p := r.json.Model.Prefix; p != nil && *p != inside {
		return nil, unsupportedf("%s: found the continuing_subword_prefix %s, expected %s", tokenizerJSON, tensor.Quote(*p),
			inside)
	}
	v, err := r.tokens(modelWordPiece)
	if err != nil {
		return nil, err
	}
	v.lenient = true
	turnWords(v)
	v.pre, err = r.preTokenizer()
	return v, err
}

// turnWords marks the tokens that begin a word instead of those that do not.
func turnWords(v *vocabulary) {
	for id, text := range v.tokens {
		if v.types[id] == control {
			continue
		}
		if rest, ok := strings.CutPrefix(text, inside); ok {
			v.tokens[id] = rest
		} else {
			v.tokens[id] = space + text
		}
	}
}

// wordPieceLines reads WordPiece from vocab.txt, a token a line, where there is nothing else. The special tokens are
// those of tokenizer_config.json, with the usual names where it has none.
func (r *reader) wordPieceLines(b []byte) (*vocabulary, error) {
	if r.o.Architecture != "" && r.arch.TypeVocabSize == 0 {
		return nil, malformedf("found a %s alone, expected a %s or a %s", vocabTxt, tokenizerJSON, tokenizerModel)
	}
	lines := bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n"))
	n, err := vocabSize(r.config, r.o, len(lines))
	if err != nil {
		return nil, err
	}
	if len(lines) > n {
		return nil, malformedf("%s: found %d tokens, expected at most the vocab_size %d", vocabTxt, len(lines), n)
	}
	special := map[string]bool{}
	for kind, usual := range map[string]string{"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]",
		"mask": "[MASK]"} {
		if s := namedBy(r.own.members[kind+"_token"]); s.content != "" {
			usual = s.content
		}
		special[usual] = true
	}
	v := padded(modelWordPiece, n)
	v.lenient = true
	seen := make(map[string]int, len(lines))
	for id, line := range lines {
		text := string(bytes.TrimSuffix(line, []byte("\r")))
		if old, ok := seen[text]; ok {
			return nil, malformedf("%s: found the token %s in the lines %d and %d, expected it once", vocabTxt,
				tensor.Quote(text), old+1, id+1)
		}
		if !utf8.ValidString(text) {
			return nil, malformedf("%s: line %d: found %s, expected UTF-8", vocabTxt, id+1, tensor.Quote(text))
		}
		seen[text] = id
		v.tokens[id], v.types[id] = text, normal
		if special[text] {
			v.types[id] = control
		}
	}
	turnWords(v)
	v.pre, err = r.nameFor(jsontext.Value(`{"type":"BertPreTokenizer"}`), nil)
	return v, err
}
