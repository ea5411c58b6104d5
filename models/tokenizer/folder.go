package tokenizer

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// FromGGUF makes the files of a folder of the keys of a GGUF file. Notes say what could not be kept.
func FromGGUF(keys formats.Metadata, o Options) (Files, []string, error) {
	w := &writer{keys: keys, o: o, arch: architectureOf(o.Architecture), files: Files{}}
	if err := w.read(); err != nil {
		return nil, nil, err
	}
	err := o.checkAsked(w.v.model, true)
	switch model := w.v.model; {
	case err != nil:
	case model == modelSentencePiece:
		err = w.sentencePiece()
	case model == modelBPE:
		err = w.byteLevel()
	case model == modelWordPiece:
		err = w.wordPiece()
	default:
		err = unsupportedf("%s: found %s, expected %s, %s or %s", keyModel, tensor.Quote(w.v.model), modelSentencePiece,
			modelBPE, modelWordPiece)
	}
	if err != nil {
		return nil, nil, err
	}
	return w.files, w.notes, nil
}

// writer writes the files of a folder.
type writer struct {
	keys  formats.Metadata
	o     Options
	arch  architecture
	v     *vocabulary
	ids   map[string]int  // of special tokens, by their kinds
	add   map[string]bool // what is added to a text, where the keys say it
	files Files
	notes []string
}

func (w *writer) note(format string, args ...any) {
	w.notes = append(w.notes, fmt.Sprintf(format, args...))
}

// read takes the keys, and holds them against each other.
func (w *writer) read() error {
	v := &vocabulary{}
	w.v = v
	for _, err := range []error{
		key(w.keys, keyModel, &v.model), key(w.keys, keyPre, &v.pre), key(w.keys, keyTokens, &v.tokens),
		listOfWhole(w.keys, keyTypes, &v.types), key(w.keys, keyScores, &v.scores), key(w.keys, keyMerges, &v.merges),
	} {
		if err != nil {
			return err
		}
	}
	switch {
	case v.model == "":
		return malformedf("found no %s, expected the kind of the tokenizer", keyModel)
	case len(v.tokens) == 0:
		return malformedf("found no %s, expected tokens", keyTokens)
	case v.types != nil && len(v.types) != len(v.tokens):
		return malformedf("%s: found %d values, expected %d, one a token", keyTypes, len(v.types), len(v.tokens))
	case v.scores != nil && len(v.scores) != len(v.tokens):
		return malformedf("%s: found %d values, expected %d, one a token", keyScores, len(v.scores), len(v.tokens))
	case v.types == nil:
		v.types = slices.Repeat([]int32{normal}, len(v.tokens))
	}
	for id, score := range v.scores {
		if math.IsNaN(float64(score)) {
			return malformedf("%s: token %d: found a NaN, expected a number", keyScores, id)
		}
	}
	v.types = slices.Clone(v.types)
	for id, kind := range v.types {
		switch {
		case kind == 0: // undefined
			v.types[id] = normal
		case kind < 0 || kind > byteToken:
			return malformedf("%s: token %d: found the type %d, expected 0 to %d", keyTypes, id, kind, byteToken)
		}
	}
	w.ids, w.add = map[string]int{}, map[string]bool{}
	for _, kind := range slices.Sorted(maps.Keys(idKeys)) {
		name := idKeys[kind]
		value := w.keys.Get(name)
		if value == nil {
			continue
		}
		id, ok := anyWhole(reflect.ValueOf(value))
		switch {
		case !ok:
			return malformedf("%s: found a %T, expected a whole number", name, value)
		case id < 0 || id >= int64(len(v.tokens)):
			return malformedf("%s: found the id %d, expected less than the number of tokens, %d", name, id, len(v.tokens))
		}
		w.ids[kind] = int(id)
	}
	for _, kind := range addKinds {
		var add bool
		if err := key(w.keys, addKey(kind), &add); err != nil {
			return err
		}
		if w.keys.Get(addKey(kind)) != nil {
			w.add[kind] = add
		}
	}
	return nil
}

// anyWhole is a number of any type of whole numbers: not all that write GGUF take the one that llama.cpp has.
func anyWhole(v reflect.Value) (int64, bool) {
	switch {
	case v.CanInt():
		return v.Int(), true
	case v.CanUint():
		return int64(min(v.Uint(), math.MaxInt64)), true
	}
	return 0, false
}

