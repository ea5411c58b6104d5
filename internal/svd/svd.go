// Package svd computes truncated singular value decompositions of matrices that are read by rows, a few at a time:
// what extracting, initialising, resizing and analysing a LoRA adapter needs.
//
// A large matrix is decomposed by a randomised block Krylov process (Musco and Musco, "Randomized block Krylov methods
// for stronger and faster approximate singular value decomposition", 2015), the successor of the subspace iteration of
// Halko, Martinsson and Tropp, "Finding structure with randomness", 2011. For the same products with the matrix it
// captures more of a spectrum that decays slowly, as that of a fine-tuned difference does. It goes on until what it
// misses is estimated to be little, so a matrix of a few strong directions takes three passes or four, and white noise
// twenty. A small matrix, and a product of thin factors, is decomposed by LAPACK in float64.
//
// Everything runs on the caller's goroutine, apart from what gonum starts inside one call, and each sum has one order:
// the same machine returns the same bits for any number of threads. In every pair of singular vectors the entry of the
// left one with the largest magnitude (the first of equals) is positive.
package svd

import (
	"context"
	"errors"
	"fmt"

	"github.com/lorakit/lorakit/internal/kernels"
)

// ErrNonFinite is returned for a matrix that holds a NaN or an infinity.
var ErrNonFinite = errors.New("not finite")

// ErrRank is returned where more singular values are asked for than the matrix has.
var ErrRank = errors.New("rank out of range")

// ErrShape is returned for a matrix without elements and for factors that do not fit.
var ErrShape = errors.New("bad shape")

// Decomposition is a singular value decomposition, cut off after k values: matrix ≈ U·diag(S)·Vᵀ.
//
// k may be less than what was asked for: values that are zero to the working precision are left out. For a matrix of
// zeros k is 0.
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

// Options tune a decomposition. The zero value of each field but Rank is a good default.
type Options struct {
	// Rank is how many singular values are wanted.
	Rank int
	// Missing is the share of the energy that the best approximation of the rank holds, that may be missed: by default
	// 1e-4. The process stops when it estimates to miss less than that, and less than a thousandth of what no
	// approximation of the rank holds. Measured at ranks 4, 16 and 64, with white noise, directions from 0.3 to 10 times
	// as strong as it, and values that fall as 1/sqrt(i): it misses 4e-5 at most.
	Missing float64
	// Product, where it is not zero, is by how much the product U·S·Vᵀ may differ from the exact one, relative to the
	// matrix (Frobenius). That takes longer: two vectors that the energy does not tell apart make different products.
	Product float64
	// Block is the width of the block that the Krylov process multiplies by the matrix. By default it is 16 up to rank
	// 32, as wide as the kernels are fast, and 32 above.
	Block int
	// Iterations is how often a block is multiplied by M and Mᵀ at most, by default 100. The matrix is read as often,
	// and rarely once more.
	Iterations int
	// Seed picks the random start.
	Seed uint64
}

// withDefaults fills in what is zero.
func (o Options) withDefaults() (Options, error) {
	if o.Rank < 1 || o.Block < 0 || o.Iterations < 0 || !(o.Missing >= 0 && o.Product >= 0) {
		return o, fmt.Errorf("svd: rank %d, block %d, iterations %d, missing %v, product %v: %w, expected rank >= 1 and the "+
			"others >= 0",
			o.Rank, o.Block, o.Iterations, o.Missing, o.Product, ErrRank)
	}
	if o.Block == 0 {
		o.Block = 16
		if o.Rank > 32 {
			o.Block = 32
		}
	}
	if o.Iterations == 0 {
		o.Iterations = 100
	}
	if o.Missing == 0 {
		o.Missing = 1e-4
	}
	return o, nil
}

// widths are how many columns of a full basis are kept, and how many it may have.
func (o Options) widths() (keep, limit int) {
	keep = o.Rank + 2*o.Block
	return keep, keep + max(5*o.Block, o.Rank)
}

// Truncated returns the o.Rank leading singular values and vectors of m.
//
// A small matrix, or one with no more than twice as many values, is read once, held in float64 and decomposed by
// LAPACK. One of up to a million elements is read once and held. Else memory holds one tile of rows and the basis,
// (rows + cols) x (2·Rank + 7·Block) float32 for a small rank, whatever the iterations.
//
// Errors are ErrRank for a rank beyond the smaller side, ErrShape for an empty matrix, ErrNonFinite, what m's ReadRows
// returns and what ctx says.
func Truncated(ctx context.Context, m Matrix, o Options) (*Decomposition, error) {
	src, err := open(m)
	if err != nil {
		return nil, err
	}
	if o.Rank > src.least() {
		return nil, fmt.Errorf("svd: rank %d of a matrix of %d x %d: %w, expected at most %d", o.Rank, src.rows, src.cols,
			ErrRank, src.least())
	}
	if o, err = o.withDefaults(); err != nil {
		return nil, err
	}
	if src.small(2 * o.Rank) {
		d, err := full(ctx, m)
		if err != nil {
			return nil, err
		}
		return d.cut(o.Rank), nil
	}
	k := newKrylov(src, o.Seed)
	if err := k.converge(ctx, o); err != nil {
		return nil, err
	}
	return k.ritz(o.Rank)
}

// Energy returns the fewest leading singular values that hold the share, between 0 and 1, of m's energy, at most
// maxRank of them: where maxRank does not hold the share, maxRank of them. It starts from o.Rank values (16 by
// default) and doubles them until they suffice; what is known of the leading ones is kept. Errors are those of
// Truncated.
func Energy(ctx context.Context, m Matrix, share float64, maxRank int, o Options) (*Decomposition, error) {
	src, err := open(m)
	if err != nil {
		return nil, err
	}
	if maxRank < 1 || maxRank > src.least() {
		return nil, fmt.Errorf("svd: rank %d of a matrix of %d x %d: %w, expected 1 to %d", maxRank, src.rows, src.cols,
			ErrRank, src.least())
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
	for {
		if src.small(4 * o.Rank) {
			d, err := full(ctx, m)
			if err != nil {
				return nil, err
			}
			return d.cut(min(maxRank, RankFor(d.S, d.Energy, share))), nil
		}
		if err := k.converge(ctx, o); err != nil {
			return nil, err
		}
		d, err := k.ritz(o.Rank)
		if err != nil {
			return nil, err
		}
		need := RankFor(d.S, d.Energy, share)
		// Fewer values than asked for: the matrix has no more.
		if need <= len(d.S) || len(d.S) < o.Rank || o.Rank == maxRank {
			return d.cut(need), nil
		}
		// No later value is larger than the last one, so a jump to the rank that would hold the share if all were as large
		// misses nothing.
		next := min(maxRank, 2*o.Rank)
		if last := d.S[o.Rank-1]; last > 0 {
			kept := 0.0
			for _, s := range d.S {
				kept += float64(s * s)
			}
			if least := float64(o.Rank) + (float64(share*d.Energy)-kept)/(last*last); least > float64(next) {
				next = int(min(least, float64(maxRank)))
			}
		}
		o.Block = max(o.Block, (next-o.Rank+1)/4)
		o.Rank = next
	}
}
