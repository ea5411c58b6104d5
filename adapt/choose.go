package adapt

import (
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/internal/pyregex"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/internal/nearest"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// module is a target that a new adapter has a part for.
type module struct {
	*Target
	rank  int
	alpha float64
}

// scaling is the factor of B·A.
func (m *module) scaling() float64 { return m.alpha / float64(m.rank) }

// choice is what a new adapter is attached to.
type choice struct {
	list       []*module
	parameters []string // target_parameters
	doubled    bool     // gate_up_proj stands for two projections of the rank asked for
	notices    []string
}

// modules lists the target_modules.
func (c *choice) modules() []string {
	list := []string{}
	for _, m := range c.list {
		if !m.ByParameter {
			list = append(list, m.Module())
		}
	}
	return list
}

// key is the name that PEFT gives a module in its file: of two parameters of one module the second is wrapped around
// the first.
func (c *choice) key(m *module) string {
	shared := func(o *module) bool { return o != m && o.Experts > 0 && o.Module() == m.Module() }
	if m.Experts > 0 && strings.HasSuffix(m.Param, "."+lora.GateUp) && slices.ContainsFunc(c.list, shared) {
		return m.Module() + ".base_layer"
	}
	return m.Module()
}

// choose finds what the target of o means for a checkpoint, by the rules of PEFT.
func choose(c *checkpoint.Checkpoint, o AttachOptions, s start, task string) (*choice, error) {
	p, err := newTargetPattern(o.Target)
	if err != nil {
		return nil, err
	}
	b := &chooser{targetPattern: p, task: task, head: c.Model.Head(), all: Targets(c)}
	modelType := ""
	if c.Config != nil {
		modelType = c.Config.ModelType
	}
	b.stacked = lora.StackedExperts(modelType)
	chosen := &choice{}
	if err := b.modules(); err != nil {
		return nil, err
	}
	if err := b.experts(chosen); err != nil {
		return nil, err
	}
	kernelTold := false
	tell := func(format string, args ...any) {
		chosen.notices = append(chosen.notices, fmt.Sprintf(format, args...))
	}
	for _, t := range b.all {
		if !b.chosen[t] {
			if p.everything && t.Kind == models.Expert && !c.Model.Known {
				err := fmt.Errorf("%w: target all-linear on a model with experts whose architecture is not known "+
					"here: %s", ErrRefused, t)
				return nil, hint.With(err, hint.Hint{
					Option: "Target", Value: "attention", Effect: "takes its linear layers, and names what they say",
				})
			}
			if p.everything && t.Experts > 0 && len(chosen.notices) == 0 {
				tell("experts such as %s are no linear layers of this architecture, and all-linear leaves them alone, "+
					"as PEFT does", t)
			}
			continue
		}
		if lora.GoesToKernel(modelType, t.Module()) {
			if !p.everything {
				return nil, t.refused("its weight goes to a kernel past an adapter, and PEFT refuses it for %s",
					modelType)
			}
			if !kernelTold {
				kernelTold = true
				tell("modules such as %s are left out: their weights go to a kernel past an adapter, and PEFT refuses "+
					"them", t)
			}
			continue
		}
		if t.bypassed && s.fromWeight {
			tell("%s is left out: torch's MultiheadAttention reads its weight past an adapter, so that what the "+
				"init %s takes out of it would be lost", t, s.name)
			continue
		}
		m := &module{Target: t, rank: o.Rank, alpha: o.Alpha}
		if chosen.doubled && strings.HasSuffix(t.Param, "."+lora.GateUp) {
			m.rank, m.alpha = 2*m.rank, 2*m.alpha
		}
		if err := m.check(s); err != nil {
			return nil, err
		}
		chosen.list = append(chosen.list, m)
	}
	if len(chosen.list) == 0 {
		return nil, b.nothingChosen(c, o.Target)
	}
	for _, name := range p.names {
		if !b.matched[name] {
			tell("no module is called %s%s", tensor.Quote(name), nearest.Suggestion(name, b.words()))
		}
	}
	return chosen, nil
}

// check refuses a target that no adapter can be made for.
func (m *module) check(s start) error {
	// A gate has a row for each expert, or a single one: all-linear takes it with any rank.
	gate := (m.Kind == models.Router || m.Out == 1) && !s.fromWeight
	want := m.perMatrix
	if m.apart {
		want *= m.Experts
	}
	switch {
	case m.misfit != "":
		return m.refused("tensor %s does not fit with the others that it is made of", tensor.Quote(m.misfit))
	case m.Kind == models.Other:
		return m.refused("it is a convolution, of shape %v; linear layers, embeddings and experts can have an adapter",
			m.shape)
	case m.Kind == models.Expert && m.Experts == 0:
		return m.refused("it is an expert of a model whose architecture is not known here")
	case m.Weight == nil && m.tensors != want:
		return m.refused("the base has %d of the %d tensors that it is made of", m.tensors, want)
	case m.Out < 1 || m.In < 1:
		return m.refused("its shape is %v", m.shape)
	case m.rank > min(m.Out, m.In) && !gate:
		return m.refused("rank %d is larger than its matrix of %d x %d allows", m.rank, m.Out, m.In)
	}
	return nil
}

// chooser finds what a pattern means for a model.
type chooser struct {
	targetPattern
	task    string
	head    string
	stacked map[string]string // of lora.StackedExperts
	all     []*Target
	chosen  map[*Target]bool
	meant   map[string]bool // names of stacked that the pattern means
	matched map[string]bool // names of the pattern that matched
}

// nothingChosen names some of what a pattern might have matched, or says why there is nothing.
func (b *chooser) nothingChosen(c *checkpoint.Checkpoint, target string) error {
	var names []string
	for _, t := range b.all {
		if t.Kind == models.Linear || t.Kind == models.Conv1D {
			names = append(names, t.String())
		}
	}
	word := target
	if len(b.names) > 0 {
		word = b.names[0]
	}
	if layout, ok := c.ForeignScheme(); ok {
		return fmt.Errorf("%w: target %s matches none of the linear layers that can be read: its weights are stored as %s",
			ErrRefused, tensor.Quote(target), layout.Name)
	}
	if len(names) == 0 {
		return fmt.Errorf("%w: it has no linear layer", ErrRefused)
	}
	return fmt.Errorf("%w: target %s matches none of its linear layers, such as %s%s", ErrRefused, tensor.Quote(target),
		strings.Join(names[:min(3, len(names))], ", "), nearest.Suggestion(word, b.words()))
}

// words lists what a target may be called: modules by their last and whole names, and the words for many of them.
func (b *chooser) words() []string {
	words := []string{"all-linear", "attention"}
	for _, t := range b.all {
		words = append(words, last(t.Module()))
	}
	for _, t := range b.all {
		words = append(words, t.Module())
	}
	return words
}

// modules chooses modules. One that shares its name with what experts had is left to experts: PEFT cannot tell them
// apart.
func (b *chooser) modules() error {
	b.chosen, b.meant, b.matched = map[*Target]bool{}, map[string]bool{}, map[string]bool{}
	for _, t := range b.all {
		name := t.Module()
		if t.ByParameter || b.neverChosen(t) {
			continue
		}
		hit, err := b.match(name, b.matched)
		if err != nil {
			return err
		}
		if !hit {
			continue
		}
		if leaf := last(name); b.stacked[leaf] != "" {
			b.meant[leaf] = true
			continue
		}
		b.chosen[t] = true
	}
	return nil
}

// neverChosen reports whether a module is left alone whatever the pattern says: what PEFT trains whole for a task, and
// of all linear layers the output head.
func (b *chooser) neverChosen(t *Target) bool {
	name := t.Module()
	if lora.IsTrainedWhole(name, b.task) {
		return true
	}
	linear := t.Kind == models.Linear || t.Kind == models.Conv1D
	if !b.everything {
		return b.attention && !linear
	}
	unknown := t.Weight != nil && !t.Weight.Role.Known && !t.Weight.Role.Quantized // a head by its name
	return !linear || name == b.head || last(name) == "lm_head" || unknown
}

// experts chooses the parameters of experts and routers.
func (b *chooser) experts(c *choice) error {
	if err := b.formerNames(); err != nil {
		return err
	}
	wanted := map[string]bool{}
	var with, without []string // of the projections that are one parameter
	for name, param := range b.stacked {
		switch {
		case b.meant[name]:
			wanted[param] = true
			if param == lora.GateUp {
				with = append(with, name)
			}
		case param == lora.GateUp:
			without = append(without, name)
		}
	}
	if c.doubled = len(with) == 2; len(with) == 1 {
		return fmt.Errorf("%w: target %s without %s: in this model they are one parameter, %s",
			ErrRefused, with[0], without[0], lora.GateUp)
	}
	direct := map[string]bool{} // named as they are at run time
	for _, name := range b.names {
		direct[name] = true
	}
	for _, t := range b.all {
		for _, set := range []map[string]bool{wanted, direct} {
			for end := range set {
				if t.Param != end && !strings.HasSuffix(t.Param, "."+end) || !t.ByParameter && !wanted[end] {
					continue
				}
				if b.stacked == nil {
					return t.refused("the experts and routers of this architecture are no targets of PEFT's " +
						"all-linear, and no others can have an adapter here")
				}
				t.ByParameter, b.chosen[t], b.matched[end] = true, true, true
				if !slices.Contains(c.parameters, end) {
					c.parameters = append(c.parameters, end)
				}
			}
		}
	}
	slices.Sort(c.parameters)
	return nil
}

// formerNames finds which names of older releases the pattern means: "w1" or "gate_proj", now a part of a parameter.
func (b *chooser) formerNames() error {
	for name := range b.stacked {
		switch {
		case b.everything:
			b.meant[name] = true
		case b.regex != nil:
			for _, t := range b.all {
				if !t.ByParameter {
					continue
				}
				tried := t.Module() // of a router
				if t.Experts > 0 {
					tried += "." + name
				}
				if last(tried) != name || b.stacked[name] != last(t.Param) && t.Experts > 0 {
					continue
				}
				hit, err := b.match(tried, nil)
				if err != nil {
					return err
				}
				b.meant[name] = b.meant[name] || hit
			}
		}
		for _, n := range b.names {
			if n == name || strings.HasSuffix(n, "."+name) {
				b.meant[name], b.matched[n] = true, true
			}
		}
	}
	return nil
}

func last(name string) string { return name[strings.LastIndexByte(name, '.')+1:] }

// inAttention reports whether a module belongs to an attention block.
func inAttention(name string) bool {
	inside := strings.ToLower(name[:max(0, strings.LastIndexByte(name, '.'))])
	return strings.Contains(inside, "attn") || strings.Contains(inside, "attention")
}

// targetPattern is what a target says.
type targetPattern struct {
	target                string
	everything, attention bool
	regex                 *pyregex.Regexp
	names                 []string
}

func newTargetPattern(target string) (targetPattern, error) {
	switch {
	case target == "" || strings.EqualFold(target, "all-linear"):
		return targetPattern{everything: true}, nil
	case target == "attention":
		return targetPattern{attention: true}, nil
	case strings.ContainsAny(target, `\*+?()[]{}|^$`):
		re, err := pyregex.Compile(target)
		if err != nil {
			return targetPattern{}, fmt.Errorf("%w: target %s: %w", ErrOption, tensor.Quote(target), err)
		}
		return targetPattern{target: target, regex: re}, nil
	}
	var p targetPattern
	for name := range strings.SplitSeq(target, ",") {
		if name = strings.TrimSpace(name); name == "" {
			return targetPattern{}, fmt.Errorf("%w: target %s has an empty name", ErrOption, tensor.Quote(target))
		}
		p.names = append(p.names, name)
	}
	return p, nil
}

// match matches the name of a module, and notes which name of the pattern did.
func (p *targetPattern) match(module string, matched map[string]bool) (bool, error) {
	switch {
	case p.everything:
		return true, nil
	case p.attention:
		return inAttention(module), nil
	case p.regex != nil:
		m, err := p.regex.FullMatch(module)
		if err != nil {
			err = fmt.Errorf("%w: target %s on %s: %w", ErrRefused, tensor.Quote(p.target), tensor.Quote(module), err)
		}
		return m != nil, err
	}
	hit := false
	for _, name := range p.names {
		if module == name || strings.HasSuffix(module, "."+name) {
			hit, matched[name] = true, true
		}
	}
	return hit, nil
}
