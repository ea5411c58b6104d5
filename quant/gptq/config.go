package gptq

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/columns"
	"github.com/lorakit/lorakit/tensor"
)

// config is a quantization_config.
type config struct {
	Bits             int64          `json:"bits"`
	GroupSize        int64          `json:"group_size"` // -1 for all inputs
	ActOrder         bool           `json:"desc_act"`
	CheckpointFormat string         `json:"checkpoint_format"`
	Format           string         `json:"format"`
	Marlin           bool           `json:"is_marlin_format"`
	Words            string         `json:"pack_dtype"`
	Dynamic          jsontext.Value `json:"dynamic"` // other bits and groups for some modules
}

// The layouts that are read, by the checkpoint_format that has them. The first stores each zero less one.
const (
	firstVersion  = "gptq"
	secondVersion = "gptq_v2"
)

// Method is the quant_method, and why nothing is written.
func (*config) Method() (name, does string) {
	return "gptq", "GPTQ chooses its integers by the activations of a model"
}

// ConfigFiles are those of AutoGPTQ and GPTQModel, one that the latter reads as well, and AutoRound's.
func (*config) ConfigFiles() []string {
	return []string{"quantize_config.json", "quant_config.json", "quantization_config.json"}
}

// format is the checkpoint_format.
func (c *config) format() string {
	return strings.ToLower(cmp.Or(c.CheckpointFormat, c.Format, firstVersion))
}

// varies reports whether modules may have other bits and groups than the config says.
func (c *config) varies() bool { return c.Dynamic.Kind() == '{' }

// widths are the bits that integers have.
var widths = []int64{2, 3, 4, 8}

// check returns an error unless weights can have these bits and groups.
func (c *config) check() error {
	if !slices.Contains(widths, c.Bits) {
		return fmt.Errorf("%w: quantization_config has bits %d, expected 2, 3, 4 or 8", quant.ErrMalformed, c.Bits)
	}
	return columns.CheckGroupSize(c.GroupSize)
}

// Unread is the layout of what is not read.
func (c *config) Unread() quant.Layout {
	const again = "take the checkpoint that it was made from, or one with checkpoint_format gptq or gptq_v2"
	format := c.format()
	switch {
	case c.Marlin || strings.Contains(format, "marlin"):
		return quant.Layout{Name: "GPTQ in a layout for marlin kernels",
			Advice: "take the checkpoint that it was repacked from, with checkpoint_format gptq or gptq_v2"}
	case format == "gptq_p" || c.Bits >= 5 && c.Bits <= 7:
		return quant.Layout{Name: "GPTQ in planar words, as GPTQModel has 5, 6 and 7 bits",
			Advice: "take the checkpoint that it was made from, or one of 2, 3, 4 or 8 bits with checkpoint_format gptq or " +
				"gptq_v2"}
	case format != firstVersion && format != secondVersion:
		return quant.Layout{Name: "GPTQ with checkpoint_format " + tensor.Quote(format), Advice: again}
	case c.Words != "" && c.Words != "int32":
		return quant.Layout{Name: "GPTQ in words of " + tensor.Quote(c.Words), Advice: again}
	}
	return quant.Layout{}
}
