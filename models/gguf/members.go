package gguf

import (
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/tensor"
)

// number is a key's value as a number: whole ones of any type, and floats by the shortest decimal that gives them
// again.
func number(v any) (float64, bool) {
	switch r := reflect.ValueOf(v); r.Kind() {
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return float64(r.Uint()), true
	case reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return float64(r.Int()), true
	case reflect.Float32:
		x, err := strconv.ParseFloat(strconv.FormatFloat(r.Float(), 'g', -1, 32), 64)
		return x, err == nil
	case reflect.Float64:
		return r.Float(), true
	}
	return 0, false
}

// uniform is the one number of a list that has it for each layer, as llama.cpp lets files have what may differ between
// layers. Every other value stays as it is.
func uniform(v any) any {
	list := reflect.ValueOf(v)
	if list.Kind() != reflect.Slice || list.Len() == 0 {
		return v
	}
	first := list.Index(0).Interface()
	if _, ok := number(first); !ok {
		return v
	}
	for i := range list.Len() {
		if list.Index(i).Interface() != first {
			return v
		}
	}
	return first
}

// members is a config.json that is being made. Numbers are float64 until encode writes them.
type members map[string]any

// wholeNumber is a number of a config that is written as an integer.
type wholeNumber float64

// config makes the config.json.
func (b *restorer) config(dtype tensor.DType) ([]byte, error) {
	m := members{}
	rope := members{}
	set := func(member string, v any) {
		target := m
		if inner, ok := strings.CutPrefix(member, ropePrefix); ok {
			target, member = rope, inner
		}
		if _, there := target[member]; !there {
			target[member] = v
		}
	}
	for _, k := range b.Keys {
		if err := b.member(k, set); err != nil {
			return nil, keyError(b.Name+"."+k.name, err)
		}
	}
	for member, name := range b.RowsOf {
		if shape := b.infos[name].Shape; len(shape) > 0 {
			m[member] = wholeNumber(shape[0])
		}
	}
	find := func(name string) (any, bool) {
		if x, ok := plainNumber(m[name]); ok {
			return x, true
		}
		x, ok := number(b.own(name))
		return x, ok
	}
	for _, member := range slices.Sorted(maps.Keys(b.Back)) {
		v, ok, err := evaluate(b.Back[member][1], find)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", member, malformedf("%v", err))
		}
		if !ok {
			continue
		}
		typed, err := restoredValue(b.Back[member][0], v)
		if err != nil {
			return nil, fmt.Errorf("%s, which is %s by the keys of %s: %w", member, alternatives(b.Back[member][1]), b.Name,
				err)
		}
		set(member, typed)
	}
	for _, i := range b.Implied {
		v, ok, err := evaluate(i.expression(plainOf(m["num_hidden_layers"])), find)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", i.Member, malformedf("%v", err))
		}
		if ok && !i.OrMore {
			if x, isNumber := v.(float64); isNumber {
				v = wholeNumber(x)
			}
			m[i.Member] = v
		}
	}
	if err := b.rope(m, rope); err != nil {
		return nil, err
	}
	for member, name := range b.TensorsSay {
		_, m[member] = b.infos[name]
	}
	for member, v := range b.class.Config {
		set(member, v)
	}
	_, untied := b.infos["output.weight"]
	m["tie_word_embeddings"] = !untied
	m["architectures"] = []any{b.class.Name}
	m["model_type"] = b.class.ModelType
	m["dtype"] = dtype.Torch()
	if err := b.tokenIDs(m); err != nil {
		return nil, err
	}
	out, err := json.Marshal(encode(m), json.Deterministic(true), jsontext.WithIndent("  "))
	if err != nil {
		return nil, malformedf("found values that a config.json does not have, as a number that is none: %v", err)
	}
	return append(out, '\n'), nil
}

