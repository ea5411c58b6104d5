// Package svd computes truncated singular value decompositions of matrices that
// are read by rows, a few at a time: what extracting, initialising, resizing
// and analysing a LoRA adapter needs.
//
// A large matrix is decomposed by a randomised block Krylov process (Musco and
// Musco, "Randomized block Krylov methods for stronger and faster approximate
// singular value decomposition", 2015), the successor of the subspace iteration
// of Halko, Martinsson and Tropp, "Finding structure with randomness", 2011.
// For the same products with the matrix it captures more of a spectrum that
// decays slowly, as that of a fine-tuned difference does. A small matrix, and a
// product of thin factors, is decomposed by LAPACK in float64.
//
// Everything runs on the caller's goroutine, apart from what gonum starts inside
// one call, and each sum has one order: the same machine returns the same bits
// for any number of threads. In every pair of singular vectors the entry of the
// left one with the largest magnitude (the first of equals) is positive.
package svd

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// ErrNonFinite is returned for a matrix that holds a NaN or an infinity.
var ErrNonFinite = errors.New("not finite")

// ErrRank is returned where more singular values are asked for than the matrix has.
var ErrRank = errors.New("rank out of range")

// ErrShape is returned for a matrix without elements and for factors that do not fit.
var ErrShape = errors.New("bad shape")

// Decomposition is a singular value decomposition, cut off after k values:
// matrix ≈ U·diag(S)·Vᵀ.
//
// k may be less than what was asked for: values that are zero to the working
// precision are left out. For a matrix of zeros k is 0.
type Decomposition struct {
	U      kernels.Mat // rows x k, orthonormal columns
	V      kernels.Mat // cols x k, orthonormal columns
	S      []float64   // k values, falling
	Energy float64     // squared Frobenius norm of the whole matrix
}

// cut keeps the k leading values.
func (d *Decomposition) cut(k int) *Decomposition {
	if k < len(d.S) {
		d.U, d.V, d.S = columns(d.U, 0, k), columns(d.V, 0, k), d.S[:k]
	}
	return d
}

// Options tune a decomposition. The zero value of each field but Rank is a good
// default.
type Options struct {
	// Rank is how many singular values are wanted.
	Rank int
	// Block is the width of the block that the Krylov process multiplies by the
	// matrix. By default it is the rank up to 32 and half of it, but at least 32,
	// above. There is no oversampling: the Krylov space is Iterations+1 blocks
	// wide, so it has room.
	Block int
	// Iterations is how often a block is multiplied by MᵀM. The matrix is read
	// Iterations+1 times and multiplied by a block 2·Iterations+1 times. By
	// default 3: for rank 16 this takes 112 columns of products where
	// torch.svd_lowrank(q=24, niter=2) takes 144. Of the energy that the best
	// rank-16 approximation holds, it misses (measured) 1e-6 where the values fall
	// as 1/i, 1e-3 where as 1/sqrt(i), 2e-4 to 2e-3 where eight strong directions
	// hold 90 to 50 % of the energy above white noise; torch's misses about twice
	// as much or more. One more iteration halves that on noise and divides it by seven
	// or more elsewhere; a flat spectrum (a pretrained weight) deserves 5 to 8.
	Iterations int
	// Seed picks the random start.
	Seed uint64
}

const defaultIterations = 3

// withDefaults fills in what is zero.
func (o Options) withDefaults() (Options, error) {
	if o.Rank < 1 || o.Block < 0 || o.Iterations < 0 {
		return o, fmt.Errorf("svd: rank %d, block %d, iterations %d: %w, expected rank >= 1 and the others >= 0",
			o.Rank, o.Block, o.Iterations, ErrRank)
	}
	if o.Block == 0 {
		o.Block = o.Rank
		if o.Rank > 32 {
			o.Block = max(32, (o.Rank+1)/2)
		}
	}
	if o.Iterations == 0 {
		o.Iterations = defaultIterations
	}
	return o, nil
}

// krylovWidth is how many columns the Krylov space has, at least rank.
func (o Options) krylovWidth() int {
	return max(o.Rank, (o.Iterations+1)*min(o.Block, math.MaxInt/(o.Iterations+1)))
}

