package pipeline

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// ErrInterrupted says that a run was cancelled.
var ErrInterrupted = checkpoint.ErrInterrupted

// DefaultMemory is the memory that a run uses at most where nothing else is said.
const DefaultMemory = 256 << 20

// RunOptions say how a plan is carried out. They never change a byte of the result.
type RunOptions struct {
	Threads int   // how many tiles are computed at once; 0 is one a processor
	Memory  int64 // the peak of the whole process in bytes; 0 is DefaultMemory
	Resume  bool  // go on with what an earlier run has left
	Force   bool  // replace what is at the destination
	// MinKept is the least share of an adapter that each module has to keep; 0 asks for nothing.
	MinKept float64
	// Progress, where not nil, is called several times a second, from another goroutine.
	Progress func(Progress)
}

// Progress says how far a run is.
type Progress struct {
	Measuring           bool  // the types for a budget, before anything is written
	Done, Total         int64 // bytes of the source's tensors
	Shards, TotalShards int   // finished, and in all
	Elapsed             time.Duration
}

// Result says what a run has done.
type Result struct {
	// Complete says that the destination was there already, made by this plan.
	Complete bool `json:"already_complete,omitempty"`
	// Resumed is the number of shards that an earlier run had finished.
	Resumed int `json:"resumed_shards,omitempty"`
	// Adapters says what is kept of each adapter that was merged.
	Adapters []KeptAdapter `json:"adapters,omitempty"`
	Read     int64         `json:"bytes_read"`
	Written  int64         `json:"bytes_written"`
	Elapsed  time.Duration `json:"-"`
	// Leftover says what could not be tidied after the result was in place.
	Leftover string `json:"leftover,omitempty"`
	// Overflowed says that a cast to F16 has made an infinity, if there was none before.
	Overflowed bool `json:"overflowed,omitempty"`
	// Remarks are what schemes say of what they have written.
	Remarks []string `json:"-"`
}

// Run carries out a plan that was made from m. Everything is written into a stage beside dst, synced, and put in its
// place by one rename; dst is never touched by a run that fails. A stage with finished shards is kept where going on
// with it can help: after an interruption, a full disk or a failing one.
func Run(ctx context.Context, p *Plan, m *Merged, dst string, o RunOptions) (Result, error) {
	if o.Threads <= 0 {
		o.Threads = runtime.GOMAXPROCS(0)
	}
	if o.Memory <= 0 {
		o.Memory = DefaultMemory
	}
	start := time.Now()
	dst, err := absolute(dst)
	if err != nil {
		return Result{}, err
	}
	src := m.Base.Path
	if storage.LocalPath(m.Base.Dir, "") == "" {
		src = ""
	}
	if err := CheckDestination(src, dst, o); err != nil {
		return Result{}, err
	}
	if err := CheckSpared(dst, p.paths(m.Base)...); err != nil {
		return Result{}, err
	}
	r := &run{plan: p, from: m, opts: o, compute: make(chan struct{}, o.Threads),
		remarks: map[string][]string{}}
	if err := r.prepare(ctx); err != nil {
		return Result{}, err
	}
	if _, err := os.Lstat(dst); err == nil && o.Resume {
		if complete, err := r.complete(ctx, dst); complete || err != nil {
			result := Result{Complete: complete}
			if complete {
				result.Leftover = r.tidy(dst)
			}
			return result, err
		}
	}
	s, err := openStage(dst, p.Digest(), p.SingleFile, o.Resume, o.Force)
	if err != nil {
		return Result{}, err
	}
	if _, err := os.Lstat(dst); err == nil && !o.Force {
		// It came after the first look, or has just been put back.
		return Result{}, errors.Join(existsError(dst), s.remove())
	}
	return r.into(ctx, s, start)
}

// into carries the plan out in a stage.
func (r *run) into(ctx context.Context, s *stage, start time.Time) (Result, error) {
	r.sink, r.scratch = s, s.dir
	if err := r.carryOut(ctx); err != nil {
		return r.result(start), r.giveUp(ctx, err)
	}
	result := r.result(start)
	// DST is there: what cannot be tidied now is no failure.
	if err := errors.Join(storage.SyncDir(filepath.Dir(s.dst)), s.remove()); err != nil {
		result.Leftover = leftover(s.dir, err)
	}
	return result, nil
}

func leftover(dir string, err error) string { return fmt.Sprintf("%s is left over: %v", dir, err) }

