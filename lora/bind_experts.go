package lora

import (
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/tensor"
)

// stack reports whether a module has no weight of its own but parameters of experts.
func (b *binder) stack(m *Module) bool {
	if b.params[m.Name+".weight"] != nil {
		return false
	}
	return len(b.stacked(m.Name)) > 0
}

// stacked lists the expert parameters of a module: gate_up_proj before down_proj, as
// their model has them, then others.
func (b *binder) stacked(module string) []*parameter {
	var list []*parameter
	for _, name := range b.names {
		p := b.params[name]
		rest, ok := strings.CutPrefix(name, module+".")
		if ok && p.experts > 0 && !strings.Contains(rest, ".") {
			list = append(list, p)
		}
	}
	rank := func(p *parameter) int {
		switch {
		case strings.HasSuffix(p.name, ".gate_up_proj"):
			return 0
		case strings.HasSuffix(p.name, ".down_proj"):
			return 1
		}
		return 2
	}
	slices.SortStableFunc(list, func(x, y *parameter) int { return rank(x) - rank(y) })
	return list
}

// experts binds the modules that adapt the parameters of a stack of experts. A file
// tells only how they are nested; shapes decide, then the order.
func (b *binder) experts(i int, a Weighted, name string, modules []*Module) error {
	params := b.stacked(name)
	slices.SortFunc(modules, func(x, y *Module) int { return y.Nest - x.Nest })
	fits := func(m *Module, p *parameter) bool {
		if len(p.shape) != 2 {
			return false
		}
		direct, turned := ways(m, p)
		return m.A.Rows%p.experts == 0 && (direct || turned)
	}
	tries := 0
	var choose func(at int, free []*parameter) []*parameter
	choose = func(at int, free []*parameter) []*parameter {
		if tries++; tries > mostTries {
			return nil
		}
		if at == len(modules) {
			return []*parameter{}
		}
		for k, p := range free {
			if !fits(modules[at], p) || !b.targeted(a, p, len(modules)) {
				continue
			}
			if rest := choose(at+1, append(slices.Clone(free[:k]), free[k+1:]...)); rest != nil {
				return append([]*parameter{p}, rest...)
			}
		}
		return nil
	}
	chosen := choose(0, params)
	if chosen == nil {
		m := modules[0]
		var have []string
		for _, p := range params {
			have = append(have, fmt.Sprintf("%s %d x %v", p.name, p.experts, p.shape))
		}
		return fmt.Errorf("module %s: %w: lora_A %v and lora_B %v fit none of its expert parameters, expected %s", tensor.Quote(m.Name), ErrBase, m.A, m.B, strings.Join(have, ", "))
	}
	// A square does not tell which way round it is: another of the same stack may, else
	// the version does.
	older := olderThan019(a.Config.PeftVersion) || strings.HasPrefix(b.model.Architecture, "GptOss")
	for k, m := range modules {
		if direct, turned := ways(m, chosen[k]); direct != turned {
			older = turned
		}
	}
	for k, m := range modules {
		p := chosen[k]
		m.Param = strings.TrimPrefix(p.name, m.Name+".")
		if err := p.whole(); err != nil {
			return fmt.Errorf("module %s: %w", tensor.Quote(m.Name), err)
		}
		if m.Magnitude != nil {
			return fmt.Errorf("module %s: %w: DoRA on experts", tensor.Quote(m.Name), ErrUnsupported)
		}
		if err := a.Config.scale(m, p.name, m.A.Rows/p.experts); err != nil {
			return err
		}
		if err := a.finiteScale(m); err != nil {
			return err
		}
		if err := b.expertTerms(i, a, m, p, older); err != nil {
			return err
		}
	}
	return nil
}

// mostTries is how many ways to bind a stack's modules are looked at: the stacks of models have four parameters at most.
const mostTries = 1 << 12

// ways reports whether a module's factors fit a parameter as (out, in), and as (in,
// out).
func ways(m *Module, p *parameter) (direct, turned bool) {
	return m.A.Cols == p.shape[1] && m.B.Rows == p.shape[0], m.A.Cols == p.shape[0] && m.B.Rows == p.shape[1]
}

// targeted reports whether target_parameters can mean the parameter, where fewer are
// adapted than there are.
func (b *binder) targeted(a Weighted, p *parameter, n int) bool {
	list := a.Config.targets.parameters
	return len(list.names) == 0 || n == len(b.stacked(p.name[:strings.LastIndexByte(p.name, '.')])) || list.have(p.name)
}

// expertTerms adds a stack's deltas.
func (b *binder) expertTerms(i int, a Weighted, m *Module, p *parameter, older bool) error {
	direct, turned := ways(m, p)
	if direct && turned {
		turned = older
	}
	for e := range p.experts {
		A, B := m.expert(e, p.experts)
		t := Term{Adapter: i, Module: m, Name: p.name, Expert: e + 1, Rank: int64(m.Rank), Scale: float32(a.Weight * m.Scaling), Left: B, Right: A}
		if turned {
			t.Left, t.Right = A.Transposed(), B.Transposed()
		}
		b.spread(t, spot{p: p, expert: e})
	}
	return b.claim(i, m, spot{p: p, expert: -1})
}

// apart binds a stack whose experts have matrices of their own, as in MLX: to the stack's
// parameter, or to those of its experts.
func (b *binder) apart(i int, a Weighted, m *Module) error {
	spots, err := b.expertSpots(m)
	if err != nil {
		return err
	}
	for e, s := range spots {
		A, B := m.expert(int64(e), m.Experts)
		if err := s.p.whole(); err != nil {
			return fmt.Errorf("module %s: %w", tensor.Quote(m.Name), err)
		}
		_, rows := s.rows()
		if len(s.p.shape) != 2 || A.Cols != s.p.shape[1] || B.Rows != rows {
			return fmt.Errorf("module %s: %w: lora_a %v and lora_b %v of an expert do not fit %s of shape %v", tensor.Quote(m.Name), ErrBase, A, B, tensor.Quote(s.p.name), s.p.shape)
		}
		if err := b.claim(i, m, s); err != nil {
			return err
		}
		b.spread(Term{Adapter: i, Module: m, Name: m.Name, Expert: int64(e) + 1, Rank: int64(m.Rank), Scale: float32(a.Weight * m.Scaling), Left: B, Right: A, OutputRows: true}, s)
	}
	return nil
}
