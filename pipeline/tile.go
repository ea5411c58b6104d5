package pipeline

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// task is a piece of work for one worker: elements [lo, hi) of a job, or of a Copy the bytes [lo, hi) of one part.
type task struct {
	job     *jobRun
	part    int
	lo, hi  int64
	measure bool // what the encoder has to know before it begins
}

// copyBytes is how much the kernel copies in one task.
const copyBytes = 16 << 20

// pieces cuts a job into tasks, and takes the memory that outlives them.
func (r *run) pieces(ctx context.Context, j *jobRun, memory *semaphore.Weighted) ([]task, error) {
	var tasks []task
	if j.Copy {
		for i, p := range j.weight.Parts {
			for lo := int64(0); lo < p.Bytes; lo += copyBytes {
				tasks = append(tasks, task{job: j, part: i, lo: lo, hi: min(lo+copyBytes, p.Bytes)})
			}
		}
		return tasks, nil
	}
	tasks = r.tiles(j)
	n := j.weight.Count()
	if j.encoder != nil {
		var err error
		j.deferred, err = newDeferred(ctx, j.encoder.Deferred(0, n), memory, r.budget.deferred, r.scratch)
		return tasks, err
	}
	return tasks, nil
}

// tiles cuts a job whose values are read into tasks: tiles, but of a weight that has to be prepared one worker does
// all, and tiles that are read together are one worker's.
func (r *run) tiles(j *jobRun) []task {
	n, step := j.weight.Count(), j.tileElements(r.budget.tile)
	if band := j.weight.Band(); band > step {
		step = band - band%step
	}
	if j.prepared() {
		step = max(n, 1)
	}
	var tasks []task
	for lo := int64(0); lo < n; lo += step {
		tasks = append(tasks, task{job: j, lo: lo, hi: min(lo+step, n)})
	}
	return tasks
}

// do carries out one task.
func (r *run) do(ctx context.Context, s *scratch, g *errgroup.Group, t task) error {
	j := t.job
	if t.measure {
		return r.measure(ctx, s, t)
	}
	if j.Copy {
		part, n := &j.weight.Parts[t.part], t.hi-t.lo
		if err := j.shard.file.CopyAt(j.Outputs[t.part].Offset+t.lo, part.Data, part.Offset+t.lo, n); err != nil {
			return err
		}
		r.wrote(j.shard, n)
		r.done.Add(t.hi - t.lo)
	} else {
		err := j.measured(ctx)
		if err == nil {
			err = r.inTiles(ctx, s, t, func(lo, hi int64) error { return r.change(ctx, s, j, lo, hi) })
		}
		if err != nil {
			return err
		}
		r.done.Add((t.hi - t.lo) * j.weight.StoredBytes() / j.weight.Count())
	}
	if j.remaining.Add(-1) == 0 {
		return r.finishJob(ctx, s, g, j)
	}
	return nil
}

// inTiles prepares the job of a task, where it has to be, and goes through the task tile by tile.
func (r *run) inTiles(ctx context.Context, s *scratch, t task, tile func(lo, hi int64) error) error {
	j := t.job
	if j.prepared() {
		for _, p := range j.merging() {
			if err := r.prepareOnce(ctx, s, p); err != nil {
				return err
			}
		}
	}
	step := j.tileElements(r.budget.tile)
	for lo := t.lo; lo < t.hi; lo += step {
		if err := tile(lo, min(lo+step, t.hi)); err != nil {
			return err
		}
	}
	return nil
}

// values reads the elements [lo, hi) of a job's weight, with what adapters add, as they are written or quantised: cast.
func (r *run) values(ctx context.Context, s *scratch, j *jobRun, lo, hi int64) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if len(j.sources) > 0 {
		return r.gathered(ctx, s, j, lo, hi)
	}
	w := j.onto()
	first, last := w.around(lo, hi)
	values, err := s.Read(w.Weight, first, last, j.flip)
	if err != nil {
		return nil, err
	}
	if j.Finite {
		if err := j.checkFinite(s, lo, hi, values); err != nil {
			return nil, err
		}
	}
	if w.Change != nil {
		s.Begin()
		values, err = r.merged(s, j, first, last, values)
		s.End()
		if err != nil {
			return nil, err
		}
		width := j.DType.Bits() / 8
		values = values[(lo-first)*width : (hi-first)*width]
	} else if j.DType != w.Values {
		b := sized(&s.cast, (hi-lo)*j.DType.Bits()/8)
		s.Begin()
		err := tensor.Convert(b, j.DType, values, w.Values)
		if j.DType == tensor.F16 && err == nil && hasInfinity(b) {
			r.overflows.Store(true)
		}
		s.End()
		if err != nil {
			return nil, err
		}
		values = b
	}
	return values, nil
}

