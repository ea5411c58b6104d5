package lora

import (
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// again reports whether a value is one that another module has brought, of a parameter that goes by two
// names.
func (b *binder) again(i int, m *Module, s spot) (bool, error) {
	if m.Form != Replace {
		return false, nil
	}
	for _, o := range b.bound[claimKey(i, m.Form == Replace, s.p)] {
		if o.module.Form == Replace && o.module.Name != m.Name {
			return sameBytes(o.module.Value, m.Value)
		}
	}
	return false, nil
}

// claimKey is what claims are kept by: new values and what is added are apart.
func claimKey(i int, replaces bool, p *parameter) string {
	return fmt.Sprint(i, replaces, " ", p.name)
}

// value binds new values of a parameter, or of some of its rows.
func (b *binder) value(a Weighted, t Update, p *parameter) error {
	m := t.Module
	if a.Weight != 1 && !m.Base {
		return fmt.Errorf("module %s: %w: a value that replaces the base's, with the weight %g, expected 1",
			tensor.Quote(m.String()), ErrUnsupported, a.Weight)
	}
	t.Name = strings.TrimSuffix(t.Name, ".weight")
	if m.Form == Replace && (len(p.pieces) > 1 || p.experts > 0) {
		return b.pieces(t, p)
	}
	var c *Change
	width := int64(1)
	if n := len(p.shape); n > 0 {
		width = p.shape[n-1]
	}
	if c = b.ownChange(p, width); c == nil {
		if len(p.pieces) != 1 || !p.pieces[0].slice.Whole() {
			return fmt.Errorf("module %s: %w: a new value of a parameter that its file holds in pieces",
				tensor.Quote(m.String()), ErrUnsupported)
		}
		c = b.change(p.pieces[0].target, width)
	}
	if m.Form == Rows {
		for _, row := range m.Indices {
			if len(p.shape) != 2 || row >= p.shape[0] || m.Value.Shape[1] != width {
				return fmt.Errorf("module %s: %w: row %d of %v values, expected rows of %s, %v", tensor.Quote(m.Name), ErrBase, row,
					m.Value.Shape, tensor.Quote(p.name), p.shape)
			}
		}
		t.Rows, t.Cols = p.shape[0], width
		c.Updates = append(c.Updates, t)
		return nil
	}
	grown := len(p.shape) == 2 && len(m.Value.Shape) == 2 && m.Value.Shape[1] == p.shape[1] &&
		(p.kind == models.Embedding || b.isHead(p))
	grown = grown || len(m.Value.Shape) == 1 && b.headBias(p)
	if !slices.Equal(m.Value.Shape, p.shape) && !grown {
		return fmt.Errorf("module %s: %w: its new value has the shape %v, expected %v", tensor.Quote(m.String()), ErrBase,
			m.Value.Shape, p.shape)
	}
	if grown && m.Value.Shape[0] < p.shape[0] {
		return fmt.Errorf("module %s: %w: its new value has %d rows, expected at least the %d of the base",
			tensor.Quote(m.String()), ErrBase, m.Value.Shape[0], p.shape[0])
	}
	if grown {
		p.shape = slices.Clone(m.Value.Shape)
	}
	if c.Value != nil && m.Base && c.ValueOf.Module.Base { // both bring the base's own along
		same, err := sameBytes(c.Value, m.Value)
		if err != nil {
			return err
		}
		if same {
			return nil
		}
	}
	if c.Value != nil {
		return fmt.Errorf("module %s: %w: two adapters replace %s", tensor.Quote(m.String()), ErrUnsupported,
			tensor.Quote(p.name))
	}
	t.Rows, t.Cols = m.Value.Count()/max(width, 1), width
	return b.replace(c, m.Value, t)
}

// replace sets the value that stands for the base's own. What an adapter before this one has added to the base's is
// not for it, and would be lost if it were done in the order of the adapters, so that is refused.
func (b *binder) replace(c *Change, value *formats.Tensor, t Update) error {
	for _, u := range c.Updates {
		if u.Adapter < t.Adapter && !t.Module.Base {
			return fmt.Errorf("module %s: %w: its new value takes the place of what %s before it changes; in the other order "+
				"of the two, that is done to the new value", tensor.Quote(t.Module.String()), ErrUnsupported,
				b.adapters[u.Adapter].Path)
		}
	}
	c.Value, c.ValueOf = value, &t
	return nil
}

// pieces binds the new value of a parameter that the file holds in several tensors, or that is a stack of
// experts: each of them takes its own bytes.
func (b *binder) pieces(t Update, p *parameter) error {
	m := t.Module
	want, rows := p.shape, p.shape[0]
	if p.experts > 0 {
		want = append(tensor.Shape{p.experts}, p.shape...)
	}
	if !slices.Equal(m.Value.Shape, want) {
		return fmt.Errorf("module %s: %w: its new value has the shape %v, expected %v", tensor.Quote(m.String()), ErrBase,
			m.Value.Shape, want)
	}
	for _, pc := range p.pieces {
		s, target := pc.slice, b.targets[pc.target]
		if s.Via != "" || s.Transposed || s.FileParts > 1 || s.Parts > 1 && (s.Dim != 0 || rows%int64(s.Parts) != 0) ||
			s.Parts > 1 && s.Expert < 0 && p.experts > 0 {
			return fmt.Errorf("module %s: %w: a new value of a parameter that its file holds in other pieces",
				tensor.Quote(m.String()), ErrUnsupported)
		}
		v, n := *m.Value, rows/int64(max(s.Parts, 1))
		first := int64(s.Part) * n
		if s.Expert >= 0 {
			first += int64(s.Expert) * rows
		} else {
			n *= max(p.experts, 1)
		}
		v.Shape = slices.Clone(target.Shape)
		v.Bytes = m.Value.Bytes / (max(p.experts, 1) * rows) * n
		v.Offset += m.Value.Bytes / (max(p.experts, 1) * rows) * first
		width := target.Shape[len(target.Shape)-1]
		c := b.change(pc.target, width)
		if c.Value != nil {
			return fmt.Errorf("module %s: %w: two adapters replace %s", tensor.Quote(m.String()), ErrUnsupported,
				tensor.Quote(target.Name))
		}
		own := t
		own.Rows, own.Cols = v.Count()/max(width, 1), width
		if err := b.replace(c, &v, own); err != nil {
			return err
		}
	}
	return nil
}
