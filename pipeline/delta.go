package pipeline

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/tensor"
)

// update is a part of a change, with its factors in memory.
type update struct {
	*lora.Update
	left, right kernels.Mat
	magnitude   []float32           // of DoRA: magnitude / norm, once the norms are known
	values      []float32           // of Rows and Scale
	tiles       []*lora.TiledValues // of an element-wise product
	waves       *lora.WaveValues
	rowMap      lora.RowMap // of Transformed
	rows        map[int64]int
}

// factors keeps what was last read of adapters, for the experts that share one tensor.
type factors struct {
	have  map[*formats.Tensor][]float32
	order []*formats.Tensor
	size  int64
	limit int64
	held  map[*formats.Tensor][]float32 // while it is not nil, all that was got
}

// mostFactors is how many bytes of them are kept at most.
const mostFactors = 32 << 20

func (f *factors) get(t *formats.Tensor) ([]float32, error) {
	if v, ok := f.have[t]; ok {
		return v, nil
	}
	if v, ok := f.held[t]; ok {
		return v, nil
	}
	v, err := lora.Floats(t)
	if err != nil {
		return nil, err
	}
	if f.held != nil {
		f.held[t] = v
	}
	if f.have == nil {
		f.have = map[*formats.Tensor][]float32{}
	}
	f.have[t] = v
	f.order = append(f.order, t)
	f.size += 4 * int64(len(v))
	for f.size > f.limit && len(f.order) > 1 {
		old := f.order[0]
		f.size -= 4 * int64(len(f.have[old]))
		delete(f.have, old)
		f.order = f.order[1:]
	}
	return v, nil
}

// factorBytes is the memory of a change while a weight is merged: its factors, but for those that were seen, and two
// sums a row for each kept share.
func (w *Weight) factorBytes(seen map[*formats.Tensor]bool) int64 {
	var total int64
	for _, t := range w.contributors() {
		total += 16 * t.Rows
	}
	for i := range w.Change.Updates {
		t := &w.Change.Updates[i]
		tensors := []*formats.Tensor{t.Left.T, t.Right.T, t.Module.Magnitude}
		if t.Module.Form == lora.Rows {
			tensors = append(tensors, t.Module.Value)
		}
		tensors = append(tensors, t.Factor)
		for _, x := range t.Hadamard {
			tensors = append(tensors, x.Left.T, x.Right.T)
			total += 4 * max(w.Change.Width, chunk, x.Right.Cols) // other and row of mergeBuffers
		}
		if t.Waves != nil {
			total += t.Waves.Bytes()
		}
		if t.Transform != nil {
			total += t.Transform.Bytes(t.Cols)
		}
		for _, x := range tensors {
			if x != nil && !seen[x] {
				seen[x] = true
				total += 4 * x.Count()
			}
		}
	}
	return total
}

// loadUpdates reads the factors of a job's change.
func (r *run) loadUpdates(j *jobRun) error {
	mat := func(f lora.Matrix, rows, cols int64) (kernels.Mat, error) {
		if f.T == nil {
			return kernels.Mat{Data: []float32{1}, Rows: int(rows), Cols: int(cols)}, nil
		}
		v, err := r.factors.get(f.T)
		if err != nil {
			return kernels.Mat{}, err
		}
		return kernels.Mat{Data: v[f.Offset:], Rows: int(rows), Cols: int(cols), RowStride: int(f.RowStride),
			ColStride: int(f.ColStride)}, nil
	}
	for i := range j.weight.Change.Updates {
		t := &update{Update: &j.weight.Change.Updates[i]}
		var err error
		switch {
		case t.Module.Form == lora.Scale:
			if t.values, err = r.factors.get(t.Factor); err != nil {
				return err
			}
		case t.Transform != nil:
			if t.rowMap, err = t.Transform.Load(t.Cols); err != nil {
				return err
			}
		case t.Waves != nil:
			if t.waves, err = t.Waves.Load(); err != nil {
				return err
			}
		case t.Hadamard != nil:
			for _, h := range t.Hadamard {
				x, err := h.Load(func(m lora.Matrix) (kernels.Mat, error) { return mat(m, m.Rows, m.Cols) })
				if err != nil {
					return err
				}
				t.tiles = append(t.tiles, x)
			}
		case t.Module.Form == lora.Rows:
			if t.values, err = r.factors.get(t.Module.Value); err != nil {
				return err
			}
			t.rows = map[int64]int{}
			for k, row := range t.Module.Indices {
				t.rows[row] = k
			}
		default:
			if t.left, err = mat(t.Left, t.Rows, t.Rank); err != nil {
				return err
			}
			if t.right, err = mat(t.Right, t.Rank, t.Cols); err != nil {
				return err
			}
		}
		if t.Module.Magnitude != nil {
			v, err := r.factors.get(t.Module.Magnitude)
			if err != nil {
				return err
			}
			t.magnitude = slices.Clone(v)
		}
		j.updates = append(j.updates, t)
	}
	return nil
}

