package pipeline

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/lorakit/lorakit/quant"
)

// group is some weights of a shard whose encoders share what they measure: nothing of them is encoded before all of it
// is measured.
type group struct {
	jobs      []*jobRun
	remaining atomic.Int64  // tasks that measure and are not done
	done      chan struct{} // closed when all is measured

	mu      sync.Mutex
	numbers []float32
}

// groups makes the jobs of a shard, those of a group together.
type groups struct {
	made   map[int]*jobRun
	others map[string][]int // the jobs of each group
}

func groupsOf(sh *shardRun) groups {
	g := groups{map[int]*jobRun{}, map[string][]int{}}
	for k := range sh.Jobs {
		if name := sh.Jobs[k].Group; name != "" {
			g.others[name] = append(g.others[name], k)
		}
	}
	return g
}

// job makes job k of a shard. Where its encoder has to measure, that of the whole group is begun first; the tasks that
// encode come later and wait for it.
func (g groups) job(ctx context.Context, r *run, sh *shardRun, k int, send func([]task) error) (*jobRun, error) {
	if j := g.made[k]; j != nil {
		return j, nil
	}
	members := []int{k}
	if name := sh.Jobs[k].Group; name != "" {
		members = g.others[name]
	}
	shared := &group{done: make(chan struct{})}
	var tasks []task
	for _, at := range members {
		j, err := r.newJob(ctx, &sh.Jobs[at], sh)
		if err != nil {
			return nil, err
		}
		j.takeSources()
		g.made[at] = j
		sh.jobs = append(sh.jobs, j)
		if err := r.beginMerge(j); err != nil {
			return nil, j.weight.Failed(err)
		}
		m, ok := j.encoder.(quant.Measured)
		if !ok {
			continue
		}
		shared.jobs = append(shared.jobs, j)
		shared.numbers = make([]float32, m.Statistics())
		j.group = shared
		for _, t := range r.tiles(j) {
			t.measure = true
			tasks = append(tasks, t)
		}
	}
	shared.remaining.Store(int64(len(tasks)))
	return g.made[k], send(tasks)
}

// measure takes in the values of a task, for the group of its job.
func (r *run) measure(ctx context.Context, s *scratch, t task) error {
	g, m := t.job.group, t.job.encoder.(quant.Measured)
	numbers := make([]float32, m.Statistics())
	err := r.inTiles(ctx, s, t, func(lo, hi int64) error {
		values, err := r.values(ctx, s, t.job, lo, hi)
		if err != nil {
			return err
		}
		s.Begin()
		defer s.End()
		return t.job.locate(m.Measure(numbers, lo, hi, values))
	})
	if err != nil {
		return err
	}
	g.mu.Lock()
	m.Join(g.numbers, numbers)
	g.mu.Unlock()
	if g.remaining.Add(-1) > 0 {
		return nil
	}
	for _, j := range g.jobs {
		if err := j.encoder.(quant.Measured).Begin(g.numbers); err != nil {
			return err
		}
	}
	close(g.done)
	return nil
}

// measured waits until all is measured that the job's encoder needs.
func (j *jobRun) measured(ctx context.Context) error {
	if j.group == nil {
		return nil
	}
	select {
	case <-j.group.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// group notes which jobs share what their scheme measures.
func (b *planner) group(ctx context.Context, jobs []Job) error {
	weights := make(map[string]*Weight, len(b.from.Weights))
	for _, w := range b.from.Weights {
		weights[w.Name] = w
	}
	again, err := b.share(ctx, jobs, weights)
	if err == nil && again > 0 {
		b.notice("quantised anew, since they share a scale with weights that change: %s", plural(again, "weight"))
	}
	return err
}

// share groups jobs, of weights by their names. Where one of a group is encoded all are, so that they go on sharing
// what is measured: again is how many would have been copied.
func (b *planner) share(ctx context.Context, jobs []Job, weights map[string]*Weight) (again int, err error) {
	type kind struct {
		grouper quant.Grouper
		scheme  quant.Scheme
		spec    quant.Spec
		byName  map[string]*Job
		names   []string
	}
	var kinds []*kind
	for i := range jobs {
		j := &jobs[i]
		w := weights[j.Weight]
		var spec quant.Spec
		switch {
		case j.Encode != nil:
			spec = *j.Encode
		case j.Copy && w.Decoder != nil:
			spec = w.Decoder.Spec()
		default:
			continue
		}
		scheme, err := b.Schemes.ForType(spec.Type)
		grouper, ok := scheme.(quant.Grouper)
		if err != nil || !ok {
			continue
		}
		at := slices.IndexFunc(kinds, func(k *kind) bool { return k.spec.Equal(spec) })
		if at < 0 {
			at = len(kinds)
			kinds = append(kinds, &kind{grouper: grouper, scheme: scheme, spec: spec, byName: map[string]*Job{}})
		}
		kinds[at].byName[j.Weight] = j
		kinds[at].names = append(kinds[at].names, j.Weight)
	}
	for _, k := range kinds {
		for _, members := range k.grouper.Groups(k.spec, k.names) {
			encoded := func(name string) bool { return k.byName[name] != nil && k.byName[name].Encode != nil }
			if !slices.ContainsFunc(members, encoded) {
				continue
			}
			for _, name := range members {
				j := k.byName[name]
				if j == nil {
					continue
				}
				if j.Encode == nil {
					w := weights[name]
					n, err := encodeJob(ctx, w, w.DType, k.scheme, k.spec)
					if err != nil {
						return 0, w.Failed(err)
					}
					*j = n
					again++
				}
				j.Group = members[0]
			}
		}
	}
	return again, nil
}