// listOfWhole takes a list of whole numbers of any type, of which those that are too large become -1.
func listOfWhole(keys formats.Metadata, name string, to *[]int32) error {
	value := keys.Get(name)
	list := reflect.ValueOf(value)
	if _, same := value.([]int32); value == nil || same || list.Kind() != reflect.Slice {
		return key(keys, name, to)
	}
	all := make([]int32, list.Len())
	for i := range all {
		n, ok := anyWhole(list.Index(i))
		if !ok {
			return malformedf("%s: found a %T, expected whole numbers", name, value)
		}
		if all[i] = -1; n >= 0 && n <= math.MaxInt32 {
			all[i] = int32(n)
		}
	}
	*to = all
	return nil
}

// key takes a value that is there, and refuses one of another type.
func key[T any](keys formats.Metadata, name string, to *T) error {
	value := keys.Get(name)
	if value == nil {
		return nil
	}
	v, ok := value.(T)
	if !ok {
		return malformedf("%s: found a %T, expected a %T", name, value, *to)
	}
	*to = v
	return nil
}

// sentencePiece writes tokenizer.model. Tokens that follow the last piece, and all that have been added, are in
// tokenizer_config.json.
func (w *writer) sentencePiece() error {
	v := w.v
	if v.scores == nil {
		v.scores = make([]float32, len(v.tokens))
	}
	added := func(id int) bool {
		return v.scores[id] == noScore && (v.types[id] == control || v.types[id] == userDefined)
	}
	m := model{unknown: -1, bos: w.id("bos"), eos: w.id("eos"), pad: -1, dummyPrefix: true}
	end := 0
	for id, kind := range v.types {
		if kind == normal || kind == unknown || kind == byteToken || kind == control && !added(id) {
			end = id + 1
		}
	}
	if err := key(w.keys, keySpacePrefix, &m.dummyPrefix); err != nil {
		return err
	}
	seen := make(map[string]int, end)
	bytesFound, scored := 0, false
	for id, text := range v.tokens[:end] {
		p := piece{text, v.scores[id], v.types[id]}
		switch p.kind {
		case userDefined:
			p.text = strings.ReplaceAll(text, " ", space)
		case byteToken:
			bytesFound++
		case unknown:
			if m.unknown >= 0 {
				return malformedf("%s: found the tokens %d and %d of type 2, unknown, expected one", keyTypes, m.unknown, id)
			}
			m.unknown = id
		}
		scored = scored || p.kind == normal && p.score != noScore
		switch old, ok := seen[p.text]; {
		case p.text == "":
			return malformedf("%s: token %d: found an empty one, expected text", keyTokens, id)
		case ok:
			return malformedf("%s: found %s with the ids %d and %d, expected it once", keyTokens, tensor.Quote(p.text), old, id)
		}
		seen[p.text] = id
		m.pieces = append(m.pieces, p)
	}
	if bytesFound != 0 && bytesFound != 256 {
		return malformedf("%s: found %d tokens of type 6, bytes, expected 256 or none", keyTypes, bytesFound)
	}
	m.byteFallback = bytesFound > 0
	if m.unknown < 0 {
		id, ok := w.ids["unk"]
		if !ok {
			id, ok = seen["<unk>"]
		}
		if !ok || id >= end {
			return malformedf("%s: found no token of type 2, unknown, expected one", keyTypes)
		}
		m.unknown, m.pieces[id].kind = id, unknown
	}
	// What sentencepiece takes for bos and eos has to be there, and of type control.
	for _, id := range []*int{&m.bos, &m.eos} {
		if *id >= end || *id >= 0 && m.pieces[*id].kind != control {
			*id = -1
		}
	}
	if !scored {
		w.note("%s: no token has a score of its own: the order of merges is lost, text may become other tokens", keyScores)
	}
	w.files[tokenizerModel] = m.append(nil)

	var list []addedToken
	for id := range v.tokens {
		if id < end && !added(id) || v.types[id] != control && v.types[id] != userDefined {
			continue
		}
		text := v.tokens[id]
		if id < end && v.types[id] == userDefined && !w.arch.AddedAsTheyAre {
			text = m.pieces[id].text // with the ▁ that it had
		}
		list = append(list, addedToken{ID: int64(id), Content: text, Special: v.types[id] == control})
	}
	own, err := w.own(list)
	if err != nil {
		return err
	}
	return w.write(tokenizerConfig, own)
}

// id is the id of a special token, -1 where there is none.
func (w *writer) id(kind string) int {
	if id, ok := w.ids[kind]; ok {
		return id
	}
	return -1
}

// object is a JSON object with an order.
type object []member

