package pipeline

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sort"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/tensor"
)

// contributors are what a kept share is measured for: the new value, then the updates.
func (w *Weight) contributors() []*lora.Update {
	m := w.Change
	var list []*lora.Update
	if m.ValueOf != nil {
		list = append(list, m.ValueOf)
	}
	for i := range m.Updates {
		list = append(list, &m.Updates[i])
	}
	return list
}

// share is what is kept of one contributor to a weight, by row, from the first that it has a part in.
type share struct {
	first int64
	rows  [][2]float64
}

// resultOf is what a job has written to file, as a weight.
func (r *run) resultOf(ctx context.Context, j *jobRun, file io.ReaderAt) (*checkpoint.Weight, error) {
	out := *j.weight.Weight
	out.Decoder, out.DType, out.Values, out.Transposed = nil, j.DType, j.DType, false
	parts := make([]formats.Tensor, len(j.Outputs))
	for i, o := range j.Outputs {
		size, err := o.Size()
		if err != nil {
			return nil, err
		}
		parts[i] = formats.Tensor{Info: o.Info, File: j.shard.Name, Data: file, Offset: o.Offset, Bytes: size}
	}
	out.Parts = parts
	if j.Encode == nil {
		return &out, nil
	}
	scheme, err := r.from.Base.Schemes.ForType(j.Encode.Type)
	if err != nil {
		return nil, err
	}
	w, err := checkpoint.Decoded(ctx, &out, scheme, *j.Encode, parts)
	if err != nil {
		return nil, err
	}
	if w.Transposed = j.flip; j.flip {
		w.Shape = j.weight.Shape
	}
	return w, nil
}

// measureKept compares what a job has written to file with what it was to write: the kept share of every contributor.
// The order of all sums is that of the rows.
func (r *run) measureKept(ctx context.Context, s *scratch, j *jobRun, file io.ReaderAt) error {
	out, err := r.resultOf(ctx, j, file)
	if err != nil {
		return err
	}
	base := j.onto().base
	if base == nil || !slices.Equal(base.Shape, j.weight.Shape) {
		base = nil // a grown vocabulary has nothing to be compared with
	}
	return fillShares(s, j, base, out, j.weight.Change.Width)
}

// measuredRows is how many rows of a width are measured at once.
func measuredRows(width int64) int64 { return max(1, (64<<10)/max(width, 1)) }

// atOnce is how many contributors have a part in rows that are measured at once: a stack of experts has many, each in
// rows of its own.
func (w *Weight) atOnce() int64 {
	step := measuredRows(w.Change.Width)
	type event struct{ at, by int64 }
	var events []event
	for _, t := range w.contributors() {
		if t.Rows > 0 {
			events = append(events, event{t.Row / step, 1}, event{(t.Row+t.Rows-1)/step + 1, -1})
		}
	}
	slices.SortFunc(events, func(x, y event) int { return cmp.Or(cmp.Compare(x.at, y.at), cmp.Compare(x.by, y.by)) })
	var now, most int64
	for _, e := range events {
		now += e.by
		most = max(most, now)
	}
	return most
}

// fillShares fills a job's shares from what is written and what was there.
func fillShares(s *scratch, j *jobRun, base, out *checkpoint.Weight, width int64) error {
	step, rows := measuredRows(width), j.weight.Count()/width
	fill := func(w *checkpoint.Weight, dst []float32, lo, hi int64) error {
		values, err := s.Read(w, lo, hi, j.flip)
		if err != nil {
			return err
		}
		return tensor.ToFloats(dst, values, w.Values)
	}
	if base == nil {
		base = j.onto().Weight
	}
	value := j.weight.Change.ValueOf != nil
	alone := len(j.updates) == 1 && !value && j.updates[0].additive()
	for row := int64(0); row < rows; row += step {
		end := min(row+step, rows)
		lo, hi := row*width, end*width
		size := int(hi - lo)
		o, b, x := floats(&s.merge.out, size), floats(&s.merge.base, size), floats(&s.merge.x, size)
		if err := fill(out, o, lo, hi); err != nil {
			return err
		}
		if err := fill(base, b, lo, hi); err != nil {
			return err
		}
		if value {
			if err := fill(j.onto().Weight, x, lo, hi); err != nil {
				return err
			}
		}
		s.Begin()
		if alone {
			clear(x)
			j.shareAlone(s, o, b, x, row, end)
		} else {
			if !value {
				copy(x, b)
			}
			j.sharesOfSeveral(s, o, b, x, row, end)
		}
		s.End()
	}
	return nil
}

