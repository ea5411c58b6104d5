package pipeline

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"unsafe"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// AdapterInput is an adapter that a plan merges, and the files it was read from.
type AdapterInput struct {
	Path   string      `json:"path"`
	Weight float64     `json:"weight"`
	Files  []InputFile `json:"files"`
}

// merging is what adapters do to a weight.
type merging struct {
	*lora.Change
	base *Weight // as it was, nil where the weight is new
}

// Merge makes the weights of c what they are with the adapters added, in their order. Nothing
// is read but headers; a plan made of c then adds the deltas on the way.
func (c *Checkpoint) Merge(adapters []lora.Weighted) error {
	targets := make([]lora.Target, len(c.Weights))
	for i, w := range c.Weights {
		targets[i] = lora.Target{Name: w.Name, Shape: w.Shape, Role: w.Role}
	}
	b, err := lora.Bind(adapters, targets, c.Model)
	if err != nil {
		return fmt.Errorf("%s: %w", c.Path, err)
	}
	for _, a := range adapters {
		in := AdapterInput{Path: a.Path, Weight: a.Weight}
		for _, name := range a.Files {
			path, err := storage.Within(a.Path, name)
			if err != nil {
				return err
			}
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			in.Files = append(in.Files, inputFile(name, info))
		}
		c.adapters = append(c.adapters, in)
	}
	weights := slices.Clone(c.Weights)
	for i, change := range b.Changes {
		if change != nil {
			weights[i] = c.changed(c.Weights[i], change)
		}
	}
	if b.Head != nil {
		from := *c.Weights[b.HeadFrom]
		from.Name = b.HeadName
		from.Role = c.Model.Tensor(b.HeadName, from.Shape)
		head := c.changed(&from, b.Head)
		weights = append(weights, head)
	}
	if b.Untie {
		c.untied = true
		for _, w := range weights {
			w.Role.Tied = ""
		}
	}
	c.Weights, c.mergeNotices = weights, b.Notices
	return nil
}

// changed is a weight with a change.
func (c *Checkpoint) changed(w *Weight, change *lora.Change) *Weight {
	n := *w
	n.merge = &merging{change, w}
	if v := change.Value; v != nil {
		n.Parts, n.Decoder, n.Values, n.Transposed = []formats.Tensor{*v}, nil, v.DType, false
		n.Shape = v.Shape
		if len(v.Shape) == 2 && v.Shape[0] != w.Shape[0] {
			c.vocabulary = v.Shape[0]
		}
	}
	return &n
}

// transposed is the change of a weight of the given shape that is turned round before it
// is written.
func (m *merging) transposed(shape tensor.Shape) *merging {
	c := *m.Change
	c.Width = shape[0]
	c.Terms = slices.Clone(m.Terms)
	for i := range c.Terms {
		t := &c.Terms[i]
		t.Row, t.Rows, t.Col, t.Cols = t.Col, t.Cols, t.Row, t.Rows
		t.Left, t.Right = t.Right.Transposed(), t.Left.Transposed()
		t.OutputRows = !t.OutputRows
	}
	return &merging{&c, m.base}
}

// term is a part of a change, with its factors in memory.
type term struct {
	*lora.Term
	left, right kernels.Mat
	magnitude   []float32 // of DoRA: magnitude / norm, once the norms are known
	values      []float32 // of Rows
	rows        map[int64]int
}

// factors keeps what was last read of adapters, for the experts that share one tensor.
type factors struct {
	have  map[*formats.Tensor][]float32
	order []*formats.Tensor
	size  int64
}

const keptFactors = 32 << 20

func (f *factors) get(t *formats.Tensor) ([]float32, error) {
	if v, ok := f.have[t]; ok {
		return v, nil
	}
	v, err := lora.Floats(t)
	if err != nil {
		return nil, err
	}
	if f.have == nil {
		f.have = map[*formats.Tensor][]float32{}
	}
	f.have[t] = v
	f.order = append(f.order, t)
	f.size += 4 * int64(len(v))
	for f.size > keptFactors && len(f.order) > 1 {
		old := f.order[0]
		f.size -= 4 * int64(len(f.have[old]))
		delete(f.have, old)
		f.order = f.order[1:]
	}
	return v, nil
}

