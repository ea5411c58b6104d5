package gguf

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// Checkpoint is what a GGUF file becomes for transformers, but for its tokenizer.
type Checkpoint struct {
	Class   string
	Config  []byte // config.json
	Tensors []Restored
	Notices []string // what the config has no place for, or otherwise than the file
}

// Restored is one tensor of a checkpoint.
type Restored struct {
	Name   string
	Shape  tensor.Shape
	Pieces []Piece
	Shift  float32 // what is added to each value, in F32
}

// Piece says where a part of a checkpoint's tensor is in a tensor of the GGUF file.
type Piece struct {
	Tensor string
	View   tensor.View
}

// Values reads a tensor of a GGUF file whole. Those that are asked for are a few numbers.
type Values func(name string) ([]float32, error)

// BackOptions steer Backward.
type BackOptions struct {
	DType tensor.DType // of the checkpoint's weights, for its config
	// RopeScaling are members of rope_parameters, a JSON object, in place of those that Backward would have to find by the
	// values of rope_freqs.weight. nil lets it find them.
	RopeScaling jsontext.Value
}

// Backward says what a GGUF file becomes as a checkpoint. Errors are formats.ErrUnsupported for an architecture, a
// tensor or a value that is not known, formats.ErrMalformed for what does not fit together.
func Backward(keys formats.Metadata, tensors []tensor.Info, read Values, o BackOptions) (*Checkpoint, error) {
	name, ok := keys.Get(architectureKey).(string)
	switch v := keys.Get(architectureKey); {
	case v == nil:
		return nil, keyError(architectureKey, malformedf("found none, expected the name of an architecture"))
	case !ok:
		return nil, keyError(architectureKey, malformedf("found a %T, expected the name of an architecture", v))
	}
	if kind := keys.Get(typeKey); kind != nil && kind != "model" {
		return nil, keyError(typeKey, unsupportedf("found %v, expected model", kind))
	}
	a := data().names[name]
	if a == nil {
		return nil, keyError(architectureKey, unsupportedf("found %s, expected one of %s", tensor.Quote(name),
			strings.Join(Architectures(), ", ")))
	}
	b := &restorer{architecture: a, keys: keys, read: read, infos: map[string]tensor.Info{}}
	for _, t := range tensors {
		if _, twice := b.infos[t.Name]; twice {
			return nil, tensorError(t.Name, malformedf("found it twice, expected it once"))
		}
		if err := checkShape(t.Shape); err != nil {
			return nil, tensorError(t.Name, err)
		}
		b.infos[t.Name] = t
	}
	b.class = b.choose()
	if o.RopeScaling != nil {
		if json.Unmarshal(o.RopeScaling, &b.scaling) != nil || b.scaling == nil {
			return nil, malformedf("rope scaling: found %s, expected a JSON object", tensor.Quote(string(o.RopeScaling)))
		}
	}
	config, err := b.config(o.DType)
	if err != nil {
		return nil, err
	}
	c, err := models.ParseConfig(config)
	if err != nil {
		return nil, err
	}
	if b.settings, err = newSettings(c, b.class); err != nil {
		return nil, err
	}
	b.settings.madeBy = b.architecture
	out := &Checkpoint{Class: b.class.Name, Config: config}
	if out.Notices, err = b.differences(); err != nil {
		return nil, err
	}
	if notice, err := b.otherFreqs(); err != nil {
		return nil, err
	} else if notice != "" {
		out.Notices = append(out.Notices, notice)
	}
	if out.Tensors, err = b.restore(tensors); err != nil {
		return nil, err
	}
	return out, b.fit(keys, tensors)
}

// restorer makes a checkpoint of a file.
type restorer struct {
	*architecture
	class    *class
	keys     formats.Metadata
	infos    map[string]tensor.Info
	read     Values
	scaling  map[string]jsontext.Value // of rotary embeddings, where it was given
	settings *settings
}

// own is a key of the architecture.
func (b *restorer) own(name string) any { return uniform(b.keys.Get(b.Name + "." + name)) }

// choose is the class that the file becomes: the first, unless the file has what another is for.
func (b *restorer) choose() *class {
	for i := range b.Classes {
		c := &b.Classes[i]
		if c.When == "" || c.When == never {
			continue
		}
		if x, ok := number(b.own(c.When)); ok && x > 0 {
			return c
		}
	}
	return &b.Classes[0]
}

// group is all parts of one row in one layer.
type group struct {
	row   *row
	layer int
	end   string
}