// member sets the member of a config that a key is made of, if it is made of one alone.
func (b *restorer) member(k key, set func(member string, v any)) error {
	v := b.own(k.name)
	if k.kind == "rope" {
		return nil
	}
	if !isName(k.from) {
		return nil
	}
	name, _, _ := strings.Cut(k.from, "|")
	switch {
	case v == nil && slices.Contains(b.NeedKeys, k.name) && !slices.Contains(b.OmitZero, k.name):
		if b.class.Defaults[name] == nil && k.name != "vocab_size" {
			return malformedf("found none, expected a value for %s", name)
		}
		return nil
	case v == nil && slices.Contains(b.OmitZero, k.name) && k.kind == "bool":
		v = false
	case v == nil:
		return nil
	}
	if words := b.Words[k.name]; words != nil {
		x, _ := number(v)
		for word, n := range words {
			if float64(n) == x {
				set(name, word)
				return nil
			}
		}
		return unsupportedf("found %v, expected one of %v", v, slices.Sorted(maps.Values(words)))
	}
	if x, ok := number(v); ok {
		if x == 0 && k.otherwise == any(0.0) {
			return nil // what stands for a member that is missing
		}
		v = x
	}
	typed, err := restoredValue(k.kind, v)
	if err != nil {
		return err
	}
	set(name, typed)
	return nil
}

// isName reports whether an expression is a member by itself, or one of several.
func isName(expression string) bool {
	return strings.Trim(expression, "0123456789") != "" && !strings.ContainsAny(expression, "+-*/()")
}

// restoredValue is a value of a config by the type of the key that it is from.
func restoredValue(kind string, v any) (any, error) {
	typed, err := typedValue(kind, v)
	switch x := typed.(type) {
	case uint32:
		return wholeNumber(x), err
	case float32:
		return v, err // not rounded: it is the decimal already
	}
	return typed, err
}

// usualTheta is the base that llama.cpp takes where a file has none.
const usualTheta = 10000.0

// rope makes rope_parameters.
func (b *restorer) rope(m, rope members) error {
	if b.class.Theta == 0 {
		return nil
	}
	theta, err := b.theta(freqBase)
	if err != nil {
		return err
	}
	rope["rope_theta"] = theta
	kind := "default"
	switch v := b.own(scalingType); v {
	case nil:
		// llama.cpp takes a scaling that has no type for a linear one.
		if x, ok := number(b.linearFactor()); ok && x != 0 && x != 1 {
			kind = "linear"
		}
	case "none":
	case "linear", "yarn", "longrope":
		kind = v.(string)
	default:
		return keyError(b.Name+"."+scalingType, unsupportedf("found %v, expected none, linear, yarn or longrope", v))
	}
	if kind == "linear" || kind == "yarn" {
		for i, k := range scalingKeys {
			v := b.own(k.key)
			if i == 0 && kind == "linear" {
				v = b.linearFactor()
			}
			if v == nil || kind == "linear" && i > 0 {
				if v == nil && k.need && !(kind == "linear" && i > 0) {
					return keyError(b.Name+"."+k.key, malformedf("found none, which a %s scaling needs", kind))
				}
				continue
			}
			x, _ := number(v)
			typed, err := restoredValue(k.kind, x)
			if err != nil {
				return keyError(b.Name+"."+k.key, err)
			}
			rope[k.members[0]] = typed
		}
	}
	if kind == "yarn" {
		maps.Copy(rope, b.RopeConfig)
	}
	for member, v := range b.scaling {
		rope[member] = v
	}
	for _, made := range b.Made {
		var err error
		switch {
		case made == madeFreqs && b.scaling != nil:
			if err := json.Unmarshal(b.scaling["rope_type"], &kind); err != nil {
				return malformedf("rope scaling: found no rope_type, expected one")
			}
		case made == madeFreqs:
			kind, err = b.restoreFreqs(m, rope, kind)
		case made == madeFactors:
			kind, err = b.restoreFactors(rope, kind)
		}
		if err != nil {
			return err
		}
	}
	if _, has := rope["long_factor"]; kind == "longrope" && !has {
		return keyError(b.Name+"."+scalingType, malformedf("found longrope, and no tensors %s and %s with its factors",
			factorsLong, factorsShort))
	}
	rope["rope_type"] = kind
	if kind == "default" {
		delete(rope, "original_max_position_embeddings")
	}
	if _, nested := b.class.Parameters["sliding_attention"]; nested {
		theta, err := b.theta(freqBaseSWA)
		if err != nil {
			return err
		}
		m["rope_parameters"] = members{
			"full_attention":    rope,
			"sliding_attention": members{"rope_type": "default", "rope_theta": theta},
		}
		return nil
	}
	m["rope_parameters"] = rope
	return nil
}

