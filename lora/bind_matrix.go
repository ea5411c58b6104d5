package lora

import (
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// matrix adds the delta of a linear layer, a convolution or an embedding.
func (b *binder) matrix(a Weighted, t Update, s spot) error {
	m, p := t.Module, s.p
	t.Rank = m.A.Rows
	if len(p.shape) < 2 {
		return b.misfit(m, s)
	}
	_, rows := s.rows()
	cols := int64(1)
	for _, d := range p.shape[1:] {
		cols *= d
	}
	side, only := a.side(m, p)
	if m.fit != nil {
		if len(p.shape) != 2 || p.kind == models.Embedding {
			return fmt.Errorf("module %s: %w: %s is for linear layers, and %s is none, of shape %v", tensor.Quote(m.Name),
				ErrBase,
				a.Config.PeftType, tensor.Quote(p.name), p.shape)
		}
		outputs, inputs := a.Config.sides(p, rows, cols)
		if !only && a.Config.PeftType == veRA && outputs != m.B.Rows && inputs == m.B.Rows {
			outputs, inputs = inputs, outputs
		}
		if err := m.fit(m, outputs, inputs); err != nil {
			return fmt.Errorf("module %s: %w; it does not fit %s of shape %v", tensor.Quote(m.Name), err, tensor.Quote(p.name),
				p.shape)
		}
		t.Rank = m.A.Rows
	}
	fits := orientation(0)
	if rows == m.B.Rows && cols == m.A.Cols {
		fits |= asStored
	}
	if rows == m.A.Cols && cols == m.B.Rows && len(p.shape) == 2 && s.parts == 0 {
		fits |= transposed
	}
	switch {
	case m.Form == Conv && len(p.shape) > 2:
		if !slices.Equal(append(tensor.Shape{p.shape[1]}, m.Kernel...), p.shape[1:]) {
			fits = 0
		}
	case m.Form == Linear && m.Reshaped:
	// kohya takes a linear layer for a convolution of one element, or the other way round
	case m.Form == Conv || len(p.shape) > 2:
		if !points(m.Kernel) || !points(p.shape[2:]) {
			fits = 0
		}
	}
	if only {
		fits &= side
	} else if fits == asStored|transposed && side != 0 {
		fits = side
	}
	switch fits {
	case 0:
		if a.Dialect == LoRALib && b.loralibConv(a, t, p) {
			return nil
		}
		return b.misfit(m, s)
	case asStored | transposed:
		return fmt.Errorf("module %s: %w: lora_A %v and lora_B %v fit %s of shape %v both ways round, and its architecture "+
			"is not "+
			"known, which would tell", tensor.Quote(m.Name), ErrUnsupported, m.A, m.B, tensor.Quote(p.name), p.shape)
	case transposed:
		t.Left, t.Right, t.OutputRows = m.A.Transposed(), m.B.Transposed(), false
	default:
		t.Left, t.Right, t.OutputRows = m.B, m.A, true
	}
	if m.Hadamard != nil || m.Waves != nil {
		t.Left, t.Right, t.Hadamard, t.Waves = Matrix{}, Matrix{}, m.Hadamard, m.Waves
		if fits == transposed {
			t.Hadamard, t.Waves = Transposed(m.Hadamard), m.Waves.Transposed()
		}
	}
	if m.Magnitude != nil && m.Magnitude.Count() != m.B.Rows {
		return fmt.Errorf("module %s: %w: its magnitude has %d elements, expected %d", tensor.Quote(m.Name), ErrMalformed,
			m.Magnitude.Count(), m.B.Rows)
	}
	for _, pc := range p.pieces {
		summed := 0 // the dimension that a norm of DoRA runs along
		if t.OutputRows {
			summed = 1
		}
		if m.Magnitude != nil && pc.slice.Parts > 1 && pc.slice.Dim == summed {
			return fmt.Errorf("module %s: %w: DoRA on a weight that its file cuts across its inputs", tensor.Quote(m.Name),
				ErrUnsupported)
		}
	}
	if p.experts > 0 && s.expert < 0 {
		return fmt.Errorf("module %s: %w: one module for the stack of experts %s", tensor.Quote(m.Name), ErrBase,
			tensor.Quote(p.name))
	}
	b.changeMatrix(t, s, rows, cols)
	return nil
}

// changeMatrix adds an update of a matrix to the parameter's own change, where it has no tensor in the file, or else
// to the tensors that the spot is in.
func (b *binder) changeMatrix(t Update, s spot, rows, cols int64) {
	if c := b.ownChange(s.p, cols); c != nil {
		t.Rows, t.Cols, t.Name = rows, cols, strings.TrimSuffix(t.Name, ".weight")
		c.Updates = append(c.Updates, t)
		return
	}
	b.spread(t, s)
}

// side is the way in which the factors of a module are for a parameter, by what the two are: the one that PEFT has, or
// a guess, where only is not set: then the other one counts if it alone fits. 0 is no guess.
func (a *Adapter) side(m *Module, p *parameter) (guess orientation, only bool) {
	stores := a.Dialect == MLX || a.Dialect == LoRALib // the factors of an embedding under the names of a linear layer's
	_, leaf := cutLast(m.Name)
	switch {
	case m.Form == Conv || len(p.shape) > 2 || m.Parameter: // PEFT takes a parameter as it lies
		return asStored, true
	case m.Form == Embedding && !stores:
		return transposed, true // A is rank x rows
	case p.known && p.kind == models.Embedding && stores, p.kind == models.Conv1D:
		return transposed, true
	case p.known && p.kind != models.Embedding:
		return asStored, true
	case m.Form == Embedding:
		return transposed, false
	case p.known, stores && p.kind == models.Embedding: // of a linear layer's factors for an embedding, or what may be one
		return 0, false
	case a.Dialect == PEFT && a.Config.fanInFanOut(), a.Dialect != PEFT && slices.Contains(conv1Ds, leaf):
		return 0, false
	}
	return asStored, false
}

// conv1Ds are the last parts of the names of layers of transformers' class Conv1D, whose weights lie (in, out).
var conv1Ds = []string{"c_attn", "c_fc", "c_proj", "q_attn"}

// fanInFanOut reports whether a config says that a weight it is for lies (in, out). PEFT sets it by the class of the
// last module that it adapts.
func (c *Config) fanInFanOut() bool {
	var f struct {
		FanInFanOut bool `json:"fan_in_fan_out"`
	}
	return json.Unmarshal(c.raw, &f) == nil && f.FanInFanOut
}

// points reports whether a kernel has one element.
func points(kernel tensor.Shape) bool {
	return !slices.ContainsFunc(kernel, func(d int64) bool { return d != 1 })
}

// misfit says that a module does not fit what it is for.
func (b *binder) misfit(m *Module, s spot) error {
	part := ""
	if s.parts > 0 {
		part = fmt.Sprintf("part %d of %d of ", s.part+1, s.parts)
	}
	if m.made != nil {
		return fmt.Errorf("module %s: %w: its delta of %d x %d does not fit %s%s of shape %v", tensor.Quote(m.Name), ErrBase,
			m.B.Rows, m.A.Cols, part, tensor.Quote(s.p.name), s.p.shape)
	}
	return fmt.Errorf("module %s: %w: lora_A %v and lora_B %v do not fit %s%s of shape %v", tensor.Quote(m.Name), ErrBase,
		m.A, m.B, part, tensor.Quote(s.p.name), s.p.shape)
}

// loralibConv adds the delta of loralib's ConvLoRA, whose product (out*k x in*k) is taken for the weight (out, in, k,
// k) as it lies in memory. It returns false where it does not fit.
func (b *binder) loralibConv(a Weighted, t Update, p *parameter) bool {
	m := t.Module
	if len(p.shape) != 4 || p.shape[2] != p.shape[3] || len(p.pieces) != 1 || !p.pieces[0].slice.Whole() {
		return false
	}
	k := p.shape[2]
	if m.B.Rows != p.shape[0]*k || m.A.Cols != p.shape[1]*k || m.A.Rows%k != 0 {
		return false
	}
	t.Scale = float32(a.Weight * m.Scaling * float64(k)) // its rank is that of the file by k
	t.Left, t.Right, t.Rows, t.Cols = m.B, m.A, m.B.Rows, m.A.Cols
	t.Name = strings.TrimSuffix(t.Name, ".weight")
	c := b.change(p.pieces[0].target, t.Cols)
	if c.Width != t.Cols {
		return false
	}
	c.Updates = append(c.Updates, t)
	return true
}
