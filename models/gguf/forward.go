package gguf

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// Model is what a checkpoint becomes as a GGUF file, but for its tokenizer.
type Model struct {
	Architecture string
	Keys         formats.Metadata // all but general.name and the others of a model card
	Tensors      []Tensor         // made ones first, then in the order of their first sources
	Dropped      []string         // tensors of the checkpoint that GGUF has no place for
	Zeros        []string         // those that are left out, which is right only if all of their values are 0
	CutsRows     bool             // Options.Vocabulary matters
	Notices      []string         // what llama.cpp will compute otherwise
}

// Tensor is one tensor of a GGUF file.
type Tensor struct {
	tensor.Info
	// Sources are the tensors that it is made of, one after the other in its elements: one, or a stack of equal shapes.
	Sources []string
	// View is what of the first source it has, and where; of each next one it is further on by as many elements.
	View tensor.View
	// Shift is added to each value before it gets its type, as torch adds: sums of F16 are rounded to F16, others to F32.
	Shift  float32
	Values []float32 // of a tensor that has no source
	// Scales is the source of the scales of blocks of MXFP4, of which ScalesView has one for each: then the View is of the
	// bytes of the codes, and Packed puts the two together.
	Scales     string
	ScalesView tensor.View
}

// Options steer Forward.
type Options struct {
	Type Type
	// Vocabulary is how many tokens the tokenizer has: an architecture may want the rows of its embedding past it cut off.
	// Zero keeps them.
	Vocabulary int64
}

// Forward says what the checkpoint with a config and tensors becomes. Errors are formats.ErrUnsupported for a class or
// a tensor that is not known, formats.ErrMalformed for what does not fit together.
func Forward(c *models.Config, tensors []tensor.Info, o Options) (*Model, error) {
	if c == nil {
		return nil, malformedf("found no config.json, which a GGUF file's keys are made of")
	}
	a, cl, err := forClass(c.Architecture)
	if err != nil {
		return nil, fmt.Errorf("config.json: %w", err)
	}
	s, err := newSettings(c, cl)
	if err != nil {
		return nil, err
	}
	m := &Model{Architecture: a.Name}
	if m.Notices, err = a.check(s); err != nil {
		return nil, err
	}
	if m.Keys, err = a.keys(s, o.Type.FileType); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(a.Assumed)) {
		if m.Keys.Get(a.Name+"."+name) == nil {
			m.Notices = append(m.Notices, fmt.Sprintf("config.json has nothing for the key %s.%s: llama.cpp takes %s, where "+
				"transformers computes with %s", a.Name, name, a.Assumed[name][0], a.Assumed[name][1]))
		}
	}
	for _, kind := range a.Made {
		made, err := a.made(kind, s, func(name string, v any) {
			m.Keys = append(m.Keys, formats.Pair{Name: a.Name + "." + name, Value: v})
		})
		if err != nil {
			return nil, err
		}
		m.Tensors = append(m.Tensors, made...)
	}
	if err := m.place(a, s, tensors, o); err != nil {
		return nil, err
	}
	if err := m.head(a, c.TieWordEmbeddings); err != nil {
		return nil, err
	}
	m.Keys = append(m.Keys, formats.Pair{Name: sizeKey, Value: sizeLabel(m.Tensors)})
	infos := make([]tensor.Info, len(m.Tensors))
	for i, t := range m.Tensors {
		infos[i] = t.Info
	}
	if err := a.fit(m.Keys, infos); err != nil {
		return nil, fmt.Errorf("what config.json says does not fit: %w", err)
	}
	return m, nil
}

// Packs reports whether a tensor of a checkpoint is codes, or scales of codes, that GGUF has as they are.
func Packs(c *models.Config, name string) bool {
	if c == nil {
		return false
	}
	a, _, err := forClass(c.Architecture)
	if err != nil {
		return false
	}
	r, _, _, known := a.find(name)
	return known && r != nil && (r.has(mxfp4Blocks) || r.has(mxfp4Scales))
}

// stacked are the sources of a tensor that has several.
type stacked struct {
	at      int // in Model.Tensors
	count   int64
	shape   tensor.Shape
	sources map[int]string
}