// loadTerms reads the factors of a job's change.
func (r *run) loadTerms(j *jobRun) error {
	mat := func(f lora.Factor, rows, cols int64) (kernels.Mat, error) {
		if f.T == nil {
			ones := make([]float32, 1)
			ones[0] = 1
			return kernels.Mat{Data: ones, Rows: int(rows), Cols: int(cols)}, nil
		}
		v, err := r.factors.get(f.T)
		if err != nil {
			return kernels.Mat{}, err
		}
		return kernels.Mat{Data: v[f.Offset:], Rows: int(rows), Cols: int(cols), RowStride: int(f.RowStride), ColStride: int(f.ColStride)}, nil
	}
	for i := range j.weight.merge.Terms {
		t := &term{Term: &j.weight.merge.Terms[i]}
		var err error
		if t.Module.Form == lora.Rows {
			if t.values, err = r.factors.get(t.Module.B); err != nil {
				return err
			}
			t.rows = map[int64]int{}
			for k, row := range t.Module.Indices {
				t.rows[row] = k
			}
		} else {
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
		j.terms = append(j.terms, t)
	}
	return nil
}

// contributors are what a kept share is measured for: the new value, then the terms.
func (m *merging) contributors() []*lora.Term {
	var list []*lora.Term
	if m.ValueOf != nil {
		list = append(list, m.ValueOf)
	}
	for i := range m.Terms {
		list = append(list, &m.Terms[i])
	}
	return list
}

// prepared reports whether a job has to read its weight before it can begin: for
// the norms of DoRA, or to quantise it and back.
func (j *jobRun) prepared() bool {
	if j.weight.merge == nil {
		return false
	}
	if j.Through != nil {
		return true
	}
	for i := range j.weight.merge.Terms {
		if j.weight.merge.Terms[i].Module.Magnitude != nil {
			return true
		}
	}
	return false
}

// mergeBuffers is the memory in which a worker merges.
type mergeBuffers struct{ base, x, delta, out, total []float32 }

func floats(b *[]float32, n int) []float32 {
	if cap(*b) < n {
		*b = make([]float32, n)
	}
	return (*b)[:n]
}

// littleEndian is whether float32 numbers lie in memory as they do in a file.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// bytesOf returns the memory of numbers.
func bytesOf(x []float32) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(x))), 4*len(x))
}

// toFloats converts stored numbers.
func toFloats(dst []float32, values []byte, d tensor.DType) error {
	if err := tensor.Convert(bytesOf(dst), tensor.F32, values, d); err != nil || littleEndian {
		return err
	}
	for i := range dst {
		dst[i] = math.Float32frombits(bits.ReverseBytes32(math.Float32bits(dst[i])))
	}
	return nil
}

// fromFloats converts numbers to what is stored. It uses x up.
func fromFloats(dst []byte, d tensor.DType, x []float32) error {
	if !littleEndian {
		for i := range x {
			x[i] = math.Float32frombits(bits.ReverseBytes32(math.Float32bits(x[i])))
		}
	}
	return tensor.Convert(dst, d, bytesOf(x), tensor.F32)
}

// simple returns the term of a job where its change is one product that covers the
// whole weight, which has a kernel of its own.
func (j *jobRun) simple() *term {
	if len(j.terms) != 1 || j.weight.merge.Value != nil || j.encoder != nil || !j.DType.Float() || !j.weight.Values.Float() {
		return nil
	}
	t := j.terms[0]
	if t.magnitude != nil || t.Module.Form == lora.Rows || t.Cols != j.weight.merge.Width || t.Rows*t.Cols != j.weight.Count() {
		return nil
	}
	return t
}

var kernelFloat = map[tensor.DType]kernels.Float{tensor.F32: kernels.F32, tensor.F16: kernels.F16, tensor.BF16: kernels.BF16}