type member struct {
	name  string
	value any
}

func (o *object) set(name string, value any) { *o = append(*o, member{name, value}) }

// MarshalJSONTo writes the members in their order.
func (o object) MarshalJSONTo(e *jsontext.Encoder) error {
	if err := e.WriteToken(jsontext.BeginObject); err != nil {
		return err
	}
	for _, m := range o {
		if err := e.WriteToken(jsontext.String(m.name)); err != nil {
			return err
		}
		if err := json.MarshalEncode(e, m.value); err != nil {
			return err
		}
	}
	return e.WriteToken(jsontext.EndObject)
}

// write writes a JSON file, as transformers lays it out.
func (w *writer) write(name string, value any) error {
	b, err := json.Marshal(value, jsontext.WithIndent("  "))
	if err != nil {
		return malformedf("%s: found text that is no UTF-8, expected it for JSON: %v", name, wrongJSON(err))
	}
	w.files[name] = append(b, '\n')
	return nil
}

// own makes tokenizer_config.json, with tokens that are added to those of another file.
func (w *writer) own(added []addedToken) (*object, error) {
	o := &object{}
	class := "PreTrainedTokenizerFast"
	switch {
	case w.v.model == modelSentencePiece && w.arch.Class != "":
		class = w.arch.Class
	case w.v.model == modelSentencePiece:
		class = "LlamaTokenizer"
	case w.v.model == modelWordPiece:
		class = "BertTokenizer"
	}
	o.set("tokenizer_class", class)
	// Where texts end with another token than eos, that one is called eos in GGUF, and eos is eot.
	named := maps.Clone(w.ids)
	if eot, ok := named["eot"]; ok && w.add["eos"] {
		named["eos"] = eot
	}
	kinds := slices.Clone(specialKinds)
	if w.v.model == modelWordPiece {
		// What begins and ends a text is called cls and sep there.
		if id, ok := named["bos"]; ok {
			named["cls"] = id
		}
		if id, ok := named["eos"]; ok {
			if _, ok := named["sep"]; !ok {
				named["sep"] = id
			}
		}
		kinds = slices.DeleteFunc(kinds, func(kind string) bool {
			return kind == "bos" || kind == "eos" && named["eos"] == named["sep"]
		})
	}
	if _, ok := named["unk"]; !ok && w.v.model == modelSentencePiece {
		if id := slices.Index(w.v.types, unknown); id >= 0 {
			named["unk"] = id
		}
	}
	for _, kind := range kinds {
		id, ok := named[kind]
		// Another token that is named here would become special.
		if ok && (w.v.types[id] == control || w.v.types[id] == unknown && w.v.model == modelSentencePiece) {
			o.set(kind+"_token", w.v.tokens[id])
		}
	}
	for _, kind := range addKinds {
		if add, ok := w.add[kind]; ok && w.v.model != modelWordPiece {
			o.set("add_"+kind+"_token", add)
		}
	}
	if w.arch.ReadsAddPrefixSpace && w.keys.Get(keySpacePrefix) != nil {
		var add bool
		if err := key(w.keys, keySpacePrefix, &add); err != nil {
			return nil, err
		}
		o.set("add_prefix_space", add)
	}
	var list object
	for _, a := range added {
		list.set(fmt.Sprint(a.ID), object{{"content", a.Content}, {"lstrip", a.LStrip}, {"normalized", a.Normalized},
			{"rstrip", a.RStrip}, {"single_word", a.SingleWord}, {"special", a.Special}})
	}
	if list != nil {
		o.set("added_tokens_decoder", list)
	}
	o.set("clean_up_tokenization_spaces", false)
	return o, w.chatTemplates(o)
}

func (w *writer) chatTemplates(o *object) error {
	var main string
	if err := key(w.keys, keyTemplate, &main); err != nil {
		return err
	}
	var names []string
	if err := key(w.keys, keyTemplates, &names); err != nil {
		return err
	}
	if len(names) == 0 {
		if w.keys.Get(keyTemplate) != nil {
			o.set("chat_template", main)
		}
		return nil
	}
	if len(names) > maxTemplates {
		return fmt.Errorf("%s: found %d names, expected at most %d: %w", keyTemplates, len(names), maxTemplates,
			formats.ErrLimit)
	}
	var list []object
	if w.keys.Get(keyTemplate) != nil {
		list = append(list, object{{"name", "default"}, {"template", main}})
	}
	for _, name := range names {
		var text string
		if err := key(w.keys, keyTemplate+"."+name, &text); err != nil {
			return err
		}
		if w.keys.Get(keyTemplate+"."+name) == nil {
			w.note("%s: the template %s is named and not there", keyTemplates, tensor.Quote(name))
			continue
		}
		list = append(list, object{{"name", name}, {"template", text}})
	}
	o.set("chat_template", list)
	return nil
}