// shareAlone fills the rows [row, end) of the share of a job's only update. delta is zero, and becomes the delta
// itself, not what float32 leaves of it in a sum.
func (j *jobRun) shareAlone(s *scratch, out, base, delta []float32, row, end int64) {
	width := j.weight.Change.Width
	j.apply(s, j.updates[0], delta, row*width, end*width)
	for k := row; k < end; k++ {
		p, q := (k-row)*width, (k-row+1)*width
		j.shares[0].set(k, out[p:q], base[p:q], delta[p:q], delta[p:q])
	}
}

// sharesOfSeveral fills the rows [row, end) of the shares of all contributors: each one's delta is what it changes of
// x, which is the new value where there is one, else the base.
func (j *jobRun) sharesOfSeveral(s *scratch, out, base, x []float32, row, end int64) {
	width := j.weight.Change.Width
	m := &s.merge
	total, before := floats(&m.total, len(x)), floats(&m.before, len(x))
	clear(total)
	m.here = m.here[:0]
	note := func(contributor int) {
		if len(m.here) == len(m.deltas) {
			m.deltas = append(m.deltas, nil)
		}
		d := floats(&m.deltas[len(m.here)], len(x))
		for i := range d {
			d[i] = x[i] - before[i]
			total[i] += d[i]
		}
		m.here = append(m.here, contributor)
	}
	contributor := 0
	if j.weight.Change.ValueOf != nil {
		copy(before, base)
		note(contributor)
		contributor++
	}
	for _, t := range j.updates {
		if t.Row < end && row < t.Row+t.Rows { // of a stack of experts each has its own
			copy(before, x)
			j.apply(s, t, x, row*width, end*width)
			note(contributor)
		}
		contributor++
	}
	for k := row; k < end; k++ {
		p, q := (k-row)*width, (k-row+1)*width
		for n, i := range m.here {
			j.shares[i].set(k, out[p:q], base[p:q], total[p:q], m.deltas[n][p:q])
		}
	}
}

// set fills row k of a share, where it has one.
func (s *share) set(k int64, out, base, total, delta []float32) {
	if at := k - s.first; at >= 0 && at < int64(len(s.rows)) {
		ed, dd := kernels.Kept(out, base, total, delta)
		s.rows[at] = [2]float64{ed, dd}
	}
}

// lost are the weights that adapters change and that are not written.
func (m *Merged) lost() []*Weight {
	if m.gguf == nil {
		return nil
	}
	return m.gguf.lost
}

// KeptModule is what is left of an adapter in one module.
type KeptModule struct {
	Name string `json:"name"`
	// Kept is <realised, delta> / <delta, delta>: 1 is all of it.
	Kept  float64 `json:"kept"`
	Delta float64 `json:"delta_norm"` // the Frobenius norm
	// Least is, of a stack of experts, the one of which least is kept: the share of the stack hardly shows
	// that one of many is lost.
	Least *KeptExpert `json:"least,omitempty"`

	error, square float64
}

// KeptExpert is what is left of an adapter in one expert of a stack, or in the one of its projections that has kept
// least, where the file has a tensor for each.
type KeptExpert struct {
	Expert int64   `json:"expert"`
	Kept   float64 `json:"kept"`
}

// Lowest is the least share that m's parts have kept, and what has kept it: m, or an expert of it.
func (m KeptModule) Lowest() (name string, kept float64) {
	if m.Least != nil && !(m.Least.Kept >= m.Kept) {
		return fmt.Sprintf("%s, expert %d", m.Name, m.Least.Expert), m.Least.Kept
	}
	return m.Name, m.Kept
}