// change makes one tile of the result and writes it to its place in the shard.
func (r *run) change(ctx context.Context, s *scratch, j *jobRun, lo, hi int64) error {
	values, err := r.values(ctx, s, j, lo, hi)
	if err != nil {
		return err
	}
	if j.encoder == nil {
		return r.write(j.shard, values, j.Outputs[0].Offset+lo*j.DType.Bits()/8)
	}
	if err := j.encode(s, lo, hi, values); err != nil {
		return err
	}
	for i, x := range s.ranges {
		if err := r.write(j.shard, s.views[i], j.Outputs[x.Part].Offset+x.Offset); err != nil {
			return err
		}
	}
	return nil
}

// encode quantises one tile: the ranges of the outputs that it fills are in s.ranges then, and their bytes in s.views.
func (j *jobRun) encode(s *scratch, lo, hi int64, values []byte) error {
	s.ranges = j.encoder.Tiles(s.ranges[:0], lo, hi)
	var total int64
	for _, x := range s.ranges {
		total += x.Length
	}
	out := sized(&s.out, total)
	s.views = s.views[:0]
	for _, x := range s.ranges {
		s.views = append(s.views, out[:x.Length:x.Length])
		out = out[x.Length:]
	}
	kept := j.encoder.Deferred(0, lo) // by the tiles before
	deferred := j.deferred.tile(s, kept, j.encoder.Deferred(lo, hi))
	s.Begin()
	err := j.encoder.Encode(s.views, deferred, lo, hi, values)
	s.End()
	if err != nil {
		return j.locate(err)
	}
	return j.deferred.keep(s, deferred, kept)
}

// checkFinite refuses values, those of the elements [lo, hi), that are not finite.
func (j *jobRun) checkFinite(s *scratch, lo, hi int64, values []byte) error {
	x := floats(&s.merge.x, int(hi-lo))
	if err := tensor.ToFloats(x, values, j.onto().Values); err != nil {
		return err
	}
	for i, f := range x {
		if !finite(f) {
			return fmt.Errorf("%w: element %d is %v, expected finite numbers", lora.ErrMalformed, lo+int64(i), f)
		}
	}
	return nil
}

// locate says where in the weight, as its model has it, a value is not finite.
func (j *jobRun) locate(err error) error {
	var bad *quant.NonFiniteError
	if !errors.As(err, &bad) {
		return err
	}
	index := bad.Index
	shape := j.weight.Shape
	if j.flip {
		index = index%shape[0]*shape[1] + index/shape[0]
	}
	at := make(tensor.Shape, len(shape))
	rest := index
	for i := len(shape) - 1; i >= 0; i-- {
		at[i], rest = rest%shape[i], rest/shape[i]
	}
	err = fmt.Errorf("%w (at %v of %v), expected finite numbers",
		&quant.NonFiniteError{Index: index, What: bad.What}, at, shape)
	return hint.With(err, hint.Hint{Option: "AllowNonFinite", Effect: "encodes it as " + j.Encode.Type + " does"})
}

func (r *run) write(sh *shardRun, p []byte, off int64) error {
	n, err := sh.file.WriteAt(p, off)
	r.wrote(sh, int64(n))
	return err
}

// wrote counts what has been written of a shard, but for a scratch file.
func (r *run) wrote(sh *shardRun, n int64) {
	if !sh.streamed() {
		r.written.Add(n)
	}
}

// hasInfinity reports whether any of the float16 in b is infinite, eight bytes at a time.
func hasInfinity(b []byte) bool {
	const ones, signs, inf = 0x0001000100010001, 0x8000800080008000, 0x7c007c007c007c00
	for ; len(b) >= 8; b = b[8:] {
		// A lane is zero where its float is infinite, whatever its sign.
		x := binary.LittleEndian.Uint64(b)&^uint64(signs) ^ inf
		if (x-ones)&^x&signs != 0 {
			return true
		}
	}
	for ; len(b) >= 2; b = b[2:] {
		if binary.LittleEndian.Uint16(b)&0x7fff == 0x7c00 {
			return true
		}
	}
	return false
}