// Parts of a tokenizer.json, in the order in which they are written.
type (
	typed struct {
		Type string `json:"type"`
	}
	sequence[T any] struct {
		Type          string `json:"type"`
		PreTokenizers []T    `json:"pretokenizers,omitzero"`
		Processors    []T    `json:"processors,omitzero"`
		Normalizers   []T    `json:"normalizers,omitzero"`
	}
	byteLevelPart struct {
		Type           string `json:"type"`
		AddPrefixSpace bool   `json:"add_prefix_space"`
		TrimOffsets    bool   `json:"trim_offsets"`
		UseRegex       bool   `json:"use_regex"`
	}
	// written is a whole tokenizer.json.
	written struct {
		Version       string       `json:"version"`
		Truncation    any          `json:"truncation"`
		Padding       any          `json:"padding"`
		AddedTokens   []addedToken `json:"added_tokens"`
		Normalizer    any          `json:"normalizer"`
		PreTokenizer  any          `json:"pre_tokenizer"`
		PostProcessor any          `json:"post_processor"`
		Decoder       any          `json:"decoder"`
		Model         object       `json:"model"`
	}
)

// byteLevel writes byte-level BPE as tokenizer.json.
func (w *writer) byteLevel() error {
	row, name, err := rowFor(w.v.pre, w.o)
	if err != nil {
		return err
	}
	ids, added, err := w.byText()
	if err != nil {
		return err
	}
	apart, err := w.apart(ids, added)
	if err != nil {
		return err
	}
	post, err := w.postProcessor()
	if err != nil {
		return err
	}
	var pairs bytes.Buffer
	e := jsontext.NewEncoder(&pairs)
	if err := e.WriteToken(jsontext.BeginArray); err != nil {
		return err
	}
	for _, m := range w.v.merges {
		left, right, err := checkMerge(m)
		if err != nil {
			return fmt.Errorf("%s: %w", keyMerges, err)
		}
		for _, token := range []jsontext.Token{jsontext.BeginArray, jsontext.String(left), jsontext.String(right),
			jsontext.EndArray} {
			if err := e.WriteToken(token); err != nil {
				return malformedf("%s: %s: found no UTF-8, expected it for JSON", keyMerges, tensor.Quote(m))
			}
		}
	}
	if err := e.WriteToken(jsontext.EndArray); err != nil {
		return err
	}
	f := written{Version: "1.0", AddedTokens: added, PreTokenizer: row.spelled(), PostProcessor: post,
		Decoder: byteLevelPart{"ByteLevel", true, true, true}}
	if f.Normalizer, err = w.normalizer(row); err != nil {
		return err
	}
	vocab, err := w.vocab(apart)
	if err != nil {
		return err
	}
	f.Model = object{{"type", "BPE"}, {"dropout", nil}, {"unk_token", nil}, {"continuing_subword_prefix", nil},
		{"end_of_word_suffix", nil}, {"fuse_unk", false}, {"byte_fallback", false},
		{"ignore_merges", slices.Contains(knownCuts().IgnoreMerges, name)},
		{"vocab", vocab}, {"merges", jsontext.Value(pairs.Bytes())}}
	if err := w.write(tokenizerJSON, f); err != nil {
		return err
	}
	own, err := w.own(nil)
	if err != nil {
		return err
	}
	return w.write(tokenizerConfig, own)
}

// normalizer writes what is done to a text first: what tokenizers with that cut do, and what the keys say.
func (w *writer) normalizer(row preRow) (any, error) {
	var list []any
	if row.Normalizer != "" {
		list = append(list, typed{row.Normalizer})
	}
	for _, k := range []struct{ key, kind string }{{keyLowercase, "Lowercase"}, {keyAccents, "StripAccents"}} {
		var yes bool
		if err := key(w.keys, k.key, &yes); err != nil {
			return nil, err
		}
		if yes {
			list = append(list, typed{k.kind})
		}
	}
	switch len(list) {
	case 0:
		return nil, nil
	case 1:
		return list[0], nil
	}
	return sequence[any]{Type: "Sequence", Normalizers: list}, nil
}

