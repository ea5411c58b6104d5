package lora

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/tensor"
)

// Spectrum is what the values of a module say of what it does.
type Spectrum struct {
	// Norm is the Frobenius norm of what is added: of the delta of a pair of factors, over all experts of a stack, or of
	// a scaled bias; for Replace and Rows that of the new values. NaN where there is none: where NeedsBase is set, and
	// for integers.
	Norm float64
	// Values are the singular values of a delta, falling, without those that are zero. Nil for what has no factors, and
	// for a stack.
	Values []float64
	// NeedsBase is set for a stack of experts where only the base tells how many there are.
	NeedsBase bool
}

// Spectrograph finds the spectra of an adapter's modules, one after the other. Its zero value is ready; it
// keeps what it has read for those that follow, as the experts of a stack share tensors.
type Spectrograph struct{ read reader }

// Spectrum reads the values of a module. The singular values of its delta are found from the factors alone: those of
// scaling * B·A as a matrix, whatever it is added to, and for DoRA without the magnitudes, which are about the base.
func (g *Spectrograph) Spectrum(a *Adapter, m *Module) (*Spectrum, error) {
	s := &Spectrum{}
	var err error
	switch {
	case m.Form == Transformed:
		s.Norm, s.NeedsBase = math.NaN(), true
		return s, nil
	case !m.factored() && m.Value.DType.Integer():
		s.Norm = math.NaN()
		return s, nil
	case !m.factored():
		if s.Norm, err = norm(m.Value); m.Form == Bias {
			s.Norm *= math.Abs(m.Scaling)
		}
	case m.Rank == 0 || m.fit != nil:
		s.Norm, s.NeedsBase = math.NaN(), true
		return s, nil
	case m.stackOf() > 0:
		var sum float64
		n := m.stackOf()
		for e := range n {
			fa, fb := m.expert(e, n)
			values, err := g.values(fa, fb, m.Scaling)
			if err != nil {
				return nil, fmt.Errorf("%s: module %s: %w", a.Path, tensor.Quote(m.String()), err)
			}
			sum += energy(values)
		}
		s.Norm = math.Sqrt(sum)
	case m.kronecker():
		if s.Values, err = g.kroneckerValues(m); err == nil {
			s.Norm = math.Sqrt(energy(s.Values))
		}
	case m.Hadamard != nil && m.Rank > largestSpectrum:
		s.Norm, err = m.hadamardNorm()
	default:
		if s.Values, err = g.values(m.A, m.B, m.Scaling); err == nil {
			s.Norm = math.Sqrt(energy(s.Values))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: module %s: %w", a.Path, tensor.Quote(m.String()), err)
	}
	if s.Norm-s.Norm != 0 {
		return nil, fmt.Errorf("%s: module %s: %w: the norm of what it adds is %v, expected a finite number; its scaling is "+
			"%g", a.Path, tensor.Quote(m.String()), ErrMalformed, s.Norm, m.Scaling)
	}
	return s, nil
}

// values finds the singular values of scaling * b·a that are not zero.
func (g *Spectrograph) values(a, b Matrix, scaling float64) ([]float64, error) {
	fa, err := g.read.matrix(a)
	if err != nil {
		return nil, err
	}
	fb, err := g.read.matrix(b)
	if err != nil {
		return nil, err
	}
	d, err := svd.Product(fb, fa)
	if err != nil {
		return nil, err
	}
	values := make([]float64, 0, len(d.S))
	for _, v := range d.S {
		if v *= math.Abs(scaling); v != 0 {
			values = append(values, v)
		}
	}
	return values, nil
}

// kroneckerValues finds the singular values of a Kronecker product: all products of one of either factor with one
// of the other.
func (g *Spectrograph) kroneckerValues(m *Module) ([]float64, error) {
	var of [2][]float64
	for i, t := range m.Hadamard {
		for _, f := range []*Matrix{&t.Left, &t.Right} {
			if f.T == nil { // the identity
				n := f.Rows
				*f = matrixOf(computedTensor(m.made[0], func() ([]float32, error) { return identity(n) }, n, n))
			}
		}
		var err error
		if of[i], err = g.values(t.Right, t.Left, 1); err != nil {
			return nil, err
		}
	}
	values := make([]float64, 0, len(of[0])*len(of[1]))
	for _, x := range of[0] {
		for _, y := range of[1] {
			if v := math.Abs(m.Scaling) * x * y; v != 0 {
				values = append(values, v)
			}
		}
	}
	slices.SortFunc(values, func(x, y float64) int { return cmp.Compare(y, x) })
	return values, nil
}

func energy(values []float64) float64 {
	var sum float64
	for _, v := range values {
		sum += float64(v * v)
	}
	return sum
}

func (m *Module) factored() bool { return m.Value == nil }

// stackOf is how many experts the factors of a module are for, as far as its Rank is known; 0 for one matrix.
func (m *Module) stackOf() int64 {
	if r := int64(m.Rank); m.factored() && r > 0 && m.A.Rows != r {
		return m.A.Rows / r
	}
	return 0
}

// norm is the Frobenius norm of a tensor, which is read in pieces.
func norm(t *formats.Tensor) (float64, error) {
	if _, ok := t.Data.(computed); ok || !t.DType.Float() && t.DType != tensor.F64 {
		v, err := Floats(t)
		return math.Sqrt(kernels.SquaredNorm(v)), err
	}
	const piece = 64 << 10
	width := t.DType.Bits() / 8
	n := min(piece, t.Count())
	raw, b, x := make([]byte, n*width), make([]byte, 4*n), make([]float32, n)
	var sum float64
	for lo := int64(0); lo < t.Count(); lo += piece {
		n := min(piece, t.Count()-lo)
		if _, err := t.ReadAt(raw[:n*width], lo*width); err != nil {
			return 0, err
		}
		if err := tensor.Convert(b[:4*n], tensor.F32, raw[:n*width], t.DType); err != nil {
			return 0, fmt.Errorf("%s: tensor %s: %w", t.File, tensor.Quote(t.Name), err)
		}
		for i := range n {
			x[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
		}
		if err := checkFinite(t, x[:n], lo); err != nil {
			return 0, err
		}
		sum += kernels.SquaredNorm(x[:n])
	}
	return math.Sqrt(sum), nil
}

// Parts are the modules of an adapter to be looked at one by one: a stack of experts is taken apart into modules of
// single experts, and names without dots get them, where no base is needed for it. What needs one stays as
// it is. Modules that view the same tensors follow each other.
func (a *Adapter) Parts() ([]*Module, error) {
	list, err := a.apart()
	if errors.Is(err, ErrUnsupported) {
		list, err = a.Modules, nil
	}
	if err != nil {
		return nil, a.named(err)
	}
	if named, err := alone(list); err == nil {
		list = named
	}
	return list, nil
}

// Contents says what a file holds of a module.
type Contents struct {
	// Shape is that of the parameter's change or new values, at run time: (out, in) of a linear layer, (rows, width) of
	// an embedding, with the kernel of a convolution. Nil for a stack of experts, whose orientation only the base tells.
	Shape tensor.Shape
	// A and B are the shapes of the factors as they are stored, nil where there are none.
	A, B    tensor.Shape
	DType   tensor.DType
	Experts int64 // of a stack, where it is known
}

// Contents describes what a module consists of, by the headers alone.
func (m *Module) Contents() Contents {
	if !m.factored() {
		return Contents{Shape: m.Value.Shape, DType: m.Value.DType}
	}
	c := Contents{A: m.A.T.Shape, B: m.B.T.Shape, DType: m.B.T.DType, Experts: m.stackOf()}
	if m.Waves != nil || m.fit != nil && m.A.Rows*m.A.Cols*m.B.Rows*m.B.Cols == 0 {
		return Contents{Shape: m.A.T.Shape, DType: m.A.T.DType} // of what both are made of
	}
	if m.made != nil {
		c.A, c.B, c.DType = tensor.Shape{m.A.Rows, m.A.Cols}, tensor.Shape{m.B.Rows, m.B.Cols}, m.made[0].DType
		if i := slices.IndexFunc(m.made, func(t *formats.Tensor) bool { return !t.DType.Integer() }); i >= 0 {
			c.DType = m.made[i].DType
		}
	}
	switch {
	case m.Rank == 0 || c.Experts > 0 || m.fit != nil:
	case m.Form == Embedding:
		c.Shape = tensor.Shape{m.A.Cols, m.B.Rows}
	default:
		c.Shape = append(tensor.Shape{m.B.Rows, m.channels()}, m.Kernel...)
	}
	return c
}

// Size counts the elements of the tensors that are the adapter's own, and the bytes of all, copies of the
// base's matrices included.
func (a *Adapter) Size() (trained, bytes int64) {
	counted := map[*formats.Tensor]bool{}
	for _, m := range a.Modules {
		list := []*formats.Tensor{m.A.T, m.B.T, m.Value, m.Magnitude}
		if m.made != nil {
			list = m.made
		}
		for _, t := range list {
			if t == nil || counted[t] {
				continue
			}
			counted[t] = true
			if bytes += t.Bytes; !m.Base {
				trained += t.Count()
			}
		}
	}
	return trained, bytes
}

// Starts lists what init_lora_weights names: how A and B began, where not as by default.
func (c *Config) Starts() []string { return stringList(c.Init) }
