package models

import (
	"slices"
	"strings"
)

// Head returns the run-time name of the module that is the model's output embedding, or "" where it has none or its
// architecture is not known.
func (m *Model) Head() string {
	if m.data == nil {
		return ""
	}
	return m.data.Head
}

// EncoderDecoder reports whether the config says that the model is an encoder with a decoder.
func (c *Config) EncoderDecoder() bool {
	v, ok := c.value("is_encoder_decoder")
	return ok && v.Kind() == 't'
}

// HeadSource returns the run-time parameter that a config may tie the weight of the output head to, whether this one
// does or not; "" where there is none.
func (m *Model) HeadSource() string {
	if m.data == nil || m.data.Head == "" {
		return ""
	}
	for _, t := range m.data.Ties {
		if source, ok := t.Pairs[m.data.Head+".weight"]; ok {
			return source
		}
	}
	return ""
}

// Embedding returns the run-time name of the module that is the model's input embedding, or "" where it is not
// known.
func (m *Model) Embedding() string {
	if m.data == nil {
		return ""
	}
	return m.data.Embedding
}

// LogitsBias returns the tensor that is added to all logits, a buffer of the model itself as BART and its like
// have it, or "". It is as long as the vocabulary.
func (m *Model) LogitsBias() string {
	const name = "final_logits_bias" // by which transformers knows what it resizes with the vocabulary
	if m.data == nil || m.data.Head == "" {
		return ""
	}
	if _, ok := m.data.parameter(split(name), anyRank); !ok {
		return ""
	}
	return name
}

// SharedBy lists the run-time parameters that are tied to param, in order.
func (m *Model) SharedBy(param string) []string {
	var list []string
	for target, source := range m.tied {
		if source == param && target != param && !strings.Contains(target, "#") {
			list = append(list, target)
		}
	}
	slices.Sort(list)
	return list
}

// TieSwitches lists the members of the config, by their dotted paths, that have to be false for the output head to be
// no longer tied. A model that is always tied has none: it keeps two values apart where the file has both.
func (m *Model) TieSwitches() []string {
	if m.Architecture == scaledWhileTied {
		return nil // it keeps two values apart too
	}
	return m.switches
}

// scaledWhileTied is an architecture that scales what its head reads where the config says that it is tied: without
// the switch, the same weights are another function.
const scaledWhileTied = "SwitchTransformersForConditionalGeneration"

// switches are the members of the config that make the tie what it is.
func (c *Config) switches(t tie) []string {
	var list []string
	for _, path := range t.Config {
		v, ok := c.value(path)
		if ok && v.Kind() == 't' {
			list = append(list, path)
		}
		if ok && !t.Either {
			break
		}
	}
	if len(list) == 0 && len(t.Config) > 0 {
		list = t.Config[:1]
	}
	return list
}
