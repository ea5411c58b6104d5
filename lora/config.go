package lora

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/dlclark/regexp2/v2"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/tensor"
)

// Config is what an adapter_config.json says of the mathematics.
type Config struct {
	PeftType    string         `json:"peft_type"`
	PeftVersion string         `json:"peft_version"`
	Rank        int            `json:"r"`
	Alpha       float64        `json:"lora_alpha"`
	RSLoRA      bool           `json:"use_rslora"`
	DoRA        bool           `json:"use_dora"`
	LoraBias    bool           `json:"lora_bias"`
	BiasMode    string         `json:"bias"`
	EnsureTie   bool           `json:"ensure_weight_tying"`
	Tokens      jsontext.Value `json:"trainable_token_indices"`
	BLayout     string         `json:"lora_B_layout"` // of unsloth: rank_major or grouped_by_expert
	Targets     jsontext.Value `json:"target_modules"`
	Parameters  jsontext.Value `json:"target_parameters"`
	ToSave      jsontext.Value `json:"modules_to_save"`
	Init        jsontext.Value `json:"init_lora_weights"`

	ranks, alphas []pattern
	raw           []byte
}

// pattern is an entry of rank_pattern or alpha_pattern, in the file's order.
type pattern struct {
	key   string
	value float64
	re    *regexp2.Regexp
}

// unsupported are the fields that change what an adapter computes and are not known
// here. A value that is null, false or empty switches them off.
var unsupported = []string{
	"alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
	"use_bdlora", "use_qalora", "velora_config",
}

// matchTimeout bounds how long one regular expression of a config may take on one
// name.
const matchTimeout = 250 * time.Millisecond

// parseConfig reads an adapter_config.json.
func parseConfig(b []byte) (Config, error) {
	c := Config{raw: b, Rank: 8, Alpha: 8} // PEFT's own, where they are absent
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	var all map[string]jsontext.Value
	if err := json.Unmarshal(b, &all); err != nil {
		return c, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if c.PeftType != "LORA" {
		return c, fmt.Errorf("%w: peft_type is %s, expected LORA", ErrUnsupported, tensor.Quote(c.PeftType))
	}
	for _, name := range []string{"r", "lora_alpha"} {
		if v, ok := all[name]; ok && v.Kind() != '0' {
			return c, fmt.Errorf("%w: %s is %s, expected a number", ErrMalformed, name, tensor.Quote(string(v)))
		}
	}
	for _, name := range unsupported {
		if v, ok := all[name]; ok && !empty(v) {
			return c, fmt.Errorf("%w: %s is %s, which changes what the adapter computes", ErrUnsupported, name, tensor.Quote(string(v)))
		}
	}
	if c.Rank <= 0 {
		return c, fmt.Errorf("%w: r is %d, expected 1 or more", ErrMalformed, c.Rank)
	}
	if !slices.Contains([]string{"", "rank_major", "grouped_by_expert"}, c.BLayout) {
		return c, fmt.Errorf("%w: lora_B_layout is %s, expected rank_major or grouped_by_expert", ErrUnsupported, tensor.Quote(c.BLayout))
	}
	var err error
	if c.ranks, err = parsePatterns(all["rank_pattern"]); err != nil {
		return c, fmt.Errorf("rank_pattern: %w", err)
	}
	if c.alphas, err = parsePatterns(all["alpha_pattern"]); err != nil {
		return c, fmt.Errorf("alpha_pattern: %w", err)
	}
	return c, nil
}

// empty reports whether a JSON value switches a field off.
func empty(v jsontext.Value) bool {
	switch string(v) {
	case "", "null", "false", "[]", "{}", `""`:
		return true
	}
	return false
}

// parsePatterns reads an object of regular expressions and numbers in its order, which
// a map would lose.
func parsePatterns(v jsontext.Value) ([]pattern, error) {
	if empty(v) {
		return nil, nil
	}
	d := jsontext.NewDecoder(strings.NewReader(string(v)))
	if t, err := d.ReadToken(); err != nil || t.Kind() != '{' {
		return nil, fmt.Errorf("%w: expected a JSON object", ErrMalformed)
	}
	var list []pattern
	for d.PeekKind() == '"' {
		key, err := d.ReadToken()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		p := pattern{key: key.String()}
		val, err := d.ReadToken()
		if err != nil || val.Kind() != '0' {
			return nil, fmt.Errorf("%w: the value of %s is no number", ErrMalformed, tensor.Quote(p.key))
		}
		if p.value, err = val.Float(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		if p.re, err = compile(`(.*\.)?(` + p.key + `)$`); err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	return list, nil
}

// compile prepares a regular expression of Python that is to match from the start of a
// name.
func compile(expr string) (*regexp2.Regexp, error) {
	re, err := regexp2.Compile(`\A(?:`+expr+`)`, regexp2.None)
	if err != nil {
		return nil, fmt.Errorf("%w: regular expression %s: %s", ErrMalformed, tensor.Quote(expr), tensor.Quote(err.Error()))
	}
	re.MatchTimeout = matchTimeout
	return re, nil
}

// lookup returns the value of the first pattern that matches a name, or otherwise.
func lookup(list []pattern, name string, otherwise float64) (float64, error) {
	for _, p := range list {
		ok, err := p.re.MatchString(name)
		if err != nil {
			return 0, fmt.Errorf("%w: the pattern %s takes too long on %s", ErrMalformed, tensor.Quote(p.key), tensor.Quote(name))
		}
		if ok {
			return p.value, nil
		}
	}
	return otherwise, nil
}

// scale gives a module its rank, alpha and scaling, where have is the rank of its
// tensors.
func (c *Config) scale(m *Module, name string, have int64) error {
	r, err := lookup(c.ranks, name, float64(c.Rank))
	if err != nil {
		return err
	}
	if m.Alpha, err = lookup(c.alphas, name, c.Alpha); err != nil {
		return err
	}
	if float64(have) != r {
		return fmt.Errorf("%w: module %s has rank %d in its tensors and %g by adapter_config.json", ErrMalformed, tensor.Quote(name), have, r)
	}
	m.Rank = int(have)
	m.Scaling = m.Alpha / r
	if c.RSLoRA {
		m.Scaling = m.Alpha / math.Sqrt(r)
	}
	return nil
}

// residual are the starts that take a part out of the base: PEFT computes it anew when it
// loads such an adapter.
var residual = []string{"pissa", "olora", "corda", "loftq", "lora_ga"}

// plainBase refuses an adapter whose deltas are not for the base as it is.
func (c *Config) plainBase() error {
	for _, list := range stringList(c.Init) {
		for _, start := range residual {
			if strings.HasPrefix(list, start) {
				return fmt.Errorf("%w: init_lora_weights is %s, whose deltas are for the base without the part it started from; save it with path_initial_model_for_weight_conversion, which makes a plain one", ErrUnsupported, tensor.Quote(list))
			}
		}
	}
	return nil
}
