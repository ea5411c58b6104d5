package quant

import (
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Quantization is the quantization_config of a config.json, or the compression_config that compressed-tensors has had
// before, nil where there is neither.
func Quantization(config []byte) jsontext.Value {
	var c struct {
		Quantization jsontext.Value `json:"quantization_config"`
		Compression  jsontext.Value `json:"compression_config"`
	}
	if json.Unmarshal(config, &c) != nil {
		return nil
	}
	if none := c.Quantization == nil || c.Quantization.Kind() == 'n'; none && c.Compression.Kind() == '{' {
		return c.Compression
	}
	return c.Quantization
}
