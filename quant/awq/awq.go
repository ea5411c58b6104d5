// Package awq reads the weights of AWQ checkpoints in the layout for gemm, as AutoAWQ saves them: integers of 4 bits
// along the rows of a matrix that lies (in, out), with a scale and a zero for each group of inputs.
//
// It writes none: what makes an AWQ weight is how its channels are scaled before they are rounded, by what they do to
// activations. Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
// (2023); names, shapes and arithmetic are those of AutoAWQ.
package awq

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/columns"
	"github.com/lorakit/lorakit/tensor"
)

func init() { quant.Register(Scheme{}) }

// Scheme is the quant.Scheme of AWQ.
type Scheme = columns.Scheme[config, *config]

// config is a quantization_config.
type config struct {
	Bits      int64  `json:"bits"`
	GroupSize int64  `json:"group_size"` // -1 for all inputs
	Version   string `json:"version"`
	Format    string `json:"format"` // as version
	Backend   string `json:"backend"`
}

// bits are those of AutoAWQ's integers.
const bits = 4

// Method is the quant_method, and why nothing is written.
func (*config) Method() (name, does string) {
	return "awq", "AWQ scales the channels of a model by its activations"
}

// ConfigFiles is AutoAWQ's of before it had config.json say it.
func (*config) ConfigFiles() []string { return []string{"quant_config.json"} }

// check returns an error unless weights can have these bits and groups.
func (c *config) check() error {
	if c.Bits != bits {
		return fmt.Errorf("%w: quantization_config has bits %d, expected %d", quant.ErrMalformed, c.Bits, bits)
	}
	return columns.CheckGroupSize(c.GroupSize)
}

// Unread is the layout of what is not read.
func (c *config) Unread() quant.Layout {
	l := quant.Layout{Advice: "take the checkpoint that it was made from, or one that is quantised with version gemm"}
	version := strings.ToLower(cmp.Or(c.Version, c.Format, "gemm"))
	if strings.EqualFold(c.Backend, "llm-awq") {
		version = "llm-awq"
	}
	switch version {
	case "gemm", "exllama", "exllamav2", "ipex": // kernels that load the layout for gemm
		return quant.Layout{}
	case "gemv", "gemv_fast":
		l.Name = "AWQ in the layout for " + version
	case "llm-awq":
		l.Name = "AWQ in the layout of llm-awq"
	case "marlin":
		l.Name = "AWQ in a layout for marlin kernels"
	default:
		l.Name = "AWQ with version " + tensor.Quote(version)
	}
	return l
}

// Layout is that of a module.
func (c *config) Layout(m columns.Module, _ quant.Stored) (columns.Layout, error) {
	if err := c.check(); err != nil {
		return columns.Layout{}, err
	}
	l := columns.Layout{In: m.Codes[0], Out: m.Codes[1] * (32 / bits), Bits: bits, Interleaved: true}
	l.Groups, l.GroupSize = columns.GroupsOf(l.In, c.GroupSize)
	l.Spec = quant.Spec{Type: "awq", Params: quant.Params{
		{Name: "bits", Value: l.Bits}, {Name: "group_size", Value: c.GroupSize}}}
	return l, nil
}
