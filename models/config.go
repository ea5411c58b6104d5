package models

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// The limits of a config.json.
const (
	MaxConfigSize  = 16 << 20 // bytes
	MaxConfigDepth = 64       // objects and arrays inside each other
)

// ErrLimit says that a config.json is larger or deeper than the limits.
var ErrLimit = errors.New("limit exceeded")

// Config is what a checkpoint's config.json says.
type Config struct {
	ModelType string
	// the first of "architectures" if it is known, else the model type's most usual class, else as in the file
	Architecture string
	Assumed      bool // Architecture is the model type's, not the file's
	// "bfloat16" from dtype or torch_dtype, of the file or of its first section that has one; "" where none does
	DType string
	// quantization_config as it is in the file, or compression_config, its older name, or MLX's own quantization, or the
	// quantization_config of text_config, of which the rest of the model is plain; or nil
	Quantization jsontext.Value
	// QuantizationKeys are the paths of the members that say how the weights are quantised: those, if they are there.
	QuantizationKeys []string

	// TieWordEmbeddings is the file's own value, or that of its text_config, or nil. Model.Tensor knows what an absent
	// one means.
	TieWordEmbeddings *bool

	root jsontext.Value // the literals that are no JSON replaced
}

// ofText is where a model of several parts has it whose text alone is quantised, as Kimi-K2.5 has.
const ofText = "text_config.quantization_config"

// JSON is the file, with numbers in the place of Python's NaN, Infinity and -Infinity.
func (c *Config) JSON() []byte { return c.root }

// ParseConfig reads a config.json. Python's NaN, Infinity and -Infinity are taken where a number may stand; everything
// else is to be JSON, an object, in UTF-8 and without a name twice in one object.
func ParseConfig(b []byte) (*Config, error) {
	root, err := checked(b)
	if err != nil {
		return nil, err
	}
	c := &Config{root: root}
	top, err := members(root, 0)
	if err != nil {
		return nil, err
	}
	var older, mlx jsontext.Value
	for _, m := range top {
		v := root[m.value.from:m.value.to]
		switch m.name {
		case "quantization":
			if v.Kind() == '{' && bytes.Contains(v, []byte(`"group_size"`)) {
				mlx = bytes.Clone(b[m.value.from:m.value.to])
				c.QuantizationKeys = append(c.QuantizationKeys, m.name)
			}
		case "model_type":
			if err := text(v, m.name, &c.ModelType); err != nil {
				return nil, err
			}
		case "architectures":
			if v.Kind() == 'n' {
				continue
			}
			var list []string
			if err := json.Unmarshal(v, &list); err != nil {
				return nil, fmt.Errorf("config: architectures is no list of strings")
			}
			if len(list) > 0 {
				c.Architecture = list[0]
			}
		case "compression_config":
			if v.Kind() == '{' {
				older = bytes.Clone(b[m.value.from:m.value.to])
				c.QuantizationKeys = append(c.QuantizationKeys, m.name)
			}
		case "quantization_config":
			c.QuantizationKeys = append(c.QuantizationKeys, m.name)
			if v.Kind() != 'n' {
				c.Quantization = bytes.Clone(b[m.value.from:m.value.to])
			}
		}
	}
	if c.Quantization == nil {
		c.Quantization = older
	}
	if c.Quantization == nil {
		c.Quantization = mlx
	}
	if v, ok := c.value(ofText); ok && v.Kind() == '{' {
		c.QuantizationKeys = append(c.QuantizationKeys, ofText)
		if c.Quantization == nil {
			c.Quantization = bytes.Clone(v)
		}
	}
	c.DType = dtype(root, top)
	for _, path := range []string{"tie_word_embeddings", "text_config.tie_word_embeddings"} {
		if v, ok := c.value(path); ok && (v.Kind() == 't' || v.Kind() == 'f') {
			tie := v.Kind() == 't'
			c.TieWordEmbeddings = &tie
			break
		}
	}
	// A model of a known type whose class is not, an old name mostly, is loaded by its type, unless it brings code of its
	// own.
	if _, own := c.value("auto_map"); !known(c.Architecture) && !own {
		if usual := usualClass(c.ModelType); usual != "" {
			c.Architecture, c.Assumed = usual, true
		}
	}
	return c, nil
}

// usualClasses has the class that a model type most usually has.
var usualClasses = sync.OnceValue(func() map[string]string {
	usual := map[string]string{}
	if err := json.Unmarshal(types, &usual); err != nil {
		panic(err) // the table is part of the program
	}
	return usual
})

