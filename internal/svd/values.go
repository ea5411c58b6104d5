package svd

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/lorakit/lorakit/internal/kernels"
	"gonum.org/v1/gonum/mat"
)

// Spectrum is the singular values of a matrix.
type Spectrum struct {
	S        []float64 // falling
	Energy   float64   // squared Frobenius norm, of all values
	Complete bool      // S has all values, else the leading ones
}

// completeSide is the smaller side up to which all singular values are computed.
const completeSide = 1024

// Values returns all min(rows, cols) singular values of m where that is at most 1024, else the o.Rank leading ones as
// Truncated finds them.
//
// All of them are the roots of the eigenvalues of the Gram matrix of the smaller side in float64, so a value below
// about 1e-7 of the largest is noise; one below what float64 can tell from zero is returned as 0. For a wide matrix
// pairs of tiles are needed, so the later rows are read several times. Errors are those of Truncated.
func Values(ctx context.Context, m Matrix, o Options) (*Spectrum, error) {
	src, err := open(m)
	if err != nil {
		return nil, err
	}
	if src.least() > completeSide {
		d, err := Truncated(ctx, m, o)
		if err != nil {
			return nil, err
		}
		return &Spectrum{S: d.S, Energy: d.Energy}, nil
	}
	n := src.least()
	g := mat.NewDense(n, n, nil)
	total := 0.0
	err = src.tiles(ctx, func(tile kernels.Mat, lo int) error {
		e, err := energy(tile, lo)
		if err != nil {
			return err
		}
		total += e
		t := wide(tile)
		if src.cols <= src.rows {
			var part mat.Dense
			part.Mul(t.T(), t)
			g.Add(g, &part)
			return nil
		}
		return pairs(ctx, src, g, t, lo)
	})
	if err != nil {
		return nil, err
	}
	sym := mat.NewSymDense(n, nil)
	for i := range n {
		for j := i; j < n; j++ {
			sym.SetSym(i, j, g.At(i, j))
		}
	}
	var f mat.EigenSym
	if !f.Factorize(sym, false) {
		return nil, fmt.Errorf("svd: matrix of %d x %d: the eigenvalues of its Gram matrix did not converge", src.rows,
			src.cols)
	}
	s := f.Values(nil)
	slices.Sort(s)
	slices.Reverse(s)
	zero := s[0] * 0x1p-52 * float64(n)
	for i, v := range s {
		if v <= zero {
			s[i] = 0
		} else {
			s[i] = math.Sqrt(v)
		}
	}
	return &Spectrum{S: s, Energy: total, Complete: true}, nil
}

// pairs fills in the part of M·Mᵀ that the tile t at row lo has with itself and with all later tiles, which it
// reads.
func pairs(ctx context.Context, src *source, g, t *mat.Dense, lo int) error {
	height, _ := t.Dims()
	other := make([]float32, src.step*src.cols)
	for at := lo; at < src.rows; at += src.step {
		if err := ctx.Err(); err != nil {
			return err
		}
		u, hi := t, min(at+src.step, src.rows)
		if at > lo {
			part := other[:(hi-at)*src.cols]
			if err := src.read(part, at, hi); err != nil {
				return err
			}
			u = wide(kernels.MatOf(part, hi-at, src.cols))
		}
		block := g.Slice(lo, lo+height, at, hi).(*mat.Dense)
		block.Mul(t, u.T())
	}
	return nil
}

// EffectiveRank is the exponential of the entropy of s/sum(s) (Roy and Vetterli, "The effective rank: a measure of
// effective dimensionality", 2007): n for n equal values, near 1 where one dominates, 0 where all are zero.
func EffectiveRank(s []float64) float64 {
	sum := 0.0
	for _, v := range s {
		sum += v
	}
	if !(sum > 0) {
		return 0
	}
	entropy := 0.0
	for _, v := range s {
		if p := v / sum; p > 0 {
			entropy -= float64(p * math.Log(p))
		}
	}
	return math.Exp(entropy)
}

// StableRank is the energy over the square of the largest singular value: the number of values that there would be if
// all were as large. It is 0 for a matrix of zeros.
func StableRank(s []float64, energy float64) float64 {
	if len(s) == 0 || s[0] == 0 {
		return 0
	}
	return energy / (s[0] * s[0])
}

// RankFor returns the fewest leading values of s, which falls, that hold the share of the energy; len(s) + 1 where all
// of s together do not, and 0 where there is no energy. The share of 1 is met to float32 precision.
func RankFor(s []float64, energy, share float64) int {
	if !(energy > 0) || share <= 0 {
		return 0
	}
	// What float32 and the sums lose is no reason for another rank.
	goal := min(share, 1-0x1p-23) * energy
	kept := 0.0
	for i, v := range s {
		kept += float64(v * v)
		if kept >= goal {
			return i + 1
		}
	}
	return len(s) + 1
}
