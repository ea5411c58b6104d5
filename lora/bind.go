package lora

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// Target is a tensor of the base's file.
type Target struct {
	Name  string
	Shape tensor.Shape
	Role  models.Tensor
}

// Weighted is an adapter and the weight with which it is merged.
type Weighted struct {
	*Adapter
	Weight float64
}

// Update is what one module of an adapter does to a rectangle of a file's tensor, seen as a matrix whose rows are
// Change.Width long.
type Update struct {
	Adapter int // which of those that were bound
	Module  *Module
	Name    string // the run-time parameter, without ".weight"
	Expert  int64  // which of a stack, from 1; 0 is none

	Row, Rows, Col, Cols int64
	// Left (Rows x Rank) times Right (Rank x Cols), times Scale, is added; not for Form Rows.
	Left, Right Matrix
	Rank        int64
	Scale       float32
	// Hadamard, where not nil, are the matrices whose element-wise product stands for that of Left and Right.
	Hadamard []Tiled
	// Waves, where not nil, stand for that product too.
	Waves *Waves
	// Transform, of Form Transformed, is what becomes of the rectangle's rows, whose FirstOutput is the first.
	Transform Transform
	// Factor, of Form Scale, multiplies the rectangle's rows or columns, as OutputRows says.
	Factor *formats.Tensor
	// OutputRows says, for DoRA and Scale, that the magnitudes or factors belong to rows of the rectangle,
	// else to columns; FirstOutput is that of the first one.
	OutputRows  bool
	FirstOutput int64
}

// Change is what becomes of one tensor of the file.
type Change struct {
	Width int64
	// Value, where not nil, is the tensor that stands for the base's own, ValueOf the module that brings it.
	Value   *formats.Tensor
	ValueOf *Update
	Updates []Update
}

// Binding says what adapters do to a base.
type Binding struct {
	// Changes has an entry for each Target; nil where nothing is done to it.
	Changes []*Change
	// Head, where not nil, is an output head that was tied to the embedding Targets[HeadFrom] and is a tensor of its own
	// from now on, under the name HeadName.
	Head     *Change
	HeadName string
	HeadFrom int
	// Untie says that the config must no longer tie the head to the embedding.
	Untie bool
	// Copies are other parameters that were tied by the same switch, and are tensors of their own from now on.
	Copies  []Copy
	Notices []string
}

// Copy is a parameter that was tied to Targets[From].
type Copy struct {
	Name   string
	From   int
	Change *Change // nil where it is what it was
}

// piece is the part of a run-time parameter that a tensor of the file holds.
type piece struct {
	target int
	slice  models.Slice
}

// parameter is a run-time parameter, or a tensor of the file taken as one.
type parameter struct {
	name    string
	shape   tensor.Shape // of one expert's matrix for a stack of them
	experts int64        // 0 for a plain one
	kind    models.Kind
	known   bool // kind is that of the architecture, and no guess by the name
	pieces  []piece
	uneven  string // a tensor of the file whose shape is not that of the parameter's others, or cannot be a part of one
}

// whole refuses a parameter of which the file lacks a piece, or has one of another shape: a part of a delta would go
// nowhere.
func (p *parameter) whole() error {
	if p.uneven != "" {
		return fmt.Errorf("%w: tensor %s has a shape that does not go with %s, which it is a part of", ErrBase,
			tensor.Quote(p.uneven), tensor.Quote(p.name))
	}
	if len(p.pieces) == 0 {
		return nil
	}
	s, want := p.pieces[0].slice, int64(1)
	if s.Expert >= 0 {
		want = p.experts
	}
	if s.Parts > 1 {
		want *= int64(s.Parts)
	}
	if n := int64(len(p.pieces)); n != want {
		return fmt.Errorf("%w: the base has %d of the %d tensors that %s is made of", ErrBase, n, want, tensor.Quote(p.name))
	}
	return nil
}

