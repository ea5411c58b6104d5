package tokenizer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// config is config.json, with text_config laid over it where the size of the vocabulary is asked for.
type config struct {
	root, text map[string]jsontext.Value
}

func readConfig(b []byte) (*config, error) {
	c := &config{}
	if b == nil {
		return c, nil
	}
	parsed, err := models.ParseConfig(b)
	if err != nil {
		if errors.Is(err, models.ErrLimit) {
			return nil, fmt.Errorf("%s: %w: %w", configJSON, err, formats.ErrLimit)
		}
		return nil, malformedf("%s: %v", configJSON, err)
	}
	c.root, _ = parsed.Members("")
	c.text, _ = parsed.Members("text_config")
	return c, nil
}

// count is a number of things, false where there is none or null.
func (c *config) count(name string) (int, bool, error) {
	v, ok := c.text[name]
	if !ok {
		v = c.root[name]
	}
	if v == nil || v.Kind() == 'n' {
		return 0, false, nil
	}
	n, err := strconv.ParseInt(string(v), 10, 32)
	if err != nil || n < 0 {
		return 0, false, malformedf("%s: %s: found %s, expected a whole number from 0 to 2^31-1", configJSON, name, cut(v))
	}
	return int(n), true, nil
}

// id is the id of a special token; a list of several, as eos_token_id may be, is passed over as the converter does.
func (c *config) id(name string) (int64, bool, error) {
	v := c.root[name]
	if v == nil || v.Kind() == 'n' {
		v = c.text[name]
	}
	if v == nil || v.Kind() != '0' {
		return 0, false, nil
	}
	n, err := strconv.ParseInt(string(v), 10, 64)
	if err != nil {
		return 0, false, nil // a number, but no whole one
	}
	if n < 0 {
		return 0, false, malformedf("%s: %s: found %d, expected 0 or more", configJSON, name, n)
	}
	return n, true, nil
}

// tokenizerOwn is tokenizer_config.json.
type tokenizerOwn struct {
	members map[string]jsontext.Value
	order   []string  // the names of members, as the file has them
	decoder []decoded // added_tokens_decoder
}

// decoded is a token of added_tokens_decoder.
type decoded struct {
	id      int
	content string
	special bool
}

func readOwn(b []byte) (*tokenizerOwn, error) {
	t := &tokenizerOwn{}
	if b == nil {
		return t, nil
	}
	if err := unmarshal(tokenizerConfig, b, &t.members); err != nil {
		return nil, err
	}
	if err := eachMember(bytes.TrimSpace(b), func(name string, _ jsontext.Value) error {
		t.order = append(t.order, name)
		return nil
	}); err != nil {
		return nil, malformedf("%s: %v", tokenizerConfig, wrongJSON(err))
	}
	list := t.members["added_tokens_decoder"]
	if list == nil || list.Kind() == 'n' {
		return t, nil
	}
	err := eachMember(list, func(name string, value jsontext.Value) error {
		var token struct {
			Content *string `json:"content"`
			Special bool    `json:"special"`
		}
		id, err := strconv.ParseInt(name, 10, 32)
		if err != nil || id < 0 {
			return fmt.Errorf("found the id %s, expected a whole number", tensor.Quote(name))
		}
		if err := json.Unmarshal(value, &token); err != nil || token.Content == nil {
			return fmt.Errorf("token %d: found %s, expected an object with content and special", id, cut(value))
		}
		t.decoder = append(t.decoder, decoded{int(id), *token.Content, token.Special})
		return nil
	})
	if err != nil {
		return nil, malformedf("%s: added_tokens_decoder: %v", tokenizerConfig, err)
	}
	return t, nil
}

// text is a member that is a string, else "".
func (t *tokenizerOwn) text(name string) string { return text(t.members[name]) }

// flag is a member that is a bool, false where it is none.
func (t *tokenizerOwn) flag(name string) (value, ok bool) {
	switch v := t.members[name]; {
	case v == nil:
		return false, false
	default:
		return v.Kind() == 't', v.Kind() == 't' || v.Kind() == 'f'
	}
}

// tokenizerFile is tokenizer.json.
type tokenizerFile struct {
	AddedTokens   []addedToken   `json:"added_tokens"`
	Normalizer    jsontext.Value `json:"normalizer"`
	PreTokenizer  jsontext.Value `json:"pre_tokenizer"`
	PostProcessor jsontext.Value `json:"post_processor"`
	Decoder       jsontext.Value `json:"decoder"`
	Model         struct {
		Type         string         `json:"type"`
		Vocab        jsontext.Value `json:"vocab"`
		Merges       jsontext.Value `json:"merges"`
		ByteFallback bool           `json:"byte_fallback"`
		Prefix       *string        `json:"continuing_subword_prefix"`
	} `json:"model"`

	vocab []entry
	more  []addedToken // those that other files add, without ids
}

