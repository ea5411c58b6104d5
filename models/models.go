// Package models says what a config.json means for the tensors of its checkpoint: which of them are linear layers that
// transformers quantises, which stay in float32, which are tied, and which run-time parameter each of them becomes.
//
// The answers are data, read off the models that transformers builds (see generate), one small file an architecture. A
// run reads one of them, and those of its parts where a model is made of others than by default. An architecture that
// is not there is answered by a general rule over names.
package models

import (
	"slices"
	"strings"
	"sync"

	"github.com/lorakit/lorakit/tensor"
)

// Kind is what a tensor is in its model.
type Kind uint8

// The kinds of tensors.
const (
	Other     Kind = iota // norms, biases, convolutions, tables that are no embedding
	Linear                // the weight of a torch.nn.Linear, (out, in)
	Conv1D                // the weight of transformers' Conv1D, (in, out)
	Embedding             // the table of a torch.nn.Embedding, (rows, width)
	Expert                // a matrix of one expert, or of all experts fused (experts, ...)
	Router                // the matrix of a router that is no torch.nn.Linear
)

var kindNames = [...]string{"other", "linear", "conv1d", "embedding", "expert", "router"}

// String returns the kind's name, such as "linear".
func (k Kind) String() string {
	if int(k) >= len(kindNames) {
		return "unknown"
	}
	return kindNames[k]
}

// Stay says why a linear layer that transformers would quantise by default has to stay as it is all the same. Its
// module then has to be named in the list beside those of Skipped.
type Stay uint8

// The reasons to stay.
const (
	Free Stay = iota // nothing beyond transformers' own defaults
	Raw              // its weight goes raw into a fused kernel (the out_proj of a Mamba-2 mixer)
	// the file holds it in other pieces than the run-time parameter: packed, they could not be put together
	Pieces
)

// Tensor is what is known of one tensor of a checkpoint's file.
type Tensor struct {
	Kind Kind

	// Known is false where the architecture's data has no such parameter: the general rule answered. transformers ignores
	// most such tensors.
	Known bool

	// Quantized reports whether transformers quantises the tensor by default.
	Quantized bool

	// Stay is set where transformers would quantise, but the result would not run or not load; Quantized is false then.
	Stay Stay

	// KeepFloat32 reports that the model loads the tensor in float32 where its dtype is float16; KeepFloat32Strict, where
	// it is float16 or bfloat16.
	KeepFloat32, KeepFloat32Strict bool

	// Tied is the run-time parameter whose values this one shares, or "". A writer leaves the tensor out if the file has
	// that parameter too, with the same values; with others, transformers keeps both apart.
	Tied string

	// Runtime lists what the tensor becomes: one whole parameter as a rule.
	Runtime []Slice

	// Program is what has given the tensor its name, where that is not one of transformers, which does not load it.
	Program string
}

// Slice is the place of a file's tensor in a run-time parameter.
type Slice struct {
	Param  string // name of the run-time parameter
	Expert int    // index into its first dimension, or -1; what follows is about that expert's matrix

	// The tensor is part Part of Parts along dimension Dim of the parameter, all parts in equal size; Parts is 1 for all
	// of it.
	Dim, Part, Parts int

	// The parameter is part FilePart of FileParts along dimension FileDim of the file's tensor; FileParts is 1 for all of
	// it.
	FileDim, FilePart, FileParts int

	// Transposed says that the file has the last two dimensions exchanged.
	Transposed bool

	// Via names the operations of transformers that make the parameter from this tensor (and perhaps others), where they
	// are more than the fields above can say, else "".
	Via string
}

// Shape is the shape of the parameter, or of the expert's matrix, by that of the file's tensor. It is false where the
// tensor has no such dimension or cannot be divided so.
func (s Slice) Shape(file tensor.Shape) (tensor.Shape, bool) {
	shape := slices.Clone(file)
	if s.FileParts > 1 {
		if s.FileDim < 0 || s.FileDim >= len(shape) || shape[s.FileDim]%int64(s.FileParts) != 0 {
			return nil, false
		}
		shape[s.FileDim] /= int64(s.FileParts)
	}
	if n := len(shape); s.Transposed && n >= 2 {
		shape[n-1], shape[n-2] = shape[n-2], shape[n-1]
	}
	if s.Parts > 1 {
		if s.Dim < 0 || s.Dim >= len(shape) {
			return nil, false
		}
		shape[s.Dim] *= int64(s.Parts)
	}
	return shape, true
}

// whole says that a tensor is the parameter.
func whole(param string) Slice {
	return Slice{Param: param, Expert: -1, Parts: 1, FileParts: 1}
}

// Whole reports whether the tensor is the parameter, as it is.
func (s Slice) Whole() bool {
	return s == whole(s.Param)
}

