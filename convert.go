package lorakit

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"path/filepath"
	"time"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// ConvertOptions say what Convert makes of a checkpoint. The zero value keeps
// every weight as it is.
type ConvertOptions struct {
	// To is the format to write, such as "safetensors"; empty keeps the source's.
	To string
	// DType is what plain weights are cast to: "f32", "f16", "bf16", or "keep" (or
	// empty).
	DType string
	// Quantize is "keep" (or empty), "none" for plain weights, or a type: "nf4",
	// "fp4", "int8".
	Quantize string
	// BlockSize is how many elements share a scale: a power of two from 32 to
	// 4096; 0 is 64. DoubleQuant quantises the scales as well. Both are for nf4
	// and fp4.
	BlockSize   int
	DoubleQuant bool
	// PerExpert quantises the matrices of experts as well.
	PerExpert bool
	// Include, where not empty, names by globs exactly the tensors that are
	// quantised. Exclude names some that are not.
	Include, Exclude []string
	// Merge are adapters whose deltas are added, in this order, before anything is cast or
	// quantised.
	Merge    []Adapter
	subtract bool // instead of adding

	// Base is "as-is" (or empty), or "dequantized": each adapted weight goes through NF4
	// and back first, as an adapter trained by QLoRA has seen it.
	Base string
	// MinKept is the least share of an adapter that each of its modules has to keep; 0 is 0.5, a
	// negative one asks for nothing.
	MinKept float64
	// MaxShardSize is the most bytes of tensors in a file; 0 is 5 GB.
	MaxShardSize int64
	// AllowNonFinite encodes NaN and infinity as bitsandbytes does. Else they are an
	// error.
	AllowNonFinite bool

	// Memory is the peak of the whole process in bytes; 0 is 256 MiB. Buffers are
	// made to fit; a program that wants the garbage collector to keep to it too
	// calls debug.SetMemoryLimit, as the command does.
	Memory int64
	// Threads is how many compute at once; 0 is one a processor.
	Threads int
	// Resume goes on with a stage that an earlier run has left. Force replaces
	// what is at the destination. DryRun stops when the plan is made.
	Resume, Force, DryRun bool
	// Progress, where not nil, is called several times a second, from another
	// goroutine.
	Progress func(Progress)
}

// ConvertResult says what Convert has done.
type ConvertResult struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	Format      string `json:"format"`
	Shards      int    `json:"shards"`
	Tensors     int    `json:"tensors"`   // logical weights in the result
	Quantized   int    `json:"quantized"` // how many of them are in the scheme asked for
	pipeline.Result
	// Rounding is, for Unmerge, how far each plain weight is to be expected from what it was before
	// the adapters were merged.
	Rounding []pipeline.Rounding `json:"rounding,omitempty"`
	Seconds  float64             `json:"seconds"`
	Notices  []string            `json:"notices"`
	// Plan is, with DryRun, what would be carried out.
	Plan *Plan `json:"plan,omitempty"`
}

// defaultShardSize is that of the command line.
const defaultShardSize = 5_000_000_000

