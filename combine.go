package lorakit

import (
	"context"
	"fmt"

	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
)

// CombineOptions say how Combine makes one adapter of several, as PEFT's
// add_weighted_adapter does.
type CombineOptions struct {
	// Type is one of linear, cat, svd, ties, ties_svd, dare_linear, dare_ties,
	// dare_linear_svd, dare_ties_svd, magnitude_prune, magnitude_prune_svd.
	Type string
	// Density is the share of values that pruning leaves, for the types that prune.
	Density float64
	// MajoritySign is "total" (or empty) or "frequency", for the ties types.
	MajoritySign string
	// Rank is that of the result of the svd types; 0 is the largest of the adapters.
	Rank int
	// Seed is for the dare types, which drop values at random.
	Seed  uint64
	Force bool
}

// Combination says what Combine or Resize has made.
type Combination struct {
	Destination string   `json:"destination"`
	Rank        int      `json:"rank"`
	Modules     []string `json:"modules"`
	Notices     []string `json:"notices"`
	// Explained is, of Resize, the share of the squared norm of all deltas that the result holds, and Resized
	// has it for each module.
	Explained float64         `json:"explained,omitzero"`
	Resized   []ResizedModule `json:"resized,omitempty"`
}

// ResizedModule is what a module has become, or an expert of one.
type ResizedModule struct {
	Name      string  `json:"name"`
	Rank      int     `json:"rank"`
	Explained float64 `json:"explained"` // 1 where there was nothing to hold
}

// Combine writes to out the adapter whose delta is the combination of those of others. It has
// alpha = rank and no rsLoRA, so that its delta is the product of its factors.
func Combine(ctx context.Context, out string, adapters []Adapter, o CombineOptions) (*Combination, error) {
	if len(adapters) == 0 {
		return nil, fmt.Errorf("%w: no adapter is given", ErrOption)
	}
	lo := lora.CombineOptions{Type: o.Type, Density: o.Density, MajoritySign: o.MajoritySign, Rank: o.Rank, Seed: o.Seed}
	if err := lo.Check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOption, err)
	}
	if err := pipeline.CheckSpared(out, paths(adapters)...); err != nil {
		return nil, err
	}
	list, closeAll, err := openAlone(adapters)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	carried, notices, err := lora.Carried(list)
	if err != nil {
		return nil, err
	}
	r, err := writeAdapter(ctx, list[0].Adapter, lora.Tied(list), out, o.Force, func(emit func(lora.Trained) error) ([]*lora.Module, error) {
		if err := lora.Combine(ctx, list, lo, emit); err != nil {
			return nil, err
		}
		return carried, nil
	})
	if err != nil {
		return nil, err
	}
	first := list[0].Adapter
	for _, a := range list {
		r.Notices = append(r.Notices, a.Notices...)
		if x, y := first.Config.Base, a.Config.Base; x != "" && y != "" && x != y {
			r.Notices = append(r.Notices, fmt.Sprintf("%s is for %s and %s for %s, by their base_model_name_or_path", first.Path, x, a.Path, y))
		}
	}
	r.Notices = append(r.Notices, notices...)
	return r, nil
}

// Resize writes an adapter of another rank: the given one, or with rank 0 the smallest of each
// module that keeps the share energy of its squared norm. It works on the factors
// alone.
func Resize(ctx context.Context, adapter Adapter, out string, rank int, energy float64, force bool) (*Combination, error) {
	if (rank > 0) == (energy > 0) || rank < 0 || energy < 0 || energy > 1 {
		return nil, fmt.Errorf("%w: rank is %d and energy %v, expected one of them: a rank of 1 or more, or an energy above 0 and at most 1", ErrOption, rank, energy)
	}
	list, closeAll, err := openAlone([]Adapter{adapter})
	if err != nil {
		return nil, err
	}
	defer closeAll()
	var resized []ResizedModule
	var held, whole float64
	r, err := writeAdapter(ctx, list[0].Adapter, lora.Tied(list), out, force, func(emit func(lora.Trained) error) ([]*lora.Module, error) {
		return lora.Resize(ctx, list[0].Adapter, rank, energy, func(t lora.Trained) error {
			m := ResizedModule{t.Name, t.Rank, 1}
			if t.Energy > 0 {
				m.Explained = t.Held / t.Energy
			}
			resized = append(resized, m)
			held += t.Held
			whole += t.Energy
			return emit(t)
		})
	})
	if err != nil {
		return nil, err
	}
	r.Notices = append(r.Notices, list[0].Notices...)
	if r.Resized, r.Explained = resized, 1; whole > 0 {
		r.Explained = held / whole
	}
	return r, nil
}

// writeAdapter writes as a PEFT folder the modules that produce emits and those that it returns, which
// were made of an adapter; tied where they promise that a head stays tied to its embedding.
func writeAdapter(ctx context.Context, like *lora.Adapter, tied bool, out string, force bool, produce func(emit func(lora.Trained) error) ([]*lora.Module, error)) (*Combination, error) {
	w, err := pipeline.NewAdapterWriter(like.Path, out, force)
	if err != nil {
		return nil, err
	}
	defer w.Abort()
	var modules []*lora.Module
	r := &Combination{Destination: out, Modules: []string{}, Notices: []string{}}
	rest, err := produce(func(t lora.Trained) error {
		m, err := w.Spool(t)
		modules = append(modules, m)
		r.Rank = max(r.Rank, t.Rank)
		return err
	})
	if err != nil {
		return nil, interrupted(ctx, err)
	}
	a := lora.New(out, lora.Settings{Like: &like.Config, Base: like.Config.Base, EnsureTie: tied}, append(modules, rest...))
	r.Modules = a.Names()
	e, err := a.Encode(lora.EncodeOptions{To: lora.PEFT})
	if err != nil {
		return nil, err
	}
	return r, w.Write(ctx, e)
}

// CombineTypes lists the types of combination.
func CombineTypes() []string { return lora.CombineTypes() }
