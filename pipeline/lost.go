package pipeline

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// measure finds the error of every option: the sum of the squares of what is lost, in float64, in the order of the
// elements.
func measure(ctx context.Context, b *planner, choices []*choice) error {
	r := &run{from: b.from, opts: b.Measuring}
	if r.opts.Threads <= 0 {
		r.opts.Threads = runtime.GOMAXPROCS(0)
	}
	if r.opts.Memory <= 0 {
		r.opts.Memory = DefaultMemory
	}
	r.compute, r.scratch = make(chan struct{}, r.opts.Threads), os.TempDir()
	r.weights = make(map[string]*Weight, len(b.from.Weights))
	for _, w := range b.from.Weights {
		r.weights[w.Name] = w
	}
	needs := newNeeds()
	users := &Plan{Format: b.format.Name()}
	var lossy []*option
	for _, c := range choices {
		for i := range c.options {
			o := &c.options[i]
			if !slices.ContainsFunc(o.jobs, func(j Job) bool { return j.Encode != nil }) {
				continue // nothing is lost
			}
			lossy = append(lossy, o)
			users.Shards = append(users.Shards, Shard{Jobs: o.jobs})
			for k := range o.jobs {
				j, err := r.newJob(ctx, &o.jobs[k], nil)
				if err != nil {
					return c.weights[k].Failed(err)
				}
				needs.add(j)
				needs.compared(j)
				r.total += j.weight.StoredBytes()
			}
		}
	}
	var err error
	if needs.users, err = users.users(b.from); err != nil {
		return err
	}
	if r.budget, err = newBudget(needs, r.opts.Memory, r.opts.Threads); err != nil {
		return err
	}
	r.factors.limit = r.budget.factors
	defer r.report()()

	memory := semaphore.NewWeighted(r.budget.deferred)
	free := make(chan *scratch, r.budget.workers)
	for range r.budget.workers {
		free <- newScratch(r.compute)
	}
	var begin sync.Mutex
	g, within := errgroup.WithContext(ctx)
	g.SetLimit(r.budget.workers)
	for _, o := range lossy {
		g.Go(func() (err error) {
			s := <-free
			defer func() { free <- s }()
			o.err, err = r.errorOf(within, s, o.jobs, memory, &begin)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// compared adds to the needs of a job what comparing takes: the values before and after as float32, and what is
// decoded.
func (n *needs) compared(j *jobRun) {
	if j.encoder == nil {
		return
	}
	for tile, most := range n.tiles {
		elements := min(j.tileElements(tile), j.weight.Count())
		size := j.scratchSize(j.tileElements(tile))
		size.merge = max(size.merge, 8*elements)
		size.gathered += 4*elements + size.out // what the reader has of the quantised form
		n.tiles[tile] = most.max(size)
	}
}

// errorOf is the error of weights that get one type.
func (r *run) errorOf(
	ctx context.Context, s *scratch, jobs []Job, memory *semaphore.Weighted, begin *sync.Mutex,
) (float64, error) {
	sh := &shardRun{Shard: &Shard{Jobs: jobs}}
	r.newSources(sh)
	var list []*jobRun
	begin.Lock() // adapters are read by one at a time
	for k := range jobs {
		j, err := r.newJob(ctx, &jobs[k], sh)
		if err == nil {
			j.takeSources()
			err = r.beginMerge(j)
		}
		if err != nil {
			begin.Unlock()
			return 0, r.weights[jobs[k].Weight].Failed(err)
		}
		list = append(list, j)
	}
	r.merges = nil // what is kept of an adapter is the run's to find
	begin.Unlock()

	if err := r.measureGroups(ctx, s, list); err != nil {
		return 0, err
	}
	sum := float64(0)
	for _, j := range list {
		if j.encoder == nil {
			continue
		}
		e, err := r.lost(ctx, s, j, memory)
		if err != nil {
			return 0, j.weight.Failed(err)
		}
		if math.IsNaN(e) {
			return 0, j.weight.Failed(fmt.Errorf("%w: it has values that are not finite, whose error cannot be measured for a "+
				"budget", ErrRefused))
		}
		sum += e
	}
	return sum, nil
}

// measureGroups has the encoders of jobs measure what they have to know first, those of a group together.
func (r *run) measureGroups(ctx context.Context, s *scratch, jobs []*jobRun) error {
	groups := map[string][]*jobRun{}
	for _, j := range jobs {
		if _, ok := j.encoder.(quant.Measured); ok {
			name := cmp.Or(j.Group, j.Weight)
			groups[name] = append(groups[name], j)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(groups)) {
		var all []float32
		for _, j := range groups[name] {
			m := j.encoder.(quant.Measured)
			numbers := make([]float32, m.Statistics())
			err := r.eachTile(ctx, s, j, func(lo, hi int64, values []byte) error {
				s.Begin()
				defer s.End()
				return j.locate(m.Measure(numbers, lo, hi, values))
			})
			if err != nil {
				return j.weight.Failed(err)
			}
			if all == nil {
				all = numbers
			} else {
				m.Join(all, numbers)
			}
		}
		for _, j := range groups[name] {
			if err := j.encoder.(quant.Measured).Begin(all); err != nil {
				return j.weight.Failed(err)
			}
		}
	}
	return nil
}

// eachTile goes through the values of a job's weight.
func (r *run) eachTile(ctx context.Context, s *scratch, j *jobRun, use func(lo, hi int64, values []byte) error) error {
	return r.inTiles(ctx, s, task{job: j, hi: j.weight.Count()}, func(lo, hi int64) error {
		values, err := r.values(ctx, s, j, lo, hi)
		if err != nil {
			return err
		}
		return use(lo, hi, values)
	})
}

// lost is the sum of the squares of what a job's weight loses. The quantised form is made tile by tile and never held
// whole: where something of it is known only when all is encoded, all is encoded twice.
func (r *run) lost(ctx context.Context, s *scratch, j *jobRun, memory *semaphore.Weighted) (float64, error) {
	n := j.weight.Count()
	var err error
	if j.deferred, err = newDeferred(ctx, j.encoder.Deferred(0, n), memory, r.budget.deferred, r.scratch); err != nil {
		return 0, err
	}
	defer func() { j.deferred.close() }()
	form := &quantisedForm{}
	for i := range j.Outputs {
		size, err := j.Outputs[i].Size()
		if err != nil {
			return 0, err
		}
		j.Outputs[i].Offset = form.size
		form.size += size
	}
	tiled := int64(0)
	for _, x := range j.encoder.Tiles(nil, 0, n) {
		tiled += x.Length
	}
	if tiled < form.size {
		err := r.eachTile(ctx, s, j, func(lo, hi int64, values []byte) error { return j.encode(s, lo, hi, values) })
		if err == nil {
			err = j.encoder.Finish(j.deferred, func(part int, off int64, p []byte) error {
				form.finish(j.Outputs[part].Offset+off, p)
				return nil
			})
		}
		if err != nil {
			return 0, err
		}
	}
	low, err := r.resultOf(ctx, j, form)
	if err != nil {
		return 0, err
	}
	sum := float64(0)
	err = r.eachTile(ctx, s, j, func(lo, hi int64, values []byte) error {
		x := floats(&s.merge.out, int(hi-lo))
		if err := tensor.ToFloats(x, values, j.DType); err != nil {
			return err
		}
		if err := j.encode(s, lo, hi, values); err != nil {
			return err
		}
		form.tile = form.tile[:0]
		for i, x := range s.ranges {
			form.tile = append(form.tile, placed{j.Outputs[x.Part].Offset + x.Offset, s.views[i]})
		}
		back, err := s.Read(low, lo, hi, j.flip)
		if err != nil {
			return err
		}
		y := floats(&s.merge.base, int(hi-lo))
		if err := tensor.ToFloats(y, back, low.Values); err != nil {
			return err
		}
		s.Begin()
		for i := range x {
			d := float64(x[i]) - float64(y[i])
			if math.IsInf(float64(x[i]), 0) { // whose error is infinite in most types, and not less in a better one
				d = math.NaN()
			}
			sum += float64(d * d)
		}
		s.End()
		r.done.Add((hi - lo) * j.weight.StoredBytes() / n)
		return nil
	})
	return sum, err
}

// quantisedForm is the file that a quantised weight would be, of which no more is there than is looked at: what a tile
// fills, and what is written at the end.
type quantisedForm struct {
	size           int64
	tile, finished []placed
}

type placed struct {
	at    int64
	bytes []byte
}

// finish takes in what is written at the end.
func (f *quantisedForm) finish(at int64, p []byte) {
	if n := len(f.finished); n > 0 {
		if last := &f.finished[n-1]; last.at+int64(len(last.bytes)) == at {
			last.bytes = append(last.bytes, p...)
			return
		}
	}
	f.finished = append(f.finished, placed{at, slices.Clone(p)})
}

// ReadAt fills p from the bytes that are there.
func (f *quantisedForm) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		had := n
		for _, list := range [][]placed{f.tile, f.finished} {
			for _, x := range list {
				if at := off + int64(n) - x.at; at >= 0 && at < int64(len(x.bytes)) && n < len(p) {
					n += copy(p[n:], x.bytes[at:])
				}
			}
		}
		if n == had {
			return n, io.ErrUnexpectedEOF
		}
	}
	return n, nil
}
