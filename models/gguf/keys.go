package gguf

import (
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// The keys that are no architecture's own.
const (
	architectureKey = "general.architecture"
	typeKey         = "general.type"
	sizeKey         = "general.size_label"
	fileTypeKey     = "general.file_type"
	quantizationKey = "general.quantization_version"
)

// keys makes the metadata of a model: all but those of the tokenizer and of a model card.
func (a *architecture) keys(s *settings, fileType uint32) (formats.Metadata, error) {
	list := formats.Metadata{{Name: architectureKey, Value: a.Name}, {Name: typeKey, Value: "model"}}
	add := func(name string, value any) {
		list = append(list, formats.Pair{Name: a.Name + "." + name, Value: value})
	}
	for _, k := range a.Keys {
		if k.kind == "rope" {
			if err := s.ropeKeys(add); err != nil {
				return nil, err
			}
			continue
		}
		v, ok, err := a.value(k, s)
		if err != nil {
			return nil, fmt.Errorf("config.json: %w (for the key %s.%s)", err, a.Name, k.name)
		}
		if ok {
			add(k.name, v)
		}
	}
	list = append(list, formats.Pair{Name: fileTypeKey, Value: fileType})
	for _, name := range slices.Sorted(maps.Keys(a.Fixed)) {
		list = slices.DeleteFunc(list, func(p formats.Pair) bool { return p.Name == name })
		list = append(list, formats.Pair{Name: name, Value: a.Fixed[name]})
	}
	return append(list, formats.Pair{Name: quantizationKey, Value: uint32(2)}), nil
}

// value is what a key has for a config. It is false where the config has nothing for it.
func (a *architecture) value(k key, s *settings) (any, bool, error) {
	v, ok, err := evaluate(k.from, s.find)
	if err != nil {
		return nil, false, err
	}
	if !ok {
		v = k.otherwise
	}
	if v == nil {
		if slices.Contains(a.NeedKeys, k.name) {
			return nil, false, malformedf("found no %s", alternatives(k.from))
		}
		return nil, false, nil
	}
	if word, ok := v.(string); ok && a.Words[k.name] != nil {
		n, known := a.Words[k.name][word]
		if !known {
			return nil, false, unsupportedf("%s: found %s, expected one of %v", alternatives(k.from), tensor.Quote(word),
				slices.Sorted(maps.Keys(a.Words[k.name])))
		}
		v = float64(n)
	}
	typed, err := typedValue(k.kind, v)
	if err != nil {
		return nil, false, fmt.Errorf("%s: %w", alternatives(k.from), err)
	}
	if slices.Contains(a.OmitZero, k.name) && reflect.ValueOf(typed).IsZero() {
		return nil, false, nil
	}
	return typed, true, nil
}

// typedValue is a value as a key of a type has it.
func typedValue(kind string, v any) (any, error) {
	switch x, number := v.(float64); kind {
	case "bool":
		if b, ok := v.(bool); ok {
			return b, nil
		}
		return nil, malformedf("found %v, expected true or false", v)
	case "f32":
		if !number || !(math.Abs(x) <= math.MaxFloat32) {
			return nil, malformedf("found %v, expected a number within a float's range", v)
		}
		return float32(x), nil
	default:
		if !number || x != math.Trunc(x) || x < 0 || x > math.MaxUint32 {
			return nil, malformedf("found %v, expected a whole number from 0 to %d", v, uint32(math.MaxUint32))
		}
		return uint32(x), nil
	}
}

// check refuses what the format has no key for and llama.cpp computes otherwise, and tells what it lets pass.
func (a *architecture) check(s *settings) (notices []string, err error) {
	for _, member := range slices.Sorted(maps.Keys(a.Must)) {
		v, ok := s.find(member)
		if !ok {
			continue
		}
		only, _, err := evaluateOrNone(a.Must[member], s)
		if err != nil {
			return nil, err
		}
		if !reflect.DeepEqual(v, only) {
			return nil, unsupportedf("config.json: %s: found %v, expected %s: llama.cpp computes with no other", member, v,
				orNone(only))
		}
	}
	for _, member := range a.NotNull {
		if v, there := s.members[member]; there && v == nil {
			return nil, unsupportedf("config.json: %s: found null, expected a value: GGUF has no word for none", member)
		}
	}
	for _, i := range a.Implied {
		v, ok := s.find(i.Member)
		if !ok {
			continue
		}
		layers, _ := s.find("num_hidden_layers")
		only, _, err := evaluate(i.expression(layers), s.find)
		if err != nil {
			return nil, err
		}
		if !reflect.DeepEqual(v, only) && !i.enough(v, only) {
			why := "GGUF has no key for it, and llama.cpp"
			if slices.ContainsFunc(a.Keys, func(k key) bool { return k.from == i.Member }) {
				why = "llama.cpp does not heed the key for it, and"
			}
			notices = append(notices, fmt.Sprintf("%s is %v; %s computes with %v", i.Member, v, why, orNone(only)))
		}
	}
	notices = append(notices, a.otherActivations(s)...)
	notices = append(notices, a.otherScaling(s)...)
	if n := a.otherWindows(s); n != "" {
		notices = append(notices, n)
	}
	return notices, nil
}

// otherActivations says that a config has another activation than its class, whose own llama.cpp has built in.
func (a *architecture) otherActivations(s *settings) (notices []string) {
	for _, member := range slices.Sorted(maps.Keys(a.Classes[0].Config)) {
		only, isWord := a.Classes[0].Config[member].(string)
		found, _ := s.find(member)
		word, ok := found.(string)
		if !isWord || !ok || word == only || word == "swish" && only == "silu" { // two names of one
			continue
		}
		notices = append(notices, fmt.Sprintf("%s is %s; GGUF has no key for it, and llama.cpp computes with %s", member,
			tensor.Quote(word), only))
	}
	return notices
}

// otherWindows says that a config has sliding windows in other layers than llama.cpp.
func (a *architecture) otherWindows(s *settings) string {
	raw, ok := s.members["layer_types"].(jsontext.Value)
	var kinds []string
	if !ok || json.Unmarshal(raw, &kinds) != nil {
		return ""
	}
	for i, kind := range kinds {
		sliding := a.Every > 0 && (i+1)%a.Every != 0
		if kind == "sliding_attention" != sliding {
			return fmt.Sprintf("layer_types has %s in layer %d; GGUF has no key for it, and llama.cpp computes otherwise",
				tensor.Quote(kind), i)
		}
	}
	return ""
}

// enough says that a config has more than llama.cpp takes, where more is as good.
func (i implied) enough(v, only any) bool {
	x, isNumber := v.(float64)
	y, limited := only.(float64)
	return i.OrMore && isNumber && (!limited || x >= y)
}

// expression is what a model with so many layers has.
func (i implied) expression(layers any) string {
	if i.When != 0 && layers == any(i.When) {
		return i.Then
	}
	return i.Is
}

// evaluateOrNone evaluates an expression, of which "" is none.
func evaluateOrNone(expression string, s *settings) (any, bool, error) {
	if expression == "" {
		return nil, false, nil
	}
	return evaluate(expression, s.find)
}

func orNone(v any) string {
	if v == nil {
		return "none"
	}
	return fmt.Sprint(v)
}
