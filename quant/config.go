package quant

import (
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Quantization is the quantization_config of a config.json, nil where there is none.
func Quantization(config []byte) jsontext.Value {
	var c struct {
		Quantization jsontext.Value `json:"quantization_config"`
	}
	if json.Unmarshal(config, &c) != nil {
		return nil
	}
	return c.Quantization
}
