package lorakit

import (
	"context"
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// The quantisations that the inits answer to: that of QLoRA, and that of LoftQ's own
// base.
var (
	qloraNF4 = nf4Spec(nf4Block, true)
	loftqNF4 = nf4Spec(nf4Block, false)
)

// nf4Block is the block size of both.
const nf4Block = 64

func nf4Spec(block int64, double bool) quant.Spec {
	s := quant.Spec{Type: "nf4", Params: quant.Params{{Name: "block_size", Value: block}}}
	if double {
		s.Params = append(s.Params, quant.Param{Name: "double_quant", Value: true})
	}
	return s
}

// errorMissing is what decomposing an error of quantisation may miss of what the rank could take back: its
// spectrum is flat, so that no direction matters much. The estimate is careful: measured, 0.02 to 0.025 are missed.
const errorMissing = 0.05

// pissaProduct is by how much the part that pissa takes out of a weight may differ from what PEFT takes out of
// the base, by an exact decomposition of its own: so ours has to agree in the product, and not only in the values.
const pissaProduct = 1e-3

// initial is the adapter of one target: A and B for a scaling of alpha / rank.
type initial struct {
	lora.Trained
	before, after float64       // relative errors in four bits, without and with the adapter; NaN where they mean nothing
	previous      *lora.Trained // of loftq: what is taken out of the base before it is quantised, with a scaling of 1
}

// start makes the adapter of one target.
func (o *AttachOptions) start(ctx context.Context, s *site) (*initial, error) {
	x := &initial{before: math.NaN(), after: math.NaN()}
	x.Trained = lora.Trained{Form: lora.Linear, Rank: s.rank}
	stack := max(1, s.experts)
	x.A, x.B = kernels.NewMat(stack*s.rank, s.in), kernels.NewMat(s.out, stack*s.rank)
	if s.kind == models.Embedding { // A is zero, and B random: rows that are not trained stay as they are
		x.Form = lora.Embedding
		random := source(o.Seed, s.param)
		for i := range x.B.Data {
			x.B.Data[i] = float32(random.NormFloat64())
		}
		return x, nil
	}
	init, err := o.Init, error(nil)
	if (init == "loftq" || init == "compensate") && !s.whole.Role.Quantized {
		init = "kaiming" // the weight is not in four bits beside the adapter, and has no error to answer to
	}
	switch init {
	case "kaiming":
		random, bound := source(o.Seed, s.String()), 1/math.Sqrt(float64(s.in)) // for a = sqrt(5)
		for i := range x.A.Data {
			x.A.Data[i] = float32((2*random.Float64() - 1) * bound)
		}
	case "gaussian":
		random := source(o.Seed, s.String())
		for i := range x.A.Data {
			x.A.Data[i] = float32(random.NormFloat64() / float64(s.rank))
		}
	case "pissa":
		err = o.pissa(ctx, s, x)
	case "olora":
		err = o.olora(ctx, s, x)
	case "loftq":
		err = o.loftq(ctx, s, x)
	case "compensate":
		err = o.compensate(ctx, s, x)
	}
	return x, err
}

// source is where random numbers come from: from the same seed the same for a target, whatever
// other targets there are.
func source(seed uint64, target string) *rand.Rand {
	h := fnv.New64a()
	h.Write([]byte(target)) // never fails
	return rand.New(rand.NewPCG(seed, h.Sum64()))
}

// matrix reads a target's weight as (out, in).
func (s *site) matrix() *checkpoint.Matrix {
	return checkpoint.NewMatrix(s.whole, s.kind == models.Conv1D)
}

// scaling is the factor of B·A.
func (s *site) scaling() float64 { return s.alpha / float64(s.rank) }

// pissa starts from the leading singular values of the weight (Meng et al., "PiSSA",
// 2024), which PEFT takes out of the base as it loads the adapter.
func (o *AttachOptions) pissa(ctx context.Context, s *site, x *initial) error {
	d, err := svd.Truncated(ctx, s.matrix(), svd.Options{Rank: s.rank, Seed: o.Seed, Product: pissaProduct})
	if err != nil {
		return err
	}
	x.set(d, 1/s.scaling())
	return residual(ctx, s, x)
}

// olora starts from the first columns of an orthonormal basis of the weight (Büyükakyüz,
// "OLoRA", 2024): of its QR decomposition B is the first columns of Q and A the first
// rows of R, which those columns and one product give.
func (o *AttachOptions) olora(ctx context.Context, s *site, x *initial) error {
	q, r, err := svd.QR(ctx, s.matrix(), s.rank)
	if err != nil {
		return err
	}
	x.B, x.A = q, r
	return residual(ctx, s, x)
}

// residual measures what is left of a base in four bits whose adapter has been taken out before,
// against the base in four bits.
func residual(ctx context.Context, s *site, x *initial) error {
	w := s.matrix()
	rest := minus(w, x.B, x.A, s.scaling())
	low, err := checkpoint.Quantized(ctx, s.whole, qloraNF4)
	if err != nil {
		return err
	}
	lowRest, err := checkpoint.Quantized(ctx, checkpoint.Computed(s.whole, rest), qloraNF4)
	if err != nil {
		return err
	}
	norm, err := w.Energy()
	if err != nil || norm == 0 {
		return err
	}
	plain, err := w.Minus(checkpoint.NewMatrix(low, s.kind == models.Conv1D)).Energy()
	if err != nil {
		return err
	}
	with, err := energy(ctx, difference{rest, checkpoint.NewMatrix(lowRest, false)})
	if err != nil {
		return err
	}
	x.before, x.after = math.Sqrt(plain/norm), math.Sqrt(with/norm)
	return nil
}

// compensate starts from the error that quantising the weight makes.
func (o *AttachOptions) compensate(ctx context.Context, s *site, x *initial) error {
	low, err := checkpoint.Quantized(ctx, s.whole, qloraNF4)
	if err != nil {
		return err
	}
	w := s.matrix()
	d, err := svd.Truncated(ctx, w.Minus(checkpoint.NewMatrix(low, s.kind == models.Conv1D)), svd.Options{Rank: min(s.rank, s.out, s.in), Seed: o.Seed, Missing: errorMissing})
	if err != nil {
		return err
	}
	x.set(d, 1/s.scaling())
	norm, err := w.Energy()
	if err != nil || norm == 0 {
		return err
	}
	x.before, x.after = math.Sqrt(d.Energy/norm), math.Sqrt(left(d)/norm)
	return nil
}

// loftq alternates (Li et al., "LoftQ", 2023): the weight less the adapter of the step before is
// quantised, and the adapter is the leading part of what the weight is apart from that. It keeps the
// step with the smallest error.
func (o *AttachOptions) loftq(ctx context.Context, s *site, x *initial) error {
	w := s.matrix()
	norm, err := w.Energy()
	if err != nil || norm == 0 {
		return err
	}
	var at, best *svd.Decomposition // the last step, and that before the best
	least := math.Inf(1)
	for step := range o.LoftQIterations {
		from, flip := s.whole, s.kind == models.Conv1D
		if step > 0 {
			t := lora.Trained{A: kernels.NewMat(s.rank, s.in), B: kernels.NewMat(s.out, s.rank)}
			put(&t, at, s.rank, 1)
			from, flip = checkpoint.Computed(s.whole, minus(s.matrix(), t.B, t.A, 1)), false
		}
		low, err := checkpoint.Quantized(ctx, from, loftqNF4)
		if err != nil {
			return err
		}
		d, err := svd.Truncated(ctx, w.Minus(checkpoint.NewMatrix(low, flip)), svd.Options{Rank: min(s.rank, s.out, s.in), Seed: o.Seed, Missing: errorMissing})
		if err != nil {
			return err
		}
		if step == 0 {
			x.before = math.Sqrt(d.Energy / norm)
		}
		if e := left(d); e < least {
			least, best = e, at
			x.set(d, 1/s.scaling())
			x.after = math.Sqrt(e / norm)
		}
		at = d
	}
	if best != nil {
		x.previous = &lora.Trained{Name: s.module(), Form: lora.Linear, Rank: s.rank, A: kernels.NewMat(s.rank, s.in), B: kernels.NewMat(s.out, s.rank)}
		put(x.previous, best, s.rank, 1)
	}
	return nil
}

// left is the energy that a decomposition has cut off.
func left(d *svd.Decomposition) float64 {
	var kept float64
	for _, v := range d.S {
		kept += float64(v * v)
	}
	return max(0, d.Energy-kept)
}

// set makes A and B of a decomposition times a factor.
func (x *initial) set(d *svd.Decomposition, factor float64) {
	clear(x.A.Data)
	clear(x.B.Data)
	put(&x.Trained, d, x.Rank, factor)
}

// put makes A and B, of zeros, of a decomposition times a factor: the root of each singular value goes
// to each side. Where there are fewer values than the rank, zeros stay.
func put(t *lora.Trained, d *svd.Decomposition, rank int, factor float64) {
	for q, v := range d.S {
		root := float32(math.Sqrt(v * factor))
		for i := range t.B.Rows {
			t.B.Data[i*rank+q] = d.U.Data[i*d.U.RowStride+q*d.U.ColStride] * root
		}
		for i := range t.A.Cols {
			t.A.Data[q*t.A.Cols+i] = d.V.Data[i*d.V.RowStride+q*d.V.ColStride] * root
		}
	}
}

// minus is m less scale times b·a.
func minus(m svd.Matrix, b, a kernels.Mat, scale float64) svd.Matrix {
	scaled := kernels.NewMat(b.Rows, b.Cols)
	for i, v := range b.Data {
		scaled.Data[i] = float32(-scale * float64(v))
	}
	return sum{m, scaled, a}
}

// sum is a matrix and a product of thin factors.
type sum struct {
	svd.Matrix
	b, a kernels.Mat
}

// ReadRows fills dst with the rows from lo to hi.
func (s sum) ReadRows(dst []float32, lo, hi int) error {
	if err := s.Matrix.ReadRows(dst, lo, hi); err != nil {
		return err
	}
	kernels.MulAdd(kernels.MatOf(dst, hi-lo, s.a.Cols), s.b.Slice(lo, hi, 0, s.b.Cols), s.a)
	return nil
}

// difference is a matrix less another.
type difference struct {
	svd.Matrix
	other svd.Matrix
}

// ReadRows fills dst with the rows from lo to hi.
func (d difference) ReadRows(dst []float32, lo, hi int) error {
	if err := d.Matrix.ReadRows(dst, lo, hi); err != nil {
		return err
	}
	other := make([]float32, len(dst))
	if err := d.other.ReadRows(other, lo, hi); err != nil {
		return err
	}
	for i, v := range other {
		dst[i] -= v
	}
	return nil
}

// tiles reads a matrix by rows, some at a time.
func tiles(ctx context.Context, m svd.Matrix, f func(tile kernels.Mat, lo int) error) error {
	rows, cols := m.Dims()
	step := max(1, (256<<10)/max(cols, 1))
	x := make([]float32, min(step, rows)*cols)
	for lo := 0; lo < rows; lo += step {
		if err := ctx.Err(); err != nil {
			return err
		}
		hi := min(lo+step, rows)
		part := x[:(hi-lo)*cols]
		if err := m.ReadRows(part, lo, hi); err != nil {
			return err
		}
		if err := f(kernels.MatOf(part, hi-lo, cols), lo); err != nil {
			return err
		}
	}
	return nil
}

// energy is the sum of the squares of all elements.
func energy(ctx context.Context, m svd.Matrix) (float64, error) {
	var sum float64
	err := tiles(ctx, m, func(tile kernels.Mat, _ int) error {
		for i := range tile.Rows {
			sum += kernels.SquaredNorm(tile.Data[i*tile.Cols : (i+1)*tile.Cols])
		}
		return nil
	})
	return sum, err
}

// fits refuses an init that a target has no values for.
func (s *site) fits(init string) error {
	if init == "kaiming" || init == "gaussian" {
		return nil
	}
	switch {
	case s.parameter && (init == "loftq" || init == "compensate"):
		return fmt.Errorf("module %s: %w: transformers leaves experts and routers out of four bits, so that there is no error for --init %s; --target attention takes what there is", tensor.Quote(s.String()), ErrRefused, init)
	case s.parameter:
		return fmt.Errorf("module %s: %w: PEFT has no --init %s for experts and routers; --target attention takes what there is", tensor.Quote(s.String()), ErrRefused, init)
	case s.kind == models.Embedding:
		return fmt.Errorf("module %s: %w: there is no --init %s for an embedding", tensor.Quote(s.String()), ErrRefused, init)
	case s.whole == nil:
		return fmt.Errorf("module %s: %w: the base has its weight in %d pieces, and --init %s needs it whole", tensor.Quote(s.String()), ErrRefused, s.pieces, init)
	case (init == "pissa" || init == "olora") && (s.whole.Role.Kind == models.Embedding || s.whole.Role.Tied != ""):
		return fmt.Errorf("module %s: %w: its weight is the embedding's too, so that PEFT would take what --init %s starts from out of both", tensor.Quote(s.String()), ErrRefused, init)
	case s.whole.Decoder != nil:
		return fmt.Errorf("module %s: %w: its weight is quantised already, and --init %s needs what it was", tensor.Quote(s.String()), ErrRefused, init)
	}
	return nil
}