// usualClass is the class that a model type most usually has, or "".
func usualClass(modelType string) string {
	if modelType == "" {
		return ""
	}
	return usualClasses()[modelType]
}

// section is the config of a model that the model is made of, and what it is called there, such as text_config or
// decoder.
type section struct {
	name   string
	config *Config
}

// maxSections is more than any model has.
const maxSections = 16

// sections returns the configs of the models that the model is made of, those inside of them included.
func (c *Config) sections() []section {
	var all []section
	var walk func(v jsontext.Value, depth int)
	walk = func(v jsontext.Value, depth int) {
		list, err := members(v, 0)
		if err != nil || depth == 0 {
			return
		}
		for _, m := range list {
			inner := v[m.value.from:m.value.to]
			if inner.Kind() != '{' || len(all) == maxSections {
				continue
			}
			s := &Config{root: inner}
			if t, ok := s.value("model_type"); ok && t.Kind() == '"' && json.Unmarshal(t, &s.ModelType) == nil {
				if s.Architecture = usualClass(s.ModelType); s.Architecture != "" {
					all = append(all, section{m.name, s})
				}
			}
			walk(inner, depth-1)
		}
	}
	walk(c.root, 3)
	return all
}

// text reads a string, or null as none.
func text(v jsontext.Value, name string, s *string) error {
	if v.Kind() == 'n' {
		return nil
	}
	if err := json.Unmarshal(v, s); err != nil {
		return fmt.Errorf("config: %s is no string", name)
	}
	return nil
}

// dtype looks for the type of the weights in an object, then in its sections.
func dtype(b jsontext.Value, list []member) string {
	for _, name := range []string{"dtype", "torch_dtype"} {
		for _, m := range list {
			if m.name != name {
				continue
			}
			var s string
			if v := b[m.value.from:m.value.to]; v.Kind() == '"' && json.Unmarshal(v, &s) == nil {
				return strings.TrimPrefix(s, "torch.")
			}
		}
	}
	for _, m := range list {
		if m.isSection(b) {
			if inner, err := members(b, m.value.from); err == nil {
				if s := dtype(b, inner); s != "" {
					return s
				}
			}
		}
	}
	return ""
}

// tied reports whether the config switches a set of ties on.
func (c *Config) tied(t tie) bool {
	for _, path := range t.Config {
		if v, ok := c.value(path); ok && (v.Kind() == 't' || !t.Either) {
			return v.Kind() == 't'
		}
	}
	return t.Default
}

// VocabularyPaths lists the dotted paths of the members vocab_size, and Marian's decoder_vocab_size, that are n, at
// the top and in sections; where none is, vocab_size of the top.
func (c *Config) VocabularyPaths(n int64) []string {
	var found []string
	var walk func(v jsontext.Value, prefix string, depth int)
	walk = func(v jsontext.Value, prefix string, depth int) {
		list, err := members(v, 0)
		if err != nil {
			return
		}
		for _, m := range list {
			inner := v[m.value.from:m.value.to]
			switch {
			case (m.name == "vocab_size" || m.name == "decoder_vocab_size") && string(inner) == strconv.FormatInt(n, 10):
				found = append(found, prefix+m.name)
			case inner.Kind() == '{' && depth > 0 && !strings.Contains(m.name, "."):
				walk(inner, prefix+m.name+".", depth-1)
			}
		}
	}
	walk(c.root, "", 3)
	if len(found) == 0 {
		found = []string{"vocab_size"}
	}
	return found
}

// count returns the number at a path, if it is a whole one above zero.
func (c *Config) count(path string) (int, bool) {
	v, ok := c.value(path)
	if !ok || v.Kind() != '0' {
		return 0, false
	}
	n, err := strconv.Atoi(string(v))
	return n, err == nil && n > 0
}

// value returns the value at a dotted path of names.
func (c *Config) value(path string) (jsontext.Value, bool) {
	v := c.root
	for name := range strings.SplitSeq(path, ".") {
		if v.Kind() != '{' {
			return nil, false
		}
		list, err := members(v, 0)
		if err != nil {
			return nil, false
		}
		found := false
		for _, m := range list {
			if m.name == name {
				v, found = v[m.value.from:m.value.to], true
				break
			}
		}
		if !found {
			return nil, false
		}
	}
	return v, true
}

