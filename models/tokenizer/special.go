package tokenizer

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// specialKinds are the special tokens that files name.
var specialKinds = []string{"bos", "eos", "unk", "sep", "pad", "cls", "mask"}

// idKeys are the keys of the ids; that of the separator has always been misspelt. cls has none.
var idKeys = map[string]string{
	"bos": "tokenizer.ggml.bos_token_id", "eos": "tokenizer.ggml.eos_token_id", "unk": "tokenizer.ggml.unknown_token_id",
	"sep": "tokenizer.ggml.seperator_token_id", "pad": "tokenizer.ggml.padding_token_id",
	"mask": "tokenizer.ggml.mask_token_id", "eot": "tokenizer.ggml.eot_token_id", "eom": "tokenizer.ggml.eom_token_id",
}

// addKinds are the special tokens that are added to a text, with the keys that say whether.
var addKinds = []string{"bos", "eos", "sep"}

func addKey(kind string) string { return "tokenizer.ggml.add_" + kind + "_token" }

// named is a special token as tokenizer_config.json has it: a string, or an object with content. The converter compares
// strings alone, so an object is like no token.
type named struct {
	content string
	there   bool // neither missing nor empty
	plain   bool // a string
}

func namedBy(v jsontext.Value) named {
	switch {
	case v == nil:
		return named{}
	case v.Kind() == '"':
		s := text(v)
		return named{s, s != "", true}
	case v.Kind() == '{':
		var o struct {
			Content jsontext.Value `json:"content"`
		}
		if json.Unmarshal(v, &o) != nil {
			return named{}
		}
		return named{text(o.Content), true, false}
	}
	return named{}
}

func (n named) is(text string) bool { return n.plain && n.content == text }

func plainly(text string) named { return named{text, text != "", true} }

// special finds the ids of special tokens, what is added to a text, the chat templates and what is done to a text
// first, in the way of the converter.
func (r *reader) special(v *vocabulary, k *keyList) error {
	s := specials{reader: r, kinds: slices.Clone(specialKinds), tokens: map[string]named{}, add: map[string]bool{}}
	for _, kind := range specialKinds {
		s.tokens[kind] = namedBy(r.own.members[kind+"_token"])
	}
	s.own = len(r.own.members) > 0
	if r.json != nil {
		if err := s.postProcessor(); err != nil {
			return err
		}
	}
	if err := s.ids(v, k); err != nil {
		return err
	}
	for _, kind := range addKinds {
		if add, ok := s.add[kind]; ok {
			k.set(addKey(kind), add)
		} else if add, ok := r.own.flag("add_" + kind + "_token"); ok {
			k.set(addKey(kind), add)
		}
	}
	if r.json != nil {
		if err := normalizer(r.json.Normalizer, k, maxNesting); err != nil {
			return err
		}
	}
	if !s.own {
		return nil
	}
	return r.chatTemplates(k)
}

// specials are what post_processor and tokenizer_config.json say together.
type specials struct {
	*reader
	kinds  []string // those whose ids are looked for
	tokens map[string]named
	add    map[string]bool
	own    bool // there is a tokenizer_config.json with something in it
}

// templatePart is a part of a template: a special token or a sequence.
type templatePart struct {
	SpecialToken struct {
		ID string `json:"id"`
	} `json:"SpecialToken"`
	Sequence struct {
		ID string `json:"id"`
	} `json:"Sequence"`
}

type processor struct {
	Type       string           `json:"type"`
	Processors []jsontext.Value `json:"processors"`
	Single     []templatePart   `json:"single"`
	Pair       []templatePart   `json:"pair"`
	CLS        []jsontext.Value `json:"cls"`
	SEP        []jsontext.Value `json:"sep"`
}

// postProcessor reads what is added to a text.
func (s *specials) postProcessor() error {
	if s.own {
		if !s.tokens["bos"].there && s.tokens["cls"].there {
			s.tokens["bos"] = s.tokens["cls"]
		}
		if !s.tokens["eos"].there && s.tokens["sep"].there {
			s.tokens["eos"] = s.tokens["sep"]
		}
	}
	part := s.json.PostProcessor
	if part == nil || part.Kind() == 'n' {
		return nil
	}
	p, err := readProcessor(part)
	if err != nil {
		return err
	}
	list := []jsontext.Value{part}
	if p.Processors != nil {
		list = p.Processors
	}
	for _, part := range list {
		if p, err = readProcessor(part); err != nil {
			return err
		}
		switch p.Type {
		case "ByteLevel":
			for _, kind := range []string{"bos", "eos"} {
				if _, ok := s.add[kind]; !ok {
					s.add[kind] = false
				}
			}
		case "RobertaProcessing":
			s.roberta(p)
		case "TemplateProcessing":
			s.template(p)
		}
	}
	return nil
}

