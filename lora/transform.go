package lora

import (
	"fmt"
	"math"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// Transform is what a module of a multiplicative method makes of its weight, as a matrix (outputs x inputs): each row
// of it becomes another one, for which the row and the adapter are enough.
type Transform interface {
	// Fit reports whether the transform is for a weight of such a size, as an error that says why not.
	Fit(outputs, inputs int64) error
	// Bytes is the memory that Load takes for a weight with so many inputs at most.
	Bytes(inputs int64) int64
	// Load reads the adapter's tensors, for a weight with so many inputs.
	Load(inputs int64) (RowMap, error)
	// Inverse undoes the transform. An error says that nothing does, or why it is not known.
	Inverse() (Transform, error)
}

// RowMap is a Transform with its factors in memory. It is used by several goroutines at once.
type RowMap interface {
	// Apply transforms rows in place, of which the first is the weight's row first. room has as many elements.
	Apply(rows kernels.Mat, first int64, room []float32)
}

// targeted reports whether a config's target_modules has to mean a module.
func (m *Module) targeted() bool {
	return m.A.T != nil || m.Form == Scale || m.Form == Transformed || m.selectedAs != ""
}

// transformed is a module that transforms its weight.
func transformed(name string, main *formats.Tensor, by Transform) *Module {
	return &Module{Name: name, Param: "weight", Form: Transformed, Value: main, Transform: by}
}

// transform binds a module that transforms its weight.
func (b *binder) transform(a Weighted, t Update, s spot) error {
	m, p := t.Module, s.p
	what, weight := a.Config.PeftType, a.Weight
	if m.inverted {
		weight = -weight // as the others are that are taken out
	}
	if weight != 1 {
		return fmt.Errorf("module %s: %w: %s with the weight %g, expected 1", tensor.Quote(m.Name), ErrUnsupported,
			what, weight)
	}
	misfit := func(err error) error {
		return fmt.Errorf("module %s: %w; it does not fit %s of shape %v", tensor.Quote(m.Name), err,
			tensor.Quote(p.name), p.shape)
	}
	_, ofEmbedding := m.Transform.(*oftTransform)
	ofEmbedding = ofEmbedding && m.Transform.(*oftTransform).embedding
	switch n := len(p.shape); {
	case p.kind == models.Conv1D:
		return fmt.Errorf("module %s: %w: %s on a Conv1D, which PEFT has not", tensor.Quote(m.Name), ErrUnsupported,
			what)
	case p.experts > 0 && s.expert < 0, n != 2 && n != 4, n == 4 && (p.shape[2] != p.shape[3] || ofEmbedding):
		return misfit(fmt.Errorf("%w: %s is for linear layers, and convolutions with square kernels", ErrBase, what))
	case ofEmbedding && (p.kind == models.Linear || b.isHead(p)), !ofEmbedding && p.kind == models.Embedding:
		return misfit(fmt.Errorf("%w: its tensor %s is none for a parameter of kind %s", ErrBase,
			tensor.Quote(m.Value.Name), p.kind))
	}
	_, rows := s.rows()
	cols := int64(1)
	for _, d := range p.shape[1:] {
		cols *= d
	}
	if err := m.Transform.Fit(rows, cols); err != nil {
		return misfit(err)
	}
	if what == oft && len(p.shape) == 4 && p.shape[2] > 1 {
		b.out.Notices = append(b.out.Notices, fmt.Sprintf("%s: on a convolution with a kernel of %d x %d, what PEFT "+
			"computes beside the base is not what it merges; the merge is PEFT's", m.Name, p.shape[2], p.shape[3]))
	}
	for _, pc := range p.pieces {
		if x := pc.slice; x.Transposed || x.Parts > 1 && x.Dim != 0 {
			return fmt.Errorf("module %s: %w: %s on a weight that its file holds transposed, or cuts across its inputs",
				tensor.Quote(m.Name), ErrUnsupported, what)
		}
	}
	t.Transform, t.OutputRows = m.Transform, true
	b.changeMatrix(t, s, rows, cols)
	return nil
}

// blockProduct multiplies rows, in blocks of equal size, with a matrix for each block, or one for all.
type blockProduct struct {
	size   int
	blocks []float32 // one after the other, each by rows
	// order, where not nil, says where each element of a row stands before it is multiplied; after it, all go back.
	order []int32
}

// Apply multiplies rows.
func (x *blockProduct) Apply(rows kernels.Mat, _ int64, room []float32) {
	was := kernels.MatOf(room[:rows.Rows*rows.Cols], rows.Rows, rows.Cols)
	for i := range rows.Rows {
		row, to := rows.Data[i*rows.RowStride:][:rows.Cols], was.Data[i*was.RowStride:][:rows.Cols]
		if x.order == nil {
			copy(to, row)
		}
		for k, at := range x.order {
			to[at] = row[k]
		}
		clear(row)
	}
	square := x.size * x.size
	for k := range rows.Cols / x.size {
		block := kernels.MatOf(x.blocks[k*square%len(x.blocks):][:square], x.size, x.size)
		lo, hi := k*x.size, (k+1)*x.size
		kernels.MulAdd(rows.Slice(0, rows.Rows, lo, hi), was.Slice(0, rows.Rows, lo, hi), block)
	}
	for i := 0; i < rows.Rows && x.order != nil; i++ {
		row, from := rows.Data[i*rows.RowStride:][:rows.Cols], was.Data[i*was.RowStride:][:rows.Cols]
		copy(from, row)
		for k, at := range x.order {
			row[k] = from[at]
		}
	}
}

// rowMaps are transforms one after the other.
type rowMaps []RowMap

// Apply transforms rows.
func (x rowMaps) Apply(rows kernels.Mat, first int64, room []float32) {
	for _, m := range x {
		m.Apply(rows, first, room)
	}
}

// rowScales multiplies each row with a factor.
type rowScales []float32

// Apply multiplies rows.
func (x rowScales) Apply(rows kernels.Mat, first int64, _ []float32) {
	for i := range rows.Rows {
		row, f := rows.Data[i*rows.RowStride:][:rows.Cols], x[first+int64(i)]
		for j := range row {
			row[j] *= f
		}
	}
}

// The arithmetic from here on is in float64, with a conversion around each product that is added to something: without
// it compilers may fuse both, and the bytes would be those of a machine.

// inverse inverts a matrix (n x n, by rows) in place, by Gauss-Jordan elimination with row pivots. It reports whether
// the matrix has an inverse that is known to some digits.
func inverse(a []float64, n int) bool {
	largest := 0.0
	for _, x := range a {
		largest = max(largest, math.Abs(x))
	}
	if largest-largest != 0 {
		return false
	}
	swaps := make([]int, n)
	for k := range n {
		best := k
		for i := k + 1; i < n; i++ {
			if math.Abs(a[i*n+k]) > math.Abs(a[best*n+k]) {
				best = i
			}
		}
		swaps[k] = best
		pivot := a[best*n+k]
		if !(math.Abs(pivot) > 1e-7*largest) {
			return false
		}
		if best != k {
			x, y := a[k*n:][:n], a[best*n:][:n]
			for j := range x {
				x[j], y[j] = y[j], x[j]
			}
		}
		row := a[k*n:][:n]
		row[k] = 1
		for j := range row {
			row[j] /= pivot
		}
		for i := range n {
			if i == k {
				continue
			}
			other := a[i*n:][:n]
			f := other[k]
			other[k] = 0
			for j, x := range row {
				other[j] -= float64(f * x)
			}
		}
	}
	for k := n - 1; k >= 0; k-- {
		if s := swaps[k]; s != k {
			for i := range n {
				a[i*n+k], a[i*n+s] = a[i*n+s], a[i*n+k]
			}
		}
	}
	return !slices.ContainsFunc(a, func(x float64) bool { return x-x != 0 })
}

// cayley makes (I - Q)(I + Q)^-1 of a skew-symmetric Q (n x n), in place: 2(I + Q)^-1 - I, which is orthogonal.
func cayley(q []float64, n int) bool {
	for i := range n {
		q[i*n+i]++
	}
	if !inverse(q, n) {
		return false
	}
	for i := range q {
		q[i] *= 2
	}
	for i := range n {
		q[i*n+i]--
	}
	return true
}

// narrowed puts a square matrix, or its transpose, into float32. It reports whether all of it is finite there.
func narrowed(dst []float32, src []float64, n int, turned bool) bool {
	for i := range n {
		for j := range n {
			x := float32(src[i*n+j])
			if x-x != 0 {
				return false
			}
			if turned {
				dst[j*n+i] = x
			} else {
				dst[i*n+j] = x
			}
		}
	}
	return true
}
