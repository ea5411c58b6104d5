package lora

import (
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// IA3 (Liu et al., 2022) multiplies the outputs of a module by a vector, and so the rows of its weight and its bias, or
// where it is one of feedforward_modules its inputs, and so the columns.

// ia3 makes a module of the vector.
func (c *Config) ia3(name string, p parts) (*Module, error) {
	l := p["ia3_l"]
	inputs, err := c.scalesInputs(name)
	if err != nil {
		return nil, err
	}
	// Of a linear layer (out, 1) or (1, in), of a convolution (1, n, 1, 1).
	n := l.Count()
	at := slices.Index(l.Shape, n)
	if n == 0 || len(l.Shape) < 2 || at < 0 || at > 1 {
		return nil, fmt.Errorf("%w: its ia3_l has the shape %v, expected a vector", ErrMalformed, l.Shape)
	}
	if len(l.Shape) == 2 && n > 1 && inputs != (at == 1) {
		return nil, fmt.Errorf("%w: its ia3_l has the shape %v, which does not agree with feedforward_modules", ErrMalformed,
			l.Shape)
	}
	return &Module{Name: name, Param: "weight", Form: Scale, Value: l, Inputs: inputs}, nil
}

// scalesInputs reports whether feedforward_modules means a module. In a list PEFT takes the ends of names, also within
// a part of one.
func (c *Config) scalesInputs(name string) (bool, error) {
	var list []string
	if empty(c.feedforward) {
		return false, nil
	}
	if json.Unmarshal(c.feedforward, &list) == nil {
		return slices.ContainsFunc(list, func(end string) bool { return strings.HasSuffix(name, end) }), nil
	}
	var expr string
	if json.Unmarshal(c.feedforward, &expr) != nil {
		return false, fmt.Errorf("%w: feedforward_modules is %s, expected names or a regular expression", ErrMalformed,
			tensor.Quote(string(c.feedforward)))
	}
	return c.matches("feedforward_modules", expr, name)
}

// factor binds a vector that scales a weight, and its bias where it scales outputs.
func (b *binder) factor(a Weighted, t Update, s spot) error {
	m, p := t.Module, s.p
	if a.Weight != 1 {
		return fmt.Errorf("module %s: %w: IA3 with the weight %g, expected 1", tensor.Quote(m.Name), ErrUnsupported, a.Weight)
	}
	n := m.Value.Count()
	misfit := fmt.Errorf("module %s: %w: its vector of %d elements does not fit %s of shape %v", tensor.Quote(m.Name),
		ErrBase, n, tensor.Quote(p.name), p.shape)
	if len(p.shape) < 2 || p.kind == models.Embedding || p.experts > 0 && s.expert < 0 {
		return misfit
	}
	_, rows := s.rows()
	dims, axis := [2]int64{rows, p.shape[1]}, 0
	if m.Inputs {
		axis = 1
	}
	turned := p.kind == models.Conv1D || !p.known && dims[axis] != n && dims[1-axis] == n
	turned = turned && len(p.shape) == 2 && s.parts == 0
	outputs := dims[0]
	if turned {
		outputs, axis = dims[1], 1-axis
	}
	t.Factor, t.OutputRows = m.Value, axis == 0
	groups, kernel := int64(1), int64(1)
	if m.Inputs && len(p.shape) > 2 {
		groups = n / max(dims[1], 1) // of a convolution, each with inputs of its own
		for _, d := range p.shape[2:] {
			kernel *= d
		}
		t.Factor = repeated(m.Value, kernel)
	}
	if groups < 1 || n != dims[axis]*groups || rows%groups != 0 || groups > 1 && s.parts > 0 {
		return misfit
	}
	if p == b.headParam && b.headTarget < 0 {
		t.Rows, t.Cols, t.Name = rows, dims[1], strings.TrimSuffix(t.Name, ".weight")
		b.headChange(t.Cols).Updates = append(b.headChange(t.Cols).Updates, t)
	} else if groups == 1 {
		b.spread(t, s)
	} else {
		for g := range groups {
			t.FirstOutput = g * dims[1] * kernel
			b.spread(t, spot{p: p, expert: s.expert, part: g, parts: groups})
		}
	}
	if m.Inputs {
		return nil
	}
	return b.factorBias(t, s, outputs)
}

// factorBias scales the bias beside a weight, where there is one.
func (b *binder) factorBias(t Update, s spot, outputs int64) error {
	name, ok := strings.CutSuffix(s.p.name, "weight")
	if !ok {
		return nil
	}
	p := b.params[name+"bias"]
	if i, ok := b.files[name+"bias"]; ok && p == nil {
		p = b.fileParameter(i)
	}
	if p == nil {
		return nil
	}
	first := s.part * outputs
	if len(p.shape) != 1 || p.shape[0] < first+outputs || s.parts == 0 && p.shape[0] != outputs {
		return fmt.Errorf("module %s: %w: its vector of %d elements does not fit %s of shape %v", tensor.Quote(t.Module.Name),
			ErrBase, outputs, tensor.Quote(p.name), p.shape)
	}
	t.Factor, t.Name, t.OutputRows, t.FirstOutput = t.Module.Value, p.name, false, 0
	t.Row, t.Rows, t.Col, t.Cols = 0, 1, first, outputs
	for _, pc := range p.pieces {
		if !pc.slice.Whole() {
			return fmt.Errorf("module %s: %w: a bias that its file holds in pieces", tensor.Quote(t.Module.Name), ErrUnsupported)
		}
		c := b.change(pc.target, p.shape[0])
		c.Updates = append(c.Updates, t)
	}
	return nil
}

// repeated is a vector with each element n times.
func repeated(t *formats.Tensor, n int64) *formats.Tensor {
	return computedTensor(t, func() ([]float32, error) {
		v, err := Floats(t)
		if err != nil {
			return nil, err
		}
		out := make([]float32, 0, int64(len(v))*n)
		for _, x := range v {
			for range n {
				out = append(out, x)
			}
		}
		return out, nil
	}, t.Count()*n)
}