// theta is the base of frequencies that a key has.
func (b *restorer) theta(name string) (float64, error) {
	v := b.own(name)
	if v == nil {
		return usualTheta, nil
	}
	x, ok := number(v)
	if !ok || x-x != 0 {
		return 0, keyError(b.Name+"."+name, malformedf("found %v, expected a finite number", v))
	}
	return x, nil
}

// linearFactor is the factor of a linear scaling, which old files have by another name.
func (b *restorer) linearFactor() any {
	if v := b.own(scalingFactor); v != nil {
		return v
	}
	return b.own(scaleLinear)
}

// values reads a tensor of one dimension.
func (b *restorer) values(name string) ([]float32, error) {
	t, ok := b.infos[name]
	if !ok {
		return nil, nil
	}
	if len(t.Shape) != 1 || t.Shape[0] > maxDimensions {
		return nil, tensorError(name, malformedf("found the shape %v, expected one dimension of at most %d", t.Shape,
			maxDimensions))
	}
	x, err := b.read(name)
	if err == nil && int64(len(x)) != t.Shape[0] {
		err = malformedf("found %d values, expected %d", len(x), t.Shape[0])
	}
	if err != nil {
		return nil, tensorError(name, err)
	}
	return x, nil
}

// restoreFreqs finds the llama3 scaling whose divisors a file has: no key says which it is.
func (b *restorer) restoreFreqs(m, rope members, kind string) (string, error) {
	values, err := b.values(ropeFreqs)
	if err != nil || values == nil {
		return kind, err
	}
	base, _ := plainNumber(rope["rope_theta"])
	s := llama3Scaling{base: base, low: 1, high: 4, factor: float64(values[len(values)-1])}
	dimensions := 2 * len(values)
	for old := range oldLengths {
		s.old = float64(old)
		if near(llama3(s, dimensions), values) {
			factor, _ := number(float32(s.factor))
			rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"] = factor, s.low, s.high
			rope["original_max_position_embeddings"] = wholeNumber(s.old)
			return "llama3", nil
		}
	}
	return kind, hint.With(tensorError(ropeFreqs, unsupportedf("found divisors of no llama3 scaling whose low and high "+
		"factors are 1 and 4, expected the scaling to be given")),
		hint.Hint{Option: "RopeScaling", Value: "JSON", Effect: "gives it, as rope_parameters"})
}

// otherFreqs says that a scaling that was given makes other divisors than the file has.
func (b *restorer) otherFreqs() (string, error) {
	if b.scaling == nil || !b.isMade(ropeFreqs) {
		return "", nil
	}
	values, err := b.values(ropeFreqs)
	if err != nil {
		return "", err
	}
	made, err := b.settings.freqs(b.turned())
	if err != nil {
		return "", err
	}
	var own []float32
	if len(made) > 0 {
		own = made[0].Values
	}
	if near(own, values) {
		return "", nil
	}
	return fmt.Sprintf("the scaling that was given makes other divisors than %s has", ropeFreqs), nil
}

// oldLengths are the lengths that models are made for before they are scaled, the most usual first.
func oldLengths(yield func(int) bool) {
	if !yield(8192) {
		return
	}
	for old := 64; old <= 1<<20 && yield(old); old *= 2 {
	}
}

// near reports whether two lists are equal but for the last bits.
func near(x, y []float32) bool {
	return slices.EqualFunc(x, y, func(a, b float32) bool {
		return math.Abs(float64(a)-float64(b)) <= math.Abs(float64(b))/(1<<20)
	})
}

// restoreFactors puts the factors of a longrope scaling into the config.
func (b *restorer) restoreFactors(rope members, kind string) (string, error) {
	long, err := b.values(factorsLong)
	if err != nil {
		return kind, err
	}
	short, err := b.values(factorsShort)
	if err != nil {
		return kind, err
	}
	switch {
	case long == nil && short == nil:
		return kind, nil
	case len(long) != len(short):
		return kind, malformedf("found %d values of %s and %d of %s, expected as many", len(long), factorsLong, len(short),
			factorsShort)
	}
	for member, values := range map[string][]float32{"long_factor": long, "short_factor": short} {
		list := make([]any, len(values))
		for i, x := range values {
			list[i], _ = number(x)
		}
		rope[member] = list
	}
	return "longrope", nil
}