// Convert reads the checkpoint src, a folder or a file, and writes it to dst as o
// says. An option that is wrong whatever the checkpoint is an ErrOption.
func Convert(ctx context.Context, src, dst string, o ConvertOptions) (*ConvertResult, error) {
	po, err := o.plan()
	if err != nil {
		return nil, err
	}
	if o.Memory <= 0 {
		o.Memory = pipeline.DefaultMemory
	}
	if err := pipeline.CheckDestination(src, dst, pipeline.RunOptions{Resume: o.Resume, Force: o.Force}); err != nil {
		return nil, err
	}
	if err := pipeline.CheckSpared(dst, paths(o.Merge)...); err != nil {
		return nil, err
	}
	c, err := checkpoint.Open(ctx, src)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	m := pipeline.Plain(c)
	if len(o.Merge) > 0 {
		merged, closeAll, err := merge(c, o.Merge, o.subtract)
		if err != nil {
			return nil, err
		}
		defer closeAll()
		m = merged
	}
	if err := pipeline.CheckMemory(m, po, o.Memory); err != nil {
		return nil, err
	}
	p, err := pipeline.NewPlan(ctx, m, dst, po)
	if err != nil {
		return nil, err
	}
	r := &ConvertResult{Source: src, Destination: filepath.Clean(dst), Format: p.Format, Shards: len(p.Shards), Notices: append([]string{}, p.Notices...)}
	r.Quantized = p.Quantized
	for _, s := range p.Shards {
		r.Tensors += len(s.Jobs)
	}
	if o.DryRun {
		r.Plan = p
		return r, nil
	}
	start := time.Now()
	r.Result, err = pipeline.Run(ctx, p, m, dst, pipeline.RunOptions{Threads: o.Threads, Memory: o.Memory, Resume: o.Resume, Force: o.Force, MinKept: cmp.Or(o.MinKept, 0.5), Progress: o.Progress})
	r.Seconds = time.Since(start).Seconds()
	if err != nil {
		return nil, err
	}
	if r.Overflowed {
		r.Notices = append(r.Notices, "the result holds infinities in F16: values past 65504, the largest float16, become infinite; bf16 and f32 have room for them")
	}
	if r.Leftover != "" {
		r.Notices = append(r.Notices, r.Leftover)
	}
	return r, nil
}

// plainType is the type of that name to cast to, 0 for keep.
func plainType(name string) (tensor.DType, error) {
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
	return 0, fmt.Errorf("%w: dtype %q is unknown; known are keep, f32, f16, bf16", ErrOption, name)
}

// nf4Params is NF4 with what was asked for: the type that the options for blocks are of.
func nf4Params(asked quant.Params) (quant.Spec, error) {
	scheme, err := quant.ForType("nf4")
	if err != nil {
		return quant.Spec{}, err
	}
	s, err := scheme.Spec("nf4", asked)
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrOption, err)
	}
	return s, err
}

// plan checks what does not depend on a checkpoint.
func (o ConvertOptions) plan() (pipeline.Options, error) {
	po := pipeline.Options{
		To: o.To, Quantize: cmp.Or(o.Quantize, "keep"), Params: quant.Params{{Name: "block_size", Value: int64(cmp.Or(o.BlockSize, 64))}, {Name: "double_quant", Value: o.DoubleQuant}}, PerExpert: o.PerExpert,
		Include: o.Include, Exclude: o.Exclude, MaxShardSize: cmp.Or(o.MaxShardSize, defaultShardSize), AllowNonFinite: o.AllowNonFinite,
	}
	switch o.Base {
	case "", "as-is":
	case "dequantized":
		seen, err := nf4Params(po.Params)
		if err != nil {
			return po, err
		}
		po.Through = &seen
		if len(o.Merge) == 0 {
			return po, fmt.Errorf("%w: base says what adapters are added to, and none is merged", ErrOption)
		}
	default:
		return po, fmt.Errorf("%w: base %q is unknown; known are as-is, dequantized", ErrOption, o.Base)
	}
	if math.IsNaN(o.MinKept) || o.MinKept > 1 {
		return po, fmt.Errorf("%w: min-kept is %v, expected 0 to 1", ErrOption, o.MinKept)
	}
	var err error
	if po.DType, err = plainType(o.DType); err != nil {
		return po, err
	}
	if po.Quantize != "keep" && po.Quantize != "none" {
		if _, err := quant.ForType(po.Quantize); err != nil {
			return po, fmt.Errorf("%w: %w, keep, none", ErrOption, err)
		}
	} else if len(o.Include)+len(o.Exclude) > 0 {
		return po, fmt.Errorf("%w: include and exclude choose what is quantised, and quantize is %s", ErrOption, po.Quantize)
	}
	if o.To != "" {
		if _, err := formats.Lookup(o.To); err != nil {
			return po, fmt.Errorf("%w: %w", ErrOption, err)
		}
	}
	if _, err := nf4Params(po.Params); err != nil {
		return po, err
	}
	if o.Threads < 0 || o.Threads > 4096 || o.MaxShardSize < 0 {
		return po, fmt.Errorf("%w: threads is %d and max-shard-size %d, expected at most 4096 threads and no negative numbers", ErrOption, o.Threads, o.MaxShardSize)
	}
	return po, nil
}