type binder struct {
	targets    []Target
	model      *models.Model
	params     map[string]*parameter
	names      []string                // of params, in the order of the file
	own        map[string][]*parameter // by the module that has them
	files      map[string]int
	out        *Binding
	bound      map[string][]claim      // by adapter and parameter
	flat       map[string][]*parameter // by names with underscores for dots
	embedding  string                  // the run-time parameter that the head is tied to
	head       string
	headParam  *parameter
	headTarget int                   // of the file, or -1
	sharers    map[string]*sharer    // others that are tied to the embedding, where they are adapted
	authored   map[string][]authored // where diffusers' modules are in a base with the authors' names
	adapters   []Weighted
	clash      error // two changes of one tensor that are for rows of different sizes
}

// Bind finds what the adapters do to the tensors of a base. Each tensor of each adapter takes part, or Bind fails and
// names it.
func Bind(adapters []Weighted, targets []Target, model *models.Model) (*Binding, error) {
	b := &binder{targets: targets, model: model, params: map[string]*parameter{}, files: map[string]int{},
		out: &Binding{Changes: make([]*Change, len(targets)), HeadFrom: -1}, bound: map[string][]claim{},
		sharers: map[string]*sharer{}, headTarget: -1, adapters: adapters}
	for i, t := range targets {
		b.files[t.Name] = i
		for _, s := range t.Role.Runtime {
			b.add(i, s)
		}
	}
	b.findHead()
	for i, a := range adapters {
		b.out.Notices = append(b.out.Notices, a.Notices...)
		if err := a.placed(); err != nil {
			return nil, err
		}
		if err := a.finiteScales(); err != nil {
			return nil, a.named(err)
		}
		if err := a.Config.plainBase(); err != nil {
			return nil, a.named(err)
		}
		if err := b.bind(i, a); err != nil {
			return nil, a.named(err)
		}
		if b.clash != nil {
			return nil, a.named(b.clash)
		}
	}
	if err := b.untie(); err != nil {
		return nil, err
	}
	return b.out, b.sameRows()
}

// finiteScales refuses what float32 cannot scale by. The scaling of experts is known once they are bound.
func (a *Weighted) finiteScales() error {
	for _, m := range a.Modules {
		if m.A.T == nil && m.Form != Bias {
			continue
		}
		if err := a.finiteScale(m); err != nil {
			return err
		}
	}
	return nil
}

func (a *Weighted) finiteScale(m *Module) error {
	if s := float32(a.Weight * m.Scaling); math.IsNaN(float64(s)) || math.IsInf(float64(s), 0) {
		return fmt.Errorf("module %s: %w: it is scaled by %g, which float32 cannot hold", tensor.Quote(m.String()),
			ErrMalformed, a.Weight*m.Scaling)
	}
	return nil
}

// add takes up a part of a run-time parameter.
func (b *binder) add(i int, s models.Slice) {
	t := b.targets[i]
	if s.Via != "" || s.Param == "" {
		return
	}
	shape, fits := s.Shape(t.Shape)
	if !fits {
		shape = slices.Clone(t.Shape)
	}
	p := b.params[s.Param]
	if p == nil {
		p = &parameter{name: s.Param, kind: t.Role.Kind, known: t.Role.Known}
		b.params[s.Param] = p
		b.names = append(b.names, s.Param)
	}
	switch {
	case s.Expert >= 0:
		p.experts = max(p.experts, int64(s.Expert)+1)
	case t.Role.Kind == models.Expert && len(shape) == 3:
		p.experts = shape[0]
		shape = shape[1:]
		if s.Parts > 1 {
			s.Dim-- // it counts the stack's own dimension
		}
	}
	if !fits || p.shape != nil && !slices.Equal(p.shape, shape) {
		p.uneven = t.Name
	}
	p.shape = shape
	p.pieces = append(p.pieces, piece{i, s})
}

