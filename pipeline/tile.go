package pipeline

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// task is a piece of work for one worker: elements [lo, hi) of a job, or of a Copy
// the bytes [lo, hi) of one part.
type task struct {
	job    *jobRun
	part   int
	lo, hi int64
}

// copyBytes is how much the kernel copies in one task.
const copyBytes = 16 << 20

// pieces cuts a job into tasks, and takes the memory that outlives them.
func (r *run) pieces(ctx context.Context, j *jobRun, memory *semaphore.Weighted) ([]task, error) {
	var tasks []task
	if j.Copy {
		for i, p := range j.weight.Parts {
			for lo := int64(0); lo < p.Bytes; lo += copyBytes {
				tasks = append(tasks, task{j, i, lo, min(lo+copyBytes, p.Bytes)})
			}
		}
		return tasks, nil
	}
	n, step := j.weight.Count(), j.tileElements(r.budget.tile)
	if j.prepared() && n > 0 { // one worker does all of it
		tasks = append(tasks, task{job: j, lo: 0, hi: n})
	}
	for lo := int64(0); lo < n && !j.prepared(); lo += step {
		tasks = append(tasks, task{job: j, lo: lo, hi: min(lo+step, n)})
	}
	if j.encoder != nil {
		var err error
		j.carry, err = newCarry(ctx, j.encoder.Carry(0, n), memory, r.budget.carry, r.scratch)
		return tasks, err
	}
	return tasks, nil
}

// do carries out one task.
func (r *run) do(ctx context.Context, s *scratch, g *errgroup.Group, t task) error {
	j := t.job
	if j.Copy {
		part, n := &j.weight.Parts[t.part], t.hi-t.lo
		if err := j.shard.file.CopyAt(j.Outputs[t.part].Offset+t.lo, part.Data, part.Offset+t.lo, n); err != nil {
			return err
		}
		r.written.Add(n)
		r.done.Add(t.hi - t.lo)
	} else {
		if err := r.change(ctx, s, t); err != nil {
			return err
		}
		r.done.Add((t.hi - t.lo) * j.weight.StoredBytes() / j.weight.Count())
	}
	if j.left.Add(-1) == 0 {
		return r.finishJob(ctx, s, g, j)
	}
	return nil
}

// change reads, casts and quantises one tile and writes it to its place in the
// shard.
func (r *run) change(ctx context.Context, s *scratch, t task) error {
	j := t.job
	if j.prepared() && !j.ready {
		if err := r.prepareMerge(ctx, s, j); err != nil {
			return err
		}
		step := j.tileElements(r.budget.tile)
		for lo := t.lo; lo < t.hi; lo += step {
			if err := r.change(ctx, s, task{job: j, lo: lo, hi: min(lo+step, t.hi)}); err != nil {
				return err
			}
		}
		return nil
	}
	w := j.weight
	values, err := s.Read(w.Weight, t.lo, t.hi, j.flip)
	if err != nil {
		return err
	}
	if j.Finite {
		if err := j.finite(s, t, values); err != nil {
			return err
		}
	}
	if w.Change != nil {
		s.Begin()
		values, err = r.merged(s, j, t.lo, t.hi, values)
		s.End()
		if err != nil {
			return err
		}
	} else if j.DType != w.Values {
		b := sized(&s.cast, (t.hi-t.lo)*j.DType.Bits()/8)
		s.Begin()
		err := tensor.Convert(b, j.DType, values, w.Values)
		if j.DType == tensor.F16 && err == nil && hasInfinity(b) {
			r.overflows.Store(true)
		}
		s.End()
		if err != nil {
			return err
		}
		values = b
	}
	if j.encoder == nil {
		return r.write(j.shard, values, j.Outputs[0].Offset+t.lo*j.DType.Bits()/8)
	}

	s.ranges = j.encoder.Tiles(s.ranges[:0], t.lo, t.hi)
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
	first := t.lo / j.encoder.Unit()
	carry := j.carry.tile(s, first, j.encoder.Carry(t.lo, t.hi))
	s.Begin()
	err = j.encoder.Encode(s.views, carry, t.lo, t.hi, values)
	s.End()
	if err != nil {
		return j.locate(err)
	}
	if err := j.carry.keep(s, carry, first); err != nil {
		return err
	}
	for i, x := range s.ranges {
		if err := r.write(j.shard, s.views[i], j.Outputs[x.Part].Offset+x.Offset); err != nil {
			return err
		}
	}
	return nil
}

// finite refuses values, those of a tile, that are not finite.
func (j *jobRun) finite(s *scratch, t task, values []byte) error {
	x := floats(&s.merge.x, int(t.hi-t.lo))
	if err := tensor.ToFloats(x, values, j.weight.Values); err != nil {
		return err
	}
	for i, f := range x {
		if !finite(f) {
			return fmt.Errorf("%w: element %d is %v, expected finite numbers", lora.ErrMalformed, t.lo+int64(i), f)
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
	return fmt.Errorf("%w (at %v of %v), expected finite numbers; --allow-non-finite encodes it as %s does",
		&quant.NonFiniteError{Index: index, What: bad.What}, at, shape, j.Encode.Type)
}

func (r *run) write(sh *shardRun, p []byte, off int64) error {
	n, err := sh.file.WriteAt(p, off)
	r.written.Add(int64(n))
	return err
}

// hasInfinity reports whether any of the float16 in b is infinite, eight bytes at a
// time.
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