// KeptAdapter is what is left of an adapter.
type KeptAdapter struct {
	Path    string       `json:"path"`
	Kept    float64      `json:"kept"`
	Modules []KeptModule `json:"modules"`
	Unused  []string     `json:"unused"`
}

func kept(e, d float64) float64 {
	if d == 0 {
		return 1 // there was nothing to lose
	}
	return 1 + e/d
}

// keptShares sums the shares of all jobs up. lost are weights that adapters change and that are not written.
func keptShares(adapters []AdapterInput, jobs []*jobRun, lost []*Weight) []KeptAdapter {
	out := make([]KeptAdapter, len(adapters))
	index := make([]map[string]int, len(adapters))
	for i, a := range adapters {
		out[i] = KeptAdapter{Path: a.Path, Unused: []string{}, Modules: []KeptModule{}}
		index[i] = map[string]int{}
	}
	for _, w := range lost {
		for _, t := range w.contributors() {
			out[t.Adapter].Unused = append(out[t.Adapter].Unused, t.Name)
		}
	}
	for i := range out {
		slices.Sort(out[i].Unused)
		out[i].Unused = slices.Compact(out[i].Unused)
	}
	for _, j := range jobs {
		for k, t := range j.weight.contributors() {
			a := &out[t.Adapter]
			at, ok := index[t.Adapter][t.Name]
			if !ok {
				at = len(a.Modules)
				index[t.Adapter][t.Name] = at
				a.Modules = append(a.Modules, KeptModule{Name: t.Name})
			}
			m := &a.Modules[at]
			var e, d float64
			for _, row := range j.shares[k].rows {
				m.error += row[0]
				m.square += row[1]
				e += row[0]
				d += row[1]
			}
			if share := kept(e, d); t.Expert > 0 && (m.Least == nil || share < m.Least.Kept) {
				m.Least = &KeptExpert{t.Expert - 1, share}
			}
		}
	}
	for i := range out {
		var e, d float64
		for k := range out[i].Modules {
			m := &out[i].Modules[k]
			m.Kept, m.Delta = kept(m.error, m.square), math.Sqrt(m.square)
			e += m.error
			d += m.square
		}
		out[i].Kept = kept(e, d)
		sort.SliceStable(out[i].Modules, func(x, y int) bool { return out[i].Modules[x].Name < out[i].Modules[y].Name })
	}
	return out
}

// Finite reports whether m's kept share is a number: it is none where the base or the result holds NaN or
// infinity.
func (m KeptModule) Finite() bool { return !math.IsNaN(m.Kept) && !math.IsInf(m.Kept, 0) }

// below lists the modules whose kept share is below least, or is no number.
func below(adapters []KeptAdapter, least float64) []KeptModule {
	var list []KeptModule
	for _, a := range adapters {
		for _, m := range a.Modules {
			if _, kept := m.Lowest(); kept < least || !m.Finite() {
				list = append(list, m)
			}
		}
	}
	return list
}

// beginMerge reads the factors of a job's change, and makes room for its shares.
func (r *run) beginMerge(j *jobRun) error {
	if len(j.sources) > 0 { // which share factors: none is read twice
		r.factors.held = map[*formats.Tensor][]float32{}
		defer func() { r.factors.held = nil }()
	}
	for _, p := range j.sources {
		if p.begun {
			continue
		}
		p.begun = true
		if err := r.beginMerge(p.jobRun); err != nil {
			return fmt.Errorf("tensor %s: %w", tensor.Quote(p.weight.Name), err)
		}
	}
	if j.weight.Change == nil {
		return nil
	}
	if err := r.loadUpdates(j); err != nil {
		return err
	}
	for _, t := range j.weight.contributors() {
		j.shares = append(j.shares, share{t.Row, make([][2]float64, t.Rows)})
	}
	r.merges = append(r.merges, j)
	return nil
}