// Members returns the members of the object at a dotted path, such as "text_config", or of the whole config at "". It
// is false where there is no object.
func (c *Config) Members(path string) (map[string]jsontext.Value, bool) {
	v := c.root
	if path != "" {
		var ok bool
		if v, ok = c.value(path); !ok {
			return nil, false
		}
	}
	if v.Kind() != '{' {
		return nil, false
	}
	list, err := members(v, 0)
	if err != nil {
		return nil, false
	}
	found := make(map[string]jsontext.Value, len(list))
	for _, m := range list {
		found[m.name] = v[m.value.from:m.value.to]
	}
	return found, true
}

// span is a range of bytes.
type span struct{ from, to int }

// member is one name and value of an object, with the places of both.
type member struct {
	name       string
	key, value span
}

// isSection reports whether the member is a nested config, such as text_config.
func (m member) isSection(b []byte) bool {
	return strings.HasSuffix(m.name, "_config") && m.name != "quantization_config" && b[m.value.from] == '{'
}

// members lists the members of the object that begins at b[at], in order.
func members(b []byte, at int) ([]member, error) {
	d := jsontext.NewDecoder(bytes.NewBuffer(b[at:]))
	if _, err := d.ReadToken(); err != nil {
		return nil, err
	}
	var list []member
	for d.PeekKind() != '}' {
		raw, err := d.ReadValue()
		if err != nil {
			return nil, err
		}
		m := member{}
		m.key.to = at + int(d.InputOffset())
		m.key.from = m.key.to - len(raw)
		name, err := jsontext.AppendUnquote(nil, raw)
		if err != nil {
			return nil, err
		}
		m.name = string(name)
		if raw, err = d.ReadValue(); err != nil {
			return nil, err
		}
		m.value.to = at + int(d.InputOffset())
		m.value.from = m.value.to - len(raw)
		list = append(list, m)
	}
	return list, nil
}

// checked returns the file with its Python literals replaced by numbers of the same length, after making sure that it
// is an object within the limits.
func checked(b []byte) (jsontext.Value, error) {
	if len(b) > MaxConfigSize {
		return nil, fmt.Errorf("config: %w: %d bytes, at most %d are read", ErrLimit, len(b), MaxConfigSize)
	}
	v := masked(b)
	d := jsontext.NewDecoder(bytes.NewBuffer(v))
	for first, done := true, false; ; first = false {
		t, err := d.ReadToken()
		if err == io.EOF && done {
			return v, nil
		}
		if err != nil {
			return nil, fmt.Errorf("config: %w", plain(err))
		}
		if first && t.Kind() != '{' {
			return nil, fmt.Errorf("config: not a JSON object but %s", strings.Replace(t.Kind().String(), "[", "array", 1))
		}
		if done {
			return nil, fmt.Errorf("config: something follows the JSON object, at byte %d", d.InputOffset())
		}
		done = d.StackDepth() == 0
		if d.StackDepth() > MaxConfigDepth {
			return nil, fmt.Errorf("config: %w: nested more than %d deep at byte %d", ErrLimit, MaxConfigDepth, d.InputOffset())
		}
	}
}

// plain keeps an error to one line without the decoder's package name.
func plain(err error) error {
	if err == io.EOF {
		return errors.New("empty, where a JSON object was expected")
	}
	return errors.New(strings.ReplaceAll(strings.TrimPrefix(err.Error(), "jsontext: "), "\n", " "))
}

// masked replaces NaN, Infinity and -Infinity outside of strings by numbers of the same length.
func masked(b []byte) []byte {
	out := bytes.Clone(b)
	for i := 0; i < len(out); i++ {
		switch out[i] {
		case '"':
			for i++; i < len(out) && out[i] != '"'; i++ {
				if out[i] == '\\' {
					i++
				}
			}
		case 'N', 'I':
			for _, word := range [...]string{"NaN", "Infinity"} {
				if bytes.HasPrefix(out[i:], []byte(word)) && standsAlone(b, i, len(word), word == "Infinity") {
					for range word {
						out[i] = '1'
						i++
					}
					i--
					break
				}
			}
		}
	}
	return out
}

// standsAlone reports whether the word at b[at:at+n] is a whole token, with a minus before it where that is allowed.
func standsAlone(b []byte, at, n int, signed bool) bool {
	before := at - 1
	if signed && before >= 0 && b[before] == '-' {
		before--
	}
	for _, i := range [...]int{before, at + n} {
		if i >= 0 && i < len(b) && !bytes.ContainsRune([]byte(" \t\r\n,:[]}"), rune(b[i])) {
			return false
		}
	}
	return true
}