// restore says where the tensors of the checkpoint are.
func (b *restorer) restore(tensors []tensor.Info) ([]Restored, error) {
	layers, err := b.settings.whole(b.layers())
	if err != nil {
		return nil, err
	}
	parts := map[group][]string{}
	var order []group
	var names []string
	for _, t := range tensors {
		if b.isMade(t.Name) {
			continue
		}
		p, n, end, ok := b.find(t.Name)
		if !ok {
			return nil, tensorError(t.Name, unsupportedf("found a tensor that %s has no place for", b.class.Name))
		}
		if n.layer >= 0 && int64(n.layer) >= layers {
			return nil, tensorError(t.Name, malformedf("found layer %d, expected layers below %d", n.layer, layers))
		}
		names = append(names, t.Name)
		g := group{p.row, n.layer, end}
		if parts[g] == nil {
			parts[g] = make([]string, len(p.row.names))
			order = append(order, g)
		}
		parts[g][p.part] = t.Name
	}
	if err := b.complete(names, layers); err != nil {
		return nil, err
	}
	var all []Restored
	for _, g := range order {
		if i := slices.Index(parts[g], ""); i >= 0 {
			return nil, malformedf("found no tensor for %s", fill(g.row.names[i], g.layer, -1)+g.end)
		}
		list, err := b.restoreGroup(g, parts[g])
		if err != nil {
			return nil, tensorError(parts[g][0], err)
		}
		all = append(all, list...)
	}
	return all, nil
}

// find is the row that a tensor of a GGUF file belongs to.
func (b *restorer) find(name string) (place, numbered, string, bool) {
	n, ok := split(name)
	if !ok || n.index >= 0 {
		return place{}, n, "", false
	}
	if p, ok := b.byName[n.pattern]; ok && p.row.entire() {
		return p, n, "", true
	}
	end := ending(n.pattern)
	p, ok := b.byName[strings.TrimSuffix(n.pattern, end)]
	return p, n, end, ok && end != "" && !p.row.entire()
}

// restoreGroup is the tensors that one row's parts are made of: one, or each of a stack.
func (b *restorer) restoreGroup(g group, parts []string) ([]Restored, error) {
	shapes := make([]tensor.Shape, len(parts))
	for i, name := range parts {
		shapes[i] = b.infos[name].Shape
	}
	count := int64(1)
	if g.row.has(stack) {
		expected, err := b.settings.whole(g.row.numbersOf(stack)[0])
		if err != nil {
			return nil, err
		}
		if count = expected; len(shapes[0]) == 0 || shapes[0][0] != count || count > maxNumber {
			return nil, malformedf("found the shape %v, expected a stack of %d", shapes[0], count)
		}
		for i := range shapes {
			shapes[i] = shapes[i][1:]
		}
	}
	shape, err := g.row.source(shapes)
	if err != nil {
		return nil, err
	}
	if _, err := shape.Count(); err != nil {
		return nil, err
	}
	views := make([]view, len(parts))
	for i := range parts {
		if views[i], err = g.row.view(i, shape, 0, b.settings.whole); err != nil {
			return nil, err
		}
		if made := g.row.result(views[i], shape); !slices.Equal(made, shapes[i]) {
			return nil, malformedf("found the shape %v, expected %v", shapes[i], made)
		}
	}
	list := make([]Restored, count)
	for k := range list {
		t := Restored{Name: fill(g.row.module, g.layer, k) + g.end, Shape: shape}
		if b.PlusOne != "" && strings.HasSuffix(t.Name, b.PlusOne) {
			t.Shift = -1
		}
		for i, name := range parts {
			t.Pieces = append(t.Pieces, Piece{name, views[i].placed(int64(k) * views[i].count()).Inverse()})
		}
		list[k] = t
	}
	return list, nil
}

// isMade reports whether a tensor is one that Forward makes of the config, and config has read.
func (b *restorer) isMade(name string) bool {
	switch name {
	case ropeFreqs:
		return slices.Contains(b.Made, madeFreqs)
	case factorsLong, factorsShort:
		return slices.Contains(b.Made, madeFactors)
	}
	return false
}

// source is the shape that a checkpoint has a tensor in, by those of all parts that it has in GGUF, without the number
// of stacked ones.
func (r *row) source(parts []tensor.Shape) (tensor.Shape, error) {
	shape := slices.Clone(parts[0])
	for i := len(r.ops) - 1; i >= 0; i-- {
		op := r.ops[i]
		switch op.kind {
		case transpose:
			if last := len(shape) - 1; last > 0 {
				shape[last-1], shape[last] = shape[last], shape[last-1]
			}
		case alternate, halves:
			d := len(shape) - op.fromLast
			if d < 0 || shape[d] > math.MaxInt64/int64(len(parts)) {
				return nil, malformedf("found the shape %v, expected at least %d dimensions", shape, op.fromLast)
			}
			shape[d] *= int64(len(parts))
		case splitHeads:
			// The shape is that of the first part, turned back: (heads, rows, width).
			if len(shape) != 3 || len(parts[1]) != 3 || shape[1] > math.MaxInt32 || parts[1][1] > math.MaxInt32 ||
				shape[0] > math.MaxInt32 {
				return nil, malformedf("found the shapes %v and %v, expected three dimensions", parts[0], parts[1])
			}
			rows := shape[1] + parts[1][1]
			if shape[0]*rows/max(rows, 1) != shape[0] {
				return nil, malformedf("found the shape %v, expected fewer rows", shape)
			}
			shape = tensor.Shape{shape[0] * rows, shape[2]}
		}
	}
	return shape, nil
}

func tensorError(name string, err error) error {
	return fmt.Errorf("tensor %s: %w", tensor.Quote(name), err)
}

func keyError(name string, err error) error {
	return fmt.Errorf("key %s: %w", tensor.Quote(name), err)
}
