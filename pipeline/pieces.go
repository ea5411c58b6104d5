package pipeline

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// piece is a part of a weight that is put together of elements of others, of which adapters change some.
type piece struct {
	of   *Weight
	view tensor.View
}

// together makes a weight of that name and shape of pieces. Where none of them changes it is a checkpoint's weight, and
// where the only piece is all of another that one under a new name.
func together(info tensor.Info, pieces []piece, shift float32) (*Weight, error) {
	changed := false
	excerpts := make([]checkpoint.Excerpt, len(pieces))
	for i, p := range pieces {
		excerpts[i] = checkpoint.Excerpt{Weight: p.of.Weight, View: p.view}
		changed = changed || p.of.Change != nil
	}
	w, err := checkpoint.Compose(tensor.Info{Name: info.Name, Shape: info.Shape}, excerpts, shift)
	if err != nil {
		return nil, err
	}
	w.Role = generalModel.Tensor(w.Name, w.Shape)
	n := &Weight{Weight: w}
	for _, p := range pieces {
		n.made = append(n.made, p.of.Name)
	}
	if !changed {
		return n, nil
	}
	if first := pieces[0]; len(pieces) == 1 && first.view.Plain() && shift == 0 && first.of.Count() == w.Count() &&
		len(first.of.Shape) == len(w.Shape) {
		n.Change, n.base, n.Role = first.of.Change, first.of.base, first.of.Role
		if n.Role.Kind == models.Conv1D { // it stands in GGUF as it does here
			n.Role.Kind = models.Linear
		}
		return n, nil
	}
	n.pieces, n.shift = pieces, shift
	return n, nil
}

// source is a weight that adapters change, of which a job's weight has a part: a job of its own, that writes nothing.
type source struct {
	*jobRun
	view tensor.View
}

// newSources makes the sources of a shard, each with the number of jobs that have a part of it: what is kept of an
// adapter is measured when all of them are done.
func (r *run) newSources(sh *shardRun) {
	sh.sources = map[*Weight]*jobRun{}
	for k := range sh.Jobs {
		j := &sh.Jobs[k]
		for _, p := range r.weights[j.Weight].pieces {
			s := sh.sources[p.of]
			if s == nil {
				s = &jobRun{Job: &Job{Weight: p.of.Name, DType: tensor.F32}, weight: p.of, shard: sh, inner: true}
				if p.of.trained() && p.of.Role.Quantized {
					s.RoundTrip = j.RoundTrip
				}
				sh.sources[p.of] = s
			}
			s.remaining.Add(1)
		}
	}
}

// takeSources gives a job its sources.
func (j *jobRun) takeSources() {
	for _, p := range j.weight.pieces {
		s := j.shard.sources[p.of]
		s.parts = append(s.parts, sourcePart{j, p.view})
		j.sources = append(j.sources, source{s, p.view})
	}
}

// sourcePart is what a job has of a source.
type sourcePart struct {
	job  *jobRun
	view tensor.View
}

// gathered reads the elements [lo, hi) of a job's weight, which is put together of others with what adapters add.
func (r *run) gathered(ctx context.Context, s *scratch, j *jobRun, lo, hi int64) ([]byte, error) {
	b := sized(&s.gathered, 4*(hi-lo))
	for i := range j.sources {
		p := &j.sources[i]
		err := p.view.Gather(b, lo, hi, 4, gatheredAtOnce(hi-lo), func(from, n int64) ([]byte, error) {
			values, err := r.values(ctx, s, p.jobRun, from, from+n)
			if err != nil {
				err = fmt.Errorf("tensor %s: %w", tensor.Quote(p.weight.Name), err)
			}
			return values, err
		})
		if err != nil {
			return nil, err
		}
	}
	tensor.Shift(b, j.weight.shift)
	if j.DType == tensor.F32 {
		return b, nil
	}
	out := sized(&s.cast, (hi-lo)*j.DType.Bits()/8)
	s.Begin()
	defer s.End()
	if err := tensor.Convert(out, j.DType, b, tensor.F32); err != nil {
		return nil, err
	}
	if j.DType == tensor.F16 && hasInfinity(out) {
		r.overflows.Store(true)
	}
	return out, nil
}

// gatheredAtOnce is how many elements of a source are made at once for n of a weight.
func gatheredAtOnce(n int64) int64 { return 2*n + 4096 }

// finishSources gives the sources of a job back, and finds out what is kept of the adapters in those of which all is
// written.
func (r *run) finishSources(ctx context.Context, s *scratch, j *jobRun) error {
	for _, p := range j.sources {
		if p.remaining.Add(-1) > 0 || p.weight.Change == nil {
			continue
		}
		if err := r.measureSource(ctx, s, p.jobRun, j.shard.file); err != nil {
			return err
		}
		p.settle()
	}
	return nil
}

// measureSource is measureKept of a source, of what was written of it in file.
func (r *run) measureSource(ctx context.Context, s *scratch, p *jobRun, file io.ReaderAt) error {
	var excerpts []checkpoint.Excerpt
	shift := float32(0)
	for _, part := range p.parts {
		out, err := r.resultOf(ctx, part.job, file)
		if err != nil {
			return err
		}
		excerpts = append(excerpts, checkpoint.Excerpt{Weight: out, View: part.view.Inverse()})
		shift = -part.job.weight.shift
	}
	out, err := p.onto().from(excerpts, shift)
	if err != nil {
		return err
	}
	base := p.onto().base
	if base != nil && !slices.Equal(base.Shape, p.weight.Shape) {
		base = nil
	}
	return fillShares(s, p, base, out, p.weight.Change.Width)
}

// from is a weight that adapters change as it stands in a result, of whose weights it has excerpts. Rows at its end
// that are in none are cut off there: they keep nothing of an adapter.
func (w *Weight) from(excerpts []checkpoint.Excerpt, shift float32) (*checkpoint.Weight, error) {
	covered := int64(0)
	for _, x := range excerpts {
		covered += x.View.Count()
	}
	if missing := w.Count() - covered; missing > 0 {
		base := w.Weight
		if w.base != nil && slices.Equal(w.base.Shape, w.Shape) {
			base = w.base
		}
		view := tensor.NewView([]tensor.Dim{{N: missing, From: 1, To: 1}}, covered, covered)
		excerpts = append(excerpts, checkpoint.Excerpt{Weight: base, View: view})
	}
	return checkpoint.Compose(tensor.Info{Name: w.Name, Shape: w.Shape}, excerpts, shift)
}

// merging are the jobs whose weights adapters change: the sources of a job, or itself.
func (j *jobRun) merging() []*jobRun {
	if len(j.sources) == 0 {
		return []*jobRun{j}
	}
	list := make([]*jobRun, len(j.sources))
	for i, p := range j.sources {
		list[i] = p.jobRun
	}
	return list
}

// trained reports whether a weight is one that QLoRA may have seen quantised: a plain matrix that adapters add to.
func (w *Weight) trained() bool {
	return w.Change != nil && !w.Decodes() && len(w.Change.Updates) > 0 && len(w.Shape) > 1
}