// byText lists the tokens by their texts, and those that are added.
func (w *writer) byText() (ids map[string]int, added []addedToken, err error) {
	ids = make(map[string]int, len(w.v.tokens))
	added = []addedToken{}
	for id, text := range w.v.tokens {
		kind := w.v.types[id]
		if kind == unused {
			continue
		}
		switch old, ok := ids[text]; {
		case ok:
			return nil, nil, malformedf("%s: found %s with the ids %d and %d, expected it once", keyTokens, tensor.Quote(text),
				old, id)
		case !utf8.ValidString(text):
			return nil, nil, unsupportedf("%s: token %d: found %s, which is no UTF-8, expected text that a %s can hold",
				keyTokens, id, tensor.Quote(text), tokenizerJSON)
		}
		ids[text] = id
		if kind == control || kind == userDefined {
			if text == "" {
				return nil, nil, malformedf("%s: token %d: found an empty one, expected text", keyTokens, id)
			}
			added = append(added, addedToken{ID: int64(id), Content: text, Special: kind == control})
		}
	}
	return ids, added, nil
}

// apart reports whether the added tokens can stand beside the vocabulary: there they get the ids that follow it, one
// after the other. Where they have others, or merges make them, they are a part of it. The merges are held against the
// tokens.
func (w *writer) apart(ids map[string]int, added []addedToken) (bool, error) {
	base := 0
	for _, kind := range w.v.types {
		if kind != unused && kind != control && kind != userDefined {
			base++
		}
	}
	apart := true
	for i, a := range added {
		apart = apart && int(a.ID) == base+i
	}
	for _, m := range w.v.merges {
		left, right, err := checkMerge(m)
		if err != nil {
			return false, fmt.Errorf("%s: %w", keyMerges, err)
		}
		for _, text := range []string{left, right, left + right} {
			id, ok := ids[text]
			if !ok {
				return false, malformedf("%s: %s: found no token %s, expected it among the tokens", keyMerges, tensor.Quote(m),
					tensor.Quote(text))
			}
			if kind := w.v.types[id]; kind == control || kind == userDefined {
				apart = false
			}
		}
	}
	return apart, nil
}