// prepared reports whether a job has to read its weight before it can begin: for the norms of DoRA, or to quantise it
// and back.
func (j *jobRun) prepared() bool {
	for _, p := range j.sources {
		if p.prepared() {
			return true
		}
	}
	if j.weight.Change == nil {
		return false
	}
	if j.RoundTrip != nil {
		return true
	}
	for i := range j.weight.Change.Updates {
		if j.weight.Change.Updates[i].Module.Magnitude != nil {
			return true
		}
	}
	return false
}

// mergeBuffers is the memory in which a worker merges.
type mergeBuffers struct {
	base, x, delta, out, total, before []float32
	other, row                         []float32   // of an element-wise product
	lines                              []float64   // of waves
	deltas                             [][]float32 // of contributors
	here                               []int       // which contributors those are
}

func floats(b *[]float32, n int) []float32 {
	if cap(*b) < n {
		*b = make([]float32, n)
	}
	return (*b)[:n]
}

// simple returns the update of a job where its change is one product that covers the whole weight, which has a kernel
// of its own.
func (j *jobRun) simple() *update {
	if j.inner || len(j.updates) != 1 || j.weight.Change.Value != nil || j.encoder != nil || !j.DType.Float() ||
		!j.onto().Values.Float() {
		return nil
	}
	t := j.updates[0]
	if !t.additive() || t.Cols != j.weight.Change.Width || t.Rows*t.Cols != j.weight.Count() {
		return nil
	}
	return t
}

var kernelFloat = map[tensor.DType]kernels.Float{tensor.F32: kernels.F32, tensor.F16: kernels.F16,
	tensor.BF16: kernels.BF16}

// chunk is how many elements of a delta are made at once: few enough to stay in a cache.
const chunk = 32 << 10

// merged returns the elements [lo, hi) of a job's weight with its change, in the job's DType. values has them as they
// were read.
func (r *run) merged(s *scratch, j *jobRun, lo, hi int64, values []byte) ([]byte, error) {
	to := j.DType
	out := sized(&s.cast, (hi-lo)*to.Bits()/8)
	width := j.weight.Change.Width
	if t := j.simple(); t != nil {
		rows := max(1, chunk/width)
		from, as := kernelFloat[j.onto().Values], kernelFloat[to]
		in, on := j.onto().Values.Bits()/8, to.Bits()/8
		for row := lo / width; row < hi/width; row += rows {
			end := min(row+rows, hi/width)
			delta := floats(&s.merge.delta, int((end-row)*width))
			t.product(&s.merge, delta, row, end, 0, width)
			for k := row; k < end; k++ {
				at := k*width - lo
				ed, dd := kernels.MergeRow(out[at*on:(at+width)*on], as, values[at*in:(at+width)*in], from,
					delta[(k-row)*width:(k-row+1)*width], t.Scale)
				j.shares[0].rows[k] = [2]float64{ed, dd}
			}
		}
		return out, nil
	}
	n := int(hi - lo)
	x := floats(&s.merge.x, n)
	if err := tensor.ToFloats(x, values, j.onto().Values); err != nil {
		return nil, err
	}
	if v := j.weight.Change.Value; v != nil {
		for i, f := range x {
			if !finite(f) {
				return nil, fmt.Errorf("%w: the value that the adapter's tensor %s gives it has %v at element %d, expected finite "+
					"numbers", lora.ErrMalformed, tensor.Quote(v.Name), f, lo+int64(i))
			}
		}
	}
	for _, t := range j.updates {
		j.apply(s, t, x, lo, hi)
	}
	return out, tensor.FromFloats(out, to, x)
}

