package train

import (
	"fmt"
	"slices"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/tensor"
)

// network is a model whose parameters are bound: to a checkpoint, and to what an adapter does to them.
type network struct {
	*spec
	base      *checkpoint.Checkpoint // nil where only sizes count
	adapter   *adapter               // nil where there is none
	params    map[string]*checkpoint.Parameter
	embedding *lookup
	positions *lookup // of learned positions, or nil
	blocks    []*block
	finalNorm *normal
	head      *heading
	unused    []string // parameters of the file that have no part in the model
}

// bind finds the parameters of a model in a checkpoint. Each has to be there, in the shape that its config gives it.
func bind(c *checkpoint.Checkpoint, sp *spec) (*network, error) {
	n := &network{spec: sp, base: c, params: map[string]*checkpoint.Parameter{}}
	names := c.Parameters()
	if own := sp.head.module + ".weight"; sp.tied && slices.Contains(names, own) {
		sp.tied = false // as transformers has it
	}
	wanted := map[string]bool{}
	for _, p := range sp.parameters() {
		wanted[p.name] = true
		have, err := c.Runtime(p.name)
		if err != nil {
			return nil, err
		}
		if !slices.Equal(have.Shape, p.shape) {
			w := have.Pieces[0].Weight
			return nil, fmt.Errorf("%s: tensor %s: %w: the shape of parameter %s is %v, expected %v by config.json",
				w.Parts[0].File, tensor.Quote(w.Name), checkpoint.ErrRefused, tensor.Quote(p.name), have.Shape, p.shape)
		}
		n.params[p.name] = have.Exact()
	}
	for _, name := range names {
		if !wanted[name] {
			n.unused = append(n.unused, name)
		}
	}
	return n, nil
}

// build makes the layers, with what the adapter, which may be nil, does to them.
func (n *network) build(length int) error {
	n.embedding = n.lookup(n.spec.embedding, n.vocab, n.spec.embedScale)
	n.embedding.padding = n.padToken
	if n.spec.positions != "" {
		n.positions = n.lookup(n.spec.positions, n.maxPositions, 1)
		n.positions.padding = -1
	}
	n.blocks = nil
	made := map[*rotary]*turns{}
	for i := range n.layers {
		b, err := n.block(&n.layers[i], made, length)
		if err != nil {
			return err
		}
		n.blocks = append(n.blocks, b)
	}
	var err error
	if n.finalNorm, err = n.normal(&n.spec.finalNorm); err != nil {
		return err
	}
	p, err := n.projection(&n.spec.head)
	if err != nil {
		return err
	}
	n.head = &heading{projection: p, scale: n.logitScale, softCap: n.logitCap}
	return nil
}

// adaptation is what the adapter does to a parameter, or nil.
func (n *network) adaptation(param string) *adaptation {
	if n.adapter == nil {
		return nil
	}
	return n.adapter.params[param]
}

// parameter is a parameter as it is used: that of the base, or of two ends of a tie the one that the base has, unless
// the adapter brings another value.
func (n *network) parameter(name string) *checkpoint.Parameter {
	if a := n.adaptation(name); a != nil && a.copied != nil {
		return checkpoint.ParameterOf(a.copied)
	}
	if name == n.spec.head.module+".weight" && n.tied {
		name = n.spec.embedding + ".weight"
	}
	return n.params[name]
}

// source is the matrix of a parameter as it is used, whose frozen values are base. Its rows have cols elements.
func (n *network) source(param string, base *checkpoint.Parameter, cols int) source {
	from := source(decoded{base.Matrix(0)})
	if a := n.adaptation(param); a != nil {
		if a.value != nil {
			from = held{a.value, cols}
		}
		if a.rows != nil {
			from = &patched{from, a, cols}
		}
	}
	return from
}

func (n *network) lookup(module string, rows int, factor float32) *lookup {
	param := module + ".weight"
	l := &lookup{module: module, rows: rows, width: n.hidden, factor: factor}
	if n.base != nil {
		l.table = n.source(param, n.parameter(param), n.hidden)
	}
	if a := n.adaptation(param); a != nil {
		l.whole, l.some, l.indices, l.low = a.value, a.rows, a.indices, a.plain
		if a.plain != nil && a.plain.magnitude != nil {
			l.norms = make([]float32, n.hidden)
		}
	}
	return l
}

// vector reads a parameter that is small, which is kept.
func (n *network) vector(param string) ([]float32, error) {
	if n.base == nil {
		return nil, nil
	}
	m := n.parameter(param).Matrix(0)
	rows, cols := m.Dims()
	v := make([]float32, rows*cols)
	return v, m.ReadRows(v, 0, rows)
}

func (n *network) projection(l *linear) (*projection, error) {
	if l == nil {
		return nil, nil
	}
	p := &projection{linear: *l, turned: l.conv}
	param := l.module + ".weight"
	base := n.parameter(param)
	a := n.adaptation(param)
	if a == nil {
		a = &adaptation{}
	}
	if n.base != nil && base.Turned() && a.value == nil && a.rows == nil {
		base, p.turned = base.T(), !p.turned // it is read as it lies
	}
	cols := l.in
	if p.turned {
		cols = l.out
	}
	if n.base != nil {
		p.weight = n.source(param, base, cols)
	}
	p.whole, p.rows, p.indices, p.low = a.value, a.rows, a.indices, a.plain
	if a.plain != nil && a.plain.magnitude != nil {
		p.norms = make([]float32, l.out)
	}
	if a.rows != nil {
		return p, nil // PEFT's layer of trained tokens multiplies by the matrix and leaves out the bias
	}
	if a := n.adaptation(l.module + ".bias"); a != nil {
		p.biasWhole, p.biasAdded, p.biasScale = a.value, a.bias, a.biasScale
	}
	if !l.bias {
		return p, nil
	}
	var err error
	p.bias, err = n.vector(l.module + ".bias")
	return p, err
}

