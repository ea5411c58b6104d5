package mlx

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// The member of config.json that mlx-lm reads, and its copy for others.
const (
	ownKey  = "quantization"
	copyKey = "quantization_config"
)

// config is the quantization of a config.json.
type config struct {
	all     settings
	modules map[string]jsontext.Value // what single modules have instead
}

// settings are the members for all modules, or for one.
type settings struct {
	Group int64  `json:"group_size"`
	Bits  int64  `json:"bits"`
	Mode  string `json:"mode"`
}

// readConfig reads the quantization of a config.json, nil where that has none of MLX.
func readConfig(b []byte) (*config, error) {
	var file struct {
		Own  jsontext.Value `json:"quantization"`
		Copy jsontext.Value `json:"quantization_config"`
	}
	if len(b) == 0 || json.Unmarshal(b, &file) != nil {
		return nil, nil // no JSON for others either
	}
	own, other := parseConfig(file.Own), parseConfig(file.Copy)
	if own == nil || other == nil {
		if own == nil {
			own = other
		}
		return own, nil
	}
	if own.all != other.all {
		return nil, fmt.Errorf("config.json: %w: its %s has %s, and its %s %s", quant.ErrMalformed, ownKey, own.all, copyKey,
			other.all)
	}
	for _, module := range slices.Sorted(maps.Keys(joined(own.modules, other.modules))) {
		if !bytes.Equal(own.modules[module], other.modules[module]) {
			return nil, fmt.Errorf("config.json: %w: module %s has not the same in its %s and in its %s", quant.ErrMalformed,
				tensor.Quote(module), ownKey, copyKey)
		}
	}
	return own, nil
}

func joined(a, b map[string]jsontext.Value) map[string]jsontext.Value {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}

// ofOthers are members by which other schemes are known that have bits and group_size too: those that have a name, and
// GPTQ and AWQ without one.
var ofOthers = []string{"quant_method", "desc_act", "sym", "zero_point"}

// parseConfig returns nil for what is none of MLX, or of a mode that is not known here.
func parseConfig(v jsontext.Value) *config {
	var members map[string]jsontext.Value
	if v.Kind() != '{' || json.Unmarshal(v, &members) != nil {
		return nil
	}
	if members["group_size"] == nil || members["bits"] == nil || slices.ContainsFunc(ofOthers, func(name string) bool {
		return members[name] != nil
	}) {
		return nil
	}
	c := &config{modules: members}
	if json.Unmarshal(v, &c.all) != nil {
		return nil
	}
	if c.all.Mode == "" {
		c.all.Mode = affine // as all were before there were modes
	}
	if !knownMode(c.all.Mode) {
		return nil
	}
	for _, name := range []string{"group_size", "bits", "mode"} {
		delete(c.modules, name)
	}
	for name, m := range c.modules {
		if m.Canonicalize() == nil {
			c.modules[name] = m
		}
	}
	return c
}

func knownMode(mode string) bool {
	return slices.ContainsFunc(kinds, func(k *kind) bool { return k.mode == mode })
}

// of returns the layout of a module's weight, without a kind where it is to be plain, and whether the module is listed.
func (c *config) of(module string) (l layout, listed bool, err error) {
	v, listed := c.modules[module]
	switch {
	case !listed || v.Kind() == 't':
		l, err = c.all.layout()
		return l, listed, err
	case v.Kind() == 'f':
		return layout{}, true, nil
	}
	var s settings
	if v.Kind() != '{' || json.Unmarshal(v, &s) != nil {
		return layout{}, true, fmt.Errorf("the quantization of config.json has %s for the module, expected false or an "+
			"object with group_size, bits and mode", tensor.Quote(string(v)))
	}
	// What is not said is MLX's default, and not what all others have.
	if s.Mode == "" {
		s.Mode = affine
	}
	for _, k := range kinds {
		if k.mode == s.Mode && (s.Mode != affine || k == defaultKind) {
			s.Bits, s.Group = cmp.Or(s.Bits, k.bits), cmp.Or(s.Group, k.groups[0])
		}
	}
	l, err = s.layout()
	return l, true, err
}

// layout finds the kind that is meant.
func (s settings) layout() (layout, error) {
	var bits, groups []int64
	for _, k := range kinds {
		if k.mode != s.Mode {
			continue
		}
		bits, groups = append(bits, k.bits), k.groups
		if k.bits == s.Bits && slices.Contains(k.groups, s.Group) {
			return layout{k, s.Group}, nil
		}
	}
	if bits == nil {
		return layout{}, fmt.Errorf("the quantization of config.json has mode %s, expected affine, mxfp4, mxfp8 or nvfp4",
			tensor.Quote(s.Mode))
	}
	return layout{}, fmt.Errorf("the quantization of config.json has %s, expected bits %s and group_size %s", s,
		numbers(bits), numbers(groups))
}

func (s settings) String() string {
	return fmt.Sprintf("mode %s, bits %d, group_size %d", tensor.Quote(s.Mode), s.Bits, s.Group)
}

// numbers lists numbers in order: "32, 64 or 128".
func numbers(list []int64) string {
	var words []string
	for _, n := range slices.Sorted(slices.Values(list)) {
		words = append(words, strconv.FormatInt(n, 10))
	}
	if last := len(words) - 1; last > 0 {
		return strings.Join(words[:last], ", ") + " or " + words[last]
	}
	return words[0]
}

// Config returns mlx-lm's quantization: what most weights have for all modules, and the others one by one. Modules that
// stay plain are not listed, as mlx-lm knows them by their tensors.
func (Scheme) Config(weights []quant.Assigned, _ []string) (key string, object []byte, err error) {
	var most layout
	count := map[layout]int{}
	layouts := make([]layout, len(weights))
	for i, w := range weights {
		if layouts[i], err = layoutOf(w.Spec); err != nil {
			return "", nil, fmt.Errorf("tensor %s: %w", tensor.Quote(w.Name), err)
		}
		count[layouts[i]]++
	}
	for _, l := range layouts { // of those that are as many, the first
		if count[l] > count[most] {
			most = l
		}
	}
	if most.kind == nil {
		return "", nil, fmt.Errorf("%w: no weights, expected at least one", quant.ErrUnsupported)
	}
	b := append([]byte{'{'}, most.members()...)
	for i, l := range layouts {
		if l == most {
			continue
		}
		name, err := jsontext.AppendQuote(nil, strings.TrimSuffix(weights[i].Name, weightSuffix))
		if err != nil {
			return "", nil, fmt.Errorf("tensor %s: %w: its name is no UTF-8, which config.json is",
				tensor.Quote(weights[i].Name), quant.ErrUnsupported)
		}
		b = fmt.Appendf(b, ", %s: {%s}", name, l.members())
	}
	return ownKey, append(b, '}'), nil
}

func (l layout) members() []byte {
	return fmt.Appendf(nil, `"group_size": %d, "bits": %d, "mode": %q`, l.group, l.bits, l.mode)
}

// Declaration reads the quantization that Config writes. Which modules it is about, the tensors say by themselves.
func (Scheme) Declaration(object []byte) (quant.Declaration, bool) {
	return quant.Declaration{Unsaid: true}, parseConfig(object) != nil
}
