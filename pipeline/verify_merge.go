package pipeline

import (
	"context"
	"fmt"
	"slices"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/tensor"
)

// MergeVerification says what is kept of adapters in a merge.
type MergeVerification struct {
	Adapters []KeptAdapter `json:"adapters"`
}

// Short lists the modules whose kept share is below least.
func (v *MergeVerification) Short(least float64) []KeptModule { return below(v.Adapters, least) }

// VerifyMerge measures what of m's adapters is in out, a merge that anyone has made.
func VerifyMerge(ctx context.Context, m *Merged, out *checkpoint.Checkpoint) (*MergeVerification, error) {
	r := &run{from: m, compute: make(chan struct{}, 1), factors: factors{limit: mostFactors}}
	byName, byParam := map[string]*checkpoint.Weight{}, map[string]*checkpoint.Weight{}
	for _, w := range out.Weights {
		byName[w.Name] = w
		if s := w.Role.Runtime; len(s) == 1 && s[0].Whole() {
			byParam[s[0].Param] = w
		}
	}
	s := newScratch(r.compute)
	for _, w := range m.Weights {
		if w.Change == nil {
			continue
		}
		if ctx.Err() != nil {
			return nil, ErrInterrupted
		}
		o := byName[w.Name]
		if o == nil && w.Name == m.Head { // another tool has left it tied
			o = byName[m.HeadFrom]
		}
		if rt := w.Role.Runtime; o == nil && len(rt) == 1 && rt[0].Whole() {
			o = byParam[rt[0].Param]
		}
		if o == nil {
			return nil, fmt.Errorf("%s: %w: there is no tensor %s, which the adapter changes", out.Path, ErrRefused,
				tensor.Quote(w.Name))
		}
		if !slices.Equal(o.Shape, w.Shape) {
			return nil, o.Failed(fmt.Errorf("%w: its shape is %v, expected %v", ErrRefused, o.Shape, w.Shape))
		}
		j := &jobRun{Job: &Job{Weight: w.Name, DType: w.DType}, weight: w}
		if err := r.beginMerge(j); err != nil {
			return nil, w.Failed(err)
		}
		if j.prepared() {
			if err := r.prepareMerge(ctx, s, j); err != nil {
				return nil, w.Failed(err)
			}
		}
		base := w.base
		if !slices.Equal(base.Shape, w.Shape) {
			base = nil
		}
		if err := fillShares(s, j, base, o, w.Change.Width); err != nil {
			return nil, o.Failed(err)
		}
		j.settle()
	}
	return &MergeVerification{keptShares(m.Adapters, r.merges)}, nil
}
