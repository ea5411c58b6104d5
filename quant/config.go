package quant

import (
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Quantization is the quantization_config of a config.json, or the compression_config that compressed-tensors has had
// before, or the quantization_config of its text_config, as vLLM looks for them; nil where there is none.
func Quantization(config []byte) jsontext.Value {
	var c struct {
		Quantization jsontext.Value `json:"quantization_config"`
		Compression  jsontext.Value `json:"compression_config"`
		MLX          jsontext.Value `json:"quantization"`
		Text         jsontext.Value `json:"text_config"`
	}
	var text struct {
		Quantization jsontext.Value `json:"quantization_config"`
	}
	if json.Unmarshal(config, &c) != nil {
		return nil
	}
	switch {
	case c.Quantization != nil && c.Quantization.Kind() != 'n':
		return c.Quantization
	case c.Compression.Kind() == '{':
		return c.Compression
	case c.MLX.Kind() == '{' || json.Unmarshal(c.Text, &text) != nil || text.Quantization.Kind() != '{':
		return nil
	}
	return text.Quantization
}