// merged returns the elements [lo, hi) of a job's weight with its change, in the job's
// DType. values has them as they were read.
func (r *run) merged(s *scratch, j *jobRun, lo, hi int64, values []byte) ([]byte, error) {
	to := j.DType
	out := sized(&s.cast, (hi-lo)*to.Bits()/8)
	width := j.weight.merge.Width
	if t := j.simple(); t != nil {
		const chunk = 32 << 10 // elements whose delta stays in the cache
		rows := max(1, chunk/width)
		in, on := j.weight.Values.Bits()/8, to.Bits()/8
		for row := lo / width; row < hi/width; row += rows {
			end := min(row+rows, hi/width)
			delta := floats(&s.merge.delta, int((end-row)*width))
			clear(delta)
			kernels.MulAdd(kernels.MatOf(delta, int(end-row), int(width)), t.left.Slice(int(row), int(end), 0, int(t.Rank)), t.right)
			for k := row; k < end; k++ {
				at := k*width - lo
				ed, dd := kernels.MergeRow(out[at*on:(at+width)*on], kernelFloat[to], values[at*in:(at+width)*in], kernelFloat[j.weight.Values],
					delta[(k-row)*width:(k-row+1)*width], t.Scale)
				j.shares[0].rows[k] = [2]float64{ed, dd}
			}
		}
		return out, nil
	}
	n := int(hi - lo)
	x := floats(&s.merge.x, n)
	if err := toFloats(x, values, j.weight.Values); err != nil {
		return nil, err
	}
	if v := j.weight.merge.Value; v != nil {
		for i, f := range x {
			if !finite(f) {
				return nil, fmt.Errorf("%w: the value that the adapter's tensor %s gives it has %v at element %d, expected finite numbers", lora.ErrMalformed, tensor.Quote(v.Name), f, lo+int64(i))
			}
		}
	}
	for _, t := range j.terms {
		j.apply(s, t, x, lo, hi)
	}
	return out, fromFloats(out, to, x)
}

// apply does what a term does to the elements [lo, hi).
func (j *jobRun) apply(s *scratch, t *term, x []float32, lo, hi int64) {
	width := j.weight.merge.Width
	const chunk = 32 << 10
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
		delta := floats(&s.merge.delta, int((r1-r0)*(c1-c0)))
		clear(delta)
		kernels.MulAdd(kernels.MatOf(delta, int(r1-r0), int(c1-c0)),
			t.left.Slice(int(r0-t.Row), int(r1-t.Row), 0, int(t.Rank)), t.right.Slice(0, int(t.Rank), int(c0-t.Col), int(c1-t.Col)))
		for k := r0; k < r1; k++ {
			dst := piece[(k-row)*cols+c0-col : (k-row)*cols+c1-col]
			kernels.AddScaled(dst, dst, delta[(k-r0)*(c1-c0):(k-r0+1)*(c1-c0)], t.Scale)
			switch {
			case t.magnitude == nil || !j.ready:
			case t.OutputRows:
				f := t.magnitude[t.FirstOutput+k-t.Row]
				for i := range dst {
					dst[i] *= f
				}
			default:
				f := t.magnitude[t.FirstOutput+c0-t.Col:]
				for i := range dst {
					dst[i] *= f[i]
				}
			}
		}
	}
}

