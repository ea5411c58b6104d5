package gguf

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/tensor"
)

// The tensors that are made of the parameters of rotary embeddings.
const (
	ropeFreqs    = "rope_freqs.weight"
	factorsLong  = "rope_factors_long.weight"
	factorsShort = "rope_factors_short.weight"
)

// Kinds of made tensors, as the data has them.
const (
	madeFreqs   = "rope_freqs"
	madeFactors = "rope_factors"
)

// maxDimensions is more than any head has.
const maxDimensions = 1 << 16

// ropeKey is a key of the scaling of rotary embeddings, by the members of rope_parameters that it may come from.
type ropeKey struct {
	key, kind string
	members   []string
	need      bool
}

// scalingKeys are those that a linear or yarn scaling has beside its type, of which linear has the first alone.
var scalingKeys = []ropeKey{
	{scalingFactor, "f32", []string{"factor"}, true},
	{"rope.scaling.original_context_length", "u32", []string{"original_max_position_embeddings"}, true},
	{"rope.scaling.yarn_ext_factor", "f32", []string{"extrapolation_factor"}, false},
	{"rope.scaling.yarn_attn_factor", "f32", []string{"attention_factor", "attn_factor"}, false},
	{"rope.scaling.yarn_beta_fast", "f32", []string{"beta_fast"}, false},
	{"rope.scaling.yarn_beta_slow", "f32", []string{"beta_slow"}, false},
}

// The keys of rotary embeddings that are not of scalingKeys.
const (
	scalingType    = "rope.scaling.type"
	scalingFactor  = "rope.scaling.factor"
	scaleLinear    = "rope.scale_linear" // of files before rope.scaling.type
	freqBase       = "rope.freq_base"
	freqBaseSWA    = "rope.freq_base_swa"
	attnFactor     = "rope.scaling.attn_factor"
	logMultiplier  = "rope.scaling.yarn_log_multiplier"
	dimensionCount = "rope.dimension_count"
)

// ropeKeys adds the keys of rotary embeddings.
func (s *settings) ropeKeys(add func(name string, value any)) error {
	switch t := s.ropeType(); t {
	case "", "default", "llama3":
	case "linear", "yarn":
		if s.rope["factor"] == nil {
			break // as the converter has it: no scaling
		}
		add(scalingType, t)
		keys := scalingKeys
		if t == "linear" {
			keys = keys[:1]
		}
		for _, k := range keys {
			v, member := s.ropeMember(k.members)
			if v == nil {
				if k.need {
					return malformedf("config.json: rope_parameters: found no %s, which a %s scaling needs", k.members[0], t)
				}
				continue
			}
			typed, err := typedValue(k.kind, v)
			if err != nil {
				return fmt.Errorf("config.json: rope_parameters.%s: %w", member, err)
			}
			add(k.key, typed)
		}
	case "longrope", "su":
		add(scalingType, "longrope")
	default:
		return unsupportedf("config.json: rope_parameters: found the type %s, expected default, linear, yarn, longrope or "+
			"llama3", tensor.Quote(t))
	}
	for _, base := range []struct {
		key  string
		from map[string]any
	}{{freqBase, s.rope}, {freqBaseSWA, s.sliding}} {
		v := base.from["rope_theta"]
		if v == nil {
			continue
		}
		typed, err := typedValue("f32", v)
		if err != nil {
			return fmt.Errorf("config.json: rope_theta: %w", err)
		}
		add(base.key, typed)
	}
	return nil
}

// ropeMember is the first of members that rope_parameters has.
func (s *settings) ropeMember(members []string) (any, string) {
	for _, m := range members {
		if v := s.rope[m]; v != nil {
			return v, m
		}
	}
	return nil, ""
}

// made makes the tensors that the config becomes, with the keys that go with them.
func (a *architecture) made(kind string, s *settings, add func(name string, value any)) ([]Tensor, error) {
	switch kind {
	case madeFreqs:
		return s.freqs(a.turned())
	case madeFactors:
		return s.factors(a.turned(), add)
	}
	return nil, fmt.Errorf("found the made tensor %q, which there is not", kind)
}

// turned is the expression for the dimensions of a head that are turned.
func (a *architecture) turned() string {
	for _, k := range a.Keys {
		if k.name == dimensionCount {
			return k.from
		}
	}
	return "hidden_size//num_attention_heads"
}