// apply does what an update does to the elements [lo, hi).
func (j *jobRun) apply(s *scratch, t *update, x []float32, lo, hi int64) {
	width := j.weight.Change.Width
	for at := lo; at < hi; {
		row, col := at/width, at%width
		rows, cols := int64(1), min(width-col, hi-at)
		if col == 0 && hi-at >= width {
			rows, cols = min((hi-at)/width, max(1, chunk/width)), width
		}
		piece := x[at-lo : at-lo+rows*cols]
		at += rows * cols
		if t.Module.Form == lora.Rows {
			for k := range rows {
				if i, ok := t.rows[row+k]; ok {
					copy(piece[k*cols:(k+1)*cols], t.values[int64(i)*width+col:])
				}
			}
			continue
		}
		r0, r1 := max(row, t.Row), min(row+rows, t.Row+t.Rows)
		c0, c1 := max(col, t.Col), min(col+cols, t.Col+t.Cols)
		if r0 >= r1 || c0 >= c1 {
			continue
		}
		scale := t.Module.Form == lora.Scale
		delta := floats(&s.merge.delta, int((r1-r0)*(c1-c0)))
		if t.rowMap != nil { // tiles are of whole rows
			part := kernels.MatOf(piece, int(rows), int(cols)).Slice(int(r0-row), int(r1-row), int(c0-col), int(c1-col))
			t.rowMap.Apply(part, t.FirstOutput+r0-t.Row, delta)
			continue
		}
		if !scale {
			t.product(&s.merge, delta, r0-t.Row, r1-t.Row, c0-t.Col, c1-t.Col)
		}
		for k := r0; k < r1; k++ {
			dst := piece[(k-row)*cols+c0-col : (k-row)*cols+c1-col]
			if scale {
				t.multiply(dst, t.values, k, c0)
				continue
			}
			kernels.AddScaled(dst, dst, delta[(k-r0)*(c1-c0):(k-r0+1)*(c1-c0)], t.Scale)
			if t.magnitude != nil && j.ready {
				t.multiply(dst, t.magnitude, k, c0)
			}
		}
	}
}

// prepareOnce prepares a job that has to be, unless that is done: a source may be that of several jobs.
func (r *run) prepareOnce(ctx context.Context, s *scratch, j *jobRun) error {
	j.preparing.Lock()
	defer j.preparing.Unlock()
	if j.ready || !j.prepared() {
		return nil
	}
	return r.prepareMerge(ctx, s, j)
}

// prepareMerge quantises a job's weight and back, where its deltas go onto that, and finds the norms of DoRA.
func (r *run) prepareMerge(ctx context.Context, s *scratch, j *jobRun) error {
	if j.RoundTrip != nil {
		if err := r.goRoundTrip(ctx, s, j); err != nil {
			return err
		}
	}
	width := j.weight.Change.Width
	step := max(width, largestTile/4/width*width)
	for _, t := range j.updates {
		if t.magnitude == nil {
			continue
		}
		sums := make([]float64, len(t.magnitude))
		for lo := int64(0); lo < j.weight.Count(); lo += step {
			hi := min(lo+step, j.weight.Count())
			values, err := s.Read(j.onto().Weight, lo, hi, j.flip)
			if err != nil {
				return err
			}
			x := floats(&s.merge.x, int(hi-lo))
			if err := tensor.ToFloats(x, values, j.onto().Values); err != nil {
				return err
			}
			s.Begin()
			j.apply(s, t, x, lo, hi)
			t.addNorms(sums, x, lo, hi, width)
			s.End()
		}
		for i, sum := range sums {
			norm := float32(math.Sqrt(sum))
			if f := t.magnitude[i] / norm; norm > 0 && finite(f) {
				t.magnitude[i] = f
				continue
			}
			if i >= int(t.FirstOutput) && i < int(t.FirstOutput+t.outputs()) {
				return fmt.Errorf("module %s: %w: the norm of its output %d with the delta is %v, by which DoRA divides",
					tensor.Quote(t.Name), lora.ErrBase, i, norm)
			}
		}
	}
	j.ready = true
	return nil
}

// addNorms adds the squares of the elements [lo, hi) of a weight to the sums of an update's outputs.
func (t *update) addNorms(sums []float64, x []float32, lo, hi, width int64) {
	for k := max(lo/width, t.Row); k < min(hi/width, t.Row+t.Rows); k++ {
		row := x[k*width-lo+t.Col : k*width-lo+t.Col+t.Cols]
		if t.OutputRows {
			sums[t.FirstOutput+k-t.Row] += kernels.SquaredNorm(row)
			continue
		}
		for i, v := range row {
			sums[t.FirstOutput+int64(i)] += float64(float64(v) * float64(v))
		}
	}
}

// outputs is how many outputs of its module an update covers.
func (t *update) outputs() int64 {
	if t.OutputRows {
		return t.Rows
	}
	return t.Cols
}

func finite(x float32) bool { return !math.IsNaN(float64(x)) && !math.IsInf(float64(x), 0) }

// onto is the weight that a job's deltas go onto: its own, or what is left of that once quantised. Other workers may
// look at weight meanwhile, which stays.
func (j *jobRun) onto() *Weight {
	if j.low != nil {
		return j.low
	}
	return j.weight
}

// goRoundTrip finds what is left of a job's weight once quantised.
func (r *run) goRoundTrip(ctx context.Context, s *scratch, j *jobRun) error {
	scheme, err := r.from.Base.Schemes.ForType(j.RoundTrip.Type)
	if err != nil {
		return err
	}
	low, err := s.Quantized(ctx, j.weight.Weight, scheme, *j.RoundTrip)
	if err != nil {
		return err
	}
	j.low = &Weight{Weight: low, Change: j.weight.Change, base: low}
	return nil
}
