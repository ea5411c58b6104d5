// Package gptq reads the weights of GPTQ checkpoints, as AutoGPTQ, GPTQModel, optimum and AutoRound save them:
// integers of 2, 3, 4 or 8 bits down the columns of a matrix that lies (in, out), with a scale and a zero for each
// group of inputs. With act-order (desc_act) a list says which group an input is in.
//
// It writes none: what makes a GPTQ weight is how its integers are chosen, by what they do to activations. Source:
// Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022); names,
// shapes and arithmetic are those of GPTQModel.
package gptq

import (
	"fmt"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/bitfield"
	"github.com/lorakit/lorakit/quant/internal/columns"
	"github.com/lorakit/lorakit/tensor"
)

func init() { quant.Register(Scheme{}) }

// Scheme is the quant.Scheme of GPTQ.
type Scheme = columns.Scheme[config, *config]

// Layout is that of a module.
func (c *config) Layout(m columns.Module, s quant.Stored) (columns.Layout, error) {
	if err := c.check(); err != nil {
		return columns.Layout{}, err
	}
	l := columns.Layout{Out: m.Codes[1], In: m.Codes[0] * 32 / c.Bits, Bits: c.Bits, Down: true}
	if c.format() == firstVersion {
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
		var fit []int64
		for _, b := range widths {
			if bitfield.Words(l.In, b) == m.Codes[0] {
				fit = append(fit, b)
			}
		}
		if len(fit) > 1 {
			return l, fmt.Errorf("%w: %s of shape %v may have %d bits or %d", quant.ErrMalformed,
				tensor.Quote(m.Name+".qweight"), m.Codes, fit[0], fit[1])
		}
		if len(fit) == 1 {
			l.Bits = fit[0]
		}
	}
	l.Spec = quant.Spec{Type: "gptq", Params: quant.Params{
		{Name: "bits", Value: l.Bits}, {Name: "group_size", Value: c.GroupSize}}}
	return l, nil
}
