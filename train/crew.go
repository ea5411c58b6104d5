package train

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/kernels"
)

// crew are the threads that share the work of a step.
type crew struct {
	ctx     context.Context
	workers []*worker
}

// worker is a thread and the memory that is its own.
type worker struct {
	reader checkpoint.Reader
	tile   []float32 // rows of a weight
	scores [3][]float32
	sums   []float64
}

func newCrew(ctx context.Context, threads int) *crew {
	c := &crew{ctx: ctx, workers: make([]*worker, threads)}
	for i := range c.workers {
		c.workers[i] = &worker{}
	}
	return c
}

// scratch is one of the worker's matrices, of any content.
func (w *worker) scratch(which, rows, cols int) kernels.Mat {
	if n := rows * cols; len(w.scores[which]) < n {
		w.scores[which] = make([]float32, n)
	}
	return kernels.MatOf(w.scores[which][:rows*cols], rows, cols)
}

// each calls do for the numbers below n, each by some worker. What a number computes must not depend on which. Of
// several errors that of the lowest number is returned: numbers begin in order, so it does not depend on the threads.
func (c *crew) each(n int, do func(w *worker, i int) error) error {
	var next, failed atomic.Int64
	failed.Store(int64(n))
	var mu sync.Mutex
	var first error
	run := func(w *worker) {
		for {
			i := next.Add(1) - 1
			if i >= failed.Load() {
				return
			}
			err := c.ctx.Err()
			if err == nil {
				err = do(w, int(i))
			}
			if err == nil {
				continue
			}
			mu.Lock()
			if i < failed.Load() {
				failed.Store(i)
				first = err
			}
			mu.Unlock()
		}
	}
	var others sync.WaitGroup
	for _, w := range c.workers[1:min(len(c.workers), max(n, 1))] {
		others.Go(func() { run(w) })
	}
	run(c.workers[0])
	others.Wait()
	return first
}

// parts calls do for ranges that make up n, a multiple of grain each but the last, several a worker.
func (c *crew) parts(n, grain int, do func(w *worker, lo, hi int)) error {
	const each = 2 // so that one that begins late does not make the others wait
	size := (n + each*len(c.workers) - 1) / (each * len(c.workers))
	size = max((size+grain-1)/grain*grain, grain)
	return c.each((n+size-1)/size, func(w *worker, i int) error {
		do(w, i*size, min((i+1)*size, n))
		return nil
	})
}

// pack copies b in the order in which products read it, into memory for the largest.
func (c *crew) pack(memory []float32, b kernels.Mat) (*kernels.Panels, error) {
	p := kernels.NewPanels(memory[:kernels.PanelsLen(b.Rows, b.Cols)], b)
	return p, c.each(p.Blocks(), func(_ *worker, i int) error {
		p.Pack(i)
		return nil
	})
}
