package lora

import (
	"context"
	"fmt"

	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/tensor"
)

// Resize calls emit with each module of a, in the order of names, at another rank: the given
// one, or with rank 0 the smallest that keeps the share energy, above 0 and at most 1,
// of the squared norm of its delta. It works on the factors alone, so memory is bounded
// by them. The singular values are all on B, as in Combine.
//
// A rank above that of a module is filled with zeros, up to the smaller side of its
// matrix; beyond it is an error.
func Resize(ctx context.Context, a *Adapter, rank int, energy float64, emit func(Trained) error) error {
	switch {
	case rank < 0:
		return fmt.Errorf("%w: rank %d, expected 1 or more", ErrUnsupported, rank)
	case rank == 0 && !(energy > 0 && energy <= 1):
		return fmt.Errorf("%w: energy %v, expected more than 0 and at most 1", ErrUnsupported, energy)
	case rank > 0 && energy != 0:
		return fmt.Errorf("%w: rank %d and energy %v, expected one of them", ErrUnsupported, rank, energy)
	}
	modules, err := plainModules(a)
	if err != nil {
		return err
	}
	for _, m := range modules {
		if most := min(m.B.Rows, m.A.Cols); int64(rank) > most {
			return fmt.Errorf("%s: module %s: %w: rank %d is larger than its matrix allows, %d", a.Path, tensor.Quote(m.Name), ErrBase, rank, most)
		}
	}
	for _, m := range modules {
		if err := ctx.Err(); err != nil {
			return err
		}
		fa, fb, err := factors(a, m)
		if err != nil {
			return err
		}
		for i := range fb.Data {
			fb.Data[i] *= float32(m.Scaling)
		}
		d, err := svd.Product(fb, fa)
		if err != nil {
			return fmt.Errorf("%s: module %s: %w", a.Path, tensor.Quote(m.Name), err)
		}
		r := rank
		if r == 0 {
			// At least one, so that a module without a delta stays a module.
			r = max(1, min(svd.RankFor(d.S, d.Energy, energy), len(d.S)))
		}
		t := leading(d, r)
		t.Name, t.Form = m.Name, m.Form
		if err := emit(t); err != nil {
			return err
		}
	}
	return nil
}
