package lorakit

import (
	"cmp"
	"fmt"

	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
)

// ConvertOptions say what Convert makes of a checkpoint. The zero value keeps every weight as it is.
type ConvertOptions struct {
	// To is the format to write, such as "safetensors"; empty keeps the source's.
	To string
	// DType is what plain weights are cast to: "f32", "f16", "bf16", or "keep" (or empty).
	DType string
	// Quantize is "keep" (or empty), "none" for plain weights, or a type: "nf4", "fp4", "int8", one of llama.cpp's for
	// GGUF (QuantizeChoices lists all).
	Quantize string
	// BlockSize is how many elements share a scale: a power of two from 32 to 4096 in nf4 and fp4, 32, 64 or 128 in mlx2
	// to mlx8; 0 is 64. DoubleQuant quantises the scales of nf4 and fp4 as well.
	BlockSize   int
	DoubleQuant bool
	// PerExpert quantises the matrices of experts as well.
	PerExpert bool
	// Rules give weights types of their own: the first whose glob matches the name, in this order. All others get that of
	// Quantize. A rule is about the weights that are quantised anyway; one that matches none of these takes what it
	// matches.
	Rules []Rule
	// Budget is the most bits a quantised weight may have on average, companions included; 0 is any number. Rules with one
	// glob are the types from which it takes for each weight, by the error that each makes.
	Budget float64
	// Include, where not empty, names by globs exactly the tensors that are quantised. Exclude names some that are not.
	Include, Exclude []string
	// Merge are adapters whose deltas are added, in this order, before anything is cast or quantised.
	Merge    []Adapter
	subtract bool // instead of adding

	// Base is "as-is" (or empty), or "dequantized": each adapted weight goes through NF4 and back first, as an adapter
	// trained by QLoRA has seen it.
	Base string
	// MinKept is the least share of an adapter that each of its modules has to keep; 0 is 0.5, a negative one asks for
	// nothing.
	MinKept float64
	// MaxShardSize is the most bytes of tensors in a file; 0 is 5 GB, but of GGUF no limit.
	MaxShardSize int64
	// MaxTensors is the most tensors in a file of a folder; 0 is no limit.
	MaxTensors int
	// PreTokenizer is llama.cpp's name for how a tokenizer cuts text before it merges, where it is to be another than the
	// files say, or they do not say it. RopeScaling is a JSON object of members of rope_parameters for a checkpoint made
	// of a GGUF file, whose keys do not carry them.
	PreTokenizer, RopeScaling string
	// AllowNonFinite encodes NaN and infinity as bitsandbytes does. Else they are an error.
	AllowNonFinite bool

	// Memory is the peak of the whole process in bytes; 0 is 256 MiB. Buffers are made to fit; a program that wants the
	// garbage collector to keep to it too calls debug.SetMemoryLimit, as the command does.
	Memory int64
	// Threads is how many compute at once; 0 is one a processor.
	Threads int
	// Resume goes on with a stage that an earlier run has left. Force replaces what is at the destination. DryRun stops
	// when the plan is made.
	Resume, Force, DryRun bool
	FollowLinks           bool // see ReadOptions
	// Progress, where not nil, is called several times a second, from another goroutine.
	Progress func(Progress)
}

// Rule gives the weights that a glob matches a type, or "keep", with which they are not quantised.
type Rule = pipeline.Rule

// ParseRule reads GLOB=TYPE.
func ParseRule(text string) (Rule, error) { return pipeline.ParseRule(text) }

// plan is how a plan is made by these options.
func (o *ConvertOptions) plan() (pipeline.Options, error) {
	po := pipeline.Options{
		To: o.To, Quantize: cmp.Or(o.Quantize, "keep"), Params: o.params(),
		PerExpert: o.PerExpert, Rules: o.Rules, Budget: o.Budget, Include: o.Include, Exclude: o.Exclude,
		MaxShardSize: cmp.Or(o.MaxShardSize, pipeline.DefaultShardSize), MaxTensors: o.MaxTensors,
		AllowNonFinite: o.AllowNonFinite, PreTokenizer: o.PreTokenizer,
	}
	seen, err := nf4Spec(po.Params)
	if err != nil && (o.Base == "dequantized" || !otherScheme(po.Quantize)) { // also where no type has them
		return po, err
	}
	switch {
	case o.Base != "" && o.Base != "as-is" && o.Base != "dequantized":
		return po, pipeline.Unknown("base", o.Base, "as-is", "dequantized")
	case o.Base == "dequantized" && len(o.Merge) == 0:
		return po, fmt.Errorf("%w: base says what adapters are added to, and none is merged", ErrOption)
	}
	if o.Base == "dequantized" {
		po.RoundTrip = &seen
	}
	if po.DType, err = pipeline.CastType(o.DType); err != nil {
		return po, err
	}
	return po, po.Check()
}

// checkGGUF refuses options that are about models in GGUF files where none is read or written.
func (o *ConvertOptions) checkGGUF(from, to bool) error {
	switch {
	case o.PreTokenizer != "" && from == to:
		return fmt.Errorf("%w: a pre-tokenizer is for a model that becomes a GGUF file, or was one", ErrOption)
	case o.RopeScaling != "" && (!from || to):
		return fmt.Errorf("%w: a rope scaling is for a folder that is made of a model in a GGUF file", ErrOption)
	case to && o.PerExpert:
		return fmt.Errorf("%w: GGUF has experts in stacks, and per-expert is for one tensor an expert", ErrOption)
	}
	return nil
}

// params are the parameters of a type that the options have fields for.
func (o *ConvertOptions) params() quant.Params {
	return quant.Params{
		{Name: "block_size", Value: int64(cmp.Or(o.BlockSize, 64))}, {Name: "double_quant", Value: o.DoubleQuant},
	}
}

// otherScheme reports whether a type is of another scheme than nf4, whose parameters may have other values.
func otherScheme(typ string) bool {
	nf4, err := quant.ForType("nf4")
	if err != nil {
		return false
	}
	s, err := quant.ForType(typ)
	return err == nil && s.Name() != nf4.Name()
}

// nf4Spec is NF4 as it is asked for: what QLoRA has seen.
func nf4Spec(asked quant.Params) (quant.Spec, error) {
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

// run is how a plan is carried out by these options.
func (o *ConvertOptions) run() (pipeline.RunOptions, error) {
	ro := pipeline.RunOptions{
		Threads: o.Threads, Memory: o.Memory, Resume: o.Resume, Force: o.Force, MinKept: cmp.Or(o.MinKept, 0.5),
		Progress: o.Progress,
	}
	if ro.Memory <= 0 {
		ro.Memory = pipeline.DefaultMemory
	}
	return ro, ro.Check()
}