// Truncated returns the o.Rank leading singular values and vectors of m.
//
// Where the Krylov space would be as wide as the matrix, or the matrix is small,
// m is read once, held in float64 and decomposed by LAPACK. Else memory holds one tile of rows and
// the skinny bases, (rows + cols) x (Iterations+1)·Block float32, a few times.
//
// Errors are ErrRank for a rank beyond the smaller side, ErrShape for an empty
// matrix, ErrNonFinite, what m's ReadRows returns and what ctx says.
func Truncated(ctx context.Context, m Matrix, o Options) (*Decomposition, error) {
	src, err := open(m)
	if err != nil {
		return nil, err
	}
	if o.Rank > src.least() {
		return nil, fmt.Errorf("svd: rank %d of a matrix of %d x %d: %w, expected at most %d", o.Rank, src.rows, src.cols, ErrRank, src.least())
	}
	if o, err = o.withDefaults(); err != nil {
		return nil, err
	}
	if src.small(o.krylovWidth()) {
		d, err := full(ctx, src)
		if err != nil {
			return nil, err
		}
		return d.cut(o.Rank), nil
	}
	k := newKrylov(src, o.Seed)
	width := (o.Rank + o.Iterations) / (o.Iterations + 1) // never too few columns for the rank
	if err := k.expand(ctx, max(o.Block, width), o.Iterations); err != nil {
		return nil, err
	}
	d, err := k.ritz(o.Rank)
	if err != nil {
		return nil, err
	}
	return d.cut(o.Rank), nil
}

// Energy returns the fewest leading singular values that hold the share, between
// 0 and 1, of m's energy, at most maxRank of them: where maxRank does not hold the
// share, maxRank of them. It starts from o.Rank values (16 by default) and doubles
// them until they suffice; what is known of the leading ones is kept. Errors are
// those of Truncated.
func Energy(ctx context.Context, m Matrix, share float64, maxRank int, o Options) (*Decomposition, error) {
	src, err := open(m)
	if err != nil {
		return nil, err
	}
	if maxRank < 1 || maxRank > src.least() {
		return nil, fmt.Errorf("svd: rank %d of a matrix of %d x %d: %w, expected 1 to %d", maxRank, src.rows, src.cols, ErrRank, src.least())
	}
	if !(share > 0 && share <= 1) {
		return nil, fmt.Errorf("svd: share of the energy is %v: %w, expected more than 0 and at most 1", share, ErrRank)
	}
	if o.Rank == 0 {
		o.Rank = 16
	}
	o.Rank = min(o.Rank, maxRank)
	if o, err = o.withDefaults(); err != nil {
		return nil, err
	}
	k := newKrylov(src, o.Seed)
	for rank, block := o.Rank, o.Block; ; {
		if src.small(k.width() + (o.Iterations+1)*block) {
			d, err := full(ctx, src)
			if err != nil {
				return nil, err
			}
			return d.cut(min(maxRank, RankFor(d.S, d.Energy, share))), nil
		}
		if err := k.expand(ctx, block, o.Iterations); err != nil {
			return nil, err
		}
		next := min(maxRank, 2*rank)
		d, err := k.ritz(next)
		if err != nil {
			return nil, err
		}
		need := RankFor(d.S, d.Energy, share)
		// Fewer values than asked for: the matrix has no more.
		if need <= min(rank, len(d.S)) || len(d.S) < rank || rank == maxRank {
			return d.cut(min(rank, need)), nil
		}
		// No later value is larger than the last one that has settled, so a jump to
		// the rank that would hold the share if all were as large misses nothing.
		if last := d.S[rank-1]; last > 0 {
			kept := 0.0
			for _, s := range d.S[:rank] {
				kept += s * s
			}
			if least := float64(rank) + (share*d.Energy-kept)/(last*last); least > float64(next) {
				next = int(min(least, float64(maxRank)))
			}
		}
		block = max(8, (next-rank+1)/2)
		rank = next
	}
}
