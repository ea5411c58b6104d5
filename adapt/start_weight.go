package adapt

import (
	"context"
	"math"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/svd"
)

// pissaProduct is by how much the part that pissa takes out of a weight may differ from what PEFT takes out of
// the base, by an exact decomposition of its own: so ours has to agree in the product, and not only in the values.
const pissaProduct = 1e-3

// pissa starts from the leading singular values of the weight (Meng et al., "PiSSA", 2024), which PEFT takes out of the
// base as it loads the adapter.
func pissa(ctx context.Context, o *AttachOptions, m *module, f *factorPair) error {
	d, err := svd.Truncated(ctx, m.matrix(m.Weight), svd.Options{Rank: m.rank, Seed: o.Seed, Product: pissaProduct})
	if err != nil {
		return err
	}
	f.set(d, 1/m.scaling())
	return measureResidual(ctx, m, f)
}

// olora starts from the first columns of an orthonormal basis of the weight (Büyükakyüz, "OLoRA", 2024): of its QR
// decomposition B is the first columns of Q and A the first rows of R, which those columns and one product give.
func olora(ctx context.Context, _ *AttachOptions, m *module, f *factorPair) error {
	q, r, err := svd.QR(ctx, m.matrix(m.Weight), m.rank)
	if err != nil {
		return err
	}
	f.B, f.A = q, r
	return measureResidual(ctx, m, f)
}

// measureResidual measures the errors of a start whose adapter is taken out of the weight: of the weight in four bits,
// and of what is left of it in four bits with the adapter beside it.
func measureResidual(ctx context.Context, m *module, f *factorPair) error {
	w := m.matrix(m.Weight)
	residual := minusProduct(w, f.B, f.A, m.scaling())
	low, err := checkpoint.Quantized(ctx, m.Weight, qloraNF4)
	if err != nil {
		return err
	}
	lowResidual, err := checkpoint.Quantized(ctx, checkpoint.Computed(m.Weight, residual), qloraNF4)
	if err != nil {
		return err
	}
	norm, err := energy(ctx, w)
	if err != nil || norm == 0 {
		return err
	}
	before, err := energy(ctx, minus(w, m.matrix(low)))
	if err != nil {
		return err
	}
	after, err := energy(ctx, minus(residual, checkpoint.NewMatrix(lowResidual, false)))
	if err != nil {
		return err
	}
	f.errorBefore, f.errorAfter = math.Sqrt(before/norm), math.Sqrt(after/norm)
	return nil
}