// addedToken is a token that is found in text before all else.
type addedToken struct {
	ID         int64  `json:"id"`
	Content    string `json:"content"`
	SingleWord bool   `json:"single_word"`
	LStrip     bool   `json:"lstrip"`
	RStrip     bool   `json:"rstrip"`
	Normalized bool   `json:"normalized"`
	Special    bool   `json:"special"`
}

// errTokens says that there are more tokens, or merges, than a vocabulary has.
var errTokens = fmt.Errorf("found more than %d, expected fewer: %w", maxTokens, formats.ErrLimit)

// entry is a token of a model's vocabulary.
type entry struct {
	text string
	id   int
}

func readTokenizerFile(b []byte) (*tokenizerFile, error) {
	t := &tokenizerFile{}
	if err := unmarshal(tokenizerJSON, b, t); err != nil {
		return nil, err
	}
	for _, a := range t.AddedTokens {
		if a.ID < 0 || a.ID > math.MaxInt32 {
			return nil, malformedf("%s: added token %s: found the id %d, expected 0 to 2^31-1", tokenizerJSON,
				tensor.Quote(a.Content), a.ID)
		}
	}
	if len(t.AddedTokens) > maxTokens {
		return nil, fmt.Errorf("%s: added_tokens: %w", tokenizerJSON, errTokens)
	}
	if t.Model.Vocab.Kind() != '{' {
		return t, nil // Unigram has a list; its kind is refused
	}
	err := eachMember(t.Model.Vocab, func(name string, value jsontext.Value) error {
		id, err := wholeNumber(value)
		if err != nil {
			return malformedToken(name, value)
		}
		if len(t.vocab) == maxTokens {
			return errTokens
		}
		t.vocab = append(t.vocab, entry{name, id})
		return nil
	})
	switch {
	case errors.Is(err, formats.ErrLimit):
		return nil, fmt.Errorf("%s: vocab: %w", tokenizerJSON, err)
	case err != nil:
		return nil, malformedf("%s: vocab: %v", tokenizerJSON, err)
	}
	t.Model.Vocab = nil // which is large
	return t, nil
}

// kind is the type of the model; files of old releases leave that of BPE out.
func (t *tokenizerFile) kind() string {
	if t.Model.Type == "" && t.Model.Merges != nil {
		return "BPE"
	}
	return t.Model.Type
}

func (t *tokenizerFile) decodesInSequence() bool { return typeOf(t.Decoder) == "Sequence" }

// typeOf is the type of a part, "" where there is none.
func typeOf(part jsontext.Value) string {
	var p struct {
		Type string `json:"type"`
	}
	if part == nil || json.Unmarshal(part, &p) != nil {
		return ""
	}
	return p.Type
}

// byID puts the tokens of vocab and added_tokens where they belong. An id past n is an error. added has those of
// added_tokens, by id.
func (t *tokenizerFile) byID(model string, n int) (v *vocabulary, added map[int]addedToken, err error) {
	v = padded(model, n)
	ids := make(map[string]int, len(t.vocab)+len(t.AddedTokens))
	put := func(text string, id int) error {
		switch old, ok := ids[text]; {
		case ok && old != id:
			return malformedf("%s: token %s: found the ids %d and %d, expected one", tokenizerJSON, tensor.Quote(text), old, id)
		case id >= n:
			return malformedf("%s: token %s: found the id %d, expected less than the vocab_size %d", tokenizerJSON,
				tensor.Quote(text), id, n)
		case !ok && v.types[id] != unused:
			return malformedf("%s: id %d: found the tokens %s and %s, expected one", tokenizerJSON, id,
				tensor.Quote(v.tokens[id]), tensor.Quote(text))
		}
		ids[text] = id
		v.tokens[id], v.types[id] = text, normal
		return nil
	}
	for _, e := range t.vocab {
		if err := put(e.text, e.id); err != nil {
			return nil, nil, err
		}
	}
	// Whatever the file says, the library gives an added token the id that follows the vocabulary and the added ones so
	// far, unless the vocabulary has it.
	next := len(t.vocab)
	added = make(map[int]addedToken, len(t.AddedTokens)+len(t.more))
	for _, a := range t.AddedTokens {
		if _, ok := ids[a.Content]; !ok && int(a.ID) != next {
			return nil, nil, malformedf("%s: added token %s: found the id %d, expected %d, the next one", tokenizerJSON,
				tensor.Quote(a.Content), a.ID, next)
		}
		next = max(next, int(a.ID)+1)
		if err := put(a.Content, int(a.ID)); err != nil {
			return nil, nil, err
		}
		added[int(a.ID)] = a
	}
	for _, a := range t.more {
		id, ok := ids[a.Content]
		if !ok {
			id = next
		}
		next = max(next, id+1)
		if err := put(a.Content, id); err != nil {
			return nil, nil, fmt.Errorf("%s adds a token: %w", tokenizerConfig, err)
		}
		a.ID = int64(id)
		added[id] = a
	}
	return v, added, nil
}

