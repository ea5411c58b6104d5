package lorakit

import (
	"context"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
)

// Adapter is an adapter in any dialect that is known (AdapterDialects): a PEFT or an MLX folder, a kohya
// or a loralib file.
type Adapter struct {
	Path   string
	Weight float64 // the factor of its delta; 0 stands for 1
	// Alpha is that of a loralib file, which does not hold it.
	Alpha float64
	// ExpertLayout is "rank_major" or "grouped_by_expert", for a PEFT folder whose config does not say how
	// its stacks of experts lie; empty is PEFT's own rank_major.
	ExpertLayout string
}

// Merge adds the deltas of adapters to the base and writes the result to dst, as Convert
// does with o. A merge in which a module keeps less than o.MinKept of its delta is an
// error that wraps ErrLost.
func Merge(ctx context.Context, base string, adapters []Adapter, dst string, o ConvertOptions) (*ConvertResult, error) {
	if len(adapters) == 0 {
		return nil, fmt.Errorf("%w: no adapter is given", ErrOption)
	}
	if err := checkpoints(base); err != nil {
		return nil, err
	}
	o.Merge = adapters
	return Convert(ctx, base, dst, o)
}

// Unmerge subtracts adapters that were merged. What rounding has taken when they were merged does
// not come back; Rounding in the result says how much that is to be expected to be. An adapter with a part that cannot be subtracted (DoRA, replaced
// weights, trained rows) is an error.
func Unmerge(ctx context.Context, merged string, adapters []Adapter, dst string, o ConvertOptions) (*ConvertResult, error) {
	o.subtract = true
	r, err := Merge(ctx, merged, adapters, dst, o)
	if err != nil || o.DryRun {
		return r, err
	}
	return r, r.rounding(ctx, merged, dst, adapters)
}

// rounding works out what the roundings of a merge and of its subtraction may have taken.
func (r *ConvertResult) rounding(ctx context.Context, merged, dst string, adapters []Adapter) error {
	c, err := checkpoint.Open(ctx, merged)
	if err != nil {
		return err
	}
	defer c.Close()
	m, closeAll, err := merge(c, adapters, true)
	if err != nil {
		return err
	}
	defer closeAll()
	out, err := checkpoint.Open(ctx, dst)
	if err != nil {
		return err
	}
	defer out.Close()
	r.Rounding, err = pipeline.RoundedTwice(ctx, m, out)
	return err
}

// paths lists those of adapters.
func paths(adapters []Adapter) []string {
	var list []string
	for _, a := range adapters {
		list = append(list, a.Path)
	}
	return list
}

// openAdapters opens adapters; a weight of 0 stands for 1. What is said of them has to be
// needed by one.
func openAdapters(adapters []Adapter) ([]lora.Weighted, func(), error) {
	var list []lora.Weighted
	closeAll := func() {
		for _, a := range list {
			a.Close()
		}
	}
	alpha, layout := true, true // nobody needs them
	for _, a := range adapters {
		if a.Weight == 0 {
			a.Weight = 1
		}
		if math.IsNaN(a.Weight) || math.IsInf(a.Weight, 0) {
			closeAll()
			return nil, nil, fmt.Errorf("%w: the weight of %s is %v, expected a finite number", ErrOption, a.Path, a.Weight)
		}
		opened, err := lora.Open(a.Path, lora.OpenOptions{Alpha: a.Alpha, ExpertLayout: a.ExpertLayout})
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		list = append(list, lora.Weighted{Adapter: opened, Weight: a.Weight})
		alpha, layout = alpha && opened.Dialect != lora.LoRALib, layout && !opened.Stacked()
	}
	switch {
	case alpha && adapters[0].Alpha != 0:
		closeAll()
		return nil, nil, fmt.Errorf("%w: an alpha is given, and %s holds its own; it is for loralib files, which do not", ErrOption, adapters[0].Path)
	case layout && adapters[0].ExpertLayout != "":
		closeAll()
		return nil, nil, fmt.Errorf("%w: the expert layout %s is given, and %s has no experts whose layout is open", ErrOption, adapters[0].ExpertLayout, adapters[0].Path)
	}
	return list, closeAll, nil
}

// openAlone opens adapters that are used without their base.
func openAlone(adapters []Adapter) ([]lora.Weighted, func(), error) {
	list, closeAll, err := openAdapters(adapters)
	if err != nil {
		return nil, nil, err
	}
	for _, a := range list {
		if err := a.CheckTargets(); err != nil {
			closeAll()
			return nil, nil, err
		}
	}
	return list, closeAll, nil
}

// merge opens adapters and adds them to a checkpoint, or subtracts them.
func merge(c *checkpoint.Checkpoint, adapters []Adapter, subtract bool) (*pipeline.Merged, func(), error) {
	list, closeAll, err := openAdapters(adapters)
	if err != nil {
		return nil, nil, err
	}
	for i := range list {
		if !subtract {
			break
		}
		list[i].Weight = -list[i].Weight
		if err := list[i].Subtractable(); err != nil {
			closeAll()
			return nil, nil, err
		}
	}
	m, err := pipeline.Merge(c, list)
	if err != nil {
		closeAll()
		return nil, nil, err
	}
	return m, closeAll, nil
}