// vocab writes the vocabulary, with its added tokens or without.
func (w *writer) vocab(apart bool) (jsontext.Value, error) {
	var b bytes.Buffer
	e := jsontext.NewEncoder(&b)
	if err := e.WriteToken(jsontext.BeginObject); err != nil {
		return nil, err
	}
	for id, text := range w.v.tokens {
		kind := w.v.types[id]
		if kind == unused || apart && (kind == control || kind == userDefined) {
			continue
		}
		if err := e.WriteToken(jsontext.String(text)); err != nil {
			return nil, malformedf("%s: token %d: %v", keyTokens, id, wrongJSON(err))
		}
		if err := e.WriteToken(jsontext.Int(int64(id))); err != nil {
			return nil, err
		}
	}
	if err := e.WriteToken(jsontext.EndObject); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// Parts of a template.
type (
	templateText struct {
		ID     string `json:"id"`
		TypeID int    `json:"type_id"`
	}
	templateSpecial struct {
		SpecialToken templateText `json:"SpecialToken"`
	}
	templateSequence struct {
		Sequence templateText `json:"Sequence"`
	}
	templateIDs struct {
		ID     string   `json:"id"`
		IDs    []int    `json:"ids"`
		Tokens []string `json:"tokens"`
	}
	templateProcessing struct {
		Type          string `json:"type"`
		Single        []any  `json:"single"`
		Pair          []any  `json:"pair"`
		SpecialTokens object `json:"special_tokens"`
	}
)

// postProcessor writes what is added to a text. It is made so that the keys come out of it again: a ByteLevel says what
// is not added, and what is between two texts says whether anything separates them.
func (w *writer) postProcessor() (any, error) {
	var parts []any
	bos, saysBOS := w.add["bos"]
	eos, saysEOS := w.add["eos"]
	if saysBOS && saysEOS && !(bos && eos) {
		parts = append(parts, byteLevelPart{"ByteLevel", true, false, true})
	}
	if bos || eos {
		t, err := w.template()
		if err != nil {
			return nil, err
		}
		parts = append(parts, t)
	}
	switch len(parts) {
	case 0:
		return nil, nil
	case 1:
		return parts[0], nil
	}
	return sequence[any]{Type: "Sequence", Processors: parts}, nil
}

func (w *writer) template() (*templateProcessing, error) {
	t := &templateProcessing{Type: "TemplateProcessing"}
	special := func(kind string, second int) (any, error) {
		id, ok := w.ids[kind]
		if !ok {
			return nil, malformedf("%s: found true without %s, expected the id of what is added", addKey(kind), idKeys[kind])
		}
		text := w.v.tokens[id]
		if !slices.ContainsFunc(t.SpecialTokens, func(m member) bool { return m.name == text }) {
			t.SpecialTokens.set(text, templateIDs{text, []int{id}, []string{text}})
		}
		return templateSpecial{templateText{text, second}}, nil
	}
	a, b := templateSequence{templateText{"A", 0}}, templateSequence{templateText{"B", 1}}
	t.Single, t.Pair = []any{a}, []any{a}
	_, separated := w.add["sep"]
	if w.add["bos"] {
		s, err := special("bos", 0)
		if err != nil {
			return nil, err
		}
		t.Single, t.Pair = []any{s, a}, []any{s, a}
		if separated && !w.add["sep"] && !w.add["eos"] {
			second, err := special("bos", 1)
			if err != nil {
				return nil, err
			}
			t.Pair = append(t.Pair, second)
		}
	}
	if w.add["eos"] {
		s, err := special("eos", 0)
		if err != nil {
			return nil, err
		}
		t.Single = append(t.Single, s)
		if separated {
			t.Pair = append(t.Pair, s)
		}
		if w.add["sep"] {
			t.Pair = append(t.Pair, s)
		}
	} else if w.add["sep"] {
		kind := "sep"
		if _, ok := w.ids[kind]; !ok {
			kind = "eos"
		}
		s, err := special(kind, 0)
		if err != nil {
			return nil, err
		}
		t.Pair = append(t.Pair, s)
	}
	t.Pair = append(t.Pair, b)
	if w.add["eos"] {
		s, err := special("eos", 1)
		if err != nil {
			return nil, err
		}
		t.Pair = append(t.Pair, s)
	}
	return t, nil
}

// wordPiece writes WordPiece as tokenizer.json and vocab.txt.
func (w *writer) wordPiece() error {
	v := w.v
	v.tokens = slices.Clone(v.tokens)
	var lines bytes.Buffer
	for id, text := range v.tokens {
		if v.types[id] != control {
			if rest, ok := strings.CutPrefix(text, space); ok {
				text = rest
			} else {
				text = inside + text
			}
		}
		if strings.ContainsAny(text, "\r\n") {
			return unsupportedf("%s: token %d: found %s, expected text on one line for %s", keyTokens, id, tensor.Quote(text),
				vocabTxt)
		}
		v.tokens[id] = text
	}
	last := len(v.tokens)
	for last > 0 && v.types[last-1] == unused {
		last--
	}
	for _, text := range v.tokens[:last] {
		lines.WriteString(text)
		lines.WriteByte('\n')
	}
	_, added, err := w.byText()
	if err != nil {
		return err
	}
	vocab, err := w.vocab(false)
	if err != nil {
		return err
	}
	lower := true
	if err := key(w.keys, keyLowercase, &lower); err != nil {
		return err
	}
	var accents any
	if value := w.keys.Get(keyAccents); value != nil {
		var strip bool
		if err := key(w.keys, keyAccents, &strip); err != nil {
			return err
		}
		accents = strip
	}
	own, err := w.own(nil)
	if err != nil {
		return err
	}
	unk := "[UNK]"
	if id, ok := w.ids["unk"]; ok {
		unk = v.tokens[id]
	}
	f := written{Version: "1.0", AddedTokens: added, PreTokenizer: typed{"BertPreTokenizer"},
		Normalizer: object{{"type", "BertNormalizer"}, {"clean_text", true}, {"handle_chinese_chars", true},
			{"strip_accents", accents}, {"lowercase", lower}},
		Decoder: object{{"type", "WordPiece"}, {"prefix", inside}, {"cleanup", true}},
		Model: object{{"type", "WordPiece"}, {"unk_token", unk}, {"continuing_subword_prefix", inside},
			{"max_input_chars_per_word", 100}, {"vocab", vocab}}}
	if w.add["bos"] || w.add["eos"] {
		if f.PostProcessor, err = w.template(); err != nil {
			return err
		}
	}
	own.set("do_lower_case", lower)
	if accents != nil {
		own.set("strip_accents", accents)
	}
	w.files[vocabTxt] = lines.Bytes()
	if err := w.write(tokenizerJSON, f); err != nil {
		return err
	}
	return w.write(tokenizerConfig, own)
}
