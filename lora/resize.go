package lora

import (
	"context"
	"fmt"

	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/tensor"
)

// Resize calls emit with each module of a that has factors, in the order of names, at another rank: the given one, or
// with rank 0 the smallest that keeps the share energy, above 0 and at most 1, of the squared norm of its delta. It
// works on the factors alone, so memory is bounded by them. The singular values are all on B, as in Combine. Stacks of
// experts are resized expert by expert; DoRA keeps its magnitudes. The rest is returned, to go along: what replaces
// parts of the base as it is, and biases with their scaling in them.
//
// A rank above that of a module is filled with zeros, up to the smaller side of its matrix; beyond it is an error.
func Resize(ctx context.Context, a *Adapter, rank int, energy float64, emit func(Trained) error) ([]*Module, error) {
	switch {
	case rank < 0:
		return nil, fmt.Errorf("%w: rank %d, expected 1 or more", ErrUnsupported, rank)
	case rank == 0 && !(energy > 0 && energy <= 1):
		return nil, fmt.Errorf("%w: energy %v, expected more than 0 and at most 1", ErrUnsupported, energy)
	case rank > 0 && energy != 0:
		return nil, fmt.Errorf("%w: rank %d and energy %v, expected one of them", ErrUnsupported, rank, energy)
	}
	if err := a.Config.plainBase(); err != nil {
		return nil, a.named(err)
	}
	if err := a.Config.always(); err != nil {
		return nil, a.named(err)
	}
	naming, err := namingOf([]Weighted{{Adapter: a}})
	if err != nil {
		return nil, err
	}
	modules, err := a.apart()
	if err == nil {
		modules, err = naming(a, modules)
	}
	if err != nil {
		return nil, a.named(err)
	}
	for _, m := range modules {
		if m.A.T == nil {
			continue
		}
		if most := min(m.B.Rows, m.A.Cols); int64(rank) > most {
			return nil, fmt.Errorf("%s: module %s: %w: rank %d is larger than its matrix allows, %d", a.Path,
				tensor.Quote(m.Name), ErrUnsupported, rank, most)
		}
	}
	var rest []*Module
	var read Writer
	for _, m := range modules {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if m.A.T == nil {
			rest = append(rest, m.unscaled())
			continue
		}
		fa, fb, err := read.factors(a, m)
		if err != nil {
			return nil, err
		}
		for i := range fb.Data {
			fb.Data[i] *= float32(m.Scaling)
		}
		d, err := svd.Product(fb, fa)
		if err != nil {
			return nil, fmt.Errorf("%s: module %s: %w", a.Path, tensor.Quote(m.Name), err)
		}
		r := rank
		if r == 0 {
			// At least one, so that a module without a delta stays a module.
			r = max(1, min(svd.RankFor(d.S, d.Energy, energy), len(d.S)))
		}
		t := leading(d, r)
		t.Name, t.Component, t.Parameter, t.turned = m.Name, m.Component, m.Parameter, m.turned
		t.Form, t.Kernel, t.Magnitude = m.Form, m.Kernel, m.Magnitude
		for i, s := range d.S {
			t.Energy += float64(s * s)
			if i < r {
				t.Held += float64(s * s)
			}
		}
		if err := emit(t); err != nil {
			return nil, err
		}
	}
	return rest, nil
}

// unscaled is a bias with its scaling in its values; other modules are as they are.
func (m *Module) unscaled() *Module {
	if m.Form != Bias || m.Scaling == 1 {
		return m
	}
	n := *m
	n.Value = scaled(matrixOf(m.Value), m.Scaling).T
	n.Scaling, n.Alpha = 1, float64(m.Rank)
	return &n
}
