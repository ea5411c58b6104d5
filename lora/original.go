package lora

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// The authors of an image or video model name its modules in another way than diffusers does, and have some of them
// in one matrix that diffusers has in several (see models.Family). Adapters of kohya and ComfyUI have the authors'
// names; they are merged onto either kind of base, as are those of diffusers.

// ofImages reports whether a module is of an image or video model, by its component or its name.
func (m *Module) ofImages() bool {
	if m.Component != "" {
		return true
	}
	_, known := models.DiffusersComponent(m.Name)
	return known || isOriginal(m.Name)
}

// sizes are the outputs and inputs of the parameter that a module adapts, as far as it tells them.
func (m *Module) sizes() (out, in int64) {
	if m.A.T == nil {
		return 0, 0
	}
	return m.B.Rows, m.channels()
}

// placed lists the modules that stand for one of an adapter in the base: itself, where the base has its name. Where
// the base has diffusers' names and the adapter the authors', or the other way round, they are the parts of it under
// the base's names.
func (b *binder) placed(m *Module) []*Module {
	if m.A.T == nil || m.Experts > 0 || !m.Flat && !m.ofImages() {
		return []*Module{m}
	}
	name := m.within()
	if m.Flat {
		if _, err := b.resolve(m); err == nil {
			return []*Module{m}
		}
		names := models.UnflattenDiffusers(name)
		if w, ok := words(name, imageParts); ok && names == nil {
			names = []string{w}
		}
		if len(names) != 1 {
			return []*Module{m}
		}
		name = names[0]
	} else if b.holding(name+"."+m.Param) != nil {
		return []*Module{m}
	}
	if list := b.asDiffusers(m, name); list != nil {
		return list
	}
	if list := b.asOriginal(m, name); list != nil {
		return list
	}
	return []*Module{m}
}

// holding is the one parameter that has a name, with or without something before it.
func (b *binder) holding(full string) *parameter {
	if p, ok := b.exactly(full); ok {
		return p
	}
	var found *parameter
	for _, name := range b.names {
		if strings.HasSuffix(name, "."+full) {
			if found != nil {
				return nil
			}
			found = b.params[name]
		}
	}
	return found
}

// asDiffusers takes a module with an authors' name apart into those that a base with diffusers' names has; nil where
// it has none of them.
func (b *binder) asDiffusers(m *Module, name string) []*Module {
	out, in := m.sizes()
families:
	for _, f := range models.Families() {
		shares, ok := f.Diffusers(name, out, in)
		if !ok {
			continue
		}
		var list []*Module
		for _, s := range shares {
			p := b.holding(s.Module + "." + m.Param)
			if p == nil || out%s.Of != 0 {
				continue families
			}
			x := m.rowsOf(out/s.Of*s.First, out/s.Of*(s.First+s.Count))
			x.Name, x.Flat = join(m.Component, s.Module), false
			x.at = partOf(p, s.At, 1, s.Own)
			list = append(list, x)
		}
		return list
	}
	return nil
}

// authored is where a module of diffusers is in a base with the authors' names.
type authored struct {
	p     *parameter
	share models.Share
}

// asOriginal makes of a module with diffusers' name its parts in a base with the authors' names; nil where it has none.
func (b *binder) asOriginal(m *Module, name string) []*Module {
	if b.authored == nil {
		b.authored = map[string][]authored{}
		for _, full := range b.names {
			p := b.params[full]
			module, weight := strings.CutSuffix(full, ".weight")
			if !weight || len(p.shape) < 2 || p.experts > 0 {
				continue
			}
			if _, within, ok := strings.Cut("."+module, "."+imageModel+"."); ok {
				module = within
			}
			for _, f := range models.Families() {
				shares, _ := f.Diffusers(module, p.shape[0], p.shape[1])
				for _, s := range shares {
					at := authored{p, s}
					if !slices.Contains(b.authored[s.Module], at) { // families agree on many
						b.authored[s.Module] = append(b.authored[s.Module], at)
					}
				}
			}
		}
	}
	out, _ := m.sizes()
	var list []*Module
	for _, at := range b.authored[name] {
		if out%at.share.Own != 0 || m.Param != "weight" {
			return nil
		}
		x := m
		if at.share.Own > 1 {
			x = m.rowsOf(out/at.share.Own*at.share.At, out/at.share.Own*(at.share.At+1))
		}
		n := *x
		n.at = partOf(at.p, at.share.First, at.share.Count, at.share.Of)
		list = append(list, &n)
	}
	return list
}

