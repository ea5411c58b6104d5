package quant_test

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
)

// TestQuantization: under either name, of which the newer goes first; package models sees the same.
func TestQuantization(t *testing.T) {
	for config, want := range map[string]string{
		`{"quantization_config": {"a": 1}}`:                                             `{"a": 1}`,
		`{"compression_config": {"b": 1}}`:                                              `{"b": 1}`,
		`{"compression_config": {"b": 1}, "quantization_config": {"a": 1}}`:             `{"a": 1}`,
		`{"quantization_config": null, "compression_config": {"b": 1}}`:                 `{"b": 1}`,
		`{"compression_config": 5}`:                                                     "",
		`{"quantization": {"group_size": 1}, "compression_config": {"b": 1}}`:           `{"b": 1}`,
		`{"text_config": {"quantization_config": {"t": 1}}}`:                            `{"t": 1}`,
		`{"text_config": {"quantization_config": {}}, "compression_config": {"b": 1}}`:  `{"b": 1}`,
		`{"text_config": {"quantization_config": {}}, "quantization_config": {"a": 1}}`: `{"a": 1}`,
		`{"text_config": {"quantization_config": null}}`:                                "",
		`{"text_config": 5}`: "",
		`{"text_config": {"quantization_config": {}}, "quantization": {"group_size": 1}}`: "",
		`{}`: "",
	} {
		assert.Equal(t, want, string(quant.Quantization([]byte(config))), config)
		c, err := models.ParseConfig([]byte(config))
		assert.NoError(t, err)
		if c.QuantizationKeys == nil || c.QuantizationKeys[0] != "quantization" {
			assert.Equal(t, want, string(c.Quantization), config)
		}
	}
}
