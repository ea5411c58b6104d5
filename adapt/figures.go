package adapt

import (
	"context"
	"math"
	"slices"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/svd"
)

// missing is the share of their energy that the leading values may miss: spectra that are looked at are
// often flat, as that of a weight or of what rounding does. In white noise the last of 64 values is found
// 0.6 % too small; the default finds it to 0.01 % and takes half as long again.
const missing = 1e-2

// spectrum finds the singular values of a matrix, all or the leading ones.
func spectrum(ctx context.Context, m checkpoint.Rows, rank int) (*SpectrumFigures, error) {
	rows, cols := m.Dims()
	s, err := svd.Values(ctx, m, svd.Options{Rank: min(rank, rows, cols), Missing: missing})
	if err != nil {
		return nil, err
	}
	// Of a matrix of low rank the leading values may be all: what is left out is zero.
	complete := s.Complete || len(s.S) < min(rank, rows, cols)
	if zero := slices.Index(s.S, 0); zero >= 0 {
		s.S = s.S[:zero]
	}
	return figures(s.S, s.Energy, complete, min(rows, cols)), nil
}

// figures makes what is told of singular values; energy is the squared norm, and rank what there could be of them.
func figures(values []float64, energy float64, complete bool, rank int) *SpectrumFigures {
	if values == nil {
		values = []float64{}
	}
	f := &SpectrumFigures{
		EffectiveRank: svd.EffectiveRank(values), StableRank: svd.StableRank(values, energy),
		Complete: complete, Needed: []RankShare{}, Kept: []RankShare{}, Values: values, energy: energy,
	}
	if energy == 0 {
		return f
	}
	for _, share := range []float64{0.5, 0.9, 0.95, 0.99} {
		if k := svd.RankFor(values, energy, share); k <= len(values) {
			f.Needed = append(f.Needed, RankShare{k, share})
		}
	}
	if !complete {
		rank = len(values)
	}
	for _, k := range doublings(rank) {
		f.Kept = append(f.Kept, RankShare{k, f.keptBy(k)})
	}
	return f
}

// doublings are 1, 2, 4, … and last n.
func doublings(n int) []int {
	var list []int
	for k := 1; k < n; k *= 2 {
		list = append(list, k)
	}
	return append(list, n)
}

// keptBy is the share of the squared norm that the k leading values hold.
func (f *SpectrumFigures) keptBy(k int) float64 {
	var sum float64
	for _, v := range f.Values[:min(k, len(f.Values))] {
		sum += float64(v * v)
	}
	return min(sum/f.energy, 1)
}

// quotient is a quotient of norms that JSON can hold: 0 of 0 is 0.
func quotient(a, b float64) float64 {
	if a == 0 {
		return 0
	}
	return min(a/b, math.MaxFloat64)
}

// finite is nil for what is no number.
func finite(x float64) *float64 {
	if x-x != 0 {
		return nil
	}
	return &x
}