// partOf is the place of some of n equal parts of a parameter's outputs.
func partOf(p *parameter, first, count, n int64) *spot {
	if n == 1 {
		s := whole(p)
		return &s
	}
	return &spot{p: p, expert: -1, part: first, count: count, parts: n}
}

// rowsOf is a module for the outputs from lo to before hi of another.
func (m *Module) rowsOf(lo, hi int64) *Module {
	n := *m
	if lo == 0 && hi == m.B.Rows {
		return &n
	}
	n.B = m.B.rows(lo, hi)
	if m.Magnitude != nil {
		n.Magnitude = elementsOf(m.Magnitude, lo, hi)
		n.Magnitude.Shape = slices.Clone(m.Magnitude.Shape)
		for i, d := range n.Magnitude.Shape {
			if d == m.B.Rows {
				n.Magnitude.Shape[i] = hi - lo
				break
			}
		}
	}
	return &n
}

// elementsOf is a vector of the elements from lo to before hi of a tensor.
func elementsOf(t *formats.Tensor, lo, hi int64) *formats.Tensor {
	if _, made := t.Data.(computed); made {
		return computedTensor(t, func() ([]float32, error) {
			v, err := Floats(t)
			if err != nil {
				return nil, err
			}
			return v[lo:hi], nil
		}, hi-lo)
	}
	v, width := *t, t.DType.Bits()/8
	v.Shape, v.Offset, v.Bytes = tensor.Shape{hi - lo}, t.Offset+lo*width, (hi-lo)*width
	return &v
}

// ofComponents says of an error about a module which components its adapter is for, if they are several: the base may
// be one of them.
func (a *Adapter) ofComponents(err error) error {
	if list := components(a.Modules); len(list) > 1 {
		return fmt.Errorf("%w; the adapter is for several models, %s, and those of one can be taken alone", err, names(list))
	}
	return err
}

// inDiffusers gives modules the names that they have in diffusers' pipelines. Those of an image model whose authors'
// names are not known keep them, and e says so.
func (a *Adapter) inDiffusers(modules []*Module, e *Encoded) ([]*Module, error) {
	modules, err := a.withComponents(modules)
	if err != nil {
		return nil, err
	}
	var image, others []*Module
	for _, m := range modules {
		if m.Component == imageModel {
			image = append(image, m)
		} else {
			others = append(others, m)
		}
	}
	if others, err = countT5(others, modules); err != nil {
		return nil, err
	}
	for _, c := range components(others) {
		if at := componentName().FindString(c + "."); at == "" || strings.HasPrefix(c, "text_encoders.") {
			e.Notices = append(e.Notices, fmt.Sprintf("%s is no component that diffusers knows, and stays as it is",
				tensor.Quote(c)))
		}
	}
	if image == nil {
		return others, nil
	}
	renamed, families := fromAuthors(image)
	if len(families) == 0 {
		e.Notices = append(e.Notices, fmt.Sprintf(
			"the modules of the image model, such as %s, keep the names of its authors: "+
				"what diffusers calls them is not known", image[0].within()))
		return append(others, image...), nil
	}
	return append(others, renamed...), nil
}

// countT5 says of a T5 encoder which of diffusers' text encoders it is: the second of Flux, which has one before it,
// or the third.
func countT5(modules, all []*Module) ([]*Module, error) {
	to := ""
	for _, m := range all {
		first, _, _ := strings.Cut(m.within(), ".")
		switch {
		case m.Component == "text_encoder_2" || first == "joint_blocks":
			to = "text_encoder_3"
		case to == "" && slices.Contains([]string{"single_transformer_blocks", "single_blocks", "double_blocks"}, first):
			to = "text_encoder_2"
		}
	}
	list := slices.Clone(modules)
	for i, m := range list {
		if m.Component != t5Encoder {
			continue
		}
		if to == "" {
			return nil, fmt.Errorf("module %s: %w: whether its text encoder is diffusers' second or third is not known: the "+
				"adapter has no modules of an image model that would tell", tensor.Quote(m.Name), ErrUnsupported)
		}
		n := *m
		n.Component, n.Name = to, join(to, m.within())
		list[i] = &n
	}
	return list, nil
}