// carryOut does all the work, up to the rename.
func (r *run) carryOut(ctx context.Context) error {
	if err := r.shards(ctx); err != nil {
		return err
	}
	if err := r.checkKept(); err != nil {
		return err
	}
	if err := r.files(ctx); err != nil {
		return err
	}
	if err := r.unchanged(ctx); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if r.beforePublish != nil {
		if err := r.beforePublish(); err != nil {
			return err
		}
	}
	return r.sink.Publish()
}

// run is a plan being carried out.
type run struct {
	plan          *Plan
	from          *Merged
	opts          RunOptions
	sink          Sink
	scratch       string       // the folder of what does not fit in memory
	spooled       bool         // the source is gone with the run, so that no other can go on with it
	beforePublish func() error // is called before the result is published, where it is not nil
	budget        budget
	weights       map[string]*Weight
	work          []*shardRun
	factors       factors
	merges        []*jobRun // in the order of the plan
	shares        []KeptAdapter
	compute       chan struct{} // one token a thread that computes

	total         int64
	done, written atomic.Int64
	finished      atomic.Int64 // shards, those of an earlier run included
	resumed       int
	remark        sync.Mutex
	remarks       map[string][]string // the weights of which a scheme has said it
	overflows     atomic.Bool         // a cast has made an infinity, or kept one
	streamer      formats.Streamer    // of the shards that their format writes itself, else nil
	chunk         []byte              // of a tensor on its way to it
}

// shardRun is a shard being written.
type shardRun struct {
	*Shard
	jobs      []*jobRun // while it is being written
	sources   map[*Weight]*jobRun
	file      File
	stream    *stream       // the file too, where the format writes the shard itself, else nil
	remaining atomic.Int64  // jobs that are not done
	done      chan struct{} // closed when it has its name
}

// jobRun is a weight on its way.
type jobRun struct {
	*Job
	weight    *Weight
	low       *Weight // what QLoRA saw of it, once the job is prepared: see onto
	encoder   quant.Encoder
	flip      bool // the encoder wants the weight turned round
	shard     *shardRun
	deferred  *deferred
	updates   []*update // of the weight's change, while it is made
	shares    []share   // of its contributors
	preparing sync.Mutex
	ready     bool         // the norms of DoRA are known
	remaining atomic.Int64 // tiles that are not done
	group     *group       // of an encoder that measures, else nil

	sources []source     // where adapters change what the weight is put together of
	inner   bool         // it is such a source, and writes nothing itself
	begun   bool         // its factors are read
	parts   []sourcePart // of a source: who has which part of it
}

// newJob finds the weight of a job again and makes its encoder.
func (r *run) newJob(ctx context.Context, j *Job, sh *shardRun) (*jobRun, error) {
	run := &jobRun{Job: j, weight: r.weights[j.Weight], shard: sh}
	if run.weight == nil {
		return nil, fmt.Errorf("%s: %w: there is no tensor %s", r.from.Base.Path, ErrOtherPlan, tensor.Quote(j.Weight))
	}
	if j.Encode == nil {
		return run, nil
	}
	s, err := r.from.Base.Schemes.ForType(j.Encode.Type)
	if err != nil {
		return nil, err
	}
	run.flip = j.flips(run.weight)
	run.encoder, err = s.Encoder(ctx, *j.Encode, j.encoded(run.weight))
	if run.flip && run.weight.Change != nil {
		turned := *run.weight
		turned.Change = transposed(run.weight.Change, run.weight.Shape)
		run.weight = &turned
	}
	return run, err
}

func (r *run) result(start time.Time) Result {
	return Result{Adapters: r.shares, Resumed: r.resumed, Read: r.done.Load(), Written: r.written.Load(),
		Overflowed: r.overflows.Load(), Remarks: remarks(r.remarks), Elapsed: time.Since(start)}
}

// prepare finds the weights of all jobs again, and divides the memory for the largest of them.
func (r *run) prepare(ctx context.Context) error {
	r.weights = make(map[string]*Weight, len(r.from.Weights))
	for _, w := range r.from.Weights {
		r.weights[w.Name] = w
	}
	var err error
	if r.streamer, err = r.plan.streamer(r.from.Base.Formats); err != nil {
		return err
	}
	needs := newNeeds()
	if needs.users, err = r.plan.users(r.from); err != nil {
		return err
	}
	if r.streamer != nil {
		r.chunk = make([]byte, streamChunk)
	}
	for i := range r.plan.Shards {
		sh := &shardRun{Shard: &r.plan.Shards[i], done: make(chan struct{})}
		r.work = append(r.work, sh)
		for k := range sh.Jobs {
			j, err := r.newJob(ctx, &sh.Jobs[k], sh)
			if err != nil {
				return err
			}
			needs.add(j)
			r.total += j.weight.StoredBytes()
		}
	}
	r.budget, err = newBudget(needs, r.opts.Memory, r.opts.Threads)
	r.factors.limit = r.budget.factors
	return err
}

