package checkpoint

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"slices"

	"github.com/lorakit/lorakit/internal/parallel"
	"github.com/lorakit/lorakit/tensor"
)

// Difference says how far two weights of one name are apart.
type Difference struct {
	Name  string       `json:"name"`
	Shape tensor.Shape `json:"shape"`
	// MaxAbs is the largest |a-b|; RelRMS the root of sum (a-b)^2 / sum a^2. NaNs in the same places are no difference;
	// one beside a number makes both infinite.
	MaxAbs float64 `json:"max_abs"`
	RelRMS float64 `json:"rel_rms"`
}

// Comparison is what Compare finds.
type Comparison struct {
	Tensors []Difference `json:"tensors"`
	MaxAbs  float64      `json:"max_abs"` // over all tensors
	RelRMS  float64      `json:"rel_rms"`
	// Missing are in a, and not in b; Extra are in b, and not in a. What belongs to a scheme alone is in neither.
	Missing []string `json:"missing"`
	Extra   []string `json:"extra"`
	// Reshaped are in both with another shape.
	Reshaped []string `json:"reshaped,omitempty"`
}

// Compare reads both checkpoints through their formats and schemes and compares them weight by weight, so that a
// quantised one can be held against its source. Sums are in float64, in the order of the elements.
func Compare(ctx context.Context, a, b *Checkpoint) (*Comparison, error) {
	others := make(map[string]*Weight, len(b.Weights))
	for _, w := range b.Weights {
		others[w.Name] = w
	}
	r := &Comparison{Tensors: []Difference{}, Missing: []string{}, Extra: []string{}}
	type found struct {
		Difference
		diff, norm length
	}
	var pairs [][2]*Weight
	for _, w := range a.Weights {
		o, ok := others[w.Name]
		if !ok {
			if !w.Calibration {
				r.Missing = append(r.Missing, w.Name)
			}
			continue
		}
		delete(others, w.Name)
		if !slices.Equal(w.Shape, o.Shape) {
			r.Reshaped = append(r.Reshaped, fmt.Sprintf("%s %v %v", w.Name, w.Shape, o.Shape))
			continue
		}
		pairs = append(pairs, [2]*Weight{w, o})
	}
	all := make([]found, len(pairs))
	err := parallel.Each(ctx, len(pairs), 0, func(ctx context.Context, i int) (err error) {
		f, p := &all[i], pairs[i]
		if f.Difference, f.diff, f.norm, err = compareWeights(ctx, p[0], p[1]); err != nil {
			return p[0].Failed(err)
		}
		return nil
	})
	if ctx.Err() != nil {
		return nil, ErrInterrupted
	}
	if err != nil {
		return nil, err
	}
	var diff, norm length
	for _, f := range all {
		r.Tensors = append(r.Tensors, f.Difference)
		r.MaxAbs = max(r.MaxAbs, f.MaxAbs)
		diff.add(f.diff)
		norm.add(f.norm)
	}
	for name, w := range others {
		if !w.Calibration {
			r.Extra = append(r.Extra, name)
		}
	}
	slices.Sort(r.Missing)
	slices.Sort(r.Extra)
	r.RelRMS = diff.over(norm)
	return r, nil
}

// length is the root of a sum of squares, which neither overflows nor underflows where a float64 of its size would not:
// of numbers whose squares could, the sum is kept in units of the largest.
type length struct {
	usual      float64
	scale, sum float64 // of the others: scale² * sum
}

func (l *length) include(x float64) {
	x = math.Abs(x)
	if x > 1e-140 && x < 1e140 {
		l.usual += float64(x * x)
		return
	}
	if x > 0 {
		l.rescale(length{scale: x, sum: 1})
	}
}

// rescale adds a sum in units of its own.
func (l *length) rescale(o length) {
	if o.scale > l.scale {
		l.scale, l.sum, o.scale, o.sum = o.scale, o.sum, l.scale, l.sum
	}
	if o.scale > 0 {
		q := o.scale / l.scale
		l.sum += float64(o.sum * float64(q*q))
	}
}

// add includes what another length does.
func (l *length) add(o length) {
	l.usual += o.usual
	l.rescale(o)
}

// over is the quotient of two lengths: 0 of 0 is 0.
func (l length) over(o length) float64 {
	for _, x := range []*length{&l, &o} {
		if x.usual > 0 {
			x.rescale(length{scale: 1, sum: x.usual})
		}
	}
	switch {
	case l.scale == 0:
		return 0
	case o.scale == 0 || math.IsInf(l.scale, 1):
		return math.Inf(1)
	}
	return l.scale / o.scale * math.Sqrt(l.sum/o.sum)
}

