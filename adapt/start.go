package adapt

import (
	"context"
	"hash/fnv"
	"math"
	"math/rand/v2"

	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
)

// start is a way to begin an adapter.
type start struct {
	name string
	// fill sets the A and B of a module, which are zeros.
	fill func(ctx context.Context, o *AttachOptions, m *module, f *factorPair) error
	// fromWeight says that the adapter begins as a part of the base, which PEFT takes out as it loads the adapter.
	fromWeight bool
	// fromError says that the adapter begins as what four bits take of the base.
	fromError bool
}

// starts are the ways to begin, PEFT's default first.
var starts = []start{
	{name: "kaiming", fill: kaiming},
	{name: "gaussian", fill: gaussian},
	{name: "pissa", fill: pissa, fromWeight: true},
	{name: "olora", fill: olora, fromWeight: true},
	{name: "loftq", fill: loftq, fromError: true},
	{name: "compensate", fill: compensate, fromError: true},
}

// startNamed finds a start by its name.
func startNamed(name string) (start, error) {
	var known []string
	for _, s := range starts {
		if s.name == name {
			return s, nil
		}
		known = append(known, s.name)
	}
	return start{}, pipeline.Unknown("init", name, known...)
}

// The quantisations that the starts answer to: that of QLoRA, and that of the base that LoftQ brings along.
var (
	qloraNF4 = nf4Spec(true)
	loftqNF4 = nf4Spec(false)
)

// nf4Block is the block size of both.
const nf4Block = 64

func nf4Spec(double bool) quant.Spec {
	return quant.Spec{Type: "nf4", Params: quant.Params{
		{Name: "block_size", Value: int64(nf4Block)}, {Name: "double_quant", Value: double},
	}}
}

// factorPair is the adapter of one module as it begins: A and B for a scaling of alpha / rank.
type factorPair struct {
	lora.Trained
	// errorBefore and errorAfter are relative errors in four bits, without the adapter and with it; NaN where they mean
	// nothing.
	errorBefore, errorAfter float64
	// subtracted is, of loftq, what is taken out of the base before it is quantised, with a scaling of 1.
	subtracted *lora.Trained
}

// set makes A and B of a decomposition times a factor.
func (f *factorPair) set(d *svd.Decomposition, factor float64) { f.A, f.B = factors(d, f.Rank, factor) }

// begin makes the adapter of one module.
func (s start) begin(ctx context.Context, o *AttachOptions, m *module) (*factorPair, error) {
	f := &factorPair{errorBefore: math.NaN(), errorAfter: math.NaN()}
	f.Trained = lora.Trained{Form: m.form(), Rank: m.rank}
	stack := max(1, m.Experts)
	f.A, f.B = kernels.NewMat(stack*m.rank, m.In), kernels.NewMat(m.Out, stack*m.rank)
	switch {
	case m.Kind == models.Embedding: // A is zero, and B random: rows that are not trained stay as they are
		random := source(o.Seed, m.Param)
		for i := range f.B.Data {
			f.B.Data[i] = float32(random.NormFloat64())
		}
		return f, nil
	case s.fromError && !m.Weight.Role.Quantized:
		// The weight is not in four bits beside the adapter, and has no error to answer to.
		return f, kaiming(ctx, o, m, f)
	}
	return f, s.fill(ctx, o, m, f)
}

// check refuses a target that has no values for the start.
func (s start) check(t *Target) error {
	if !s.fromWeight && !s.fromError {
		return nil
	}
	attention := hint.Hint{Option: "Target", Value: "attention", Effect: "takes what there is"}
	switch {
	case t.ByParameter && s.fromError:
		err := t.refused("transformers leaves experts and routers out of four bits, so that there is no error for the "+
			"init %s", s.name)
		return hint.With(err, attention)
	case t.ByParameter:
		return hint.With(t.refused("PEFT has no init %s for experts and routers", s.name), attention)
	case t.Kind == models.Embedding:
		return t.refused("there is no init %s for an embedding", s.name)
	case t.Weight == nil:
		return t.refused("the base has its weight in %d pieces, and the init %s needs it whole", t.tensors, s.name)
	case s.fromWeight && (t.Weight.Role.Kind == models.Embedding || t.Weight.Role.Tied != ""):
		return t.refused("its weight is the embedding's too, so that PEFT would take what the init %s starts from out "+
			"of both", s.name)
	case t.Weight.Decodes():
		return t.refused("its weight is quantised already, and the init %s needs what it was", s.name)
	}
	return nil
}

// source is where random numbers come from: from the same seed the same for a target, whatever other targets there are.
func source(seed uint64, target string) *rand.Rand {
	h := fnv.New64a()
	h.Write([]byte(target)) // never fails
	return rand.New(rand.NewPCG(seed, h.Sum64()))
}

// kaiming starts from a uniform A with the bound 1/sqrt(in), which is Kaiming's for a = sqrt(5), and from B zero:
// PEFT's default.
func kaiming(_ context.Context, o *AttachOptions, m *module, f *factorPair) error {
	random, bound := source(o.Seed, m.String()), 1/math.Sqrt(float64(m.In))
	for i := range f.A.Data {
		f.A.Data[i] = float32((2*random.Float64() - 1) * bound)
	}
	return nil
}

// gaussian starts from a normal A of deviation 1/rank, and from B zero.
func gaussian(_ context.Context, o *AttachOptions, m *module, f *factorPair) error {
	random := source(o.Seed, m.String())
	for i := range f.A.Data {
		f.A.Data[i] = float32(random.NormFloat64() / float64(m.rank))
	}
	return nil
}
