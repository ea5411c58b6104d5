package lora

import (
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/internal/nearest"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// resolve finds what a module of an adapter means: the parameter of the run-time name; the tensor that has the name in
// the file, as older versions of a model had it at run time; what a known renaming makes of the name, which may be one
// expert or a part of a fused parameter; else the one that the name is of in another wrapper class, or the only one
// that ends in the same way, since such a class puts another prefix before it.
func (b *binder) resolve(m *Module) (spot, error) {
	if m.at != nil {
		return *m.at, nil
	}
	if _, ok := b.exactly(m.Name + "." + m.Param); ok || m.Flat { // a base may be a pipeline in one file
		return b.resolveName(m, m.Name)
	}
	return b.resolveName(m, m.within())
}

// exactly is the parameter that has a name at run time or in the file.
func (b *binder) exactly(full string) (*parameter, bool) {
	if p := b.params[full]; p != nil {
		return p, true
	}
	i, ok := b.files[full]
	if !ok {
		return nil, false
	}
	return b.fileParameter(i), true
}

// resolveName is resolve for a module by one of its names.
func (b *binder) resolveName(m *Module, name string) (spot, error) {
	full := name + "." + m.Param
	if p := b.params[full]; p != nil {
		return whole(p), nil
	}
	if full == b.head {
		return whole(b.headParam), nil
	}
	if i, ok := b.files[full]; ok {
		if r := b.targets[i].Role.Runtime; len(r) == 1 && r[0].Expert >= 0 { // so that its other names are the same place
			if s, ok := b.sliceSpot(r[0]); ok {
				return s, nil
			}
		}
		return whole(b.fileParameter(i)), nil
	}
	if p := b.params[b.model.Tensor(full, b.shapeOf(m)).Tied]; p != nil && (len(p.shape) == 1 || b.repeats(m, p)) {
		return whole(p), nil // one that goes by two names, as the bias of a head
	}
	if p := b.sharer(full); p != nil {
		return whole(p), nil
	}
	if r := b.model.Tensor(full, b.shapeOf(m)).Runtime; len(r) == 1 {
		if s, ok := b.sliceSpot(r[0]); ok {
			return s, nil
		}
	}
	if m.Flat {
		return b.resolveFlat(m)
	}
	if s, ok := b.expertSpot(m); ok {
		return s, nil
	}
	if p := b.rewrapped(name, m.Param); p != nil {
		return whole(p), nil
	}
	if tied := b.model.Tensor(full, b.shapeOf(m)).Tied; b.params[tied] != nil && !m.Base {
		return spot{}, fmt.Errorf("module %s: %w: it shares the values of %s, which an adapter cannot change at one of both",
			tensor.Quote(m.String()), ErrUnsupported, tensor.Quote(tied))
	}
	candidates := b.endingLike(full)
	if m.beside || m.ofImages() { // one of the two names is all of the other's end: others end alike
		candidates = slices.DeleteFunc(candidates, func(p *parameter) bool {
			return !strings.HasSuffix("."+p.name, "."+full) && !strings.HasSuffix("."+full, "."+p.name)
		})
	}
	return b.only(m, full, candidates) // the sizes of several do not tell which is meant
}

// repeats reports whether a module is a new value that its adapter has under the name of p too.
func (b *binder) repeats(m *Module, p *parameter) bool {
	if m.Form != Replace {
		return false
	}
	for _, claims := range b.bound {
		for _, o := range claims {
			if o.p == p && o.module.Form == Replace {
				same, err := sameBytes(o.module.Value, m.Value)
				return same && err == nil
			}
		}
	}
	return false
}

// only is the one candidate, or an error.
func (b *binder) only(m *Module, full string, candidates []*parameter) (spot, error) {
	switch len(candidates) {
	case 1:
		return whole(candidates[0]), nil
	case 0:
		like := ""
		if n := nearest.Closest(full, b.names); n != "" {
			like = "; the nearest is " + tensor.Quote(strings.TrimSuffix(n, ".weight"))
		}
		return spot{}, fmt.Errorf("module %s: %w: the base has no such module%s", tensor.Quote(m.String()), ErrBase, like)
	}
	var names []string
	for _, p := range candidates[:min(4, len(candidates))] {
		names = append(names, tensor.Quote(strings.TrimSuffix(p.name, ".weight")))
	}
	return spot{}, fmt.Errorf("module %s: %w: it may be any of %d modules: %s", tensor.Quote(m.String()), ErrBase,
		len(candidates), strings.Join(names, ", "))
}

// sliceSpot is the place of a slice that the model knows, where it is a parameter, an expert or a range of outputs.
func (b *binder) sliceSpot(r models.Slice) (spot, bool) {
	p := b.params[r.Param]
	plain := r.Via == "" && !r.Transposed && r.FileParts <= 1 && (r.Parts <= 1 || r.Dim == 0)
	if p == nil || !plain {
		return spot{}, false
	}
	s := spot{p: p, expert: int64(r.Expert)}
	if r.Parts > 1 {
		s.part, s.parts = int64(r.Part), int64(r.Parts)
	}
	return s, s.fits()
}

// fits reports whether the parameter has such an expert and such parts.
func (s spot) fits() bool {
	return s.expert < max(s.p.experts, 0) && (s.parts == 0 || len(s.p.shape) > 0 && s.p.shape[0]%s.parts == 0)
}

// fileParameter takes a tensor of the file for a parameter of its own: a part of a fused one, as it was at run time
// before it was fused.
func (b *binder) fileParameter(i int) *parameter {
	t := b.targets[i]
	if len(t.Role.Runtime) == 1 && t.Role.Runtime[0].Whole() {
		if p := b.params[t.Role.Runtime[0].Param]; p != nil {
			return p
		}
	}
	whole := models.Slice{Param: t.Name, Expert: -1, Parts: 1, FileParts: 1}
	return &parameter{name: t.Name, shape: t.Shape, kind: t.Role.Kind, known: t.Role.Known, pieces: []piece{{i, whole}}}
}

// shapeOf is the shape that a module's parameter has by its own tensors.
func (b *binder) shapeOf(m *Module) tensor.Shape {
	switch {
	case m.Form == Scale, m.Form == Transformed: // it tells one side alone
		return tensor.Shape{m.Value.Count(), m.Value.Count()}
	case m.A.T == nil:
		return m.Value.Shape
	case m.Form == Embedding:
		return tensor.Shape{m.A.Cols, m.B.Rows}
	}
	return append(tensor.Shape{m.B.Rows, m.channels()}, m.Kernel...)
}

// rewrapped is the parameter that has the name in another of the classes that a model is loaded with, nil where there
// is none or more than one.
func (b *binder) rewrapped(module, param string) (found *parameter) {
	for _, name := range rewrapped(module) {
		p := b.params[name+"."+param]
		if p != nil && found != nil && found != p {
			return nil
		}
		if p != nil {
			found = p
		}
	}
	return found
}

// senses are words in the names of the parts of a model that read or make something else than text.
var senses = []string{"vision", "visual", "image", "audio", "speech", "video", "talker"}

// towers are the parts of a model with layers of their own that a prefix names.
func towers(prefix string) (list []string) {
	for name := range strings.SplitSeq(strings.ToLower(prefix), ".") {
		if name == "encoder" || name == "decoder" {
			list = append(list, name)
		}
		for _, s := range senses {
			if strings.Contains(name, s) {
				list = append(list, s)
			}
		}
	}
	return list
}

// otherTower reports whether a name whose end is shared with a parameter's is of another part of a model: what stands
// before that end names a part that the parameter's does not.
func otherTower(name, param, end string) bool {
	has := towers(strings.TrimSuffix(param, end))
	return slices.ContainsFunc(towers(strings.TrimSuffix(name, end)), func(t string) bool {
		return !slices.Contains(has, t)
	})
}

// endingLike lists the parameters that share the longest end with a name. The end has the numbers of layers in it: one
// of another layer is never meant, nor one of another tower.
func (b *binder) endingLike(full string) []*parameter {
	parts := strings.Split(full, ".")
	last := len(parts) - 2 // a module and its parameter at least
	for i, p := range parts {
		if p != "" && strings.Trim(p, "0123456789") == "" {
			last = max(i-1, 0) // and the list that the first number counts in
			break
		}
	}
	longest := 0
	for _, name := range b.names {
		longest = max(longest, len(name))
	}
	for i, end := 0, full; i <= last; i++ {
		if i > 0 {
			_, end, _ = strings.Cut(end, ".")
		}
		if len(end) > longest {
			continue
		}
		var found []*parameter
		for _, name := range b.names {
			if name == end || strings.HasSuffix(name, "."+end) {
				found = append(found, b.params[name])
			}
		}
		if len(found) > 0 {
			return slices.DeleteFunc(found, func(p *parameter) bool { return otherTower(full, p.name, end) })
		}
	}
	return nil
}

// stringList reads a JSON list of strings, or one.
func stringList(v jsontext.Value) []string {
	var list []string
	if json.Unmarshal(v, &list) == nil {
		return list
	}
	var one string
	if json.Unmarshal(v, &one) == nil && one != "" {
		return []string{one}
	}
	return nil
}
