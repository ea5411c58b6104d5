package lora

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/tensor"
)

// projection is what a matrix of one expert is of the parameters that hold all experts.
type projection struct {
	param       string
	part, parts int64
}

// projections are the names that the matrices of an expert have in files: those of most models, then those of Mixtral.
var projections = map[string]projection{
	"gate_proj": {"gate_up_proj", 0, 2}, "up_proj": {"gate_up_proj", 1, 2}, "down_proj": {"down_proj", 0, 0},
	"w1": {"gate_up_proj", 0, 2}, "w3": {"gate_up_proj", 1, 2}, "w2": {"down_proj", 0, 0},
}

// usual is the name that most models have for one of Mixtral's.
var usual = map[string]string{"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

// ofMixtral is the inverse of usual.
var ofMixtral = map[string]string{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

// splitExpert takes the name of one expert's module apart: "….mlp.experts.3.gate_proj".
func splitExpert(name string) (stack string, expert int64, proj string, ok bool) {
	parts := strings.Split(name, ".")
	n := len(parts)
	if n < 4 || parts[n-3] != "experts" {
		return "", 0, "", false
	}
	e, err := strconv.ParseInt(parts[n-2], 10, 32)
	if _, known := projections[parts[n-1]]; err != nil || e < 0 || !known {
		return "", 0, "", false
	}
	return strings.Join(parts[:n-2], "."), e, parts[n-1], true
}

// runtimeBlock is the name at run time of a block of experts that its file has under an older one.
func runtimeBlock(name string) string {
	return strings.Replace(name, ".block_sparse_moe.", ".mlp.", 1)
}

// expertSpot finds one expert in the parameters of its stack.
func (b *binder) expertSpot(m *Module) (spot, bool) {
	stack, e, proj, ok := splitExpert(m.Name)
	if !ok || m.Param != "weight" {
		return spot{}, false
	}
	return b.stackSpot(stack, e, proj)
}

// stackSpot finds a projection of one expert. Stacks whose matrices lie the other way round than those of single
// experts, or have gate and up in turns, are none of which single experts can be told.
func (b *binder) stackSpot(stack string, e int64, proj string) (spot, bool) {
	for _, name := range []string{stack, runtimeBlock(stack)} {
		for _, at := range []projection{projections[proj], {param: proj}} {
			p := b.params[name+"."+at.param]
			if p == nil || p.experts == 0 {
				continue
			}
			r, known := b.model.Registered(name)
			square := len(p.shape) == 2 && p.shape[0] == p.shape[1]
			if r.InputsFirst || r.Interleaved || at.param == "up_proj" && !known || square && !known && !b.model.Known {
				continue
			}
			s := spot{p: p, expert: e, part: at.part, parts: at.parts}
			return s, s.fits()
		}
		own := fmt.Sprintf("%s.%d.", name, e)
		for _, end := range []string{proj, ofMixtral[proj], usual[proj]} {
			if p := b.params[own+end+".weight"]; p != nil && end != "" {
				return whole(p), true
			}
		}
	}
	return spot{}, false
}

// switchStack is the stack of experts that MLX calls "….switch_mlp.gate_proj".
func switchStack(name string) (stack, proj string, ok bool) {
	at, proj := cutLast(name)
	block, ok := strings.CutSuffix(at, ".switch_mlp")
	if _, known := projections[proj]; !ok || !known {
		return "", "", false
	}
	return block + ".experts", proj, true
}

func cutLast(name string) (before, last string) {
	i := strings.LastIndexByte(name, '.')
	return name[:max(i, 0)], name[i+1:]
}

// expertSpots finds where each expert of a stack of MLX is.
func (b *binder) expertSpots(m *Module) ([]spot, error) {
	stack, proj, ok := switchStack(m.Name)
	if !ok {
		return nil, fmt.Errorf("module %s: %w: a stack of experts of that name; known are switch_mlp.gate_proj, up_proj, "+
			"down_proj", tensor.Quote(m.Name), ErrUnsupported)
	}
	var list []spot
	for e := range m.Experts {
		s, ok := b.stackSpot(stack, e, proj)
		if !ok {
			return nil, fmt.Errorf("module %s: %w: it has %d experts, and the base has no expert %d of %s", tensor.Quote(m.Name),
				ErrBase, m.Experts, e, tensor.Quote(stack))
		}
		list = append(list, s)
	}
	if p := list[0].p; p.experts > 0 && p.experts != m.Experts {
		return nil, fmt.Errorf("module %s: %w: it has %d experts, and %s has %d", tensor.Quote(m.Name), ErrBase, m.Experts,
			tensor.Quote(p.name), p.experts)
	}
	return list, nil
}

// What EncodeOptions.Experts may be.
const (
	keepExperts  = "keep"
	fusedExperts = "fused"
	perExpert    = "per-expert"
)

// ExpertChoices lists what EncodeOptions.Experts may be.
func ExpertChoices() []string { return []string{keepExperts, perExpert, fusedExperts} }

// apart returns the modules of an adapter with every stack of experts taken apart into modules of single experts,
// which view the stack's tensors.
func (a *Adapter) apart() ([]*Module, error) {
	if err := a.placed(); err != nil {
		return nil, err
	}
	if err := a.plain(); err != nil {
		return nil, err
	}
	stacks, err := a.stacks()
	if err != nil {
		return nil, err
	}
	of := map[*Module]stack{}
	for _, s := range stacks {
		of[s.Module] = s
	}
	var list []*Module
	for _, m := range a.Modules {
		s, ok := of[m]
		switch {
		case ok:
			parts, err := s.apart(a.mixtral())
			if err != nil {
				return nil, fmt.Errorf("module %s: %w", tensor.Quote(m.Name), err)
			}
			list = append(list, parts...)
		case m.Experts > 0:
			block, proj, ok := switchStack(m.Name)
			if !ok {
				return nil, fmt.Errorf("module %s: %w: a stack of experts of that name", tensor.Quote(m.Name), ErrUnsupported)
			}
			for e := range m.Experts {
				x := m.single(block, e, proj, strings.Contains(block, ".block_sparse_moe."))
				x.A, x.B = m.expert(e, m.Experts)
				list = append(list, x)
			}
		default:
			list = append(list, m)
		}
	}
	return list, nil
}

// perExpert is apart where the names of single experts are written.
func (a *Adapter) perExpert() ([]*Module, error) {
	stacks, err := a.stacks()
	if err != nil {
		return nil, err
	}
	for _, s := range stacks {
		if s.param != "gate_up_proj" {
			continue
		}
		if err := a.gateBeforeUp(s); err != nil {
			return nil, err
		}
	}
	return a.apart()
}

// singles returns the modules of an adapter for a dialect that has no stacks of experts: taken apart where that is
// asked for.
func (a *Adapter) singles(dialect, experts string) ([]*Module, error) {
	if experts == fusedExperts {
		return nil, fmt.Errorf("%w: a %s adapter has no place for fused experts", ErrUnsupported, dialect)
	}
	if experts == perExpert {
		return a.perExpert()
	}
	stacks, err := a.stacks()
	if err != nil {
		return nil, err
	}
	apart := hint.Hint{Option: "Experts", Value: perExpert, Effect: "takes it apart"}
	for _, s := range stacks {
		return nil, noPlace(s.Module, "a stack of experts", dialect, apart)
	}
	for _, m := range a.Modules {
		if m.Experts > 0 {
			return nil, noPlace(m, "a stack of experts", dialect, apart)
		}
	}
	return a.Modules, nil
}

// single is a module of one expert, but for its factors.
func (m *Module) single(stack string, e int64, proj string, mixtral bool) *Module {
	if mixtral {
		stack, proj = strings.Replace(stack, ".mlp.", ".block_sparse_moe.", 1), ofMixtral[proj]
	}
	return &Module{Name: fmt.Sprintf("%s.%d.%s", stack, e, proj), Param: "weight", Rank: m.Rank, Alpha: m.Alpha,
		Scaling: m.Scaling}
}

// apart makes modules of single experts. A gate_up_proj whose factors were put together of those of gate and up, which
// never mix, falls into what it was.
func (s stack) apart(mixtral bool) ([]*Module, error) {
	parts := []string{s.param}
	_, end := cutLast(s.Name)
	switch {
	case end != "experts":
		return nil, fmt.Errorf("%w: a stack of experts of that name, expected experts", ErrUnsupported)
	case s.Magnitude != nil:
		return nil, fmt.Errorf("%w: DoRA on experts", ErrUnsupported)
	case s.param == "gate_up_proj":
		parts = []string{"gate_proj", "up_proj"}
	case s.param != "down_proj" && (s.param != "up_proj" || !ungated(s.layouts)):
		return nil, fmt.Errorf("%w: the experts of %s; known are gate_up_proj and down_proj", ErrUnsupported,
			tensor.Quote(s.param))
	}
	rewritten, err := s.rewritten()
	if err != nil {
		return nil, err
	}
	n, joined := int64(len(parts)), false
	if _, b := s.expert(0); n == 2 {
		if b.Rows%2 != 0 {
			return nil, fmt.Errorf("%w: its lora_B %v has an odd number of outputs, which are no gate and up", ErrMalformed, s.B)
		}
		if joined, err = s.joined(); err != nil {
			return nil, err
		}
	}
	var list []*Module
	for e := range s.experts {
		a, b := s.expert(e)
		for i, proj := range parts {
			out := b.Rows / n
			m := s.single(s.Name, e, proj, mixtral)
			m.turned = rewritten == transposed
			m.A, m.B = a, b.rows(int64(i)*out, int64(i+1)*out)
			if r := a.Rows / 2; joined {
				m.A, m.B = a.rows(int64(i)*r, int64(i+1)*r), m.B.cols(int64(i)*r, int64(i+1)*r)
				m.Rank, m.Alpha = m.Rank/2, m.Alpha/2
			}
			list = append(list, m)
		}
	}
	return list, nil
}

// joined reports whether, for every expert, the first half of the rank serves gate alone and the second one up.
func (s stack) joined() (bool, error) {
	if s.Rank%2 != 0 {
		return false, nil
	}
	read := reader{}
	for e := range s.experts {
		_, b := s.expert(e)
		half, r := b.Rows/2, b.Cols/2
		for _, off := range []Matrix{b.rows(0, half).cols(r, 2*r), b.rows(half, 2*half).cols(0, r)} {
			m, err := read.matrix(off)
			if err != nil {
				return false, err
			}
			for i := range m.Rows {
				for j := range m.Cols {
					if m.Data[i*m.RowStride+j*m.ColStride] != 0 {
						return false, nil
					}
				}
			}
		}
	}
	return true, nil
}

// evenRanks gives all modules of single experts one rank, by rows and columns of zeros, and one scaling: a stack has
// one, and PEFT and those that serve single experts look for one.
func evenRanks(modules []*Module) ([]*Module, error) {
	var first *Module
	var experts []*Module
	rank := 0
	for _, m := range modules {
		if _, _, _, ok := splitExpert(m.Name); ok && m.A.T != nil {
			if first == nil {
				first = m
			}
			rank = max(rank, m.Rank)
			experts = append(experts, m)
		}
	}
	if err := paddable(experts, int64(rank)); err != nil {
		return nil, err
	}
	list := slices.Clone(modules)
	for i, m := range list {
		if m == nil {
			continue
		}
		if _, _, _, ok := splitExpert(m.Name); !ok || m.A.T == nil || m.Rank == rank && m.Scaling == first.Scaling {
			continue
		}
		n := *m
		n.A, n.B = padded(m.A, int64(rank)), scaled(padded(m.B.Transposed(), int64(rank)).Transposed(),
			ratio(m.Scaling, first.Scaling))
		n.Rank, n.Scaling, n.Alpha = rank, first.Scaling, first.Scaling*float64(rank)
		list[i] = &n
	}
	return list, nil
}

// What filling factors with zeros may make of an adapter: mostPadded elements of one factor, and of all mostPadding
// times those that it has. A few megabytes with one huge rank would be terabytes.
const (
	mostPadded  = 1 << 28
	mostPadding = 64
)

// paddable refuses modules that would become too large at the rank.
func paddable(modules []*Module, rank int64) error {
	var have, want int64
	for _, m := range modules {
		if m.A.T == nil {
			continue
		}
		side := max(m.A.Cols, m.B.Rows)
		if int64(m.Rank) < rank && side > mostPadded/rank {
			return fmt.Errorf("module %s: %w: it has the rank %d, and filled with zeros to %d, the largest of the adapter, a "+
				"factor has more than %d elements", tensor.Quote(m.Name), ErrUnsupported, m.Rank, rank, mostPadded)
		}
		have, want = have+int64(m.Rank)*(m.A.Cols+m.B.Rows), want+rank*(m.A.Cols+m.B.Rows)
	}
	if want > mostPadded && want/mostPadding > have {
		return fmt.Errorf("%w: filled with zeros to %d, the largest of its ranks, it has %d elements instead of %d",
			ErrUnsupported, rank, want, have)
	}
	return nil
}

// family is the experts of one block: modules of single experts by projection.
type family struct {
	name  string // "model.layers.0.mlp.experts"
	older bool   // it has Mixtral's names of projections, and so may the block
	projs map[string][]*Module
	// ungated says that its model has experts without a gate: up_proj is a stack of its own.
	ungated bool
}

// families gathers modules of single experts, and returns the others. Each projection has to be there for every
// expert, in one shape; what has a smaller rank is filled with zeros.
func (a *Adapter) families(modules []*Module) (list []*family, rest []*Module, err error) {
	byName := map[string]*family{}
	most := map[string]int64{}
	for _, m := range modules {
		name, e, proj, ok := splitExpert(m.Name)
		if !ok || m.Param != "weight" {
			rest = append(rest, m)
			continue
		}
		if m.Form != Linear || m.Magnitude != nil {
			return nil, nil, fmt.Errorf("module %s: %w: DoRA or another form than linear on an expert", tensor.Quote(m.Name),
				ErrUnsupported)
		}
		u, older := usual[proj]
		if older {
			proj = u
		}
		f := byName[name]
		if f == nil {
			f = &family{name: name, older: older, projs: map[string][]*Module{}, ungated: ungated(a.layouts(name))}
			byName[name] = f
			list = append(list, f)
		}
		if e >= int64(len(modules)) {
			return nil, nil, fmt.Errorf("module %s: %w: expert %d, and not all before it are there; a stack has all of them",
				tensor.Quote(m.Name), ErrUnsupported, e)
		}
		for int64(len(f.projs[proj])) <= e {
			f.projs[proj] = append(f.projs[proj], nil)
		}
		if f.projs[proj][e] != nil {
			return nil, nil, fmt.Errorf("module %s: %w: the expert is there twice", tensor.Quote(m.Name), ErrMalformed)
		}
		f.projs[proj][e] = m
		most[name] = max(most[name], e+1)
	}
	for _, f := range list {
		for _, proj := range []string{"gate_proj", "up_proj", "down_proj"} {
			experts := f.projs[proj]
			if experts == nil {
				continue
			}
			if i := slices.Index(experts, nil); i >= 0 || int64(len(experts)) < most[f.name] {
				if i < 0 {
					i = len(experts)
				}
				return nil, nil, fmt.Errorf("module %s: %w: it has %d experts, and number %d has no %s; a stack has all of them",
					tensor.Quote(f.name), ErrUnsupported, most[f.name], i, proj)
			}
			if experts, err = evenRanks(experts); err != nil {
				return nil, nil, err
			}
			f.projs[proj] = experts
			for _, m := range experts[1:] {
				if x := experts[0]; m.A.Cols != x.A.Cols || m.B.Rows != x.B.Rows {
					return nil, nil, fmt.Errorf("module %s: %w: lora_A %v and lora_B %v, where expert 0 has %v and %v; a stack has "+
						"one shape", tensor.Quote(m.Name), ErrUnsupported, m.A, m.B, x.A, x.B)
				}
			}
		}
	}
	return list, rest, nil
}

// fuse makes of a family the modules for the parameters that hold all its experts, as PEFT has them: gate and up get
// blocks of one matrix, unless they share their A. down_proj is the last parameter of every model.
func (f *family) fuse() ([]*Module, error) {
	name := f.name
	if f.older {
		name = runtimeBlock(name)
	}
	gate, up, down := f.projs["gate_proj"], f.projs["up_proj"], f.projs["down_proj"]
	var list []*Module
	switch {
	case f.ungated && gate != nil:
		return nil, fmt.Errorf("module %s: %w: gate_proj, and the experts of its model have no gate",
			tensor.Quote(f.name), ErrUnsupported)
	case f.ungated && up != nil:
		list = append(list, stacked(name, "up_proj", up, nil, false))
	case gate != nil || up != nil:
		if gate == nil || up == nil {
			return nil, fmt.Errorf("module %s: %w: only one of gate_proj and up_proj; the stack holds both in one matrix, "+
				"whose other half it does not tell the size of", tensor.Quote(f.name), ErrUnsupported)
		}
		if gate[0].A.Cols != up[0].A.Cols || gate[0].B.Rows != up[0].B.Rows {
			return nil, fmt.Errorf("module %s: %w: gate_proj %v, %v and up_proj %v, %v differ in size", tensor.Quote(f.name),
				ErrUnsupported, gate[0].A, gate[0].B, up[0].A, up[0].B)
		}
		shared, err := sharedA(gate, up)
		if err != nil {
			return nil, err
		}
		list = append(list, stacked(name, "gate_up_proj", gate, up, shared))
	}
	if down != nil {
		for _, m := range list {
			m.WrapDepth = 1
		}
		list = append(list, stacked(name, "down_proj", down, nil, false))
	}
	return list, nil
}

// sharedA reports whether gate and up have the same A for every expert, as they have when they were taken from one
// stack.
func sharedA(gate, up []*Module) (bool, error) {
	read := reader{}
	for e := range gate {
		g, u := gate[e], up[e]
		if g.Rank != u.Rank || g.Scaling != u.Scaling {
			return false, nil
		}
		if g.A == u.A {
			continue
		}
		x, err := read.matrix(g.A)
		if err != nil {
			return false, err
		}
		y, err := read.matrix(u.A)
		if err != nil {
			return false, err
		}
		if !equal(x, y) {
			return false, nil
		}
	}
	return true, nil
}

// stacked is the module of all experts' first matrices and, where there is one, of second ones below them. Without a
// shared A the two have ranks of their own. The scaling is that of the first module, others' B take what differs.
func stacked(name, param string, first, second []*Module, shared bool) *Module {
	x, n := first[0], int64(len(first))
	rank, out := int64(x.Rank), x.B.Rows
	if second != nil {
		out *= 2
		if !shared {
			rank += int64(second[0].Rank)
		}
	}
	in := x.A.Cols
	m := &Module{Name: name, Param: param, Rank: int(rank), Scaling: x.Scaling, Alpha: x.Scaling * float64(rank),
		Experts: n}
	makeA := func() ([]float32, error) {
		v, read := make([]float32, n*rank*in), reader{}
		for e := range n {
			at := v[e*rank*in:]
			for _, list := range [][]*Module{first, second} {
				if list == nil || shared && &list[0] != &first[0] {
					continue
				}
				a, err := read.matrix(list[e].A)
				if err != nil {
					return nil, err
				}
				for i := range a.Rows {
					for j := range a.Cols {
						at[i*a.Cols+j] = a.Data[i*a.RowStride+j*a.ColStride]
					}
				}
				at = at[a.Rows*a.Cols:]
			}
		}
		return v, nil
	}
	makeB := func() ([]float32, error) {
		width := rank * n
		v, read := make([]float32, out*width), reader{}
		for e := range n {
			row, col := int64(0), int64(0)
			for _, list := range [][]*Module{first, second} {
				if list == nil {
					continue
				}
				b, err := read.matrix(list[e].B)
				if err != nil {
					return nil, err
				}
				more := float32(list[e].Scaling / x.Scaling)
				if list[e].Scaling == x.Scaling {
					more = 1
				}
				for i := range b.Rows {
					for j := range b.Cols {
						v[(row+int64(i))*width+(col+int64(j))*n+e] = b.Data[i*b.RowStride+j*b.ColStride] * more
					}
				}
				row += int64(b.Rows)
				if !shared {
					col += int64(b.Cols)
				}
			}
		}
		return v, nil
	}
	m.A = matrixOf(computedTensor(x.A.T, makeA, n*rank, in))
	m.B = matrixOf(computedTensor(x.B.T, makeB, out, rank*n))
	if x.turned {
		m.A, m.B = turnedStack(m.A, m.B, n)
	}
	return m
}

// turnedStack makes of A and B of a stack of n experts those of the matrices the other way round.
func turnedStack(a, b Matrix, n int64) (Matrix, Matrix) {
	m := &Module{A: a, B: b}
	rank := a.Rows / n
	makeA := func() ([]float32, error) {
		v, read := make([]float32, 0, n*rank*b.Rows), reader{}
		for e := range n {
			_, x := m.expert(e, n)
			of, err := read.matrix(x.Transposed())
			if err != nil {
				return nil, err
			}
			for i := range of.Rows {
				for j := range of.Cols {
					v = append(v, of.Data[i*of.RowStride+j*of.ColStride])
				}
			}
		}
		return v, nil
	}
	makeB := func() ([]float32, error) {
		v, read := make([]float32, n*rank*a.Cols), reader{}
		for e := range n {
			x, _ := m.expert(e, n)
			of, err := read.matrix(x.Transposed())
			if err != nil {
				return nil, err
			}
			for i := range of.Rows {
				for j := range of.Cols {
					v[(int64(i)*rank+int64(j))*n+e] = of.Data[i*of.RowStride+j*of.ColStride]
				}
			}
		}
		return v, nil
	}
	return matrixOf(computedTensor(a.T, makeA, n*rank, b.Rows)), matrixOf(computedTensor(b.T, makeB, a.Cols, rank*n))
}
