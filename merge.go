package lorakit

import (
	"context"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
)

// Adapter is an adapter to be merged: a folder as PEFT saves it, and the factor of its
// delta. A Weight of 0 stands for 1.
type Adapter struct {
	Path   string
	Weight float64
}

// Merge adds the deltas of adapters to the base and writes the result to dst, as Convert
// does with o. A merge in which a module keeps less than o.MinKept of its delta is an
// error that wraps ErrLost.
func Merge(ctx context.Context, base string, adapters []Adapter, dst string, o ConvertOptions) (*ConvertResult, error) {
	if len(adapters) == 0 {
		return nil, fmt.Errorf("%w: no adapter is given", ErrOption)
	}
	o.Merge = adapters
	return Convert(ctx, base, dst, o)
}

// Unmerge subtracts adapters that were merged. What rounding has taken when they were merged does
// not come back. An adapter with a part that cannot be subtracted (DoRA, replaced
// weights, trained rows) is an error.
func Unmerge(ctx context.Context, merged string, adapters []Adapter, dst string, o ConvertOptions) (*ConvertResult, error) {
	o.subtract = true
	return Merge(ctx, merged, adapters, dst, o)
}

// openAdapters opens adapters; a weight of 0 stands for 1.
func openAdapters(adapters []Adapter) ([]lora.Weighted, func(), error) {
	var list []lora.Weighted
	closeAll := func() {
		for _, a := range list {
			a.Close()
		}
	}
	for _, a := range adapters {
		if a.Weight == 0 {
			a.Weight = 1
		}
		if math.IsNaN(a.Weight) || math.IsInf(a.Weight, 0) {
			closeAll()
			return nil, nil, fmt.Errorf("%w: the weight of %s is %v, expected a finite number", ErrOption, a.Path, a.Weight)
		}
		opened, err := lora.Open(a.Path)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		list = append(list, lora.Weighted{Adapter: opened, Weight: a.Weight})
	}
	return list, closeAll, nil
}

// merge opens adapters and adds them to a checkpoint, or subtracts them.
func merge(c *pipeline.Checkpoint, adapters []Adapter, subtract bool) (func(), error) {
	list, closeAll, err := openAdapters(adapters)
	if err != nil {
		return nil, err
	}
	for i := range list {
		if !subtract {
			break
		}
		list[i].Weight = -list[i].Weight
		if err := list[i].Subtractable(); err != nil {
			closeAll()
			return nil, err
		}
	}
	if err := c.Merge(list); err != nil {
		closeAll()
		return nil, err
	}
	return closeAll, nil
}
