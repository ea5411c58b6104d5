// Package awq reads the weights of AWQ checkpoints in the layout for gemm, as AutoAWQ saves them: integers of 4 bits
// along the rows of a matrix that lies (in, out), with a scale and a zero for each group of inputs.
//
// It writes none: what makes an AWQ weight is how its channels are scaled before they are rounded, by what they do to
// activations. Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
// (2023); names, shapes and arithmetic are those of AutoAWQ.
package awq

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/columns"
	"github.com/lorakit/lorakit/tensor"
)

func init() { quant.Register(Scheme{}) }

// Scheme is the quant.Scheme of AWQ.
type Scheme struct{}

// Name returns the quant_method of a config.json.
func (Scheme) Name() string { return "awq" }

// Types lists the one type, which is read only.
func (Scheme) Types() []quant.Type { return []quant.Type{{Name: "awq", ReadOnly: true}} }

// Spec refuses: nothing is written.
func (s Scheme) Spec(typ string, _ quant.Params) (quant.Spec, error) {
	if typ != s.Name() {
		return quant.Spec{}, fmt.Errorf("%w %q", quant.ErrUnknown, typ)
	}
	return quant.Spec{}, notWritten()
}

// Encoder refuses.
func (Scheme) Encoder(context.Context, quant.Spec, tensor.Info) (quant.Encoder, error) {
	return nil, notWritten()
}

// Config refuses.
func (Scheme) Config([]quant.Assigned, []string) (key string, object []byte, err error) {
	return "", nil, notWritten()
}

func notWritten() error {
	err := fmt.Errorf("%w to awq: it is read only, since AWQ scales the channels of a model by its activations and "+
		"rounding alone is not what the name promises", quant.ErrUnsupported)
	return hint.With(err, hint.Hint{Option: "Quantize", Value: "w4a16", Effect: "writes groups of 4 bits by rounding"})
}

// config is a quantization_config.
type config struct {
	Method    string `json:"quant_method"`
	Bits      int64  `json:"bits"`
	GroupSize int64  `json:"group_size"` // -1 for all inputs
	Version   string `json:"version"`
	Format    string `json:"format"` // as version
	Backend   string `json:"backend"`
}

// bits are those of AutoAWQ's integers.
const bits = 4

// parse reads a quantization_config. It reports false for another scheme's.
func parse(b []byte) (*config, bool) {
	var named struct {
		Method string `json:"quant_method"`
	}
	if json.Unmarshal(b, &named) != nil || named.Method != (Scheme{}).Name() {
		return nil, false
	}
	var c config
	if json.Unmarshal(b, &c) != nil { // a member of another kind: check refuses it
		return &config{Method: named.Method}, true
	}
	return &c, true
}

// check returns an error unless weights can have these bits and groups.
func (c *config) check() error {
	if c.Bits != bits {
		return fmt.Errorf("%w: quantization_config has bits %d, expected %d", quant.ErrMalformed, c.Bits, bits)
	}
	return columns.CheckGroupSize(c.GroupSize)
}

// unread is the layout of what is not read.
func (c *config) unread() quant.Layout {
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

// Declaration knows a quantization_config of AWQ. Which modules stay plain it need not say: loaders take those that
// have a qweight.
func (Scheme) Declaration(b []byte) (quant.Declaration, bool) {
	c, ok := parse(b)
	if !ok {
		return quant.Declaration{}, false
	}
	return quant.Declaration{Unsaid: true, Unread: c.unread()}, true
}

// Find returns the weights whose integers are M.qweight, where config.json says that they are AWQ's.
func (Scheme) Find(ctx context.Context, s quant.Stored) ([]quant.Decoder, error) {
	c, ok := parse(quant.Quantization(s.Config()))
	if !ok || c.unread() != (quant.Layout{}) {
		return nil, nil
	}
	return columns.Find(ctx, s, c.of)
}

// of is the layout of a module.
func (c *config) of(m columns.Module) (columns.Layout, error) {
	if err := c.check(); err != nil {
		return columns.Layout{}, err
	}
	l := columns.Layout{In: m.Codes[0], Out: m.Codes[1] * (32 / bits), Bits: bits, Interleaved: true}
	l.Groups, l.GroupSize = columns.GroupsOf(l.In, c.GroupSize)
	l.Spec = quant.Spec{Type: "awq", Params: quant.Params{
		{Name: "bits", Value: l.Bits}, {Name: "group_size", Value: c.GroupSize}}}
	return l, nil
}