// bind binds one adapter.
func (b *binder) bind(i int, a Weighted) error {
	wrapped, modules, err := b.wrappedModules(a)
	if err != nil {
		return err
	}
	for _, m := range modules {
		if m.Experts > 0 {
			err = b.apart(i, a, m)
		} else {
			for _, placed := range b.placed(m) {
				if err = b.module(i, a, placed); err != nil {
					return a.ofComponents(m.ofBeside(err))
				}
			}
		}
		if err != nil {
			return err
		}
	}
	for _, n := range wrapped {
		if err := b.bindParameters(i, a, n); err != nil {
			return err
		}
	}
	if err := b.checkBeside(i, a); err != nil {
		return err
	}
	if a.Dialect != PEFT {
		return nil
	}
	return b.checkTargets(i, a)
}

// spot is what of a parameter a module adapts.
type spot struct {
	p           *parameter
	expert      int64 // -1 where it is none, or all of a stack
	part, parts int64 // a range of its outputs; parts is 0 for all
	count       int64 // how many of the parts; 0 stands for 1
}

// whole is the spot of a whole parameter.
func whole(p *parameter) spot { return spot{p: p, expert: -1} }

// rows are the outputs of the parameter that the spot has.
func (s spot) rows() (first, n int64) {
	if len(s.p.shape) == 0 {
		return 0, 1
	}
	if s.parts == 0 {
		return 0, s.p.shape[0]
	}
	n = s.p.shape[0] / s.parts
	return s.part * n, max(s.count, 1) * n
}

// claim is what a module has taken of a parameter.
type claim struct {
	module *Module
	spot
}

// claim refuses two modules of an adapter on one part of a parameter.
func (b *binder) claim(i int, m *Module, s spot) error {
	key := claimKey(i, m.Form == Replace, s.p)
	if len(s.p.shape) == 0 {
		s.parts = 0
	}
	for _, o := range b.bound[key] {
		behind := s.part >= o.part+max(o.count, 1) || o.part >= s.part+max(s.count, 1)
		apart := s.expert >= 0 && o.expert >= 0 && s.expert != o.expert || s.parts > 0 && s.parts == o.parts && behind
		if !apart {
			return fmt.Errorf("module %s: %w: it and %s both belong to %s", tensor.Quote(m.String()), ErrMalformed,
				tensor.Quote(o.module.String()), tensor.Quote(s.p.name))
		}
	}
	b.bound[key] = append(b.bound[key], claim{m, s})
	return nil
}

// spread adds an update, whose Left and Right are those of the spot, to the tensors of the file that hold it.
func (b *binder) spread(t Update, s spot) {
	for _, pc := range s.p.pieces {
		nth := int64(0)
		if s.expert >= 0 {
			if e := int64(pc.slice.Expert); e >= 0 && e != s.expert {
				continue
			} else if e < 0 {
				nth = s.expert
			}
		}
		b.place(t, s, pc, nth)
	}
}

// place adds what of an update falls into the part of its parameter that a tensor of the file holds; nth is which
// matrix of a stack it is.
func (b *binder) place(t Update, at spot, pc piece, nth int64) {
	p, s := at.p, pc.slice
	r0, r1, c0, c1 := int64(0), p.shape[0], int64(0), int64(1)
	for _, d := range p.shape[1:] {
		c1 *= d
	}
	switch n := int64(s.Parts); {
	case n <= 1:
	case s.Dim == 0:
		r0, r1 = int64(s.Part)*(r1/n), int64(s.Part+1)*(r1/n)
	default:
		c0, c1 = int64(s.Part)*(c1/n), int64(s.Part+1)*(c1/n)
	}
	first, n := at.rows()
	lo, hi := max(r0, first), min(r1, first+n)
	if lo >= hi {
		return
	}
	t.Left, t.Right = t.Left.rows(lo-first, hi-first), t.Right.cols(c0, c1)
	t.Hadamard, t.Waves = window(t.Hadamard, lo-first, c0), t.Waves.window(lo-first, c0)
	if t.OutputRows {
		t.FirstOutput += lo - first
	} else {
		t.FirstOutput += c0
	}
	height, width := r1-r0, c1-c0
	t.Row, t.Rows, t.Col, t.Cols = lo-r0, hi-lo, 0, width
	if s.Transposed {
		height, width = width, height
		t.Row, t.Rows, t.Col, t.Cols = t.Col, t.Cols, t.Row, t.Rows
		t.Left, t.Right = t.Right.Transposed(), t.Left.Transposed()
		t.Hadamard, t.Waves = Transposed(t.Hadamard), t.Waves.Transposed()
		t.OutputRows = !t.OutputRows
	}
	parts := int64(1) // of the file's tensor, below each other and beside each other
	if s.FileParts > 1 {
		if s.FileDim-len(b.targets[pc.target].Shape)+2 <= 0 {
			parts = int64(s.FileParts)
			t.Row += int64(s.FilePart) * height
		} else {
			t.Col += int64(s.FilePart) * width
			width *= int64(s.FileParts)
		}
	}
	t.Row += nth * parts * height
	c := b.change(pc.target, width)
	t.Name = strings.TrimSuffix(t.Name, ".weight")
	c.Updates = append(c.Updates, t)
}

