package pipeline

import (
	"fmt"
	"math"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// ErrOption says that an option has a value that is wrong whatever the checkpoint is.
var ErrOption = lora.ErrOption

// DefaultShardSize is the most bytes of tensors in a file where nothing else is said: transformers' own.
const DefaultShardSize = 5_000_000_000

// Unknown is the error of an option whose value is none of those that are known: it names the nearest.
func Unknown(what, value string, known ...string) error {
	return lora.UnknownOption(what, value, known...)
}

// CastType returns the type of that name that plain weights are cast to, 0 for "keep" (or nothing).
func CastType(name string) (tensor.DType, error) {
	switch name {
	case "", "keep":
		return 0, nil
	case "f32":
		return tensor.F32, nil
	case "f16":
		return tensor.F16, nil
	case "bf16":
		return tensor.BF16, nil
	}
	return 0, Unknown("dtype", name, "keep", "f32", "f16", "bf16")
}

// Check refuses what is wrong whatever the checkpoint is.
func (o *Options) Check() error {
	if _, file := fileType(o.Quantize); file {
		// its rules need no more
	} else if o.Quantize != "keep" && o.Quantize != "none" {
		scheme, err := quant.ForType(o.Quantize)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrOption, quant.Default.Unknown(o.Quantize, append(FileTypes(), "keep", "none")...))
		}
		if _, err := scheme.Spec(o.Quantize, o.Params); err != nil {
			return fmt.Errorf("%w: %w", ErrOption, err)
		}
	} else if len(o.Include)+len(o.Exclude) > 0 && len(o.Rules) == 0 {
		return fmt.Errorf("%w: include and exclude choose what is quantised, and quantize is %s", ErrOption, o.Quantize)
	}
	if err := o.checkRules(); err != nil {
		return err
	}
	if o.To != "" {
		if _, err := formats.Default.Lookup(o.To); err != nil {
			return fmt.Errorf("%w: %w", ErrOption, err)
		}
	}
	if o.MaxShardSize < 0 {
		return fmt.Errorf("%w: max shard size is %d, expected no negative number", ErrOption, o.MaxShardSize)
	}
	if o.MaxTensors < 0 {
		return fmt.Errorf("%w: max tensors is %d, expected no negative number", ErrOption, o.MaxTensors)
	}
	return nil
}

// Check refuses what is wrong whatever the plan is.
func (o *RunOptions) Check() error {
	if math.IsNaN(o.MinKept) || o.MinKept > 1 {
		return fmt.Errorf("%w: min kept is %v, expected 0 to 1", ErrOption, o.MinKept)
	}
	if o.Threads < 0 || o.Threads > 4096 {
		return fmt.Errorf("%w: threads is %d, expected at most 4096 and no negative number", ErrOption, o.Threads)
	}
	return nil
}

// Notices say, in a sentence each, what the user should know of what a run has done.
func (r *Result) Notices() []string {
	var list []string
	if r.Overflowed {
		list = append(list, "the result holds infinities in F16: values past 65504, the largest float16, become "+
			"infinite; bf16 and f32 have room for them")
	}
	list = append(list, r.Remarks...)
	if r.Leftover != "" {
		list = append(list, r.Leftover)
	}
	return list
}
