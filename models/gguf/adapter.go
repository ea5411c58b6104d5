package gguf

import (
	"fmt"
	"strings"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// Adapters says where the factors of LoRA adapters for one base stand in GGUF, and the way back. A factor that is for
// the inputs of a weight stands as it is; one that is for its outputs has its rows in the order that the weight has
// them in GGUF. A weight that is stored turned round (Conv1D) has the factors of its function all the same, and so no
// operation that turns concerns them.
type Adapters struct {
	*architecture
	class      *class
	settings   *settings
	layers     int64
	vocabulary func(architecture string) (int64, error)
	tied       bool // the base has no head of its own
	base       map[string]baseTensor
}

// baseTensor is what of a base's checkpoint is a tensor of its GGUF file, where it is one by itself.
type baseTensor struct {
	parameter string // of the running model
	shape     tensor.Shape
}

// NewAdapters reads what a base's config says of its adapters. tensors are those of its checkpoint, which tell more of
// the names and the shapes; nil where they are not at hand. vocabulary, which may be nil, says the same as that of
// Options, and is asked where an architecture's embedding is cut.
func NewAdapters(c *models.Config, tensors []tensor.Info,
	vocabulary func(architecture string) (int64, error)) (*Adapters, error) {
	if c == nil {
		return nil, malformedf("found no config.json, which tells the names in GGUF")
	}
	a, cl, err := forClass(c.Architecture)
	if err != nil {
		return nil, fmt.Errorf("config.json: %w", err)
	}
	s, err := newSettings(c, cl)
	if err != nil {
		return nil, err
	}
	m := &Adapters{architecture: a, class: cl, settings: s, vocabulary: vocabulary}
	if m.layers, err = s.whole(a.layers()); err != nil {
		return nil, err
	}
	model, _ := models.Load(c)
	m.learn(model, tensors)
	const head = "lm_head.weight"
	if r, _, _, known := a.find(head); known && r != nil {
		_, stored := m.base["output.weight"]
		m.tied = s.dropped(r) || !stored && (tensors != nil || model.Tensor(head, tensor.Shape{1, 1}).Tied != "")
	}
	return m, nil
}

// learn notes the tensors of the base's checkpoint that are one in GGUF too.
func (m *Adapters) learn(model *models.Model, tensors []tensor.Info) {
	m.base = map[string]baseTensor{}
	for _, t := range tensors {
		r, n, end, known := m.architecture.find(t.Name)
		if !known || r == nil || len(r.names) != 1 || r.has(stack) {
			continue
		}
		b := baseTensor{fill(r.module, n.layer, n.index) + end, t.Shape}
		if parts := model.Tensor(t.Name, t.Shape).Runtime; len(parts) == 1 && parts[0].Whole() {
			b.parameter = parts[0].Param
		}
		m.base[fill(r.names[0], n.layer, n.index)+end] = b
	}
}

// Architecture is general.architecture.
func (m *Adapters) Architecture() string { return m.Name }

// Place is a tensor of the base's GGUF file that a parameter of the model is in.
type Place struct {
	Tensor string // "blk.0.attn_q.weight"
	// Count is how many are stacked in it, of which the parameter is number Index; 0 where none are.
	Count, Index int64
	// Rows are the rows of the parameter that are there, in order; nil where all are, in theirs.
	Rows []int64
}

// Places says where a parameter is whose matrix, or each of a stack, has so many rows, which are the outputs of a
// linear layer: in one tensor, or a part in each of several. One that adapters cannot be written for is an error, as
// is one that the base has not.
func (m *Adapters) Places(parameter string, rows int64) ([]Place, error) {
	r, n, end, known := m.architecture.find(parameter)
	if !known {
		r, n, end, known = m.below(parameter)
	}
	switch {
	case !known, end == ".bias":
		return nil, unsupportedf("found a parameter that %s has no place for in GGUF", m.class.Name)
	case r == nil:
		return nil, unsupportedf("found a part of the model that has no place in its GGUF file")
	case int64(n.layer) >= m.layers && strings.Contains(r.module, "#"):
		return nil, malformedf("found layer %d, expected layers below %d", n.layer, m.layers)
	}
	var list []Place
	for part, pattern := range r.names {
		p := Place{Tensor: fill(pattern, n.layer, n.index) + end}
		var err error
		if err = m.check(r, p.Tensor, parameter); err != nil {
			return nil, err
		}
		if p.Rows, err = m.rows(r, part, rows); err != nil {
			return nil, err
		}
		if r.has(stack) {
			if p.Count, err = m.settings.whole(r.numbersOf(stack)[0]); err != nil {
				return nil, err
			}
			if p.Index = int64(n.index); p.Index >= p.Count {
				return nil, malformedf("found number %d, expected numbers below %d", p.Index, p.Count)
			}
		}
		list = append(list, p)
	}
	return list, nil
}

// below finds a parameter of a model that an adapter was made for without what is around it, such as its head: the
// names of its modules are the ends of those that the class has.
func (m *Adapters) below(parameter string) (*row, numbered, string, bool) {
	var found []string
	for _, r := range m.Rows {
		if first, rest, inner := strings.Cut(r.module, "."); inner && len(r.names) > 0 {
			name := first + "." + parameter
			if n, ok := split(name); ok && (n.pattern == r.module || strings.TrimSuffix(n.pattern, ending(n.pattern)) ==
				first+"."+rest) {
				found = append(found, name)
			}
		}
	}
	if len(found) != 1 {
		return nil, numbered{}, "", false
	}
	return m.architecture.find(found[0])
}

// check refuses what llama.cpp has no adapters of.
func (m *Adapters) check(r *row, name, parameter string) error {
	switch {
	case name == "output.weight" && m.tied:
		return unsupportedf("found an adapter of the output head, and the base has none: it is tied to the embedding")
	case r.has(splitHeads):
		return unsupportedf("found an adapter of a weight that GGUF has in two parts, one of them turned round")
	case r.has(mxfp4Blocks), r.has(mxfp4Scales):
		return unsupportedf("found an adapter of blocks of MXFP4")
	case m.PlusOne != "" && strings.HasSuffix(parameter, m.PlusOne):
		return unsupportedf("found an adapter of a norm that has 1 added in GGUF")
	}
	return nil
}

// rows is the order in which a part of a row has the rows of a checkpoint's matrix; nil where it has all in theirs.
func (m *Adapters) rows(r *row, part int, count int64) ([]int64, error) {
	if count < 1 || count > maxRows {
		return nil, unsupportedf("found %d rows, expected 1 to %d", count, maxRows)
	}
	v := whole(tensor.Shape{count, 1})
	for _, op := range r.ops {
		var err error
		vocabulary := int64(0)
		switch {
		case op.kind == transpose:
			continue
		case op.kind == cutRows && m.vocabulary != nil:
			if vocabulary, err = m.vocabulary(m.Name); err != nil {
				return nil, err
			}
		}
		if v, err = op.apply(v, part, len(r.names), vocabulary, m.settings.whole); err != nil {
			return nil, err
		}
	}
	rows := v.placed(0)
	if rows.Plain() && rows.From == 0 && rows.Count() == count {
		return nil, nil
	}
	list := make([]int64, 0, rows.Count())
	for from := range rows.Elements() {
		list = append(list, from)
	}
	return list, nil
}

// maxRows is more than any matrix has.
const maxRows = 1 << 28

// Shape is that of a matrix of the base as a function (out, in), nil where it is not known.
func (m *Adapters) Shape(name string) tensor.Shape {
	b, ok := m.base[name]
	if !ok || len(b.shape) != 2 {
		return nil
	}
	if p, n, _, ok := m.named(name); ok && n.index < 0 && p.row.has(transpose) {
		return b.shape.Transposed()
	}
	return b.shape
}

// Parameter is what a tensor of the base's GGUF file is in the model.
type Parameter struct {
	// Names are that of the parameter, or those of all whose stack the tensor is.
	Names []string
	// Rows are the rows of the tensor that the parameter has, in order; nil where they are all in theirs.
	Rows []int64
	// Height is how many rows the parameter has, where GGUF has had those cut off that are past its vocabulary; else 0.
	Height int64
	// Turned says that the checkpoint has the weight the other way round, as a Conv1D.
	Turned bool
}

// named is the row of a tensor of the base's GGUF file.
func (m *Adapters) named(name string) (place, numbered, string, bool) {
	return (&restorer{architecture: m.architecture}).find(name)
}

// Parameter is the inverse of Places, for a tensor of the base's GGUF file that has so many rows, in each of a stack of
// count where that is not 0.
func (m *Adapters) Parameter(name string, count, rows int64) (Parameter, error) {
	p, n, end, ok := m.named(name)
	switch {
	case !ok:
		return Parameter{}, unsupportedf("found a tensor that %s has no place for", m.class.Name)
	case n.layer >= 0 && int64(n.layer) >= m.layers:
		return Parameter{}, malformedf("found layer %d, expected layers below %d", n.layer, m.layers)
	}
	x := Parameter{Turned: p.row.has(transpose)}
	parameter := fill(p.row.module, n.layer, 0) + end
	if err := m.check(p.row, name, parameter); err != nil {
		return Parameter{}, err
	}
	if len(p.row.names) > 1 || p.row.entire() && p.row.has(transpose) {
		return Parameter{}, unsupportedf("found an adapter of the experts of %s, whose tensors have gate and up in turns "+
			"and lie the other way round: it is written and not read", m.class.Name)
	}
	var err error
	if p.row.has(cutRows) {
		if s := m.base[name].shape; len(s) > 0 {
			x.Height = s[0]
		} else if x.Height, err = m.settings.whole("vocab_size"); err != nil {
			return Parameter{}, err
		}
	} else if x.Rows, err = m.rows(p.row, p.part, rows); err != nil {
		return Parameter{}, err
	}
	x.Rows = inverse(x.Rows)
	expected := int64(0)
	if p.row.has(stack) {
		if expected, err = m.settings.whole(p.row.numbersOf(stack)[0]); err != nil {
			return Parameter{}, err
		}
	}
	if count != expected || count > maxNumber {
		return Parameter{}, malformedf("found %s, expected %s", stackOf(count), stackOf(min(expected, maxNumber)))
	}
	for k := range max(count, 1) {
		x.Names = append(x.Names, fill(p.row.module, n.layer, int(k))+end)
	}
	if b := m.base[name]; b.parameter != "" && count == 0 {
		x.Names[0] = b.parameter
	}
	return x, nil
}

// inverse is the order that undoes another; nil undoes nil.
func inverse(order []int64) []int64 {
	if order == nil {
		return nil
	}
	list := make([]int64, len(order))
	for i, from := range order {
		list[from] = int64(i)
	}
	return list
}

func stackOf(count int64) string {
	if count == 0 {
		return "one matrix"
	}
	return fmt.Sprintf("a stack of %d", count)
}
