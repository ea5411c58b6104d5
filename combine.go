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
	list, closeAll, err := openAdapters(adapters)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	return writeAdapter(ctx, list, out, o.Force, func(emit func(lora.Trained) error) error {
		return lora.Combine(ctx, list, lo, emit)
	})
}

// Resize writes an adapter of another rank: the given one, or with rank 0 the smallest of each
// module that keeps the share energy of its squared norm. It works on the factors
// alone.
func Resize(ctx context.Context, adapter Adapter, out string, rank int, energy float64, force bool) (*Combination, error) {
	if (rank > 0) == (energy > 0) || rank < 0 || energy < 0 || energy > 1 {
		return nil, fmt.Errorf("%w: rank is %d and energy %v, expected one of them: a rank of 1 or more, or an energy above 0 and at most 1", ErrOption, rank, energy)
	}
	list, closeAll, err := openAdapters([]Adapter{adapter})
	if err != nil {
		return nil, err
	}
	defer closeAll()
	return writeAdapter(ctx, list, out, force, func(emit func(lora.Trained) error) error {
		return lora.Resize(ctx, list[0].Adapter, rank, energy, emit)
	})
}

// writeAdapter writes the modules that produce emits, and what goes with the adapters they are
// made of, as a PEFT folder.
func writeAdapter(ctx context.Context, from []lora.Weighted, out string, force bool, produce func(emit func(lora.Trained) error) error) (*Combination, error) {
	copies, err := lora.BaseCopies(from)
	if err != nil {
		return nil, err
	}
	w, err := pipeline.NewAdapterWriter(from[0].Path, out, force)
	if err != nil {
		return nil, err
	}
	defer w.Abort()
	s := lora.Settings{Like: &from[0].Config, Ranks: map[string]int{}, Alphas: map[string]float64{}}
	ranks := map[string]int{}
	err = produce(func(t lora.Trained) error {
		ranks[t.Name] = t.A.Rows
		s.Rank = max(s.Rank, t.A.Rows)
		return w.Add(t)
	})
	if err != nil {
		return nil, err
	}
	for _, m := range copies {
		if err := w.Copy(m.BaseKey(), m.Value); err != nil {
			return nil, err
		}
	}
	s.Alpha = float64(s.Rank)
	for name, r := range ranks {
		if r != s.Rank {
			s.Ranks[name], s.Alphas[name] = r, float64(r)
		}
	}
	config, err := lora.PEFTConfig(s, w.Modules())
	if err != nil {
		return nil, err
	}
	return &Combination{Destination: out, Rank: s.Rank, Modules: w.Modules()}, w.Finish(ctx, config)
}

// CombineTypes lists the types of combination.
func CombineTypes() []string { return lora.CombineTypes() }