// finishMerge finds out what was kept of a job's change.
func (r *run) finishMerge(ctx context.Context, s *scratch, j *jobRun) error {
	if j.simple() == nil {
		if err := r.measureKept(ctx, s, j, j.shard.file); err != nil {
			return err
		}
	}
	j.settle()
	return nil
}

// settle gives up what a job has read of adapters, and sums up its shares: rows are many, and their sums have one
// order.
func (j *jobRun) settle() {
	for i := range j.shares {
		var e, d float64
		for _, row := range j.shares[i].rows {
			e += row[0]
			d += row[1]
		}
		j.shares[i].rows = [][2]float64{{e, d}} // only its sum is looked at from now on
	}
	j.updates = nil
}

// remeasure finds the kept shares in a shard that an earlier run has finished.
func (r *run) remeasure(ctx context.Context, sh *shardRun, file io.ReaderAt) error {
	s := newScratch(r.compute)
	r.newSources(sh)
	var sources []*jobRun
	for k := range sh.Jobs {
		w := r.weights[sh.Jobs[k].Weight]
		if !w.changed() {
			continue
		}
		j, err := r.newJob(ctx, &sh.Jobs[k], sh)
		if err != nil {
			return err
		}
		j.takeSources()
		if err := r.beginMerge(j); err != nil {
			return j.weight.Failed(err)
		}
		if j.weight.Change == nil {
			for _, p := range j.sources {
				if p.weight.Change != nil && !slices.Contains(sources, p.jobRun) {
					sources = append(sources, p.jobRun)
				}
			}
			continue
		}
		if j.prepared() {
			if err := r.prepareMerge(ctx, s, j); err != nil {
				return j.weight.Failed(err)
			}
		}
		if err := r.measureKept(ctx, s, j, file); err != nil {
			return j.weight.Failed(err)
		}
		j.settle()
	}
	for _, p := range sources {
		if p.prepared() {
			if err := r.prepareMerge(ctx, s, p); err != nil {
				return p.weight.Failed(err)
			}
		}
		if err := r.measureSource(ctx, s, p, file); err != nil {
			return p.weight.Failed(err)
		}
		p.settle()
	}
	return nil
}

// checkKept refuses a result that has lost an adapter.
func (r *run) checkKept() error {
	if len(r.plan.Adapters) == 0 {
		return nil
	}
	r.shares = keptShares(r.plan.Adapters, r.merges, r.from.lost())
	short := below(r.shares, r.opts.MinKept)
	if r.opts.MinKept <= 0 || len(short) == 0 {
		return nil
	}
	name, least := short[0].Lowest()
	for _, m := range short {
		if !m.Finite() {
			err := fmt.Errorf(
				"%w: module %s: its kept share is not a number, since the base or the result holds NaN or infinity",
				ErrLost, tensor.Quote(m.Name))
			return hint.With(err, hint.Hint{Function: "Verify", Effect: "tells a base that does"},
				hint.Hint{Option: "DType", Value: "f32", Effect: "has room for larger numbers"})
		}
		if n, kept := m.Lowest(); kept < least {
			name, least = n, kept
		}
	}
	out := []hint.Hint{{Option: "DType", Value: "f32", Effect: "keeps all of it"}}
	if slices.ContainsFunc(r.merges, func(j *jobRun) bool { return j.Encode != nil }) {
		out = []hint.Hint{
			{Option: "Quantize", Value: "none", Effect: "writes 16 bit"},
			{Option: "Quantize", Value: "int8", Effect: "keeps more"},
		}
	}
	// A share of a little less than 0 is said without a sign: -0 and 0 is 0.
	out = append(out, hint.Hint{Option: "MinKept", Value: "0", Effect: "writes it all the same"})
	err := fmt.Errorf("%w: kept share of %s is %.4f, expected at least %g (%s below it); the untouched base with the "+
		"adapter "+
		"beside it loses nothing", ErrLost, tensor.Quote(name), math.Round(least*1e4)/1e4+0, r.opts.MinKept,
		plural(len(short), "module"))
	return hint.With(err, out...)
}

// ErrLost says that a merge would lose an adapter, or a part of one.
var ErrLost = errors.New("the adapter would be lost")