// Model answers for the tensors of one checkpoint.
type Model struct {
	Architecture string // as in config.json, "" where there is none
	Known        bool   // whether the architecture has data here

	data *architecture
	tied map[string]string // abstract target parameter -> abstract source, of the ties that are on
	skip []string          // modules that the ties and the last parameter keep from being quantised

	switches []string // members of the config that tie the head
	width    int64    // hidden_size, or 0

	// parts returns the models that this one is made of. The data has them as the class has them by default; a config may
	// name others.
	parts func() []part
	// answered has the parts that knew a tensor, by what stands before its name.
	answered sync.Map // string -> *Model
}

// part is a model that another is made of, and what its config is called.
type part struct {
	name  string
	model *Model
}

// of reports whether a module is called as the config is: decoder, or text for text_config.
func (p part) of(module string) bool {
	return p.name == module || p.name == module+"_config"
}

// Load finds the data of c's architecture. It returns false where there is none (c may be nil: a file without a
// config.json); the Model answers by the general rule then.
func Load(c *Config) (*Model, bool) {
	if c == nil {
		return &Model{}, false
	}
	m, ok := loadPart(c)
	if !ok {
		return m, false
	}
	// The last parameter stays, of the whole model and of no part.
	if last := m.data.last(c); last != "" {
		m.skip = append(m.skip, last)
	}
	return m, true
}

// loadPart is Load of a model that may be a part of another.
func loadPart(c *Config) (*Model, bool) {
	m := &Model{}
	m.Architecture = c.Architecture
	d, err := read(c.Architecture)
	if err != nil {
		return m, false
	}
	m.Known, m.data = true, d
	for _, path := range []string{"hidden_size", "text_config.hidden_size"} {
		if n, ok := c.count(path); ok {
			m.width = int64(n)
		}
	}
	m.parts = sync.OnceValue(func() []part {
		var parts []part
		for _, s := range c.sections() {
			if model, ok := loadPart(s.config); ok {
				parts = append(parts, part{s.name, model})
			}
		}
		return parts
	})
	m.tied = map[string]string{}
	for _, t := range d.Ties {
		if !c.tied(t) {
			continue
		}
		if _, ok := t.Pairs[d.Head+".weight"]; ok && d.Head != "" {
			m.switches = c.switches(t)
		}
		for target, source := range t.Pairs {
			m.tied[target] = source
			m.skip = append(m.skip, moduleOf(target), moduleOf(source))
		}
	}
	return m, true
}

// Tensor says what the file's tensor of that name and shape is.
func (m *Model) Tensor(name string, shape tensor.Shape) Tensor {
	if t, ok := m.lookUp(name, len(shape)); ok {
		m.turn(t.Runtime, shape)
		return t
	}
	t := rule(name, shape)
	t.Runtime = []Slice{whole(m.renamed(name))}
	return t
}

// turn settles by its shape whether a stack of experts lies as at run time or transposed: transformers
// reads both, and has written both.
func (m *Model) turn(places []Slice, shape tensor.Shape) {
	for i := range places {
		s := &places[i]
		if s.Via != "Transpose" || len(shape) != 3 || m.width == 0 {
			continue
		}
		own := 2 // the dimension that is as wide as the model
		if strings.HasSuffix(s.Param, ".down_proj") {
			own = 1
		}
		switch m.width {
		case shape[own]:
			s.Via = ""
		case shape[3-own]:
			s.Via, s.Transposed = "", true
		}
	}
}

// Module returns the run-time name of the module that the file's tensor belongs to: "model.layers.0.mlp.up_proj" for
// its weight.
func (m *Model) Module(name string) string {
	if t, ok := m.lookUp(name, anyRank); ok {
		return moduleOf(t.Runtime[0].Param)
	}
	return moduleOf(m.renamed(name))
}

// lookUp answers from the data of the class, or else of what it is made of.
func (m *Model) lookUp(name string, rank int) (Tensor, bool) {
	if t, ok := m.ownTensor(name, rank); ok || m.data == nil {
		return t, ok
	}
	return m.inPart(m.renamed(name), rank)
}

// ownTensor is lookUp without the models that are parts of this one.
func (m *Model) ownTensor(name string, rank int) (Tensor, bool) {
	if m.data == nil {
		return Tensor{}, false
	}
	for v := range m.data.variants(name) {
		if t, ok := m.find(v, rank); ok {
			return t, true
		}
	}
	for v := range m.data.variants(name) {
		if t, ok := m.stacked(v); ok && (rank == 3 || rank == anyRank) {
			return t, true
		}
	}
	return Tensor{}, false
}

// Has reports whether the architecture has a tensor of that name and rank of its own. Unlike Tensor it does not look
// into the models that are parts of it, whose names may stand behind any other.
func (m *Model) Has(name string, rank int) bool {
	_, ok := m.ownTensor(name, rank)
	return ok
}

// renamed is the run-time name of a tensor that the data does not have.
func (m *Model) renamed(name string) string {
	if m.data == nil {
		return name
	}
	n := split(name)
	for _, rules := range []table[string]{m.data.renamed, m.data.older} {
		if to := rename(n, rules); to != name {
			return to
		}
	}
	return name
}

