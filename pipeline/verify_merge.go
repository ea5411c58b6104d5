package pipeline

import (
	"context"
	"fmt"
	"slices"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/models/gguf"
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
	find := m.findIn(out)
	if out.Origin() != nil && m.Base.Origin() == nil {
		var err error
		if find, err = m.findInGGUF(out.Origin()); err != nil {
			return nil, err
		}
	}
	var lost []*Weight
	s := newScratch(r.compute)
	for _, w := range m.Weights {
		if w.Change == nil {
			continue
		}
		if ctx.Err() != nil {
			return nil, ErrInterrupted
		}
		o, err := find(w)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", out.Path, err)
		}
		if o == nil {
			lost = append(lost, w)
			continue
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
	return &MergeVerification{keptShares(m.Adapters, r.merges, lost)}, nil
}

// findIn finds the weights of m in a checkpoint of transformers.
func (m *Merged) findIn(out *checkpoint.Checkpoint) func(*Weight) (*checkpoint.Weight, error) {
	byName, byParam := map[string]*checkpoint.Weight{}, map[string]*checkpoint.Weight{}
	for _, w := range out.Weights {
		byName[w.Name] = w
		if s := w.Role.Runtime; len(s) == 1 && s[0].Whole() {
			byParam[s[0].Param] = w
		}
	}
	return func(w *Weight) (*checkpoint.Weight, error) {
		o := byName[w.Name]
		if o == nil && w.Name == m.Head { // another tool has left it tied
			o = byName[m.HeadFrom]
		}
		if rt := w.Role.Runtime; o == nil && len(rt) == 1 && rt[0].Whole() {
			o = byParam[rt[0].Param]
		}
		if o == nil {
			return nil, fmt.Errorf("%w: there is no tensor %s, which the adapter changes", ErrRefused, tensor.Quote(w.Name))
		}
		return o, nil
	}
}

// findInGGUF finds the weights of m, a model of transformers, in a GGUF file of it, as transformers has them; nil is
// one that GGUF has no place for.
func (m *Merged) findInGGUF(out *checkpoint.Checkpoint) (func(*Weight) (*checkpoint.Weight, error), error) {
	config, err := m.config()
	if err != nil {
		return nil, err
	}
	var infos []tensor.Info
	for _, w := range m.Weights {
		if !w.Calibration {
			infos = append(infos, w.Info)
		}
	}
	there := map[string]*checkpoint.Weight{}
	for _, w := range out.Weights {
		there[w.Name] = w
	}
	options := gguf.Options{Type: gguf.F32}
	if e := there[embedding]; e != nil && len(e.Shape) > 0 { // it may have been cut
		options.Vocabulary = e.Shape[0]
	}
	model, err := gguf.Forward(config, infos, options)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.Base.Path, err)
	}
	excerpts, shifts := map[string][]checkpoint.Excerpt{}, map[string]float32{}
	missing := map[string]string{}
	for _, t := range model.Tensors {
		o := there[t.Name]
		for i, name := range t.Sources {
			if o == nil || !slices.Equal(o.Shape, t.Shape) {
				missing[name] = t.Name
				continue
			}
			view := t.View.Moved(0, int64(i)*t.View.Count()).Inverse()
			excerpts[name] = append(excerpts[name], checkpoint.Excerpt{Weight: o, View: view})
			shifts[name] = -t.Shift
		}
	}
	return func(w *Weight) (*checkpoint.Weight, error) {
		name := w.Name
		if missing[name] != "" && name == m.Head { // another tool has left it tied
			name = m.HeadFrom
		}
		if o := missing[name]; o != "" {
			return nil, fmt.Errorf("%w: there is no tensor %s of the shape that it gets of %s, which the adapter changes",
				ErrRefused, tensor.Quote(o), tensor.Quote(name))
		}
		if len(excerpts[name]) == 0 {
			return nil, nil
		}
		return w.from(excerpts[name], shifts[name])
	}, nil
}