// shards writes all shards that are not finished yet.
func (r *run) shards(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	tasks := make(chan task)
	g.Go(func() error {
		defer close(tasks)
		return r.feed(ctx, g, tasks)
	})
	for range r.budget.workers {
		g.Go(func() error {
			s := newScratch(r.compute)
			for t := range tasks {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				err := r.do(ctx, s, g, t)
				if d := (*different)(nil); errors.As(err, &d) {
					return err
				}
				if err != nil {
					return t.job.weight.Failed(err)
				}
			}
			return nil
		})
	}
	stop := r.report()
	err := g.Wait()
	stop()
	for _, sh := range r.work {
		if sh.file != nil {
			sh.file.Close() // again, where it was finished: that does no harm
		}
		for _, j := range sh.jobs {
			j.deferred.close()
		}
	}
	return err
}

// feed hands out the tasks in the order of the source.
func (r *run) feed(ctx context.Context, g *errgroup.Group, tasks chan<- task) error {
	memory := semaphore.NewWeighted(r.budget.deferred)
	send := func(list []task) error {
		for _, t := range list {
			select {
			case tasks <- t:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	}
	for i, sh := range r.work {
		finished, err := r.takeUp(ctx, sh)
		if err != nil {
			return err
		}
		if finished {
			for _, j := range sh.Jobs {
				r.done.Add(r.weights[j.Weight].StoredBytes())
			}
			r.resumed++
			r.finished.Add(1)
			close(sh.done)
			continue
		}
		if err := r.begin(ctx, g, i); err != nil {
			// A disk with no room for this shard may have had it for those before: finished, they need not be made again.
			for _, before := range r.work[:i] {
				select {
				case <-before.done:
				case <-ctx.Done():
				}
			}
			return err
		}
		if len(sh.Jobs) == 0 {
			if err := r.finishShard(sh); err != nil {
				return err
			}
		}
		r.newSources(sh)
		groups := groupsOf(sh)
		for k := range sh.Jobs {
			j, err := groups.job(ctx, r, sh, k, send)
			if err != nil {
				return err
			}
			pieces, err := r.pieces(ctx, j, memory)
			if err != nil {
				return err
			}
			j.remaining.Store(int64(len(pieces)))
			if len(pieces) == 0 { // an empty tensor
				if err := r.finishJob(ctx, newScratch(r.compute), g, j); err != nil {
					return err
				}
			}
			if err := send(pieces); err != nil {
				return err
			}
		}
	}
	return nil
}

// takeUp takes a shard that an earlier run has finished, and reports whether there is one.
func (r *run) takeUp(ctx context.Context, sh *shardRun) (bool, error) {
	if sh.streamed() {
		f, ok := r.sink.Streamed(ctx, sh.Name)
		if !ok {
			return false, nil
		}
		return r.recall(ctx, sh, f)
	}
	f, ok := r.sink.Finished(sh.Name, sh.Size)
	if !ok {
		return false, nil
	}
	defer f.Close()
	return true, r.remeasure(ctx, sh, f)
}

// begin creates the file of shard i, and that of the next, which takes its space while this one is written. No shard
// but the first is begun before it has its space. Of those that their format writes itself one at a time has a file.
func (r *run) begin(ctx context.Context, g *errgroup.Group, i int) error {
	for k, sh := range r.work[i:min(i+2, len(r.work))] {
		if sh.file != nil || k > 0 && (r.opts.Resume || sh.streamed()) { // it may be finished, or is not to have one
			continue
		}
		sh.remaining.Store(int64(len(sh.Jobs)))
		if sh.streamed() {
			if err := r.beginStream(ctx, g, i); err != nil {
				return err
			}
			continue
		}
		file, err := r.sink.Create(sh.Name, sh.Size)
		if err != nil && k == 0 {
			return err
		}
		if err == nil {
			sh.file = file
		}
	}
	if i == 0 {
		return nil
	}
	return r.work[i].file.Allocated()
}

// report calls back a few times a second until it is stopped.
func (r *run) report() (stop func()) {
	if r.opts.Progress == nil {
		return func() {}
	}
	start := time.Now()
	tell := func() {
		r.opts.Progress(Progress{
			Measuring: r.plan == nil,
			Done:      r.done.Load(), Total: r.total,
			Shards: int(r.finished.Load()), TotalShards: len(r.work), Elapsed: time.Since(start),
		})
	}
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				tell()
			case <-quit:
				tell()
				return
			}
		}
	}()
	return func() { close(quit); <-ended }
}