// place says what becomes of each tensor of a checkpoint.
func (m *Model) place(a *architecture, s *settings, tensors []tensor.Info, o Options) error {
	layers, err := s.whole(a.layers())
	if err != nil {
		return err
	}
	stacks := map[string]*stacked{}
	scales := map[string]microscales{}
	from := map[string]string{}
	for _, t := range m.Tensors {
		from[t.Name] = "the config"
	}
	for _, t := range tensors {
		r, n, end, known := a.find(t.Name)
		switch {
		case a.surplus(t.Name, layers):
			m.Dropped = append(m.Dropped, t.Name)
			continue
		case !known:
			return fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), unsupportedf("found a tensor that %s has no place for",
				a.Name))
		case r == nil:
			m.Dropped = append(m.Dropped, t.Name)
			continue
		case int64(n.layer) >= layers && strings.Contains(r.module, "#"):
			return fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), malformedf("found layer %d, expected layers below %d",
				n.layer, layers))
		case a.NoBiases && end == ".bias":
			m.Zeros = append(m.Zeros, t.Name)
			continue
		case s.dropped(r):
			m.Dropped = append(m.Dropped, t.Name)
			continue
		}
		m.CutsRows = m.CutsRows || r.has(cutRows)
		if err := m.add(a, s, r, n, end, t, o, stacks, scales, from); err != nil {
			return fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(stacks)) {
		if err := m.stack(stacks[name], o.Type); err != nil {
			return fmt.Errorf("tensor %s: %w", tensor.Quote(name), err)
		}
	}
	if err := m.scale(scales); err != nil {
		return err
	}
	names := make([]string, len(m.Tensors))
	for i, t := range m.Tensors {
		names[i] = t.Name
	}
	return a.complete(names, layers)
}

// microscales are the scales of a tensor's blocks.
type microscales struct {
	source string
	view   view
}

