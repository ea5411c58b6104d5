package checkpoint

import (
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/quant"
)

// ForeignScheme returns the quant_method of config.json where no scheme here reads it, so that its weights are seen as
// the raw tensors they consist of.
func (c *Checkpoint) ForeignScheme() (string, bool) {
	if c.Config == nil || c.Config.Quantization == nil {
		return "", false
	}
	method := c.promise().Method
	if _, ok := quant.Named(method); ok {
		return "", false
	}
	return method, true
}

// promise is what a quantization_config says of how the weights are stored.
type promise struct {
	Method   string         `json:"quant_method"`
	FourBit  bool           `json:"load_in_4bit"`
	EightBit bool           `json:"load_in_8bit"`
	Skips    jsontext.Value `json:"llm_int8_skip_modules"`
	skip     []string       // nil leaves it to the loader
}

// promise reads the quantization_config; one that cannot be read promises nothing.
func (c *Checkpoint) promise() (p promise) {
	if c.Config == nil || json.Unmarshal(c.Config.Quantization, &p) != nil {
		return promise{}
	}
	if p.Method == "" && (p.FourBit || p.EightBit) { // as before there were other methods
		p.Method = "bitsandbytes"
	}
	if json.Unmarshal(p.Skips, &p.skip) != nil {
		p.skip = nil
	}
	return p
}

// KnownSchemes lists the schemes that are read here.
func KnownSchemes() string {
	var names []string
	for _, s := range quant.All() {
		names = append(names, s.Name())
	}
	return strings.Join(names, ", ")
}