// change is what becomes of a tensor of the file, seen as a matrix whose rows are that wide.
func (b *binder) change(target int, width int64) *Change {
	c := b.out.Changes[target]
	if c == nil {
		c = &Change{Width: width}
		b.out.Changes[target] = c
	}
	if c.Width != width && b.clash == nil {
		b.clash = fmt.Errorf("tensor %s: %w: what adapters do to it is for rows of %d elements and of %d",
			tensor.Quote(b.targets[target].Name), ErrUnsupported, c.Width, width)
	}
	return c
}

// module binds what is no stack of experts.
func (b *binder) module(i int, a Weighted, m *Module) error {
	s, err := b.resolve(m)
	if err != nil {
		return err
	}
	p := s.p
	if err := p.whole(); err != nil {
		return fmt.Errorf("module %s: %w", tensor.Quote(m.String()), err)
	}
	if m.A.T != nil && m.Rank == 0 {
		if err := a.Config.scale(m, a.Config.patternName(m), m.A.Rows); err != nil {
			return err
		}
		if err := a.finiteScale(m); err != nil {
			return err
		}
	}
	if m.Magnitude != nil && a.Weight != 1 {
		return fmt.Errorf("module %s: %w: DoRA with the weight %g, expected 1", tensor.Quote(m.Name), ErrUnsupported,
			a.Weight)
	}
	if again, err := b.again(i, m, s); again || err != nil {
		return err
	}
	if err := b.claim(i, m, s); err != nil {
		return err
	}
	if p.name == b.head && b.head == "lm_head.weight" && strings.HasSuffix(b.embedding, ".embed_tokens.weight") &&
		a.Config.EnsureTie && b.headTarget < 0 {
		if err := b.sameAsEmbedding(a, m); err != nil {
			return err
		}
	}
	t := Update{Adapter: i, Module: m, Name: p.name, Scale: float32(a.Weight * m.Scaling)}
	if s.expert >= 0 || s.parts > 0 {
		t.Name = m.String()
	}
	switch m.Form {
	case Replace, Rows:
		return b.value(a, t, p)
	case Scale:
		return b.factor(a, t, s)
	case Transformed:
		return b.transform(a, t, s)
	case Bias:
		if n := m.Value.Count(); len(p.shape) != 1 || n != p.shape[0] {
			return fmt.Errorf("module %s: %w: its bias has %d elements, expected %v", tensor.Quote(m.Name), ErrBase, n, p.shape)
		}
		t.Rank, t.Right = 1, Matrix{T: m.Value, ColStride: 1, Rows: 1, Cols: p.shape[0]}
		for _, pc := range p.pieces {
			if !pc.slice.Whole() {
				return fmt.Errorf("module %s: %w: a bias that its file holds in pieces", tensor.Quote(m.Name), ErrUnsupported)
			}
			c := b.change(pc.target, p.shape[0])
			t.Rows, t.Cols = 1, p.shape[0]
			c.Updates = append(c.Updates, t)
		}
		return nil
	}
	return b.matrix(a, t, s)
}
