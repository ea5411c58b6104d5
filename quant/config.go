package quant

import (
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Quantization is the quantization_config of a config.json, nil where there is none.
func Quantization(config []byte) jsontext.Value {
	var c struct {
		Quantization jsontext.Value `json:"quantization_config"`
	}
	if json.Unmarshal(config, &c) == nil {
		return c.Quantization
	}
	// Python writes numbers that JSON does not have; in a member that nobody reads here a word will do.
	if json.Unmarshal([]byte(nonFinite.Replace(string(config))), &c) != nil {
		return nil
	}
	return c.Quantization
}

var nonFinite = strings.NewReplacer("-Infinity", `null`, "Infinity", `null`, "NaN", `null`)