func readProcessor(part jsontext.Value) (p processor, err error) {
	if err := json.Unmarshal(part, &p); err != nil {
		return p, malformedf("%s: post_processor: found %s, expected a post-processor: %v", tokenizerJSON, cut(part),
			wrongJSON(err))
	}
	return p, nil
}

func (s *specials) roberta(p processor) {
	for _, kind := range addKinds {
		s.add[kind] = true
	}
	if !s.own {
		return
	}
	for kind, pair := range map[string][]jsontext.Value{"cls": p.CLS, "sep": p.SEP} {
		if s.tokens[kind].there {
			continue
		}
		if len(pair) > 0 {
			s.tokens[kind] = plainly(text(pair[0]))
		} else {
			s.tokens[kind] = s.tokens[map[string]string{"cls": "bos", "sep": "eos"}[kind]]
		}
	}
}

// template reads templates of the usual forms: [first] A [last], and [first] A [x] [y] B [last].
func (s *specials) template(p processor) {
	first, last := "", ""
	if n := len(p.Single); n > 1 {
		if first = p.Single[0].SpecialToken.ID; first != "" {
			s.add["bos"] = s.begins(first)
		}
		if last = p.Single[n-1].SpecialToken.ID; last != "" {
			s.ends(last)
			s.add["eos"] = true
		}
	}
	pair := p.Pair
	if len(pair) > 0 && first != "" && pair[0].SpecialToken.ID == first {
		pair = pair[1:]
	}
	if n := len(pair); n > 0 && last != "" && pair[n-1].SpecialToken.ID == last {
		pair = pair[:n-1]
	}
	n := len(pair)
	if n < 3 || pair[0].Sequence.ID != "A" || pair[n-1].Sequence.ID != "B" {
		return
	}
	between := pair[1 : n-1]
	separates := func(text string) bool {
		return text != "" && (s.tokens["sep"].is(text) || s.tokens["eos"].is(text))
	}
	add := separates(between[0].SpecialToken.ID) && last == "" ||
		len(between) == 2 && separates(between[1].SpecialToken.ID)
	s.add["sep"] = add
	if add && s.own && !s.tokens["sep"].there {
		s.tokens["sep"] = s.tokens["eos"]
	}
}

// begins reports whether a token that texts begin with is bos or cls, which it becomes where there is none.
func (s *specials) begins(first string) bool {
	if !s.own {
		s.tokens["bos"] = plainly(first)
	} else if !s.tokens["bos"].is(first) && !s.tokens["cls"].is(first) {
		for _, kind := range []string{"bos", "cls"} {
			if !s.tokens[kind].there {
				s.tokens[kind] = plainly(first)
			}
		}
	}
	return s.tokens["bos"].is(first) || s.tokens["cls"].is(first)
}

// ends makes a token that texts end with eos. What was eos becomes eot, or eom.
func (s *specials) ends(last string) {
	if s.own && !s.tokens["eos"].is(last) {
		for _, kind := range []string{"eot", "eom"} {
			if !slices.Contains(s.kinds, kind) {
				s.kinds = append(s.kinds, kind)
				s.tokens[kind] = s.tokens["eos"]
				break
			}
		}
	}
	s.tokens["eos"] = plainly(last)
}

// ids looks the special tokens up in added_tokens, then takes the ids of config.json: the first that is found stays.
func (s *specials) ids(v *vocabulary, k *keyList) error {
	ids := map[string]int64{}
	set := func(kind, file string, id int64) error {
		if _, ok := ids[kind]; ok {
			return nil
		}
		if id >= int64(len(v.tokens)) {
			if !v.lenient {
				return malformedf("%s: %s_token: found the id %d, expected less than the vocab_size %d", file, kind, id,
					len(v.tokens))
			}
			s.note("%s: %s_token is left out, its id %d is past the vocab_size %d", file, kind, id, len(v.tokens))
			return nil
		}
		ids[kind] = id
		return nil
	}
	if s.json != nil && s.own {
		found := make(map[string]int64, len(s.json.AddedTokens))
		for _, a := range slices.Backward(s.json.AddedTokens) {
			found[a.Content] = a.ID
		}
		for _, kind := range s.kinds {
			if id, ok := found[s.tokens[kind].content]; ok && s.tokens[kind].content != "" {
				if err := set(kind, tokenizerConfig, id); err != nil {
					return err
				}
			}
		}
	}
	for _, kind := range s.kinds {
		id, ok, err := s.config.id(kind + "_token_id")
		if err != nil {
			return err
		}
		if ok {
			if err := set(kind, configJSON, id); err != nil {
				return err
			}
		}
	}
	for _, kind := range s.kinds {
		if id, ok := ids[kind]; ok && idKeys[kind] != "" {
			k.set(idKeys[kind], uint32(id))
		}
	}
	return nil
}

