package lora

import (
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// heads are the names that output heads have at run time where the architecture is not known.
var heads = []string{"lm_head.weight", "embed_out.weight", "output.weight"}

// findHead finds the output head that is tied to an embedding.
func (b *binder) findHead() {
	name := b.model.Head() + ".weight"
	p := b.params[b.model.HeadSource()]
	if p == nil || p.kind != models.Embedding || len(p.shape) != 2 || len(p.pieces) != 1 ||
		b.model.Tensor(name, p.shape).Tied != p.name {
		return
	}
	b.head, b.embedding = name, p.name
	if i, ok := b.files[name]; ok {
		b.headTarget = i
	}
	if b.headParam = b.params[name]; b.headParam == nil {
		b.headParam = &parameter{name: name, shape: slices.Clone(p.shape), kind: models.Linear, known: true}
	}
}

// sharer is a module that shares the embedding's values, has no tensor of its own in the file, and is adapted: the
// embedding of an encoder or a decoder.
type sharer struct {
	*parameter
	change *Change
}

// sharer finds such a module.
func (b *binder) sharer(name string) *parameter {
	if b.embedding == "" || name == b.head || !slices.Contains(b.model.SharedBy(b.embedding), name) {
		return nil
	}
	if b.sharers[name] == nil {
		shape := slices.Clone(b.params[b.embedding].shape)
		b.sharers[name] = &sharer{parameter: &parameter{name: name, shape: shape, kind: models.Embedding, known: true}}
	}
	return b.sharers[name].parameter
}

// ownChange is the change of a parameter that has no tensor in the file: of a head or another end of the tie. It is
// nil for all others.
func (b *binder) ownChange(p *parameter, width int64) *Change {
	if p == b.headParam && b.headTarget < 0 {
		return b.headChange(width)
	}
	e := b.sharers[p.name]
	if e == nil || e.parameter != p {
		return nil
	}
	if e.change == nil {
		e.change = &Change{Width: width}
	}
	return e.change
}

// isHead reports whether a parameter is the weight of the output head.
func (b *binder) isHead(p *parameter) bool {
	return p == b.headParam || p.name == b.model.Head()+".weight" || b.model.Head() == "" && slices.Contains(heads, p.name)
}

// headBias reports whether a parameter is the bias of the output head, which BERT and its like have beside it.
func (b *binder) headBias(p *parameter) bool {
	name := b.model.Head() + ".bias"
	return len(p.shape) == 1 && (p.name == name || b.model.Tensor(name, p.shape).Tied == p.name)
}

// headChange is the change of a head that has no tensor of its own yet.
func (b *binder) headChange(width int64) *Change {
	if b.out.Head == nil {
		b.out.Head = &Change{Width: width}
		b.out.HeadName = b.head
		b.out.HeadFrom = b.params[b.embedding].pieces[0].target
	}
	return b.out.Head
}

// sameAsEmbedding holds the head of a tied pair against the embedding, if that is adapted.
func (b *binder) sameAsEmbedding(a Weighted, m *Module) error {
	alone := true
	for _, o := range a.Modules {
		if o.Name+"."+o.Param != b.embedding && o.Name != strings.TrimSuffix(b.embedding, ".weight") || o.Base {
			continue
		}
		alone = alone && (o.Form == Rows || m.Form == Rows)
		if m.Form == Replace && o.Form == Replace {
			return nil
		}
		if m.Form != Linear || o.Form != Embedding {
			continue
		}
		same, err := sameNumbers(m.A, o.B.Transposed())
		if err == nil && same {
			same, err = sameNumbers(m.B, o.A.Transposed())
		}
		if err != nil {
			return err
		}
		if same {
			return nil
		}
	}
	if alone || m.Base {
		return nil
	}
	return fmt.Errorf("module %s: %w: ensure_weight_tying is set, and it differs from that of the embedding",
		tensor.Quote(m.Name), ErrMalformed)
}

// sameNumbers reports whether two matrices are equal.
func sameNumbers(x, y Matrix) (bool, error) {
	a, err := x.Read()
	if err != nil {
		return false, err
	}
	b, err := y.Read()
	return err == nil && equal(a, b), err
}

// untie decides whether the head and the embedding stay tied, and gives each a tensor of its own where they do not.
func (b *binder) untie() error {
	if b.embedding == "" {
		return nil
	}
	from := b.params[b.embedding].pieces[0].target
	b.shareBase(from)
	b.inputRows(from)
	c := b.out.Changes[from]
	if list := slices.DeleteFunc(b.untrained(c), b.hasOwn); len(list) > 0 && b.beforeUnknown(c) {
		b.out.Notices = append(b.out.Notices, fmt.Sprintf("%s was trained alone, in a vocabulary that has grown, and the "+
			"adapter does not say which rows those that share them had: the trained ones go to %s too",
			strings.TrimSuffix(b.embedding, ".weight"), strings.Join(list, " and ")))
	}
	head := b.headOwn()
	same, err := b.sameEnds(c, head)
	if err != nil {
		return err
	}
	if same {
		if b.headTarget < 0 {
			b.out.Head, b.out.HeadName = nil, ""
		}
		return nil
	}
	follows := true // rows that were trained count for both
	if c != nil {
		for _, t := range c.Updates {
			follows = follows && (b.everywhere(t) || b.ensured(t))
		}
		if c.Value != nil && !b.ensured(*c.ValueOf) {
			follows = follows && c.ValueOf.Module.Base && onlyRows(c)
		}
	}
	if head == nil && follows && len(b.sharers) == 0 {
		return nil
	}
	b.out.Untie = true
	if b.headTarget < 0 {
		b.headChange(b.params[b.embedding].shape[1])
	}
	b.shareBase(from)
	b.shareRows(from)
	b.out.Notices = append(b.out.Notices, fmt.Sprintf("%s is no longer tied to %s: the adapter changes one of them, and "+
		"both keep what they did", strings.TrimSuffix(b.head, ".weight"), strings.TrimSuffix(b.embedding, ".weight")))
	return b.copies(from)
}

// sameEnds reports whether all that share the embedding's values become the same: c is the embedding's change.
func (b *binder) sameEnds(c, head *Change) (bool, error) {
	if same, err := sameChange(c, head); !same || err != nil {
		return false, err
	}
	for _, name := range b.model.SharedBy(b.embedding) {
		if _, own := b.files[name]; own || name == b.head {
			continue
		}
		switch e := b.sharers[name]; {
		case e != nil && e.change != nil:
			if same, err := sameChange(c, e.change); !same || err != nil {
				return false, err
			}
		case c != nil && (!b.valueEverywhere(c) ||
			slices.ContainsFunc(c.Updates, func(t Update) bool { return !b.everywhere(t) })):
			return false, nil
		}
	}
	return true, nil
}

// sameRows refuses a vocabulary that has grown at one end only: what the other had is not in the adapter.
func (b *binder) sameRows() error {
	rows := func(name string, c *Change) (int64, bool) {
		i, ok := b.files[name]
		if p := b.params[name]; p != nil && len(p.pieces) == 1 && p.pieces[0].slice.Whole() {
			i, ok = p.pieces[0].target, true
		}
		switch {
		case ok && b.out.Changes[i] != nil:
			c = b.out.Changes[i]
		case ok && len(b.targets[i].Shape) == 2:
			return b.targets[i].Shape[0], false
		}
		if !ok && c != nil {
			i, ok = b.out.HeadFrom, true // it has had the rows of the embedding
		}
		if c == nil || c.Value == nil || len(c.Value.Shape) != 2 {
			if ok && len(b.targets[i].Shape) == 2 {
				return b.targets[i].Shape[0], false
			}
			return 0, false
		}
		return c.Value.Shape[0], true
	}
	head, source := b.model.Head()+".weight", b.model.HeadSource()
	m, grownHead := rows(head, b.out.Head)
	n, grown := rows(source, nil)
	if m == 0 || n == 0 || m == n || !grown && !grownHead {
		return nil
	}
	return fmt.Errorf("%w: %s has %d rows with the adapter and %s %d: the vocabulary that it was trained with had grown, "+
		"and it brings one of the two", ErrBase, tensor.Quote(head), m, tensor.Quote(source), n)
}

// headOwn is the change of the head, nil where there is none.
func (b *binder) headOwn() *Change {
	if b.headTarget >= 0 {
		return b.out.Changes[b.headTarget]
	}
	return b.out.Head
}

// shareBase gives the base's own matrix, which an adapter brings along for one end of a tie, to the other too
// where that is to be changed.
func (b *binder) shareBase(from int) {
	c, head := b.out.Changes[from], b.headOwn()
	switch {
	case head != nil && head.Value != nil && head.ValueOf.Module.Base && (c == nil || c.Value == nil):
		if c = b.change(from, head.Width); c.Value == nil {
			c.Value, c.ValueOf = head.Value, head.ValueOf
		}
	case c != nil && c.Value != nil && c.ValueOf.Module.Base && head != nil && head.Value == nil:
		head.Value, head.ValueOf = c.Value, c.ValueOf
	}
}

// shareRows gives the rows of the embedding that were trained to the head too, unless it has its own.
func (b *binder) shareRows(from int) {
	c, head := b.out.Changes[from], b.headOwn()
	isRows := func(t Update) bool { return t.Module.Form == Rows }
	if c == nil || head == nil || slices.ContainsFunc(head.Updates, isRows) || head.Value != nil &&
		!head.ValueOf.Module.Base {
		return
	}
	rows := slices.DeleteFunc(slices.Clone(c.Updates), func(t Update) bool { return !b.everywhere(t) })
	head.Updates = append(rows, head.Updates...)
}

// inputRows moves rows that were trained to the embedding that has the values, from another end that is the model's
// input embedding, as Marian's encoder is: PEFT ties all to that one.
func (b *binder) inputRows(from int) {
	name := b.model.Embedding() + ".weight"
	e := b.sharers[name]
	if e == nil || e.change == nil {
		return
	}
	c := b.out.Changes[from]
	var own []Update
	for _, t := range e.change.Updates {
		isOwn := c != nil && slices.ContainsFunc(c.Updates,
			func(o Update) bool { return o.Adapter == t.Adapter && o.Module.Form == Rows })
		if isOwn || !b.everywhere(t) {
			own = append(own, t)
			continue
		}
		if c == nil {
			c = b.change(from, e.change.Width)
		}
		c.Updates = append(c.Updates, t)
	}
	e.change.Updates = own
	if len(own) == 0 && e.change.Value == nil {
		delete(b.sharers, name)
	}
}

// everywhere reports whether an update of the embedding holds for all that share its values. Rows that were trained
// do, unless their adapter has others for another end: then PEFT ties nothing, and each of its modules has
// the rows that are under its own name.
func (b *binder) everywhere(t Update) bool {
	if t.Module.Form != Rows {
		return false
	}
	others := []*Change{b.headOwn()}
	for _, e := range b.sharers {
		others = append(others, e.change)
	}
	for _, c := range others {
		if c != nil && slices.ContainsFunc(c.Updates, func(o Update) bool {
			return o.Adapter == t.Adapter && o.Module.Form == Rows && !slices.Equal(o.Module.Indices, t.Module.Indices)
		}) {
			return false
		}
	}
	return true
}

// copies makes tensors of all that the same switch ties, and the file does not have. Modules that share the
// embedding keep what they look up: only rows that were trained, or have been added, are theirs too.
func (b *binder) copies(from int) error {
	shared := func(source string, i int, all bool) {
		for _, name := range b.model.SharedBy(source) {
			if _, ok := b.files[name]; ok || name == b.head {
				continue
			}
			c := Copy{Name: name, From: i}
			if e := b.sharers[name]; e != nil && e.change != nil {
				c.Change = e.change
			} else if change := b.out.Changes[i]; change != nil && all {
				c.Change = change
			} else if change != nil {
				c.Change = b.common(change)
			}
			b.out.Copies = append(b.out.Copies, c)
		}
	}
	c := b.out.Changes[from]
	changed := c != nil && (!b.valueEverywhere(c) ||
		slices.ContainsFunc(c.Updates, func(t Update) bool { return !b.everywhere(t) }))
	if changed || len(b.sharers) > 0 || len(b.model.TieSwitches()) > 0 {
		shared(b.embedding, from, false)
	}
	if len(b.model.TieSwitches()) == 0 {
		return nil
	}
	for _, name := range b.names {
		if p := b.params[name]; name != b.embedding && len(p.pieces) == 1 {
			shared(name, p.pieces[0].target, true)
		}
	}
	return nil
}

// common is what of a change holds for all that share the values.
func (b *binder) common(c *Change) *Change {
	n := &Change{Width: c.Width}
	if c.Value != nil {
		n.ValueOf = c.ValueOf
		if n.Value = c.Value; !b.valueEverywhere(c) {
			n.Value = b.before(c)
		}
	}
	for _, t := range c.Updates {
		if b.everywhere(t) {
			n.Updates = append(n.Updates, t)
		}
	}
	if n.Value == nil && len(n.Updates) == 0 {
		return nil
	}
	return n
}

// valueEverywhere reports whether the new value of the embedding, if it has one, holds for the embeddings of an
// encoder and a decoder too: unless it was trained for one module, and it is known what the others keep.
func (b *binder) valueEverywhere(c *Change) bool {
	return len(b.untrained(c)) == 0 || b.beforeUnknown(c)
}

// untrained lists the modules beside the head that share the embedding's values, where modules_to_save trains a copy
// for one module alone: they keep what that was before.
func (b *binder) untrained(c *Change) []string {
	if c == nil || c.Value == nil || c.ValueOf.Module.Base ||
		!b.adapters[c.ValueOf.Adapter].Config.SavesWhole(c.ValueOf.Module.Name) {
		return nil
	}
	var list []string
	for _, name := range b.model.SharedBy(b.embedding) {
		if name != b.head {
			list = append(list, strings.TrimSuffix(name, ".weight"))
		}
	}
	return list
}

// hasOwn reports whether a module has a value of its own, in the base or by an adapter.
func (b *binder) hasOwn(module string) bool {
	_, own := b.files[module+".weight"]
	e := b.sharers[module+".weight"]
	return own || e != nil && e.change != nil && e.change.Value != nil
}

// beforeUnknown reports whether the adapter does not say what the modules that were not trained had before: the
// vocabulary has grown, and the adapter has the trained rows alone.
func (b *binder) beforeUnknown(c *Change) bool { return b.grown(c) && b.before(c) == nil }

// before is what the embedding was before a copy of it was trained, as far as the adapter says: of a vocabulary that
// has grown, the base's own matrix that it brings for the head is the same. It is nil where that is the base's.
func (b *binder) before(c *Change) *formats.Tensor {
	if t := c.ValueOf.Module.before; t != nil || !b.grown(c) {
		return t
	}
	if head := b.headOwn(); head != nil && head.Value != nil && head.ValueOf.Module.Base &&
		head.ValueOf.Adapter == c.ValueOf.Adapter {
		return head.Value
	}
	return nil
}

// grown reports whether the new value of the embedding has other rows than the base.
func (b *binder) grown(c *Change) bool {
	return c.Value.Shape[0] != b.targets[b.params[b.embedding].pieces[0].target].Shape[0]
}

func onlyRows(c *Change) bool {
	for _, t := range c.Updates {
		if t.Module.Form != Rows {
			return false
		}
	}
	return true
}

// ensured reports whether an adapter promises the tie. PEFT heeds the promise where the embedding has one of two
// names. MLX has no head of its own on a tied model: its LoRAEmbedding.as_linear, which stands for one, has the delta
// too.
func (b *binder) ensured(t Update) bool {
	a := b.adapters[t.Adapter]
	_, name := cutLast(t.Module.Name)
	return a.Dialect == MLX || a.Config.EnsureTie && (name == "embed_tokens" || name == "lm_head")
}

// sameChange reports whether both ends of a tie get the same new value and the same deltas.
func sameChange(x, y *Change) (bool, error) {
	if x == nil || y == nil || (x.Value == nil) != (y.Value == nil) || len(x.Updates) != len(y.Updates) {
		return x == nil && y == nil, nil
	}
	if x.Value != nil {
		if same, err := sameBytes(x.Value, y.Value); !same || err != nil {
			return false, err
		}
	}
	for i := range x.Updates {
		s, t := &x.Updates[i], &y.Updates[i]
		if s.Module.Form == Rows && t.Module.Form == Rows {
			same, err := sameBytes(s.Module.Value, t.Module.Value)
			if !same || err != nil || !slices.Equal(s.Module.Indices, t.Module.Indices) {
				return false, err
			}
			continue
		}
		if s.Left.T == nil || t.Left.T == nil || s.Module.Magnitude != nil || t.Module.Magnitude != nil ||
			s.Adapter != t.Adapter || s.Scale != t.Scale || s.Rows != t.Rows || s.Cols != t.Cols {
			return false, nil
		}
		if same, err := sameNumbers(s.Left, t.Left); !same || err != nil {
			return false, err
		}
		if same, err := sameNumbers(s.Right, t.Right); !same || err != nil {
			return false, err
		}
	}
	return true, nil
}
