package train

import (
	"cmp"
	"fmt"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/nf4"
	"github.com/lorakit/lorakit/tensor"
)

// EstimateOptions say what Estimate counts.
type EstimateOptions struct {
	// Parameters is the size of a model of which nothing else is known; 0 where there is one to look at.
	Parameters int64
	Rank       int // of the adapter, 0 is 8
	// Target says which modules the adapter is for, as that of AttachOptions does.
	Target string
	// Tokens is how many a batch has on each GPU, as one row; 0 leaves out what grows with them: activations, logits and
	// multiply-adds.
	Tokens int
	// DType is that of a base that is not trained, "f32", "f16" or "bf16"; empty is the one that its config.json names,
	// else bf16. In the qlora rows it is that of what is not quantised.
	DType string
	// Optimizer is "adamw" (or empty), "adamw8bit", as bitsandbytes has it, or "sgd", without momentum.
	Optimizer string
	// Recipe is how full fine-tuning is done: "mixed" (or empty), "fp16x4" or "qlora-paper".
	Recipe string
	// GPUs is among how many ZeRO divides; 0 is 1.
	GPUs        int
	FollowLinks bool // for who opens the base
}

// Estimation is what Estimate finds. Sizes are in bytes.
type Estimation struct {
	Parameters int64 `json:"parameters"` // of the base, 4-bit weights as if whole
	Trainable  int64 `json:"trainable"`  // of the adapter
	// AssumedShape is that of the model of nearest size, where the size is all that is known; else nil.
	AssumedShape *Shape            `json:"assumed_shape"`
	GPUs         int               `json:"gpus"`
	Rows         []EstimatedMethod `json:"rows"`
	MultiplyAdds MultiplyAdds      `json:"multiply_adds"` // with the adapter, but for FullFineTuning
	// Notices say, in a sentence each, what of Target has no part in the adapter.
	Notices []string `json:"-"`
}

// EstimatedMethod is what one way to fine-tune takes.
type EstimatedMethod struct {
	Method      string `json:"method"` // full, lora, qlora or qlora-dq
	Recipe      string `json:"recipe"` // of full; of the others "float32", as which the adapter is trained
	Weights     int64  `json:"weights"`
	Gradients   int64  `json:"gradients"`
	Moments     int64  `json:"moments"` // of the optimizer
	Master      int64  `json:"master"`  // a copy of the weights in float32
	Activations int64  `json:"activations"`
	Logits      int64  `json:"logits"`
	Total       int64  `json:"total"`
	// Zero are the totals a GPU under ZeRO's stages 0 to 3, which divide nothing; moments and master; gradients too;
	// weights too.
	Zero [4]int64 `json:"zero"`
}

// recipe is how many bytes a parameter takes that is trained.
type recipe struct {
	name                                string
	weights, gradients, moments, master int64
}

// recipes of full fine-tuning: what frameworks do, 16 bits with moments and a copy of the weights in float32 (ZeRO, K =
// 12); everything in 16 bits; and without the copy, as the QLoRA paper counts.
var recipes = []recipe{{"mixed", 2, 2, 8, 4}, {"fp16x4", 2, 2, 4, 0}, {"qlora-paper", 2, 2, 8, 0}}

// ofAdapter is how an adapter is trained whatever the base is.
var ofAdapter = recipe{"float32", 4, 4, 8, 0}

// optimizer says how many bytes the moments of a tensor of n elements take.
type optimizer struct {
	name    string
	moments func(r recipe, n int64) int64
}

var optimizers = []optimizer{
	{"adamw", func(r recipe, n int64) int64 { return r.moments * n }},
	{"adamw8bit", func(_ recipe, n int64) int64 { return adamw8bit(n) }},
	{"sgd", func(recipe, int64) int64 { return 0 }},
}

// adamw8bit counts the moments of bitsandbytes' AdamW8bit (optim/optimizer.py, 0.50): two bytes an element and two
// float32 scales a block of 256; tensors of less than 4096 elements (min_8bit_size) have both moments in float32. The
// two tables of 256 values that all tensors share are not counted.
func adamw8bit(n int64) int64 {
	const least, block = 4096, 256
	if n < least {
		return 8 * n
	}
	return 2*n + 2*4*blocks(n, block)
}

// nf4Block is the block size that QLoRA has.
const nf4Block = 64

// nf4Bytes is what NF4 stores of a weight of n elements: 4 bits each, and a float32 scale a block; with double
// quantisation a byte a scale, a float32 scale of those for every 256 and their mean. The tables of values, which are
// the same for all weights, are not counted.
func nf4Bytes(n int64, double bool) int64 {
	scales := blocks(n, nf4Block)
	if !double {
		return blocks(n, 2) + 4*scales
	}
	return blocks(n, 2) + scales + 4*blocks(scales, nf4.NestedBlockSize) + 4
}

// blocks is how many blocks n elements fill, the last one in part.
func blocks(n, size int64) int64 { return n/size + min(1, n%size) }

// These keep all sums far from what an int64 does not hold.
const (
	maxParameters = 1 << 50
	maxRank       = 1 << 20
)

// Check refuses what is wrong whatever the base is.
func (o EstimateOptions) Check() error {
	_, err := o.chosen()
	return err
}

// chosen is what the options name.
type chosen struct {
	recipe
	optimizer
	dtype tensor.DType // or 0
	gpus  int64
}

