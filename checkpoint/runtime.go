package checkpoint

import (
	"fmt"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// Parameter is a parameter of a running model, by the name that it has there: a tensor of the file as a rule, or what
// several of them make up (experts that the file has apart), or a part of one (a projection that it has fused).
type Parameter struct {
	Name  string
	Shape tensor.Shape // at run time; of a stack of experts the first dimension is theirs
	// Experts is how many matrices are stacked, 0 for what is no stack of experts.
	Experts int
	Pieces  []Piece

	matrix  tensor.Shape // rows and columns of the parameter, or of one expert's matrix
	flipped bool         // each matrix is turned round
}

// Piece is a tensor of the file that has a part in a parameter.
type Piece struct {
	Weight *Weight
	Place  models.Slice
}

// Runtime finds a parameter by its run-time name, or one that shares its values where the config ties them.
func (c *Checkpoint) Runtime(param string) (*Parameter, error) {
	all := c.byParameter()
	pieces := all[param]
	if pieces == nil {
		if source := c.Model.Tensor(param, nil).Tied; source != "" && source != param {
			pieces = all[source]
		}
	}
	if pieces == nil {
		return nil, fmt.Errorf("%s: %w: it has no parameter %s", c.Path, ErrRefused, tensor.Quote(param))
	}
	p := &Parameter{Name: param, Pieces: pieces}
	if err := p.assemble(); err != nil {
		return nil, fmt.Errorf("%s: parameter %s: %w", c.Path, tensor.Quote(param), err)
	}
	return p, nil
}

// ParameterOf takes a plain tensor for the whole of a parameter; one of three dimensions is a stack of experts.
func ParameterOf(t *formats.Tensor) *Parameter {
	w := &Weight{Info: t.Info, Values: t.DType, Parts: []formats.Tensor{*t}}
	place := models.Slice{Param: t.Name, Expert: -1, Parts: 1, FileParts: 1}
	p := &Parameter{Name: t.Name, Shape: t.Shape, Pieces: []Piece{{w, place}}, matrix: flat(t.Shape)}
	if len(t.Shape) == 3 {
		p.Experts, p.matrix = int(t.Shape[0]), flat(t.Shape[1:])
	}
	return p
}

// Parameters lists the run-time names of all parameters, in the order in which the file first has a part of them.
func (c *Checkpoint) Parameters() []string {
	var names []string
	seen := map[string]bool{}
	for _, w := range c.Weights {
		for _, s := range w.Role.Runtime {
			if !seen[s.Param] {
				seen[s.Param] = true
				names = append(names, s.Param)
			}
		}
	}
	return names
}

// pieces lists the tensors of each run-time parameter.
func (c *Checkpoint) pieces() map[string][]Piece {
	all := make(map[string][]Piece, len(c.Weights))
	for _, w := range c.Weights {
		for _, s := range w.Role.Runtime {
			all[s.Param] = append(all[s.Param], Piece{w, s})
		}
	}
	return all
}

// assemble finds the shape of a parameter, and makes sure that its pieces fit together and are all there.
func (p *Parameter) assemble() error {
	var matrix tensor.Shape // of the parameter, or of one of its experts
	have := map[[2]int]string{}
	parts := 0
	for _, x := range p.Pieces {
		s := x.Place
		if s.Via != "" {
			return fmt.Errorf("%w: tensor %s comes to it by %s, which is not read here", ErrRefused, tensor.Quote(x.Weight.Name),
				s.Via)
		}
		shape, ok := s.Shape(x.Weight.Shape)
		if !ok {
			return p.misfit(x)
		}
		if matrix != nil && (!slices.Equal(matrix, shape) || max(1, s.Parts) != parts || (s.Expert >= 0) != (p.Experts > 0)) {
			return p.misfit(x)
		}
		matrix, parts = shape, max(1, s.Parts)
		if s.Expert >= 0 {
			p.Experts = max(p.Experts, s.Expert+1)
		}
		if other, twice := have[[2]int{s.Expert, s.Part}]; twice {
			return fmt.Errorf("%w: tensors %s and %s are the same part of it", ErrRefused, tensor.Quote(other),
				tensor.Quote(x.Weight.Name))
		}
		have[[2]int{s.Expert, s.Part}] = x.Weight.Name
	}
	if want := parts * max(1, p.Experts); len(p.Pieces) != want {
		return fmt.Errorf("%w: the file has %d of the %d tensors that it is made of", ErrRefused, len(p.Pieces), want)
	}
	p.Shape = matrix
	if p.Experts > 0 {
		p.Shape = append(tensor.Shape{int64(p.Experts)}, matrix...)
	} else if len(matrix) == 3 && p.Pieces[0].Weight.Role.Kind == models.Expert {
		p.Experts, matrix = int(matrix[0]), matrix[1:]
	}
	p.matrix = flat(matrix)
	return nil
}

// flat is a shape as a matrix: its first dimension by all others; what has one dimension is a row.
func flat(s tensor.Shape) tensor.Shape {
	switch len(s) {
	case 0:
		return tensor.Shape{1, 1}
	case 1:
		return tensor.Shape{1, s[0]}
	}
	cols := int64(1)
	for _, d := range s[1:] {
		cols *= d
	}
	return tensor.Shape{s[0], cols}
}

func (p *Parameter) misfit(x Piece) error {
	return fmt.Errorf("%w: tensor %s of shape %v does not fit with the others that it is made of, such as %s of %v",
		ErrRefused,
		tensor.Quote(x.Weight.Name), x.Weight.Shape, tensor.Quote(p.Pieces[0].Weight.Name), p.Pieces[0].Weight.Shape)
}

// Exact returns the parameter with values that are not rounded to the type that a weight had before it was quantised.
func (p *Parameter) Exact() *Parameter {
	exact := *p
	exact.Pieces = slices.Clone(p.Pieces)
	for i := range exact.Pieces {
		exact.Pieces[i].Weight = exact.Pieces[i].Weight.Exact()
	}
	return &exact
}

// T returns the parameter with its matrix, or that of each expert, turned round.
func (p *Parameter) T() *Parameter {
	turned := *p
	turned.flipped = !p.flipped
	turned.matrix = p.matrix.Transposed()
	turned.Shape = turned.matrix
	if p.Experts > 0 {
		turned.Shape = append(tensor.Shape{int64(p.Experts)}, turned.matrix...)
	}
	return &turned
}

// Turned reports whether the rows of the file are columns of the parameter, so that T is what is read fast.
func (p *Parameter) Turned() bool { return p.area(p.Pieces[0], 0).turned }

// Matrix reads the parameter by rows: its first dimension by all others, a vector as one row. Of a stack of experts it
// reads the matrix of one; expert is not looked at for others. A Matrix is for one goroutine at a time.
func (p *Parameter) Matrix(expert int) *ParameterMatrix {
	m := &ParameterMatrix{rows: int(p.matrix[0]), cols: int(p.matrix[1]), r: new(Reader)}
	for _, x := range p.Pieces {
		if p.Experts == 0 || x.Place.Expert < 0 || x.Place.Expert == expert {
			m.areas = append(m.areas, p.area(x, int64(expert)))
		}
	}
	return m
}

// area is a piece of a matrix and where it lies in its tensor, whose elements count in the order of the file.
type area struct {
	w            *Weight
	first, width int64 // the element of the tensor at which its matrix begins, and the length of the matrix' rows
	fileRow      int64 // in that matrix
	fileCol      int64
	turned       bool  // the matrix lies the other way round
	row, col     int64 // in the parameter
	rows, cols   int64
}

// area finds where a piece lies, in its tensor and in the parameter's matrix (or one expert's).
func (p *Parameter) area(x Piece, expert int64) area {
	s, shape := x.Place, x.Weight.Shape
	dims := 0 // before those of the matrix, in the tensor
	a := area{w: x.Weight, turned: s.Transposed}
	if p.Experts > 0 && s.Expert < 0 { // all experts in one tensor
		dims = 1
		a.first = expert * shape[1] * shape[2]
		shape = shape[1:]
	}
	file := flat(shape)
	a.width = file[1]
	a.rows, a.cols = file[0], file[1]
	if s.FileParts > 1 {
		if s.FileDim == dims && len(shape) > 1 {
			a.rows /= int64(s.FileParts)
			a.fileRow = int64(s.FilePart) * a.rows
		} else {
			a.cols /= int64(s.FileParts)
			a.fileCol = int64(s.FilePart) * a.cols
		}
	}
	if a.turned {
		a.rows, a.cols = a.cols, a.rows
	}
	if s.Parts > 1 {
		if s.Dim == dims && len(shape) > 1 {
			a.row = int64(s.Part) * a.rows
		} else {
			a.col = int64(s.Part) * a.cols
		}
	}
	if x.Weight.Transposed { // it has two dimensions
		a.width = shape[0]
		a.fileRow, a.fileCol = a.fileCol, a.fileRow
		a.turned = !a.turned
	}
	if p.flipped {
		a.row, a.col = a.col, a.row
		a.rows, a.cols = a.cols, a.rows
		a.turned = !a.turned
	}
	return a
}

// ParameterMatrix reads a parameter, or the matrix of one expert, by rows.
type ParameterMatrix struct {
	areas      []area
	rows, cols int
	r          *Reader
}

// By returns the same matrix, read with the memory of r. So many matrices are read by one goroutine in the memory of
// the largest piece.
func (m *ParameterMatrix) By(r *Reader) ParameterMatrix {
	by := *m
	by.r = r
	return by
}

// Dims returns rows and columns.
func (m *ParameterMatrix) Dims() (rows, cols int) { return m.rows, m.cols }

// ReadRows fills dst with the rows from lo to hi, decoded.
func (m *ParameterMatrix) ReadRows(dst []float32, lo, hi int) error {
	return m.ReadInto(dst, m.cols, lo, hi)
}

// ReadInto is ReadRows with rows that begin stride elements apart in dst; what lies between them is left alone. Rows
// that lie together in the file are read at once, and go straight to their places.
func (m *ParameterMatrix) ReadInto(dst []float32, stride, lo, hi int) error {
	fits := 0 <= lo && lo <= hi && hi <= m.rows && m.cols <= stride
	if fits && lo < hi && m.cols > 0 {
		fits = m.cols <= len(dst) && hi-lo-1 <= (len(dst)-m.cols)/stride
	}
	if !fits {
		return fmt.Errorf("rows %d to %d of a matrix of %d x %d into %d numbers, %d a row", lo, hi, m.rows, m.cols, len(dst),
			stride)
	}
	if m.cols == 0 {
		return nil
	}
	for i := range m.areas {
		a := &m.areas[i]
		first, last := max(int64(lo), a.row), min(int64(hi), a.row+a.rows)
		if first >= last {
			continue
		}
		out := dst[(first-int64(lo))*int64(stride)+a.col:]
		if err := m.read(out, int64(stride), a, first-a.row, last-a.row); err != nil {
			return a.w.Failed(err)
		}
	}
	return nil
}

// read fills the rows [r0, r1) of an area; dst begins at the first of them.
func (m *ParameterMatrix) read(dst []float32, stride int64, a *area, r0, r1 int64) error {
	if !a.turned {
		at := a.first + (a.fileRow+r0)*a.width + a.fileCol
		if a.cols == a.width { // rows that lie together
			return m.r.readFloats(a.w, dst, stride, at, r1-r0, a.cols)
		}
		for k := range r1 - r0 {
			if err := m.r.readFloats(a.w, dst[k*stride:], stride, at+k*a.width, 1, a.cols); err != nil {
				return err
			}
		}
		return nil
	}
	if int64(cap(m.r.column)) < r1-r0 {
		m.r.column = make([]float32, r1-r0)
	}
	strip := m.r.column[:r1-r0] // a piece of a row of the file, which is a piece of a column here
	for c := range a.cols {
		at := a.first + (a.fileRow+c)*a.width + a.fileCol + r0
		if err := m.r.readFloats(a.w, strip, r1-r0, at, 1, r1-r0); err != nil {
			return err
		}
		for k, v := range strip {
			dst[int64(k)*stride+c] = v
		}
	}
	return nil
}