// withComponents gives modules the component that they are of where their adapter does not name it: the one that was
// given, or the one whose models have modules of such names.
func (a *Adapter) withComponents(modules []*Module) ([]*Module, error) {
	list := slices.Clone(modules)
	component := a.component
	for _, m := range modules {
		c, known := models.DiffusersComponent(m.Name)
		switch {
		case m.Component != "" || component != "":
		case known && c != "":
			component = c
		case isOriginal(m.Name):
			component = imageModel
		case strings.HasPrefix(m.Name, "text_model."):
			component = "text_encoder"
		}
	}
	for i, m := range list {
		if m.Component != "" {
			continue
		}
		if component == "" {
			return nil, fmt.Errorf("module %s: %w: which component of a pipeline it is of is not known, as unet or text_encoder",
				tensor.Quote(m.Name), ErrUnsupported)
		}
		n := *m
		n.Component, n.Name = component, join(component, m.Name)
		list[i] = &n
	}
	return list, nil
}

// fromAuthors gives the modules of an image model diffusers' names, and takes those apart that diffusers has in
// parts, by all families that have every one of them. Where families do not agree there is none.
func fromAuthors(modules []*Module) (list []*Module, families []*models.Family) {
	factors := map[string]*Module{}
	for _, m := range modules {
		if m.A.T != nil {
			factors[m.Name] = m
		}
	}
families:
	for _, f := range models.Families() {
		var renamed []*Module
		for _, m := range modules {
			of := factors[m.Name] // a bias has the sizes of its factors
			if of == nil {
				continue families
			}
			out, in := of.sizes()
			shares, ok := f.Diffusers(m.within(), out, in)
			if !ok || out%shares[0].Of != 0 {
				continue families
			}
			renamed = append(renamed, m.shared(shares, out)...)
		}
		if families != nil && !slices.EqualFunc(list, renamed, func(x, y *Module) bool {
			return x.Name == y.Name && x.B.Offset == y.B.Offset && x.B.Rows == y.B.Rows
		}) {
			return nil, nil
		}
		list, families = renamed, append(families, f)
	}
	return list, families
}

// shared takes a module with the given number of outputs apart by its shares.
func (m *Module) shared(shares []models.Share, out int64) (list []*Module) {
	for i, s := range shares {
		component, _ := models.DiffusersComponent(s.Module)
		if component == "" {
			component = "unet" // of the names that models of both kinds have, only a U-Net's authors have others
		}
		n := out / s.Of
		lo, hi := n*s.First, n*(s.First+s.Count)
		if s.Own > 1 { // its parts in another order
			if i == 0 {
				list = append(list, m.reordered(shares, n))
				list[0].Name, list[0].Component = join(component, s.Module), component
			}
			continue
		}
		x := *m
		if m.A.T != nil {
			x = *m.rowsOf(lo, hi)
		} else if hi-lo != out {
			x.Value = elementsOf(m.Value, lo, hi)
		}
		x.Name, x.Component = join(component, s.Module), component
		list = append(list, &x)
	}
	return list
}

// reordered is a module with the parts of its outputs, of n each, in the order that its shares give them.
func (m *Module) reordered(shares []models.Share, n int64) *Module {
	x := *m
	permuted := func(t *formats.Tensor, from Matrix) *formats.Tensor {
		width := from.Cols
		return computedTensor(t, func() ([]float32, error) {
			var w Writer
			v, err := w.Values(Output{Info: t.Info, From: from, Scale: 1})
			if err != nil {
				return nil, err
			}
			r := make([]float32, len(v))
			for _, s := range shares {
				copy(r[s.At*n*width:(s.At+1)*n*width], v[s.First*n*width:])
			}
			return r, nil
		}, from.Rows, width)
	}
	if m.A.T != nil {
		x.B = matrixOf(permuted(m.B.T, m.B))
	} else {
		x.Value = permuted(m.Value, matrixOf(m.Value))
		x.Value.Shape = m.Value.Shape
	}
	if m.Magnitude != nil {
		x.Magnitude = permuted(m.Magnitude, Matrix{T: m.Magnitude, RowStride: 1, ColStride: 1, Rows: m.B.Rows, Cols: 1})
		x.Magnitude.Shape = m.Magnitude.Shape
	}
	return &x
}