// scale gives the tensors in blocks of MXFP4 their scales.
func (m *Model) scale(scales map[string]microscales) error {
	found := false
	for i := range m.Tensors {
		t := &m.Tensors[i]
		if t.Encoding != mxfp4 {
			continue
		}
		found = true
		s, ok := scales[t.Name]
		if !ok {
			return fmt.Errorf("tensor %s: %w", tensor.Quote(t.Sources[0]), malformedf("found no scales of its blocks"))
		}
		blocks := slices.Clone(t.Shape)
		blocks[len(blocks)-1] /= mxfp4.Elements
		if !slices.Equal(s.view.Dims, blocks) {
			return fmt.Errorf("tensor %s: %w", tensor.Quote(s.source), malformedf("found scales of blocks %v, expected %v",
				tensor.Shape(s.view.Dims), blocks))
		}
		t.Scales, t.ScalesView = s.source, s.view.placed(0)
		delete(scales, t.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(scales)) {
		return fmt.Errorf("tensor %s: %w", tensor.Quote(scales[name].source), malformedf("found no blocks for its scales"))
	}
	for i, p := range m.Keys {
		if found && p.Name == fileTypeKey && p.Value != Q8_0.FileType {
			m.Keys[i].Value = mxfp4FileType
		}
	}
	return nil
}

// head refuses a model without the head that its config says it has.
func (m *Model) head(a *architecture, tied *bool) error {
	const module = "output"
	if _, has := a.byName[module]; !has || tied == nil || *tied {
		return nil
	}
	for _, t := range m.Tensors {
		if t.Name == module+".weight" {
			return nil
		}
	}
	return malformedf("found no tensor for %s.weight, expected one as tie_word_embeddings is false", module)
}

// surplus reports whether a tensor, which the architecture may not know, is of a layer past the last one and left out,
// as those that predict several tokens are.
func (a *architecture) surplus(name string, layers int64) bool {
	n, ok := split(strings.ReplaceAll(name, languageModel, ""))
	if !a.Surplus || !ok || int64(n.layer) < layers {
		return false
	}
	return slices.ContainsFunc(a.Rows, func(r row) bool {
		before, _, isLayer := strings.Cut(r.module, "#")
		return isLayer && strings.HasPrefix(n.pattern, before+"#")
	})
}

// layers is the expression for the number of layers.
func (a *architecture) layers() string {
	for _, k := range a.Keys {
		if k.name == blockCount {
			return k.from
		}
	}
	return ""
}

const blockCount = "block_count"

// dropped reports whether the config has a row's tensor left out.
func (s *settings) dropped(r *row) bool {
	for _, member := range r.numbersOf(unless) {
		if v, _ := s.find(member); v == true {
			return true
		}
	}
	return false
}

// add places one tensor of a checkpoint: in each part that its row has in GGUF.
func (m *Model) add(a *architecture, s *settings, r *row, n numbered, end string, t tensor.Info, o Options,
	stacks map[string]*stacked, scales map[string]microscales, from map[string]string) error {
	if err := checkShape(t.Shape); err != nil {
		return err
	}
	if (r.has(mxfp4Blocks) || r.has(mxfp4Scales)) && t.DType != tensor.U8 {
		return malformedf("found the type %v, expected %v", t.DType, tensor.U8)
	}
	for part, pattern := range r.names {
		name := fill(pattern, n.layer, n.index) + end
		v, err := r.view(part, t.Shape, o.Vocabulary, s.whole)
		if err != nil {
			return err
		}
		if r.has(mxfp4Scales) {
			if scales[name].source != "" {
				return malformedf("found it to be scales of %s, which has those of %s", name, tensor.Quote(scales[name].source))
			}
			scales[name] = microscales{t.Name, v}
			continue
		}
		if st := stacks[name]; st != nil && r.has(stack) {
			switch {
			case st.sources[n.index] != "":
				return malformedf("found number %d of %s twice: %s", n.index, name, tensor.Quote(st.sources[n.index]))
			case !slices.Equal(st.shape, t.Shape):
				return malformedf("found the shape %v, expected %v as others of %s have", t.Shape, st.shape, name)
			case int64(n.index) >= st.count:
				return malformedf("found number %d, expected numbers below %d", n.index, st.count)
			}
			st.sources[n.index] = t.Name
			continue
		}
		if other := from[name]; other != "" {
			return malformedf("found it to be %s, which is made of %s", name, other)
		}
		from[name] = tensor.Quote(t.Name)
		info := tensor.Info{Name: name, Shape: r.result(v, t.Shape)}
		result := Tensor{Info: info, Sources: []string{t.Name}, View: v.placed(0)}
		if a.PlusOne != "" && strings.HasSuffix(t.Name, a.PlusOne) {
			result.Shift = 1
		}
		if r.has(stack) {
			count, err := s.whole(r.numbersOf(stack)[0])
			if err != nil {
				return err
			}
			if int64(n.index) >= count {
				return malformedf("found number %d, expected numbers below %d", n.index, count)
			}
			stacks[name] = &stacked{len(m.Tensors), count, t.Shape, map[int]string{n.index: t.Name}}
		}
		if result.Info = o.Type.Of(result.Info); r.has(mxfp4Blocks) {
			if len(t.Shape) < 3 || t.Shape[len(t.Shape)-1] != mxfp4.Elements/2 {
				return malformedf("found the shape %v, expected blocks of %d bytes", t.Shape, mxfp4.Elements/2)
			}
			result.DType, result.Encoding = 0, mxfp4
		}
		m.Tensors = append(m.Tensors, result)
	}
	return nil
}

// checkShape refuses a shape without elements, or with more than can be counted.
func checkShape(shape tensor.Shape) error {
	for _, d := range shape {
		if d <= 0 {
			return unsupportedf("found the shape %v, expected dimensions above 0", shape)
		}
	}
	if _, err := shape.Count(); err != nil {
		return malformedf("found the shape %v: %v", shape, err)
	}
	return nil
}

// stack completes a tensor of several sources.
func (m *Model) stack(st *stacked, typ Type) error {
	t := &m.Tensors[st.at]
	t.Sources = nil
	for i := range int(min(st.count, int64(len(st.sources))+1)) {
		source := st.sources[i]
		if source == "" {
			return malformedf("found no number %d, expected all %d", i, st.count)
		}
		t.Sources = append(t.Sources, source)
	}
	t.Shape = append(tensor.Shape{st.count}, t.Shape...)
	t.Info = typ.Of(t.Info)
	_, err := t.Shape.Count()
	return err
}

// complete refuses a model that lacks a tensor.
func (a *architecture) complete(names []string, layers int64) error {
	have := make(map[string]bool, len(names))
	everywhere := map[string]bool{}
	for _, name := range names {
		have[name] = true
		if n, ok := split(name); ok && n.layer >= 0 && outsideFeedForward(n.pattern) {
			everywhere[n.pattern] = true
		}
	}
	for _, name := range a.Need {
		if !have[name] {
			return malformedf("found no tensor for %s", name)
		}
	}
	patterns := slices.Sorted(maps.Keys(everywhere))
	for layer := range int(min(layers, maxNumber)) {
		for _, p := range patterns {
			if name := fill(p, layer, -1); !have[name] {
				return malformedf("found no tensor for %s, which other layers have", name)
			}
		}
		for _, need := range a.NeedLayer {
			if name := lacks(need, layer, have); name != "" {
				return malformedf("found no tensor for %s", name)
			}
		}
	}
	return nil
}

// outsideFeedForward reports whether a layer's tensor is one that all layers have or none: only feed-forward parts are
// of experts in some layers and dense in others.
func outsideFeedForward(pattern string) bool {
	return !strings.HasPrefix(pattern, "blk.#.ffn_") && !strings.HasPrefix(pattern, "blk.#.exp_")
}

// lacks is the name of a tensor that a layer needs and does not have, or "": of several alternatives, of the one that
// it has the most of.
func lacks(need string, layer int, have map[string]bool) string {
	missing, most := "", -1
	for alternative := range strings.SplitSeq(need, "|") {
		first, found := "", 0
		for name := range strings.SplitSeq(alternative, "+") {
			if name = fill("blk.#."+name, layer, -1); have[name] {
				found++
			} else if first == "" {
				first = name
			}
		}
		if first == "" {
			return ""
		}
		if found > most {
			missing, most = first, found
		}
	}
	return missing
}