// size is the number of tokens.
func (t *tokenizerFile) size() int {
	texts := make(map[string]struct{}, len(t.vocab))
	for _, e := range t.vocab {
		texts[e.text] = struct{}{}
	}
	for _, list := range [...][]addedToken{t.AddedTokens, t.more} {
		for _, a := range list {
			texts[a.Content] = struct{}{}
		}
	}
	return len(texts)
}

func wholeNumber(v jsontext.Value) (int, error) {
	n, err := strconv.ParseUint(string(v), 10, 31)
	return int(n), err
}

func malformedToken(text string, id jsontext.Value) error {
	return fmt.Errorf("token %s: found the id %s, expected a whole number from 0 to 2^31-1", tensor.Quote(text), cut(id))
}

// unmarshal reads a JSON file. Its text is to be UTF-8, without a name twice in one object.
func unmarshal(name string, b []byte, to any) error {
	if err := json.Unmarshal(b, to); err != nil {
		return malformedf("%s: found what is no JSON that it should have: %v", name, wrongJSON(err))
	}
	return nil
}

// eachMember goes through an object in its order.
func eachMember(v jsontext.Value, each func(name string, value jsontext.Value) error) error {
	if v.Kind() != '{' {
		return fmt.Errorf("found %s, expected an object", cut(v))
	}
	d := jsontext.NewDecoder(bytes.NewBuffer(v))
	if _, err := d.ReadToken(); err != nil {
		return err
	}
	for d.PeekKind() != '}' {
		name, err := d.ReadToken()
		if err != nil {
			return err
		}
		key := name.String()
		value, err := d.ReadValue()
		if err != nil {
			return err
		}
		if err := each(key, value); err != nil {
			return err
		}
	}
	_, err := d.ReadToken()
	if err == io.EOF {
		return nil
	}
	return err
}

// text is a string of JSON, "" where it is none.
func text(v jsontext.Value) string {
	if v == nil || v.Kind() != '"' {
		return ""
	}
	b, err := jsontext.AppendUnquote(nil, v)
	if err != nil {
		return ""
	}
	return string(b)
}

// cut writes JSON for an error.
func cut(v jsontext.Value) string {
	const most = 200
	v = bytes.Clone(v)
	if v.Compact() != nil {
		return tensor.Quote(string(v))
	}
	if len(v) > most {
		return strings.ToValidUTF8(string(v[:most]), "") + "…"
	}
	return string(v)
}

// wrongJSON says in one line what is wrong with JSON, and where, without the names of types of this program.
func wrongJSON(err error) string {
	other, isOther := err.(*json.SemanticError)
	if syntax, ok := errors.AsType[*jsontext.SyntacticError](err); ok && (isOther || err == error(syntax)) {
		return fmt.Sprintf("%v at byte %d%s", syntax.Err, syntax.ByteOffset, pointed(syntax.JSONPointer))
	}
	if isOther && other.JSONKind != 0 {
		return fmt.Sprintf("%s in place of another value%s", kindOf(other.JSONKind), pointed(other.JSONPointer))
	}
	return strings.ReplaceAll(strings.TrimPrefix(err.Error(), "json: "), "\n", " ")
}

// kindOf is what a value of JSON is called.
func kindOf(k jsontext.Kind) string {
	switch k {
	case jsontext.KindBeginArray:
		return "an array"
	case jsontext.KindBeginObject:
		return "an object"
	case jsontext.KindNull, jsontext.KindTrue, jsontext.KindFalse:
		return k.String()
	}
	return "a " + k.String()
}

// pointed names a place in JSON, for the end of an error.
func pointed(p jsontext.Pointer) string {
	const most = 100
	switch {
	case p == "":
		return ""
	case len(p) > most:
		p = p[:most] + "…"
	}
	return " in " + tensor.Quote(strings.ToValidUTF8(string(p), "�"))
}
