package adapt

import (
	"context"
	"math"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/lora"
)

// errorMissing is what decomposing an error of quantisation may miss of what the rank could take back: its
// spectrum is flat, so that no direction matters much. The estimate is careful: measured, 0.02 to 0.025 are missed.
const errorMissing = 0.05

// compensate starts from the error that quantising the weight makes.
func compensate(ctx context.Context, o *AttachOptions, m *module, f *factorPair) error {
	low, err := checkpoint.Quantized(ctx, m.Weight, qloraNF4)
	if err != nil {
		return err
	}
	w := m.matrix(m.Weight)
	d, err := decomposeError(ctx, o, m, minus(w, m.matrix(low)))
	if err != nil {
		return err
	}
	f.set(d, 1/m.scaling())
	norm, err := energy(ctx, w)
	if err != nil || norm == 0 {
		return err
	}
	f.errorBefore, f.errorAfter = math.Sqrt(d.Energy/norm), math.Sqrt(cutEnergy(d)/norm)
	return nil
}

// loftq alternates (Li et al., "LoftQ", 2023): the weight less the adapter of the step before is quantised, and the
// adapter is the leading part of what the weight is apart from that. It keeps the step with the smallest error.
func loftq(ctx context.Context, o *AttachOptions, m *module, f *factorPair) error {
	w := m.matrix(m.Weight)
	norm, err := energy(ctx, w)
	if err != nil || norm == 0 {
		return err
	}
	var last, beforeBest *svd.Decomposition // of the step before this one, and of that before the best
	least := math.Inf(1)
	for step := range o.LoftQIterations {
		from := m.Weight
		if step > 0 {
			a, b := factors(last, m.rank, 1)
			from = checkpoint.Computed(m.Weight, minusProduct(m.matrix(m.Weight), b, a, 1))
		}
		low, err := checkpoint.Quantized(ctx, from, loftqNF4)
		if err != nil {
			return err
		}
		quantised := m.matrix(low)
		if step > 0 { // computed as (out, in)
			quantised = checkpoint.NewMatrix(low, false)
		}
		d, err := decomposeError(ctx, o, m, minus(w, quantised))
		if err != nil {
			return err
		}
		if step == 0 {
			f.errorBefore = math.Sqrt(d.Energy / norm)
		}
		if e := cutEnergy(d); e < least {
			least, beforeBest = e, last
			f.set(d, 1/m.scaling())
			f.errorAfter = math.Sqrt(e / norm)
		}
		last = d
	}
	if beforeBest != nil {
		f.subtracted = &lora.Trained{Name: m.Module(), Form: lora.Linear, Rank: m.rank}
		f.subtracted.A, f.subtracted.B = factors(beforeBest, m.rank, 1)
	}
	return nil
}

// decomposeError takes the leading part of what quantising a weight has changed.
func decomposeError(ctx context.Context, o *AttachOptions, m *module, e *difference) (*svd.Decomposition, error) {
	return svd.Truncated(ctx, e, svd.Options{Rank: min(m.rank, m.Out, m.In), Seed: o.Seed, Missing: errorMissing})
}