func (n *network) normal(o *norm) (*normal, error) {
	if o == nil {
		return nil, nil
	}
	r := &normal{norm: *o}
	var err error
	if a := n.adaptation(o.module + ".weight"); a != nil {
		r.weightWhole = a.value
	}
	if r.weight, err = n.vector(o.module + ".weight"); err != nil {
		return nil, err
	}
	if o.bias {
		if a := n.adaptation(o.module + ".bias"); a != nil {
			r.biasWhole = a.value
		}
		r.bias, err = n.vector(o.module + ".bias")
	}
	return r, err
}

// maker makes parts of a block until the first error.
type maker struct {
	*network
	err error
}

func (m *maker) linear(l *linear) *projection {
	if m.err != nil {
		return nil
	}
	var p *projection
	p, m.err = m.projection(l)
	return p
}

func (m *maker) norm(o *norm) *normal {
	if m.err != nil {
		return nil
	}
	var r *normal
	r, m.err = m.normal(o)
	return r
}

// heads are the norms of q or k: one, or one a head.
func (m *maker) heads(o *norm, heads int) []*normal {
	if o == nil {
		return nil
	}
	if !o.perHead {
		return []*normal{m.norm(o)}
	}
	list := make([]*normal, heads)
	for i := range list {
		one := *o
		one.module = fmt.Sprintf("%s.norms.%d", o.module, i)
		list[i] = m.norm(&one)
	}
	return list
}

func (n *network) block(l *layer, made map[*rotary]*turns, length int) (*block, error) {
	m := &maker{network: n}
	b := &block{
		layer:           l,
		beforeAttention: m.norm(l.beforeAttention), afterAttention: m.norm(l.afterAttention),
		beforeMLP: m.norm(l.beforeMLP), afterMLP: m.norm(l.afterMLP),
	}
	a := &l.attention
	b.attending = &attending{
		attention: *a, q: m.linear(a.q), k: m.linear(a.k), v: m.linear(a.v), fused: m.linear(a.fused),
		out: m.linear(&a.out), qNorm: m.heads(a.qNorm, a.heads), kNorm: m.heads(a.kNorm, a.keyHeads),
	}
	if a.rotary != nil {
		if made[a.rotary] == nil {
			made[a.rotary] = &turns{}
			if n.base != nil {
				made[a.rotary] = turnsOf(a.rotary, length)
			}
		}
		b.attending.turns = made[a.rotary]
	}
	if f := l.mlp; f != nil {
		b.feeding = &feeding{act: f.act, gate: m.linear(f.gate), up: m.linear(f.up), gateUp: m.linear(f.gateUp),
			down: m.linear(&f.down)}
	}
	if e := l.experts; e != nil {
		b.routing = &routing{experts: *e, router: m.linear(&e.router),
			expert: func(i int) *feeding { return n.expert(e, i) }}
	}
	return b, m.err
}

// adapted lists what is trained, as multiplyAdds counts it.
func (n *network) adapted() []Adapted {
	var list []Adapted
	add := func(module string, in, out int, low *lowRank, whole *trainable) {
		if low != nil {
			list = append(list, Adapted{Name: module, In: in, Out: out, Rank: low.rank})
		}
		if whole != nil {
			list = append(list, Adapted{Name: module, In: in, Out: out})
		}
	}
	for p := range n.projections() {
		add(p.module, p.in, p.out, p.low, p.whole)
	}
	add(n.embedding.module, n.vocab, n.hidden, n.embedding.low, nil)
	for i := range n.layers {
		e := n.layers[i].experts
		if e == nil {
			continue
		}
		for _, x := range []struct {
			param   string
			in, out int
		}{{e.gateUp, e.hidden, 2 * e.width}, {e.down, e.width, e.hidden}} {
			a := n.adaptation(x.param)
			switch {
			case a == nil:
			case a.value != nil:
				list = append(list, Adapted{Name: x.param, In: x.in, Out: x.out, Experts: e.count})
			default:
				for _, low := range a.experts {
					if low != nil { // all have the same rank
						list = append(list, Adapted{Name: x.param, In: x.in, Out: x.out, Rank: low.rank, Experts: e.count})
						break
					}
				}
			}
		}
	}
	return list
}

// expert is one of a stack.
func (n *network) expert(e *experts, i int) *feeding {
	part := func(param string, in, out int) *projection {
		p := &projection{linear: linear{module: fmt.Sprintf("%s[%d]", param, i), in: in, out: out}}
		if n.base != nil {
			p.weight = decoded{n.parameter(param).Matrix(i)}
		}
		if a := n.adaptation(param); a != nil {
			if a.value != nil {
				p.whole = a.value.expert(i, in*out)
				p.weight = held{p.whole, in}
			}
			if a.experts != nil {
				p.low = a.experts[i]
			}
		}
		return p
	}
	return &feeding{act: e.act, gateUp: part(e.gateUp, e.hidden, 2*e.width), down: part(e.down, e.width, e.hidden)}
}

// expert is the part of a stack that is one expert's, of n elements.
func (t *trainable) expert(i, n int) *trainable {
	p := *t
	p.value, p.gradient = t.value[i*n:(i+1)*n], t.gradient[i*n:(i+1)*n]
	return &p
}
