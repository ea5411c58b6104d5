package gguf

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// settings are the members of a config.json as the class of transformers has them: with its defaults, and with the
// members of text_config in place of those at the top.
type settings struct {
	class   *class
	members map[string]any
	rope    map[string]any // of all layers, or of those that see everything
	sliding map[string]any // of those with a sliding window, where the class tells them apart
	madeBy  *architecture  // whose keys the config is made of, nil of one that a file has
}

// ropePrefix begins the names of members of rope_parameters.
const ropePrefix = "rope_parameters."

// maxWhole is the largest number up to which a float64 holds all whole ones.
const maxWhole = 1 << 53

// newSettings reads a config.
func newSettings(c *models.Config, cl *class) (*settings, error) {
	s := &settings{class: cl, members: map[string]any{}}
	for _, path := range []string{"", "text_config"} {
		raw, _ := c.Members(path)
		for name, value := range raw {
			v, err := plainValue(value)
			if err != nil {
				return nil, fmt.Errorf("config.json: %s: %w", name, err)
			}
			s.members[name] = v
		}
	}
	return s, s.readRope()
}

// plainValue is a value of JSON as expressions have it: null is nil, what is neither of their types stays as it is.
func plainValue(v jsontext.Value) (any, error) {
	switch v.Kind() {
	case 'n':
		return nil, nil
	case 't', 'f':
		return v.Kind() == 't', nil
	case '"':
		var text string
		return text, json.Unmarshal(v, &text)
	case '0':
		x, err := strconv.ParseFloat(string(v), 64)
		if err != nil {
			return nil, malformedf("found %s, expected a number within a double's range", v)
		}
		return x, nil
	case '{':
		var raw map[string]jsontext.Value
		if err := json.Unmarshal(v, &raw); err != nil {
			return nil, err
		}
		object := map[string]any{}
		for name, value := range raw {
			member, err := plainValue(value)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			object[name] = member
		}
		return object, nil
	}
	var list []float64
	if json.Unmarshal(v, &list) == nil {
		return list, nil
	}
	return v, nil
}

// readRope puts the parameters of rotary embeddings together, as transformers does from any age of config.
func (s *settings) readRope() error {
	given := map[string]any{}
	for _, name := range []string{"rope_parameters", "rope_scaling"} {
		if v := s.members[name]; v != nil {
			object, ok := v.(map[string]any)
			if !ok {
				return malformedf("config.json: %s: found %v, expected an object", name, v)
			}
			maps.Copy(given, object)
		}
	}
	if len(given) == 0 {
		given = s.class.Parameters
	}
	full, nested := given["full_attention"].(map[string]any)
	sliding, _ := given["sliding_attention"].(map[string]any)
	byLayer, _ := s.class.Parameters["full_attention"].(map[string]any)
	s.rope = map[string]any{}
	if nested {
		maps.Copy(s.rope, full)
	} else {
		maps.Copy(s.rope, given)
		delete(s.rope, "sliding_attention")
	}
	if s.class.Theta == 0 {
		return nil
	}
	if s.rope["rope_theta"] == nil {
		s.rope["rope_theta"] = s.orElse("rope_theta", s.class.Theta)
	}
	if s.rope["rope_type"] == nil {
		s.rope["rope_type"] = s.rope["type"]
	}
	if f := s.members["partial_rotary_factor"]; s.rope["partial_rotary_factor"] == nil {
		s.rope["partial_rotary_factor"] = f
	}
	const original = "original_max_position_embeddings"
	switch own, ok := s.orElse(original, s.class.Defaults[original]).(float64); {
	case ok:
		s.rope[original] = own // a member of its own comes before that of rope_parameters
	case s.rope[original] == nil && s.scaled():
		s.rope[original] = s.members["max_position_embeddings"]
	}
	if byLayer != nil {
		s.sliding = map[string]any{}
		maps.Copy(s.sliding, sliding)
		if s.sliding["rope_theta"] == nil {
			other, _ := s.class.Parameters["sliding_attention"].(map[string]any)
			s.sliding["rope_theta"] = s.orElse("rope_local_base_freq", other["rope_theta"])
		}
	}
	return nil
}

// scaled reports whether the rotary embeddings are of a kind that knows the length that the model was made for.
func (s *settings) scaled() bool {
	switch s.ropeType() {
	case "llama3", "yarn", "longrope", "su":
		return true
	}
	return false
}

func (s *settings) ropeType() string {
	t, _ := s.rope["rope_type"].(string)
	return strings.ToLower(t)
}

func (s *settings) orElse(member string, other any) any {
	if v := s.members[member]; v != nil {
		return v
	}
	return other
}

// find is a lookup of members.
func (s *settings) find(name string) (any, bool) {
	if inner, ok := strings.CutPrefix(name, ropePrefix); ok {
		v := s.rope[inner]
		return v, v != nil
	}
	if name == "partial_rotary_factor" && s.rope[name] != nil {
		return s.rope[name], true
	}
	v := s.members[name]
	if _, there := s.members[name]; there && v == nil && name == "num_key_value_heads" {
		v = s.members["num_attention_heads"] // as all classes that allow null here have it
	}
	if v == nil {
		v = s.class.Defaults[name]
		if e, ok := v.(string); ok {
			other, there, err := evaluate(e, s.find)
			if err != nil || !there {
				return nil, false
			}
			return other, true
		}
	}
	return v, v != nil
}

// whole is an expression that has to be a whole number above 0.
func (s *settings) whole(expression string) (int64, error) {
	v, ok, err := evaluate(expression, s.find)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", s.place(expression), err)
	}
	if !ok {
		return 0, malformedf("%s: found none, expected a number", s.place(expression))
	}
	x, ok := v.(float64)
	if !ok || x != math.Trunc(x) || x < 1 || x > maxWhole {
		return 0, malformedf("%s: found %v, expected a whole number above 0", s.place(expression), v)
	}
	return int64(x), nil
}

// place says for a message where what an expression needs stands: in config.json, or in the key that the first of its
// members was made of.
func (s *settings) place(expression string) string {
	if s.madeBy != nil {
		for member := range strings.SplitSeq(expression, "|") {
			for _, k := range s.madeBy.Keys {
				if isName(k.from) && slices.Contains(strings.Split(k.from, "|"), member) {
					return "key " + tensor.Quote(s.madeBy.Name+"."+k.name)
				}
			}
		}
	}
	return "config.json: " + alternatives(expression)
}

// alternatives writes an expression for a message.
func alternatives(expression string) string { return strings.ReplaceAll(expression, "|", " or ") }
