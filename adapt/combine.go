package adapt

import (
	"context"
	"fmt"

	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
)

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

// Combine writes to out the adapter whose delta is the combination of those of others. It has alpha = rank and no
// rsLoRA, so that its delta is the product of its factors.
func Combine(
	ctx context.Context, adapters lora.Several, out string, o lora.CombineOptions, force bool,
) (*Combination, error) {
	carried, notices, err := lora.Replacements(adapters)
	if err != nil {
		return nil, err
	}
	first := adapters[0].Adapter
	r, err := write(ctx, adapters, out, force, func(emit func(lora.Trained) error) ([]*lora.Module, error) {
		return carried, lora.Combine(ctx, adapters, o, emit)
	})
	if err != nil {
		return nil, err
	}
	for _, a := range adapters {
		r.Notices = append(r.Notices, a.Notices...)
		if x, y := first.Config.Base, a.Config.Base; x != "" && y != "" && x != y {
			r.Notices = append(r.Notices, fmt.Sprintf("%s is for %s and %s for %s, by their base_model_name_or_path",
				first.Path, x, a.Path, y))
		}
	}
	r.Notices = append(r.Notices, notices...)
	return r, nil
}

// CheckResize refuses what is wrong whatever the adapter is.
func CheckResize(rank int, energy float64) error { return checkRank(rank, energy) }

// Resize writes to out an adapter of another rank: the given one, or with rank 0 the smallest of each module that keeps
// the share energy of its squared norm. It works on the factors alone.
func Resize(
	ctx context.Context, a lora.Weighted, out string, rank int, energy float64, force bool,
) (*Combination, error) {
	if err := CheckResize(rank, energy); err != nil {
		return nil, err
	}
	var resized []ResizedModule
	var held, all float64
	r, err := write(ctx, lora.Several{a}, out, force, func(emit func(lora.Trained) error) ([]*lora.Module, error) {
		return lora.Resize(ctx, a.Adapter, rank, energy, func(t lora.Trained) error {
			m := ResizedModule{t.Name, t.Rank, 1}
			if t.Energy > 0 {
				m.Explained = t.Held / t.Energy
			}
			resized = append(resized, m)
			held += t.Held
			all += t.Energy
			return emit(t)
		})
	})
	if err != nil {
		return nil, err
	}
	r.Notices = append(r.Notices, a.Notices...)
	if r.Resized, r.Explained = resized, 1; all > 0 {
		r.Explained = held / all
	}
	return r, nil
}

// write writes to out, as a PEFT folder, the modules that produce emits and those that it returns, which are made of
// adapters: the first has the base and the task that the result names.
func write(
	ctx context.Context, of lora.Several, out string, force bool,
	produce func(emit func(lora.Trained) error) ([]*lora.Module, error),
) (*Combination, error) {
	like := of[0].Adapter
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
		return nil, orInterrupted(ctx, err)
	}
	s := lora.Settings{Like: &like.Config, Base: like.Config.Base, EnsureTie: lora.Tied(of)}
	a := lora.New(out, s, append(modules, rest...))
	r.Modules = a.Names()
	e, err := a.Encode(lora.EncodeOptions{To: like.DialectFor(out)})
	if err != nil {
		return nil, err
	}
	return r, w.Write(ctx, e)
}
