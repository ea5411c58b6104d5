package bnb

import (
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/quant"
)

// Declaration reads the quantization_config that Config writes, and that of older releases, which has no quant_method.
// A list of llm_int8_skip_modules replaces the loader's own choice.
func (Scheme) Declaration(config []byte) (quant.Declaration, bool) {
	var c struct {
		Method   string         `json:"quant_method"`
		FourBit  bool           `json:"load_in_4bit"`
		EightBit bool           `json:"load_in_8bit"`
		Skips    jsontext.Value `json:"llm_int8_skip_modules"`
	}
	if json.Unmarshal(config, &c) != nil {
		return quant.Declaration{}, false
	}
	if old := c.Method == "" && (c.FourBit || c.EightBit); !old && c.Method != (Scheme{}).Name() {
		return quant.Declaration{}, false
	}
	var p quant.Declaration
	var entries []string
	if json.Unmarshal(c.Skips, &entries) == nil && entries != nil {
		p.Skips = quant.SkipList(entries)
	}
	return p, true
}