// maxNesting is more than parts of a tokenizer.json are inside each other.
const maxNesting = 16

// normalizer reads what is done to a text first, as far as GGUF has keys for it.
func normalizer(part jsontext.Value, k *keyList, depth int) error {
	if part == nil || part.Kind() == 'n' {
		return nil
	}
	var n struct {
		Type         string           `json:"type"`
		Lowercase    *bool            `json:"lowercase"`
		StripAccents *bool            `json:"strip_accents"`
		Normalizers  []jsontext.Value `json:"normalizers"`
	}
	if err := json.Unmarshal(part, &n); err != nil || depth == 0 {
		return malformedf("%s: normalizer: found %s, expected a normalizer", tokenizerJSON, cut(part))
	}
	yes := true
	switch n.Type {
	case "Lowercase":
		n.Lowercase = &yes
	case "StripAccents":
		n.StripAccents = &yes
	case "Sequence":
		for _, part := range n.Normalizers {
			if err := normalizer(part, k, depth-1); err != nil {
				return err
			}
		}
		return nil
	case "BertNormalizer":
	default:
		return nil
	}
	if n.Lowercase != nil {
		k.set(keyLowercase, *n.Lowercase)
	}
	if n.StripAccents != nil {
		k.set(keyAccents, *n.StripAccents)
	}
	return nil
}

// chatTemplates reads the member of tokenizer_config.json, else the files beside it.
func (r *reader) chatTemplates(k *keyList) error {
	v, ok := r.own.members["chat_template"]
	if !ok {
		return r.templateFiles(k)
	}
	return templates(tokenizerConfig, v, k)
}

func (r *reader) templateFiles(k *keyList) error {
	main, ok := r.files[templateJinja]
	if !ok {
		b, ok := r.files[templateJSON]
		if !ok {
			return nil
		}
		var o map[string]jsontext.Value
		if err := unmarshal(templateJSON, b, &o); err != nil {
			return err
		}
		return templates(templateJSON, o["chat_template"], k)
	}
	var names []string
	for file := range r.files {
		if Reads(file) && path.Dir(file) == templatesFolder {
			names = append(names, file)
		}
	}
	slices.Sort(names)
	var list []template
	for _, file := range append([]string{templateJinja}, names...) {
		b := r.files[file]
		if file == templateJinja {
			b = main
		}
		if !utf8.Valid(b) {
			return malformedf("%s: found bytes that are no UTF-8, expected text", tensor.Quote(file))
		}
		name := "default"
		if file != templateJinja {
			name = strings.TrimSuffix(path.Base(file), templateSuffix)
		}
		text := strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(string(b))
		list = append(list, template{name, &text})
	}
	return setTemplates(templatesFolder, list, k)
}

// template is a chat template with a name; that of the default is default.
type template struct {
	Name     string  `json:"name"`
	Template *string `json:"template"`
}

func templates(file string, v jsontext.Value, k *keyList) error {
	switch {
	case v == nil:
	case v.Kind() == '"':
		setTemplate(k, keyTemplate, text(v))
	case v.Kind() == '[':
		var list []template
		if err := json.Unmarshal(v, &list); err != nil {
			return malformedf("%s: chat_template: found %s, expected a list of objects with name and template", file, cut(v))
		}
		return setTemplates(file, list, k)
	case v.Kind() != 'n':
		return malformedf("%s: chat_template: found %s, expected text or a list of objects with name and template", file,
			cut(v))
	}
	return nil
}

// setTemplate writes a template, as gguf-py does unless it is empty.
func setTemplate(k *keyList, name, template string) {
	if template != "" {
		k.set(name, template)
	}
}

func setTemplates(file string, list []template, k *keyList) error {
	if len(list) > maxTemplates {
		return fmt.Errorf("%s: found %d chat templates, expected at most %d: %w", file, len(list), maxTemplates,
			formats.ErrLimit)
	}
	var names []string
	for _, t := range list {
		name := strings.Map(func(c rune) rune {
			if c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' {
				return c
			}
			return '_'
		}, t.Name)
		switch {
		case name == "" || t.Template == nil:
		case name == "default":
			setTemplate(k, keyTemplate, *t.Template)
		default:
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
			setTemplate(k, keyTemplate+"."+name, *t.Template)
		}
	}
	if len(names) > 0 {
		k.set(keyTemplates, names)
	}
	return nil
}
