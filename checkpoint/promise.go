package checkpoint

import (
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/quant"
)

// promise is what the quantization_config says of how the weights are stored, by the scheme whose it is.
func (c *Checkpoint) promise() (quant.Promise, bool) {
	if c.Config == nil || c.Config.Quantization == nil {
		return quant.Promise{}, false
	}
	for _, s := range quant.All() {
		if p, ok := s.Promise(c.Config.Quantization); ok {
			return p, true
		}
	}
	return quant.Promise{}, false
}

// ForeignScheme returns the quant_method of config.json where no scheme here reads it, so that its weights are seen as
// the raw tensors they consist of.
func (c *Checkpoint) ForeignScheme() (string, bool) {
	if c.Config == nil || c.Config.Quantization == nil {
		return "", false
	}
	if _, ok := c.promise(); ok {
		return "", false
	}
	var named struct {
		Method string `json:"quant_method"`
	}
	if json.Unmarshal(c.Config.Quantization, &named) != nil {
		named.Method = ""
	}
	return named.Method, true
}

// KnownSchemes lists the schemes that are read here.
func KnownSchemes() string { return strings.Join(quant.Default.Names(), ", ") }
