package lora

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/tensor"
)

// A loralib file is torch.save of lora.lora_state_dict(model): lora_A (rank, in) and lora_B (out, rank) of each
// module, and biases where they were trained. Alpha is an argument of the layers and not in it.

// readLoRALib makes modules of the tensors of a loralib state dict.
func (a *Adapter) readLoRALib(tensors []formats.Tensor, alpha float64) error {
	if alpha == 0 {
		err := fmt.Errorf("%s: %w: a loralib state dict does not hold its alpha, and none is given", a.Path, ErrUnsupported)
		return hint.With(err, hint.Hint{Option: "Alpha", Effect: "gives it"})
	}
	type parts struct{ a, b *formats.Tensor }
	byName := map[string]*parts{}
	at := func(name string) *parts {
		if byName[name] == nil {
			byName[name] = &parts{}
		}
		return byName[name]
	}
	for i := range tensors {
		t := &tensors[i]
		module, end := cutLast(t.Name)
		switch {
		case module == "":
			return a.failed(t, fmt.Errorf("%w: no module is named", ErrMalformed))
		case end == "lora_A":
			at(module).a = t
		case end == "lora_B":
			at(module).b = t
		case strings.Contains(t.Name, "lora_"):
			return a.failed(t, fmt.Errorf("%w: its name is none that loralib gives to a part of a LoRA adapter", ErrUnsupported))
		default:
			a.Modules = append(a.Modules, &Module{Name: module, Param: end, Form: Replace, Value: t})
		}
	}
	for _, m := range a.Modules {
		m.Base = byName[m.Name] != nil && m.Param == "weight" // loralib's layers hold their base's matrix
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		p := byName[name]
		if p.a == nil || p.b == nil || len(p.a.Shape) != 2 || len(p.b.Shape) != 2 || p.a.Count() == 0 || p.b.Count() == 0 ||
			p.a.Shape[0]%p.b.Shape[1] != 0 {
			var have []string
			for _, t := range []*formats.Tensor{p.a, p.b} {
				if t != nil {
					have = append(have, t.Name+" "+t.Shape.String())
				}
			}
			return fmt.Errorf("%s: module %s: %w: it has %s, expected lora_A (rank, in) and lora_B (out, rank)", a.Path,
				tensor.Quote(name), ErrMalformed, strings.Join(have, ", "))
		}
		m := &Module{Name: name, Param: "weight", A: matrixOf(p.a), B: matrixOf(p.b), Rank: int(p.a.Shape[0]),
			Scaling: alpha / float64(p.b.Shape[1])}
		if groups := p.a.Shape[0] / p.b.Shape[1]; groups > 1 {
			if err := a.mergedLinear(m, groups); err != nil {
				return err
			}
		}
		m.Alpha = m.Scaling * float64(m.Rank)
		if _, end := cutLast(name); slices.Contains(embeddings, end) {
			m.Form = Embedding
		}
		a.Modules = append(a.Modules, m)
	}
	return nil
}

// mergedLinear makes of loralib's MergedLinear, which adapts some of the three parts of a fused query, key and value
// with factors of their own, one pair of factors with blocks of zeros. Which parts they are is not in the file: three
// are all, two are the query and the value, as in loralib's example.
func (a *Adapter) mergedLinear(m *Module, groups int64) error {
	at := []int64{0, 1, 2}
	switch groups {
	case 2:
		at = []int64{0, 2}
		a.Notices = append(a.Notices, fmt.Sprintf("%s: a loralib MergedLinear with two pairs of factors is taken for query "+
			"and value (enable_lora = [True, False, True])", m.Name))
	case 3:
	default:
		return fmt.Errorf("%s: module %s: %w: a MergedLinear with %d pairs of factors, expected 2 or 3", a.Path,
			tensor.Quote(m.Name), ErrUnsupported, groups)
	}
	b := m.B
	if b.Rows%groups != 0 {
		return fmt.Errorf("%s: module %s: %w: lora_B %v does not fall into %d groups", a.Path, tensor.Quote(m.Name),
			ErrMalformed, b, groups)
	}
	rows, r, rank := b.Rows/groups, b.Cols, m.A.Rows
	t := computedTensor(b.T, func() ([]float32, error) {
		v := make([]float32, 3*rows*rank)
		x, err := b.Read()
		if err != nil {
			return nil, err
		}
		for g := range groups {
			for i := range rows {
				copy(v[(at[g]*rows+i)*rank+g*r:][:r], x.Data[(g*rows+i)*r:][:r])
			}
		}
		return v, nil
	}, 3*rows, rank)
	m.B = matrixOf(t)
	return nil
}

// encodeLoRALib writes a state dict for torch.load. All modules get one alpha, which is not in it.
func (a *Adapter) encodeLoRALib(experts string) (*Encoded, error) {
	e := &Encoded{Format: "pytorch"}
	modules, err := a.singles(LoRALib, experts)
	if err != nil {
		return nil, err
	}
	if modules, err = alone(modules); err != nil {
		return nil, err
	}
	common := commonScales(modules)
	if common.alpha == 0 && common.rank > 0 { // B is zero instead: an alpha of 0 cannot be given
		common.alpha = float64(common.rank)
	}
	if alpha := float32(common.alpha); alpha-alpha != 0 {
		return nil, fmt.Errorf("%w: its alpha is %g, which float32 cannot hold", ErrUnsupported, common.alpha)
	}
	for _, m := range modules {
		switch {
		case m.Form == Replace:
			e.Tensors = append(e.Tensors, asItIs(m.Name+"."+m.Param, m.Value))
			continue
		case m.Form != Linear && m.Form != Embedding || m.Magnitude != nil:
			return nil, noPlace(m, m.what(), LoRALib)
		}
		want := common.alpha / float64(m.Rank) // what loralib makes of the alpha
		e.Tensors = append(e.Tensors,
			output(m.Name+".lora_A", m.A, m.A.Rows, m.A.Cols),
			output(m.Name+".lora_B", m.B, m.B.Rows, m.B.Cols).scaled(ratio(m.Scaling, want)))
	}
	e.Notices = append(e.Notices, fmt.Sprintf("a loralib state dict does not hold its alpha: it is %g", common.alpha))
	return e, nil
}
