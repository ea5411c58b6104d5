// Package gptq reads the weights of GPTQ checkpoints, as AutoGPTQ, GPTQModel, optimum and AutoRound save them:
// integers of 2, 3, 4 or 8 bits down the columns of a matrix that lies (in, out), with a scale and a zero for each
// group of inputs. With act-order (desc_act) a list says which group an input is in.
//
// It writes none: what makes a GPTQ weight is how its integers are chosen, by what they do to activations. Source:
// Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022); names,
// shapes and arithmetic are those of GPTQModel.
package gptq

import (
	"context"
	"fmt"

	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/bitfield"
	"github.com/lorakit/lorakit/quant/internal/columns"
	"github.com/lorakit/lorakit/tensor"
)

func init() { quant.Register(Scheme{}) }

// Scheme is the quant.Scheme of GPTQ.
type Scheme struct{}

// Name returns the quant_method of a config.json.
func (Scheme) Name() string { return "gptq" }

// Types lists the one type, which is read only.
func (Scheme) Types() []quant.Type { return []quant.Type{{Name: "gptq", ReadOnly: true}} }

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
	err := fmt.Errorf("%w to gptq: it is read only, since GPTQ chooses its integers by the activations of a model and "+
		"rounding alone is not what the name promises", quant.ErrUnsupported)
	return hint.With(err, hint.Hint{Option: "Quantize", Value: "w4a16", Effect: "writes groups of 4 bits by rounding"})
}

// Find returns the weights whose integers are M.qweight, where config.json says that they are GPTQ's.
func (Scheme) Find(ctx context.Context, s quant.Stored) ([]quant.Decoder, error) {
	c, ok := parse(quant.Quantization(s.Config()))
	if !ok || c.unread() != (quant.Layout{}) {
		return nil, nil
	}
	return columns.Find(ctx, s, func(m columns.Module) (columns.Layout, error) { return c.of(m, s) })
}

// of is the layout of a module.
func (c *config) of(m columns.Module, s quant.Stored) (columns.Layout, error) {
	if err := c.check(); err != nil {
		return columns.Layout{}, err
	}
	l := columns.Layout{Out: m.Codes[1], In: m.Codes[0] * 32 / c.Bits, Bits: c.Bits, Down: true}
	if c.layout() == firstVersion {
		l.Plus = 1
	}
	index, listed := s.Lookup(m.Name + ".g_idx")
	switch {
	case listed && len(index.Shape) != 1:
		return l, fmt.Errorf("%w: %s is of shape %v, expected one dimension", quant.ErrMalformed, tensor.Quote(index.Name),
			index.Shape)
	case listed:
		l.Index, l.In = index.Name, index.Shape[0]
	case c.ActOrder: // which has inputs in no order
		return l, columns.Missing(m.Name + ".g_idx")
	}
	l.Groups, l.GroupSize = columns.GroupsOf(l.In, c.GroupSize)
	if c.varies() && listed { // by module, but the shapes tell
		l.Groups = m.Scales[0]
		for _, b := range widths {
			if bitfield.Words(l.In, b) == m.Codes[0] {
				l.Bits = b
			}
		}
	}
	l.Spec = quant.Spec{Type: "gptq", Params: quant.Params{
		{Name: "bits", Value: l.Bits}, {Name: "group_size", Value: c.GroupSize}}}
	return l, nil
}