// compareElements is how many elements are compared at a time.
const compareElements = 8 << 10

// step is how many elements are best read at a time: more of a weight that is turned round, which is read in strips.
func (w *Weight) step() int64 {
	if w.Transposed {
		return 128 * compareElements
	}
	return compareElements
}

func compareWeights(ctx context.Context, a, b *Weight) (d Difference, diff, norm length, err error) {
	d = Difference{Name: a.Name, Shape: a.Shape}
	if !a.DType.Numeric() || !b.DType.Numeric() {
		same := a.DType == b.DType
		if same {
			same, err = SameBytes(ctx, a, b)
		}
		if !same {
			d.MaxAbs, d.RelRMS = math.Inf(1), math.Inf(1)
			diff.include(math.Inf(1))
		}
		return d, diff, norm, err
	}
	ra, rb := float64Reader{w: a}, float64Reader{w: b}
	n := a.Count()
	step := max(a.step(), b.step())
	for lo := int64(0); lo < n; lo += step {
		if ctx.Err() != nil {
			return d, diff, norm, ErrInterrupted
		}
		hi := min(lo+step, n)
		x, err := ra.read(lo, hi)
		if err != nil {
			return d, diff, norm, err
		}
		y, err := rb.read(lo, hi)
		if err != nil {
			return d, diff, norm, err
		}
		for i := range x {
			e := math.Abs(x[i] - y[i])
			switch {
			case x[i] == y[i] || x[i] != x[i] && y[i] != y[i]:
				e = 0
			case e != e:
				e = math.Inf(1)
			}
			if e != 0 {
				d.MaxAbs = max(d.MaxAbs, e)
				diff.include(e)
			}
			if x[i]-x[i] == 0 {
				norm.include(x[i])
			}
		}
	}
	d.RelRMS = diff.over(norm)
	return d, diff, norm, nil
}

// SameBytes reports whether two weights are stored with the same type, shape and bytes.
func SameBytes(ctx context.Context, a, b *Weight) (bool, error) {
	if a.DType != b.DType || !slices.Equal(a.Shape, b.Shape) || len(a.Parts) != len(b.Parts) {
		return false, nil
	}
	for i := range a.Parts {
		p, q := &a.Parts[i], &b.Parts[i]
		if p.Bytes != q.Bytes || p.DType != q.DType || p.Encoding != q.Encoding {
			return false, nil
		}
		if same, err := SameContent(ctx, p.Data, p.Offset, q.Data, q.Offset, p.Bytes); !same || err != nil {
			return false, err
		}
	}
	return true, nil
}

// SameValues reports whether two weights of one shape hold the same numbers, however they are stored.
func SameValues(ctx context.Context, a, b *Weight) (bool, error) {
	if same, err := SameBytes(ctx, a, b); same || err != nil || !a.Values.Numeric() || !b.Values.Numeric() {
		return same, err
	}
	x, y := float64Reader{w: a}, float64Reader{w: b}
	const piece = 64 << 10
	for lo := int64(0); lo < a.Count(); lo += piece {
		if ctx.Err() != nil {
			return false, ErrInterrupted
		}
		hi := min(lo+piece, a.Count())
		p, err := x.read(lo, hi)
		if err != nil {
			return false, a.Failed(err)
		}
		q, err := y.read(lo, hi)
		if err != nil {
			return false, b.Failed(err)
		}
		if !slices.Equal(p, q) {
			return false, nil
		}
	}
	return true, nil
}

// SameContent compares n bytes of two files.
func SameContent(ctx context.Context, a io.ReaderAt, aOff int64, b io.ReaderAt, bOff, n int64) (bool, error) {
	const piece = 256 << 10
	x, y := make([]byte, min(piece, n)), make([]byte, min(piece, n))
	for lo := int64(0); lo < n; lo += piece {
		if ctx.Err() != nil {
			return false, ErrInterrupted
		}
		x, y = x[:min(piece, n-lo)], y[:min(piece, n-lo)]
		if k, err := a.ReadAt(x, aOff+lo); k < len(x) {
			return false, err
		}
		if k, err := b.ReadAt(y, bOff+lo); k < len(y) {
			return false, err
		}
		if !bytes.Equal(x, y) {
			return false, nil
		}
	}
	return true, nil
}