// freqs makes the divisors of frequencies of a llama3 scaling.
func (s *settings) freqs(turned string) ([]Tensor, error) {
	if s.ropeType() != "llama3" {
		return nil, nil
	}
	dimensions, err := s.whole(turned)
	if err != nil {
		return nil, err
	}
	if dimensions > maxDimensions {
		return nil, malformedf("config.json: found heads of %d, expected at most %d", dimensions, maxDimensions)
	}
	var n [5]float64
	for i, m := range []struct {
		name      string
		otherwise any
	}{{"rope_theta", 10000.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0},
		{"original_max_position_embeddings", 8192.0}, {"factor", 8.0}} {
		v := s.rope[m.name]
		if v == nil {
			v = m.otherwise
		}
		x, ok := v.(float64)
		if !ok || !(x > 0) {
			return nil, malformedf("config.json: rope_parameters.%s: found %v, expected a number above 0", m.name, v)
		}
		n[i] = x
	}
	if n[1] == n[2] {
		return nil, malformedf("config.json: rope_parameters: found the same low and high_freq_factor %v, expected two", n[1])
	}
	return []Tensor{madeTensor(ropeFreqs, llama3(llama3Scaling{n[0], n[1], n[2], n[3], n[4]}, int(dimensions)))}, nil
}

// llama3Scaling are the parameters of a llama3 scaling.
type llama3Scaling struct{ base, low, high, old, factor float64 }

// llama3 computes the divisors in float32, as torch does but for the last bits of the power.
func llama3(s llama3Scaling, dimensions int) []float32 {
	values := make([]float32, (dimensions+1)/2)
	low, high, old, factor := float32(s.low), float32(s.high), float32(s.old), float32(s.factor)
	longest, shortest := float32(s.old/s.low), float32(s.old/s.high)
	for i := range values {
		exponent := float32(2*i) / float32(dimensions)
		frequency := 1 / float32(math.Pow(s.base, float64(exponent)))
		length := float32(2*math.Pi) / frequency
		switch {
		case length < shortest:
			values[i] = 1
		case length > longest:
			values[i] = factor
		default:
			smooth := (old/length - low) / (high - low)
			part := (1 - smooth) / factor
			values[i] = 1 / (part + smooth)
		}
	}
	return values
}

// factors makes the two tensors of a longrope scaling.
func (s *settings) factors(turned string, add func(name string, value any)) ([]Tensor, error) {
	long, short := s.rope["long_factor"], s.rope["short_factor"]
	if long == nil {
		return nil, nil
	}
	dimensions, err := s.whole(turned)
	if err != nil {
		return nil, err
	}
	var tensors []Tensor
	for _, t := range []struct {
		name, member string
		v            any
	}{{factorsLong, "long_factor", long}, {factorsShort, "short_factor", short}} {
		list, ok := t.v.([]float64)
		if !ok || 2*int64(len(list)) != dimensions {
			return nil, malformedf("config.json: rope_parameters.%s: found %s, expected a list of %d numbers, half of the "+
				"dimensions that are turned", t.member, describe(t.v), dimensions/2)
		}
		values := make([]float32, len(list))
		for i, x := range list {
			values[i] = float32(x)
		}
		tensors = append(tensors, madeTensor(t.name, values))
	}
	most, err := s.whole("max_position_embeddings")
	if err != nil {
		return nil, err
	}
	original, err := s.whole("rope_parameters.original_max_position_embeddings")
	if err != nil {
		return nil, err
	}
	factor, err := longropeAttention(s.ropeType(), float64(most)/float64(original), float64(original))
	if err != nil {
		return nil, err
	}
	add(attnFactor, float32(factor))
	return tensors, nil
}

// longropeAttention is what queries and keys are scaled by, as transformers has it in no member of the config.
func longropeAttention(kind string, scale, original float64) (float64, error) {
	switch {
	case kind != "longrope" && kind != "su" && kind != "yarn":
		return 0, unsupportedf("config.json: rope_parameters: found factors and the type %s, expected longrope",
			tensor.Quote(kind))
	case scale <= 1:
		return 1, nil
	case original < 2:
		return 0, malformedf("config.json: found original_max_position_embeddings %v, expected more", original)
	}
	return math.Sqrt(1 + math.Log(scale)/math.Log(original)), nil
}

// describe says what a value is for a message.
func describe(v any) string {
	switch v := v.(type) {
	case nil:
		return "none"
	case []float64:
		return fmt.Sprintf("%d numbers", len(v))
	}
	return "something else"
}

func madeTensor(name string, values []float32) Tensor {
	return Tensor{
		Info:   tensor.Info{Name: name, DType: tensor.F32, Shape: tensor.Shape{int64(len(values))}},
		Values: values,
	}
}