// tokenIDs sets the ids of the tokens that the config has.
func (b *restorer) tokenIDs(m members) error {
	type named struct{ member, key string }
	ids := []named{
		{"bos_token_id", "tokenizer.ggml.bos_token_id"},
		{"eos_token_id", "tokenizer.ggml.eos_token_id"},
		{"pad_token_id", "tokenizer.ggml.padding_token_id"},
	}
	// Beside a tokenizer.model the way to GGUF looks for the id of the unknown token nowhere but here, and llama.cpp
	// takes 0 where it is not said; a tokenizer.json has it itself.
	unknown := named{"unk_token_id", "tokenizer.ggml.unknown_token_id"}
	if b.keys.Get(unknown.key) != nil && b.keys.Get("tokenizer.ggml.model") == "llama" {
		ids = append(ids, unknown)
	}
	for _, id := range ids {
		v := b.keys.Get(id.key)
		if v == nil {
			m[id.member] = nil // a default of transformers is another model's
			continue
		}
		x, ok := number(v)
		rows, known := plainNumber(m["vocab_size"])
		if !ok || x != math.Trunc(x) || x < 0 || known && x >= rows {
			return keyError(id.key, malformedf("found %v, expected the id of one of %v tokens", v, rows))
		}
		m[id.member] = wholeNumber(x)
	}
	return nil
}

// differences lists the keys of the architecture that Forward would not make of the config again.
func (b *restorer) differences() ([]string, error) {
	made, err := b.architecture.keys(b.settings, 0)
	if err != nil {
		return nil, err
	}
	for _, kind := range b.Made {
		if _, err := b.made(kind, b.settings, func(name string, v any) {
			made = append(made, formats.Pair{Name: b.Name + "." + name, Value: v})
		}); err != nil {
			return nil, err
		}
	}
	var notices []string
	for _, p := range b.keys {
		if !strings.HasPrefix(p.Name, b.Name+".") {
			continue
		}
		v := made.Get(p.Name)
		if sameValue(v, uniform(p.Value)) || p.Name == b.Name+"."+scaleLinear && sameValue(made.Get(b.Name+"."+scalingFactor),
			p.Value) {
			continue
		}
		if v == nil {
			notices = append(notices, fmt.Sprintf("the key %s has no place in the config", tensor.Quote(p.Name)))
			continue
		}
		notices = append(notices, fmt.Sprintf("the key %s is %s; the config means %v", tensor.Quote(p.Name), short(p.Text()),
			v))
	}
	return notices, nil
}

// sameValue compares values of keys whatever the types of their numbers are.
func sameValue(x, y any) bool {
	a, isNumber := number(x)
	b, both := number(y)
	if isNumber && both {
		return a == b || float32(a) == float32(b)
	}
	return reflect.DeepEqual(x, y)
}

// short cuts a text for a message.
func short(s string) string {
	const most = 60
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

func plainNumber(v any) (float64, bool) {
	x, ok := plainOf(v).(float64)
	return x, ok
}

// plainOf is a member as expressions have it.
func plainOf(v any) any {
	if x, ok := v.(wholeNumber); ok {
		return float64(x)
	}
	return v
}

// encode makes values of JSON of a config's: floats keep a point, as Python has it.
func encode(v any) any {
	switch v := v.(type) {
	case members:
		out := map[string]any{}
		for name, value := range v {
			out[name] = encode(value)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, value := range v {
			out[i] = encode(value)
		}
		return out
	case wholeNumber:
		return jsontext.Value(strconv.FormatFloat(float64(v), 'f', 0, 64))
	case float64:
		s := strconv.FormatFloat(v, 'g', -1, 64)
		if size := math.Abs(v); size >= 1e-4 && size < 1e16 || size == 0 {
			s = strconv.FormatFloat(v, 'f', -1, 64)
		}
		if !strings.ContainsAny(s, ".e") {
			s += ".0"
		}
		return jsontext.Value(s)
	}
	return v
}