// inPart looks for a run-time name in the parts.
func (m *Model) inPart(name string, rank int) (Tensor, bool) {
	var found Tensor
	var of *Model
	prefix, ok := m.eachPart(name, func(part *Model, rest string) bool {
		t, ok := part.lookUp(rest, rank)
		if ok {
			found, of = t, part
		}
		return ok
	})
	if !ok {
		return Tensor{}, false
	}
	m.answered.LoadOrStore(prefix, of)
	return found.below(prefix), true
}

// eachPart offers the parts what a run-time name may be in them, until one takes it, and returns what stands before
// that: what follows the name of a module is a name of the model that the module is. The shorter the name of the
// module the better; where it is nested, what follows has to have a layer's number, so that no short name fits by
// chance.
func (m *Model) eachPart(name string, take func(part *Model, rest string) bool) (string, bool) {
	prefix, rest := "", name
	for nested := 1; nested <= 4; nested++ {
		module, after, ok := strings.Cut(rest, ".")
		if !ok {
			break
		}
		prefix, rest = prefix+module+".", after
		if nested > 1 && !slices.ContainsFunc(strings.Split(rest, "."), isNumber) {
			break
		}
		for _, named := range []bool{true, false} { // the part of that name first
			for _, p := range m.parts() {
				if p.of(module) == named && take(p.model, rest) {
					return prefix, true
				}
			}
		}
	}
	return "", false
}

// below is the tensor of a part as that of the whole.
func (t Tensor) below(prefix string) Tensor {
	t.Runtime = slices.Clone(t.Runtime)
	for i := range t.Runtime {
		t.Runtime[i].Param = prefix + t.Runtime[i].Param
	}
	if t.Tied != "" {
		t.Tied = prefix + t.Tied
	}
	return t
}

func moduleOf(param string) string {
	return strings.TrimSuffix(param, ".weight")
}

// find looks up one spelling of a name: as a slice, renamed, and as it is.
func (m *Model) find(file string, rank int) (Tensor, bool) {
	n := split(file)
	if s, ok := m.data.slices(n); ok {
		if t, ok := m.parameter(split(s[0].Param), anyRank); ok {
			t.Runtime = s
			if t.Quantized && !s[0].Whole() {
				t.Quantized, t.Stay = false, Pieces
			}
			if s[0].Expert >= 0 {
				t.Kind = Expert
			}
			return t, true
		}
	}
	for _, rules := range []table[string]{m.data.renamed, m.data.older} {
		renamed := rename(n, rules)
		if renamed == file {
			continue
		}
		if t, ok := m.parameter(split(renamed), rank); ok {
			t.Runtime = []Slice{whole(renamed)}
			return t, true
		}
	}
	t, ok := m.parameter(n, rank)
	t.Runtime = []Slice{whole(file)}
	return t, ok
}

// parameter answers for a run-time parameter.
func (m *Model) parameter(n name, rank int) (Tensor, bool) {
	p, ok := m.data.parameter(n, rank)
	if !ok {
		return Tensor{}, false
	}
	t := Tensor{Kind: p.kind, Known: true, KeepFloat32: p.float32, KeepFloat32Strict: p.strict}
	if len(m.tied) > 0 {
		t.Tied = m.source(n)
	}
	if p.kind == Linear || p.kind == Conv1D {
		t.Quantized = !p.stays && !m.skips(moduleOf(n.full))
		if t.Quantized && p.raw {
			t.Quantized, t.Stay = false, Raw
		}
	}
	return t, true
}

// source returns the parameter that n is tied to, or "".
func (m *Model) source(n name) string {
	s, ok := m.tied[n.full]
	if !ok {
		if s, ok = m.tied[n.pattern]; ok {
			s = fill(s, n.numbers, -1)
		}
	}
	if s == n.full {
		return ""
	}
	return s
}

// skips applies the rule by which transformers matches a module with its list: a key from the start of the name up to
// a dot, or a suffix.
func (m *Model) skips(module string) bool {
	for _, key := range m.skip {
		if strings.Contains(key, "#") {
			if split(module).pattern == key {
				return true
			}
			continue
		}
		if strings.HasSuffix(module, key) || strings.HasPrefix(module, key+".") {
			return true
		}
	}
	return false
}

// Skipped lists the modules that transformers leaves out by default: the output head, the tied modules, a last linear
// layer, also those of the parts that Tensor has found tensors in. A list of one's own in llm_int8_skip_modules
// replaces the default, so it has to name them too.
func (m *Model) Skipped() []string {
	var list []string
	add := func(s string) {
		if s != "" && !strings.Contains(s, "#") && !slices.Contains(list, s) {
			list = append(list, s)
		}
	}
	if m.data != nil {
		add(m.data.Head)
	}
	for _, s := range m.skip {
		add(s)
	}
	m.answered.Range(func(prefix, part any) bool {
		for _, s := range part.(*Model).Skipped() {
			add(prefix.(string) + s)
		}
		return true
	})
	slices.Sort(list)
	return list
}