// chosen finds what the options name.
func (o EstimateOptions) chosen() (*chosen, error) {
	c := &chosen{gpus: int64(cmp.Or(o.GPUs, 1))}
	var err error
	ofRecipe := func(r recipe) string { return r.name }
	if c.recipe, err = named("recipe", cmp.Or(o.Recipe, "mixed"), recipes, ofRecipe); err != nil {
		return nil, err
	}
	ofOptimizer := func(x optimizer) string { return x.name }
	if c.optimizer, err = named("optimizer", cmp.Or(o.Optimizer, "adamw"), optimizers, ofOptimizer); err != nil {
		return nil, err
	}
	switch o.DType {
	case "":
	case "f32":
		c.dtype = tensor.F32
	case "f16":
		c.dtype = tensor.F16
	case "bf16":
		c.dtype = tensor.BF16
	default:
		return nil, lora.UnknownOption("dtype", o.DType, "f32", "f16", "bf16")
	}
	switch {
	case o.Parameters < 0 || o.Parameters > maxParameters:
		return nil, fmt.Errorf("%w: parameters is %d, expected 1 to %d", lora.ErrOption, o.Parameters, int64(maxParameters))
	case o.Rank < 0 || o.Rank > maxRank:
		return nil, fmt.Errorf("%w: rank is %d, expected 1 to %d", lora.ErrOption, o.Rank, maxRank)
	case o.Tokens < 0 || o.GPUs < 0:
		return nil, fmt.Errorf("%w: tokens is %d and GPUs %d, expected no negative numbers", lora.ErrOption, o.Tokens,
			o.GPUs)
	}
	return c, nil
}

// named finds what has that name.
func named[T any](what, name string, list []T, nameOf func(T) string) (T, error) {
	var known []string
	for _, x := range list {
		if nameOf(x) == name {
			return x, nil
		}
		known = append(known, nameOf(x))
	}
	var none T
	return none, lora.UnknownOption(what, name, known...)
}

// Estimate counts the memory that full fine-tuning, LoRA, QLoRA and QLoRA with double quantisation take, by component,
// and the multiply-adds of a step. adapter lists the modules that o.Rank and o.Target mean.
//
// It is arithmetic: buffers of frameworks, fragments and the libraries themselves come on top.
func Estimate(s *Subject, adapter []Adapted, o EstimateOptions) (*Estimation, error) {
	c, err := o.chosen()
	if err != nil {
		return nil, err
	}
	r := &Estimation{AssumedShape: s.assumed, GPUs: int(c.gpus)}
	dtype := cmp.Or(c.dtype, s.baseDType())
	full := EstimatedMethod{Method: "full", Recipe: c.recipe.name}
	var plain, whole, nested int64 // bytes of the base: in dtype, in NF4, and with double quantisation
	for _, t := range s.tensors() {
		if t.elements > maxParameters-r.Parameters {
			return nil, fmt.Errorf("%s: %w: it has more than %d parameters", s.Path, checkpoint.ErrRefused,
				int64(maxParameters))
		}
		r.Parameters += t.elements
		full.train(c.recipe, c.optimizer, t.elements)
		bytes := t.elements * (dtype.Bits() / 8)
		plain += bytes
		if t.quantised {
			whole += nf4Bytes(t.elements, false)
			nested += nf4Bytes(t.elements, true)
		} else {
			whole += bytes
			nested += bytes
		}
	}
	added := EstimatedMethod{Recipe: ofAdapter.name}
	for _, a := range adapter {
		r.Trainable += a.parameters()
		for _, n := range a.tensors() {
			added.train(ofAdapter, c.optimizer, n)
		}
	}
	r.Rows = []EstimatedMethod{full, added.on("lora", plain), added.on("qlora", whole), added.on("qlora-dq", nested)}
	var activations, logits int64
	if o.Tokens > 0 {
		if s.noSpec != nil {
			return nil, fmt.Errorf("%s: what grows with the tokens of a batch cannot be counted: %w", s.Path, s.noSpec)
		}
		if err := s.spec.checkTokens(o.Tokens); err != nil {
			return nil, fmt.Errorf("%s: %w", s.Path, err)
		}
		if activations, logits, err = s.spec.activationBytes(o.Tokens, adapter); err != nil {
			return nil, fmt.Errorf("%s: %w", s.Path, err)
		}
		r.MultiplyAdds = s.spec.multiplyAdds(1, o.Tokens, adapter)
	}
	for i := range r.Rows {
		r.Rows[i].finish(activations, logits, c.gpus)
	}
	return r, nil
}

// train adds what a tensor of n trained elements takes.
func (m *EstimatedMethod) train(r recipe, o optimizer, n int64) {
	m.Weights += r.weights * n
	m.Gradients += r.gradients * n
	m.Moments += o.moments(r, n)
	m.Master += r.master * n
}

// on is what an adapter takes on a frozen base of so many bytes.
func (m EstimatedMethod) on(method string, base int64) EstimatedMethod {
	m.Method = method
	m.Weights += base
	return m
}

// finish adds what grows with the tokens, and sums up. A part of a GPU is rounded up.
func (m *EstimatedMethod) finish(activations, logits, gpus int64) {
	m.Activations, m.Logits = activations, logits
	m.Total = m.Weights + m.Gradients + m.Moments + m.Master + activations + logits
	divided := int64(0)
	for stage, part := range []int64{0, m.Moments + m.Master, m.Gradients, m.Weights} {
		divided += part
		m.Zero[stage] = m.Total - divided + blocks(divided, gpus)
	}
}

// tensors lists the elements of what is trained of a module: of two factors A and B, which stack the experts.
func (a Adapted) tensors() []int64 {
	if a.Rank == 0 {
		return []int64{a.parameters()}
	}
	rows := int64(a.Rank) * a.matrices()
	return []int64{rows * int64(a.In), rows * int64(a.Out)}
}