// portion is a module of diffusers that is a part of a module of an image model's authors.
type portion struct {
	*Module
	shares []models.Share
}

// toAuthors gives the modules of an image model the names of its authors, and joins those that are one matrix there.
// Where the names do not tell which authors' they would be, it returns false.
func toAuthors(modules []*Module) (list []*Module, ok bool) {
	for _, f := range models.Families() {
		parts := map[string][]portion{}
		for _, m := range modules {
			out, in := m.sizes()
			original, shares, known := f.Original(m.within(), out, in)
			if !known || m.A.T == nil {
				parts = nil
				break
			}
			parts[original] = append(parts[original], portion{m, shares})
		}
		if parts == nil {
			continue
		}
		var joined []*Module
		for _, original := range slices.Sorted(maps.Keys(parts)) {
			m := joinParts(original, parts[original])
			if m == nil {
				return nil, false
			}
			joined = append(joined, m)
		}
		if list != nil && !slices.EqualFunc(list, joined, func(x, y *Module) bool {
			return x.Name == y.Name && x.B.Rows == y.B.Rows
		}) {
			return nil, false
		}
		list = joined
	}
	return list, list != nil
}

// joinParts makes one module of its parts: A below each other and B in blocks, with zeros where there is no part; one
// A where all have the same. It is nil where the parts do not fit together.
func joinParts(name string, parts []portion) *Module {
	first := parts[0]
	// rows are those of one of the equal parts that the authors' module has.
	rows := func(p portion) int64 { return p.B.Rows / (p.shares[0].Count * int64(len(p.shares))) }
	unit, of := rows(first), first.shares[0].Of
	if len(parts) == 1 && first.shares[0].Count*int64(len(first.shares)) == of {
		x := *first.Module
		if len(first.shares) > 1 { // in another order
			back := slices.Clone(first.shares)
			for i := range back {
				back[i].At, back[i].First = back[i].First, back[i].At
			}
			x = *first.reordered(back, unit)
		}
		x.Name, x.Component = join(imageModel, name), imageModel
		return &x
	}
	rank, same := int64(0), true
	for _, p := range parts {
		if rows(p) != unit || p.B.Rows != unit*p.shares[0].Count || p.A.Cols != first.A.Cols || p.Kernel != nil ||
			p.Magnitude != nil {
			return nil
		}
		rank += p.A.Rows
		if equal, err := sameBytes(p.A.T, first.A.T); err != nil || !equal || !p.A.plain() || !first.A.plain() ||
			p.Scaling != first.Scaling {
			same = false
		}
	}
	x := Module{Name: join(imageModel, name), Component: imageModel, Param: "weight", Rank: int(rank), Scaling: 1}
	scale := func(p portion) float32 { return float32(p.Scaling) }
	if same {
		x.A, x.Rank, x.Scaling = first.A, first.Rank, first.Scaling
		rank = first.A.Rows
		scale = func(portion) float32 { return 1 }
	} else {
		x.A = matrixOf(computedTensor(first.A.T, func() ([]float32, error) {
			var all []float32
			var w Writer
			for _, p := range parts {
				v, err := w.Values(Output{Info: p.A.T.Info, From: p.A, Scale: 1})
				if err != nil {
					return nil, err
				}
				all = append(all, v...)
			}
			return all, nil
		}, rank, first.A.Cols))
	}
	x.Alpha = x.Scaling * float64(x.Rank)
	x.B = matrixOf(computedTensor(first.B.T, func() ([]float32, error) {
		all, at := make([]float32, unit*of*rank), int64(0)
		var w Writer
		for _, p := range parts {
			v, err := w.Values(Output{Info: p.B.T.Info, From: p.B, Scale: 1})
			if err != nil {
				return nil, err
			}
			for i := range p.B.Rows {
				row := all[(unit*p.shares[0].First+i)*rank+at:]
				for j, y := range v[i*p.B.Cols : (i+1)*p.B.Cols] {
					row[j] = y * scale(p)
				}
			}
			if !same {
				at += p.A.Rows
			}
		}
		return all, nil
	}, unit*of, rank))
	return &x
}