// prepareMerge quantises a job's weight and back, where its deltas go onto that, and finds
// the norms of DoRA.
func (r *run) prepareMerge(s *scratch, j *jobRun) error {
	if j.Through != nil {
		if err := through(s, j); err != nil {
			return err
		}
	}
	width := j.weight.merge.Width
	step := max(width, largestTile/4/width*width)
	for _, t := range j.terms {
		if t.magnitude == nil {
			continue
		}
		sums := make([]float64, len(t.magnitude))
		for lo := int64(0); lo < j.weight.Count(); lo += step {
			hi := min(lo+step, j.weight.Count())
			values, err := j.weight.read(s, lo, hi, j.flip)
			if err != nil {
				return err
			}
			x := floats(&s.merge.x, int(hi-lo))
			if err := toFloats(x, values, j.weight.Values); err != nil {
				return err
			}
			j.apply(s, t, x, lo, hi)
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
		for i, sum := range sums {
			norm := float32(math.Sqrt(sum))
			if f := t.magnitude[i] / norm; norm > 0 && finite(f) {
				t.magnitude[i] = f
				continue
			}
			if i >= int(t.FirstOutput) && i < int(t.FirstOutput+t.outputs()) {
				return fmt.Errorf("module %s: %w: the norm of its output %d with the delta is %v, by which DoRA divides", tensor.Quote(t.Name), lora.ErrBase, i, norm)
			}
		}
	}
	j.ready = true
	return nil
}

// outputs is how many outputs of its module a term covers.
func (t *term) outputs() int64 {
	if t.OutputRows {
		return t.Rows
	}
	return t.Cols
}

func finite(x float32) bool { return !math.IsNaN(float64(x)) && !math.IsInf(float64(x), 0) }

// storedParts lets a scheme read what an encoder has just written.
type storedParts struct {
	infos []tensor.Info
	read  func(part int, p []byte, off int64) error
}

func (p *storedParts) Lookup(name string) (tensor.Info, bool) {
	for _, t := range p.infos {
		if t.Name == name {
			return t, true
		}
	}
	return tensor.Info{}, false
}

func (p *storedParts) Read(name string, b []byte, off int64) error {
	for i, t := range p.infos {
		if t.Name == name {
			return p.read(i, b, off)
		}
	}
	return fmt.Errorf("no tensor %q", name)
}

// decoded finds the decoder of the parts and makes a weight of them.
func decoded(like *Weight, typ string, parts []formats.Tensor) (*Weight, error) {
	scheme, err := quant.ForType(typ)
	if err != nil {
		return nil, err
	}
	st := &storedParts{read: func(i int, b []byte, off int64) error { return readPart(&parts[i], b, off) }}
	var names []string
	for _, p := range parts {
		st.infos = append(st.infos, p.Info)
		names = append(names, p.Name)
	}
	d, err := scheme.Find(names, st, like.DType)
	if err != nil {
		return nil, err
	}
	if len(d) != 1 {
		return nil, fmt.Errorf("%w: the quantised form of %s is not read back", quant.ErrMalformed, tensor.Quote(like.Name))
	}
	w := *like
	w.Decoder, w.Values, w.Parts = d[0], d[0].Values(), nil
	w.Shape = d[0].Info().Shape
	for _, name := range d[0].Parts() {
		i := slices.IndexFunc(parts, func(p formats.Tensor) bool { return p.Name == name })
		w.Parts = append(w.Parts, parts[i])
	}
	return &w, nil
}

// through replaces a job's weight by what is left of it once quantised.
func through(s *scratch, j *jobRun) error {
	low, err := quantizedAndBack(s, j.weight, *j.Through)
	if err != nil {
		return err
	}
	low.merge = &merging{j.weight.merge.Change, low}
	j.weight = low
	return nil
}

// quantizedAndBack returns a weight as it is once it has been quantised. The quantised form is
// held in memory.
func quantizedAndBack(s *scratch, w *Weight, spec quant.Spec) (*Weight, error) {
	scheme, err := quant.ForType(spec.Type)
	if err != nil {
		return nil, err
	}
	flip := (&Job{Encode: &spec}).flips(w)
	info := tensor.Info{Name: w.Name, DType: w.Values, Shape: w.Shape}
	if flip {
		info.Shape = transposed(w.Shape)
	}
	e, err := scheme.Encoder(spec, info)
	if err != nil {
		return nil, err
	}
	bufs := make([][]byte, len(e.Outputs()))
	parts := make([]formats.Tensor, len(bufs))
	for i, o := range e.Outputs() {
		size, err := o.Size()
		if err != nil {
			return nil, err
		}
		bufs[i] = make([]byte, size)
		parts[i] = formats.Tensor{Info: o, File: w.Parts[0].File, Data: bytes.NewReader(bufs[i]), Bytes: size}
	}
	n := w.Count()
	held := &carry{floats: make([]float32, e.Carry(0, n))}
	step := max(largestTile/e.Unit()*e.Unit()/4, e.Unit())
	for lo := int64(0); lo < n; lo += step {
		hi := min(lo+step, n)
		values, err := w.read(s, lo, hi, flip)
		if err != nil {
			return nil, err
		}
		var views [][]byte
		for _, x := range e.Tiles(nil, lo, hi) {
			views = append(views, bufs[x.Part][x.Offset:x.Offset+x.Length])
		}
		if err := e.Encode(views, held.tile(s, lo/e.Unit(), e.Carry(lo, hi)), lo, hi, values); err != nil {
			return nil, err
		}
	}
	if err := e.Finish(held, func(part int, off int64, p []byte) error { copy(bufs[part][off:], p); return nil }); err != nil {
		return nil, err
	}
	low, err := decoded(w, spec.Type, parts)
	if err != nil {
		return nil, err
	}
	if low.Transposed = flip; flip {
		low.Shape = w.Shape
	}
	return low, nil
}

// Quantized returns a weight as it is once it has gone through the quantisation and
// back.
func Quantized(w *Weight, spec quant.Spec) (*Weight, error) {
	low, err := quantizedAndBack(&scratch{compute: make(chan struct{}, 1)}, w, spec)
	if err != nil {
		return nil, w.failed(err)
	}
	return low, nil
}

// share is what is kept of one contributor to a weight, by row.
type share struct {
	rows [][2]float64
}

// measure compares what a job has written with what it was to write: the kept share of
// every contributor. The order of all sums is that of the rows.
func (r *run) measure(s *scratch, j *jobRun) error {
	m := j.weight.merge
	list := m.contributors()
	width, n := m.Width, j.weight.Count()
	out := *j.weight
	out.merge, out.Decoder, out.DType, out.Values, out.Transposed = nil, nil, j.DType, j.DType, false
	parts := make([]formats.Tensor, len(j.Outputs))
	for i, o := range j.Outputs {
		size, err := o.Size()
		if err != nil {
			return err
		}
		parts[i] = formats.Tensor{Info: o.Info, File: j.shard.Name, Data: j.shard.file, Offset: o.Offset, Bytes: size}
	}
	out.Parts = parts
	if j.Encode != nil {
		w, err := decoded(&out, j.Encode.Type, parts)
		if err != nil {
			return err
		}
		if w.Transposed = j.flip; j.flip {
			w.Shape = j.weight.Shape
		}
		out = *w
	}
	base := m.base
	if base == nil || !slices.Equal(base.Shape, j.weight.Shape) {
		base = nil // a grown vocabulary has nothing to be compared with
	}
	return measured(s, j, base, &out, list, width, n)
}

// measured fills a job's shares from what is written and what was there.
func measured(s *scratch, j *jobRun, base, out *Weight, list []*lora.Term, width, n int64) error {
	step := max(1, (64<<10)/width)
	own := &scratch{compute: s.compute}
	fill := func(w *Weight, dst []float32, lo, hi int64) error {
		values, err := w.read(own, lo, hi, j.flip)
		if err != nil {
			return err
		}
		return toFloats(dst, values, w.Values)
	}
	deltas := make([][]float32, len(list))
	var before []float32
	one := len(j.terms) == 1 && j.weight.merge.ValueOf == nil && j.terms[0].magnitude == nil && j.terms[0].Module.Form != lora.Rows
	for row := int64(0); row < n/width; row += step {
		end := min(row+step, n/width)
		lo, hi := row*width, end*width
		size := int(hi - lo)
		x, o, b, total := floats(&s.merge.x, size), floats(&s.merge.out, size), floats(&s.merge.base, size), floats(&s.merge.total, size)
		if err := fill(out, o, lo, hi); err != nil {
			return err
		}
		from := base
		if from == nil {
			from = j.weight
		}
		if err := fill(from, b, lo, hi); err != nil {
			return err
		}
		if one { // the delta itself, not what float32 leaves of it in a sum
			clear(x)
			s.begin()
			j.apply(s, j.terms[0], x, lo, hi)
			for k := row; k < end; k++ {
				p, q := (k-row)*width, (k-row+1)*width
				ed, dd := kernels.Kept(o[p:q], b[p:q], x[p:q], x[p:q])
				j.shares[0].rows[k] = [2]float64{ed, dd}
			}
			s.end()
			continue
		}
		copy(x, b)
		clear(total)
		at := 0
		note := func() {
			d := floats(&deltas[at], size)
			for i := range d {
				d[i] = x[i] - before[i]
				total[i] += d[i]
			}
			at++
		}
		before = floats(&before, size)
		if j.weight.merge.ValueOf != nil {
			copy(before, x)
			if err := fill(j.weight, x, lo, hi); err != nil {
				return err
			}
			note()
		}
		for _, t := range j.terms {
			copy(before, x)
			j.apply(s, t, x, lo, hi)
			note()
		}
		for k := row; k < end; k++ {
			p, q := (k-row)*width, (k-row+1)*width
			for i := range deltas {
				ed, dd := kernels.Kept(o[p:q], b[p:q], total[p:q], deltas[i][p:q])
				j.shares[i].rows[k] = [2]float64{ed, dd}
			}
		}
	}
	return nil
}

// KeptModule is what is left of an adapter in one module.
type KeptModule struct {
	Name string `json:"name"`
	// Kept is <realised, delta> / <delta, delta>: 1 is all of it.
	Kept  float64 `json:"kept"`
	Delta float64 `json:"delta_norm"` // the Frobenius norm

	error, square float64
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

// keptShares sums the shares of all jobs up.
func keptShares(adapters []AdapterInput, jobs []*jobRun) []KeptAdapter {
	out := make([]KeptAdapter, len(adapters))
	index := make([]map[string]int, len(adapters))
	for i, a := range adapters {
		out[i] = KeptAdapter{Path: a.Path, Unused: []string{}, Modules: []KeptModule{}}
		index[i] = map[string]int{}
	}
	for _, j := range jobs {
		for k, t := range j.weight.merge.contributors() {
			a := &out[t.Adapter]
			at, ok := index[t.Adapter][t.Name]
			if !ok {
				at = len(a.Modules)
				index[t.Adapter][t.Name] = at
				a.Modules = append(a.Modules, KeptModule{Name: t.Name})
			}
			for _, row := range j.shares[k].rows {
				a.Modules[at].error += row[0]
				a.Modules[at].square += row[1]
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

// Short lists the modules whose kept share is below min.
func Short(adapters []KeptAdapter, least float64) []KeptModule {
	var list []KeptModule
	for _, a := range adapters {
		for _, m := range a.Modules {
			if !(m.Kept >= least) {
				list = append(list, m)
			}
		}
	}
	return list
}

// beginMerge reads the factors of a job's change, and makes room for its shares.
func (r *run) beginMerge(j *jobRun) error {
	if j.weight.merge == nil {
		return nil
	}
	if err := r.loadTerms(j); err != nil {
		return err
	}
	rows := j.weight.Count() / max(j.weight.merge.Width, 1)
	for range j.weight.merge.contributors() {
		j.shares = append(j.shares, share{make([][2]float64, rows)})
	}
	r.merges = append(r.merges, j)
	return nil
}

// finishMerge finds out what was kept of a job's change.
func (r *run) finishMerge(j *jobRun) error {
	if j.simple() == nil {
		if err := r.measure(&scratch{compute: r.compute}, j); err != nil {
			return err
		}
	}
	for i := range j.shares { // rows are many, and their sums have one order
		var e, d float64
		for _, row := range j.shares[i].rows {
			e += row[0]
			d += row[1]
		}
		j.shares[i].rows = [][2]float64{{e, d}}
	}
	j.terms = nil
	return nil
}

// remeasure finds the kept shares in a shard that an earlier run has finished.
func (r *run) remeasure(sh *shardRun) error {
	for k := range sh.Jobs {
		if r.weights[sh.Jobs[k].Weight].merge == nil {
			continue
		}
		j, err := r.newJob(&sh.Jobs[k], sh)
		if err != nil {
			return err
		}
		if sh.file == nil {
			if sh.file, err = os.Open(filepath.Join(r.stage.out(), filepath.FromSlash(sh.Name))); err != nil {
				return err
			}
		}
		if err := r.beginMerge(j); err != nil {
			return j.weight.failed(err)
		}
		s := &scratch{compute: r.compute}
		if j.prepared() {
			if err := r.prepareMerge(s, j); err != nil {
				return j.weight.failed(err)
			}
		}
		if err := r.measure(s, j); err != nil {
			return j.weight.failed(err)
		}
	}
	return nil
}

// checkKept refuses a result that has lost an adapter.
func (r *run) checkKept() error {
	if len(r.plan.Adapters) == 0 {
		return nil
	}
	r.shares = keptShares(r.plan.Adapters, r.merges)
	short := Short(r.shares, r.opts.MinKept)
	if r.opts.MinKept <= 0 || len(short) == 0 {
		return nil
	}
	least := short[0]
	for _, m := range short {
		if math.IsNaN(m.Kept) {
			return fmt.Errorf("%w: module %s: its kept share is not a number, since the base or the result holds NaN or infinity; lorakit verify names the tensor", ErrLost, tensor.Quote(m.Name))
		}
		if m.Kept < least.Kept {
			least = m
		}
	}
	return fmt.Errorf("%w: kept share of %s is %.4f, expected at least %g (%s below it); write 16 bit (--quantize none) or int8, or leave the 4-bit base as it is with the adapter beside it; --min-kept 0 writes it all the same",
		ErrLost, tensor.Quote(least.Name), least.Kept, r.opts.MinKept, plural(len(short), "module"))
}

// ErrLost says that a merge would lose an adapter, or a part of one.
var ErrLost = errors.New("the adapter would be lost")

// MergeVerification says what is kept of adapters in a merge.
type MergeVerification struct {
	Adapters []KeptAdapter `json:"adapters"`
}

// Short lists the modules whose kept share is below least.
func (v *MergeVerification) Short(least float64) []KeptModule { return Short(v.Adapters, least) }

// VerifyMerge measures what of c's adapters is in out, a merge that anyone has made.
func VerifyMerge(ctx context.Context, c, out *Checkpoint) (*MergeVerification, error) {
	r := &run{checkpoint: c, compute: make(chan struct{}, 1)}
	byName, byParam := map[string]*Weight{}, map[string]*Weight{}
	for _, w := range out.Weights {
		byName[w.Name] = w
		if s := w.Role.Runtime; len(s) == 1 && s[0].Whole() {
			byParam[s[0].Param] = w
		}
	}
	s := &scratch{compute: r.compute}
	for _, w := range c.Weights {
		if w.merge == nil {
			continue
		}
		if ctx.Err() != nil {
			return nil, ErrInterrupted
		}
		o := byName[w.Name]
		if rt := w.Role.Runtime; o == nil && len(rt) == 1 && rt[0].Whole() {
			o = byParam[rt[0].Param]
		}
		if o == nil {
			return nil, fmt.Errorf("%s: %w: there is no tensor %s, which the adapter changes", out.Path, ErrRefused, tensor.Quote(w.Name))
		}
		if !slices.Equal(o.Shape, w.Shape) {
			return nil, o.failed(fmt.Errorf("%w: its shape is %v, expected %v", ErrRefused, o.Shape, w.Shape))
		}
		j := &jobRun{Job: &Job{Weight: w.Name, DType: w.DType}, weight: w}
		if err := r.beginMerge(j); err != nil {
			return nil, w.failed(err)
		}
		if j.prepared() {
			if err := r.prepareMerge(s, j); err != nil {
				return nil, w.failed(err)
			}
		}
		base := w.merge.base
		if !slices.Equal(base.Shape, w.Shape) {
			base = nil
		}
		if err := measured(s, j, base, o, w.merge.contributors(), w.merge.Width, w.Count()); err != nil {
			return nil, o.failed(err)
		}
	}
	return &MergeVerification{keptShares(c.adapters, r.merges)}, nil
}
