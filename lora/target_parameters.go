package lora

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// target_parameters of PEFT (tuners/lora/layer.py, ParamWrapper; tuners_utils.py, _inject_parameters) adapts
// parameters and no modules. A file does not name them: PEFT goes through the parameters of a module in the order in
// which they were registered, and wraps one layer more around the module for each that target_parameters means. So the
// first of them lies innermost, "experts.base_layer.lora_A", and the last is "experts.lora_A". The order of
// target_parameters is of no account.
//
// A parameter is a matrix (out, in), or a stack of them, whose first dimension counts them. What of a stack is in and
// out depends on the version of PEFT, and in newer ones on an attribute of the module.

// orientation says which sides of a stack's matrices the factors are for.
type orientation uint8

const (
	asStored   orientation = 1 << iota // A is for the last dimension and B for the one before it
	transposed                         // the reverse
)

// stackOrientations are the ways that the version of PEFT which wrote a config may have taken a stack in: more than
// one where that is not told. isTransposed is that attribute of the module, where the module is known.
func stackOrientations(version string, isTransposed, known bool) orientation {
	var ways orientation
	for _, t := range []bool{true, false} {
		if known && t != isTransposed {
			continue
		}
		older, first, newer := transposed, transposed, asStored
		if t { // 0.19.0 had it the wrong way round
			first, newer = asStored, transposed
		}
		rules := map[era]orientation{before019: older, is0190: first, after0190: newer}
		for _, e := range erasOf(version) {
			ways |= rules[e]
		}
	}
	return ways
}

// era is a range of versions of PEFT that take stacks by one rule.
type era uint8

const (
	before019 era = iota // every stack is (experts, in, out)
	is0190               // (experts, out, in) where the attribute is set: the wrong way round
	after0190            // (experts, in, out) where the attribute is set
)

// erasOf are those that a version is of. One of the main branch, 0.19.1.dev0, may be of two, and a config without one
// was written before 0.18 or by another program.
func erasOf(version string) []era {
	if version == "" {
		return []era{before019, after0190}
	}
	number, _, development := strings.Cut(version, ".dev")
	var v [3]int
	parts := strings.SplitN(number, ".", 3)
	for i, p := range parts {
		digits := p[:len(p)-len(strings.TrimLeft(p, "0123456789"))] // "0rc1" is of 0
		n, err := strconv.Atoi(digits)
		if err != nil {
			return []era{before019, is0190, after0190}
		}
		v[i] = n
	}
	is := func(x, y, z int) int { return slices.Compare(v[:], []int{x, y, z}) }
	switch {
	case len(parts) < 2:
		return []era{before019, is0190, after0190}
	case development && is(0, 18, 0) > 0 && is(0, 19, 0) <= 0:
		return []era{before019, is0190}
	case development && is(0, 19, 1) == 0:
		return []era{is0190, after0190}
	case is(0, 19, 0) < 0:
		return []era{before019}
	case is(0, 19, 0) == 0:
		return []era{is0190}
	}
	return []era{after0190}
}

// wrappedModule is what an adapter has for the parameters of one module of the base.
type wrappedModule struct {
	name    string       // as the adapter has it
	owner   string       // as the base has it
	modules []*Module    // the innermost first
	meant   []*parameter // the parameters that they are for
}

// ownParameters are those of a module of the base itself, and of none inside of it.
func (b *binder) ownParameters(module string) []*parameter {
	if b.own == nil {
		b.own = map[string][]*parameter{}
		for _, name := range b.names {
			at, _ := cutLast(name)
			b.own[at] = append(b.own[at], b.params[name])
		}
	}
	return b.own[module]
}

// wrappedModules gathers the modules of an adapter that are for parameters, and returns the others.
func (b *binder) wrappedModules(a Weighted) (list []*wrappedModule, rest []*Module, err error) {
	byName, leaves := map[string]*wrappedModule{}, b.meantLeaves(a)
	for _, m := range a.Modules {
		w := byName[m.Name]
		switch {
		case m.Form != Linear || m.Param != "weight" || m.Experts > 0 || m.A.T == nil || a.Config.otherMethod():
		case w != nil:
			w.modules = append(w.modules, m)
			continue
		default:
			if w, err = b.wrappedModule(a, m, leaves); err != nil {
				return nil, nil, err
			}
			if w != nil {
				byName[m.Name] = w
				list = append(list, w)
				continue
			}
		}
		rest = append(rest, m)
	}
	for _, w := range list {
		slices.SortFunc(w.modules, func(x, y *Module) int { return y.WrapDepth - x.WrapDepth })
		for i, m := range w.modules {
			if want := len(w.modules) - 1 - i; m.WrapDepth != want {
				return nil, nil, fmt.Errorf("module %s: %w: it lies below %d base_layer, and not all of the %d before it are "+
					"there", tensor.Quote(m.Name), ErrMalformed, m.WrapDepth, m.WrapDepth)
			}
		}
	}
	return list, rest, nil
}

// meantLeaves are the last parts of the names in target_parameters by which the base has parameters.
func (b *binder) meantLeaves(a Weighted) (list []string) {
	have := map[string]bool{}
	for _, name := range b.names {
		_, leaf := cutLast(name)
		have[leaf] = true
	}
	for target := range a.Config.targets.parameters.names {
		if _, leaf := cutLast(target); have[leaf] {
			have[leaf] = false
			list = append(list, leaf)
		}
	}
	slices.Sort(list)
	return list
}

// wrappedModule is the module whose parameters m, and those around it, are for; nil where m is for a module as it is.
// leaves are those of meantLeaves.
func (b *binder) wrappedModule(a Weighted, m *Module, leaves []string) (*wrappedModule, error) {
	c := &a.Config
	w := &wrappedModule{name: m.Name, modules: []*Module{m}}
	if empty(c.Parameters) { // nothing says so, but the module has no weight of its own
		w.owner = m.Name
		for _, p := range b.ownParameters(m.Name) {
			if strings.HasSuffix(p.name, ".weight") {
				return nil, nil
			}
			if p.experts > 0 {
				w.meant = append(w.meant, p)
			}
		}
		if len(w.meant) == 0 {
			return nil, nil
		}
		return w, nil
	}
	if ok, err := c.selectsFirst(rewrapped(m.Name)); ok || err != nil {
		return nil, err
	}
	if w.owner = b.ownerOf(m.Name, leaves); w.owner == "" {
		return nil, nil
	}
	for _, p := range b.ownParameters(w.owner) {
		_, leaf := cutLast(p.name)
		if p.rank() < 2 || !c.meansParameter(m.Name, leaf) {
			continue
		}
		w.meant = append(w.meant, p)
	}
	if len(w.meant) == 0 {
		return nil, nil
	}
	if p := w.meant[0]; len(w.meant) == 1 && p.rank() == 2 && p.name == w.owner+".weight" && m.WrapDepth == 0 {
		m.Parameter = true // of which nothing else is left open
		return nil, nil
	}
	return w, nil
}

// meansParameter reports whether target_parameters means a parameter of a module.
func (c *Config) meansParameter(module, leaf string) bool {
	return slices.ContainsFunc(rewrapped(module), func(name string) bool {
		return c.targets.parameters.have(name + "." + leaf)
	})
}

// rank is the number of a parameter's dimensions.
func (p *parameter) rank() int {
	if p.experts > 0 {
		return len(p.shape) + 1
	}
	return len(p.shape)
}

// ownerOf is the base's name of a module whose parameters are adapted: its own, that of a known renaming, or the only
// one that ends in the same way. It is "" where there is none.
func (b *binder) ownerOf(name string, leaves []string) string {
	if len(b.ownParameters(name)) > 0 {
		return name
	}
	found := map[string]bool{}
	for _, leaf := range leaves {
		full := name + "." + leaf
		for _, r := range b.model.Tensor(full, tensor.Shape{1, 1, 1}).Runtime {
			if owner, _ := cutLast(r.Param); b.params[r.Param] != nil {
				return owner
			}
		}
		if p := b.rewrapped(name, leaf); p != nil {
			owner, _ := cutLast(p.name)
			return owner
		}
		for _, p := range b.endingLike(full) {
			owner, _ := cutLast(p.name)
			found[owner] = true
		}
	}
	if owners := slices.Collect(maps.Keys(found)); len(owners) == 1 {
		return owners[0]
	}
	return ""
}

// bindParameters binds the modules of an adapter that are for parameters of one module of the base.
func (b *binder) bindParameters(i int, a Weighted, w *wrappedModule) error {
	err := b.pairWithParameters(a, w)
	if err != nil {
		return fmt.Errorf("module %s: %w", tensor.Quote(w.name), err)
	}
	r, known := b.model.Registered(w.owner)
	sides, err := w.orientation(a.Config.PeftVersion, r.IsTransposed, known || b.model.Known)
	if err != nil {
		return fmt.Errorf("module %s: %w", tensor.Quote(w.name), err)
	}
	for k, m := range w.modules {
		p := w.meant[k]
		_, m.Param = cutLast(p.name)
		if err := p.whole(); err != nil {
			return fmt.Errorf("module %s: %w", tensor.Quote(m.String()), err)
		}
		if m.Magnitude != nil {
			return fmt.Errorf("module %s: %w: DoRA on a parameter", tensor.Quote(m.String()), ErrUnsupported)
		}
		s, err := p.asStack()
		if err != nil {
			return fmt.Errorf("module %s: %w", tensor.Quote(m.String()), err)
		}
		// PEFT matches its patterns with the whole name of a parameter, also of one that is called weight.
		if err := a.Config.scale(m, m.Name+"."+m.Param, m.A.Rows/s.experts); err != nil {
			return err
		}
		if err := a.finiteScale(m); err != nil {
			return err
		}
		if err := b.claim(i, m, whole(p)); err != nil {
			return err
		}
		for e := range s.experts {
			t := Update{Adapter: i, Module: m, Name: p.name, Expert: e + 1, Rank: int64(m.Rank), Left: m.B, Right: m.A}
			t.Scale = float32(a.Weight * m.Scaling)
			at := spot{p: s, expert: e}
			if s.experts > 1 {
				t.Right, t.Left = m.expert(e, s.experts)
			}
			if s.experts > 1 && sides == transposed {
				t.Left, t.Right = t.Right.Transposed(), t.Left.Transposed()
			}
			if p.rank() == 2 {
				t.Expert, at = 0, whole(p)
			}
			b.spread(t, at)
		}
	}
	return nil
}

// asStack views a parameter as a stack of matrices, as PEFT takes it: a matrix is a stack of one.
func (p *parameter) asStack() (*parameter, error) {
	s := *p
	switch {
	case p.experts > 0 && len(p.shape) == 2:
	case p.experts > 0:
		return nil, fmt.Errorf("%w: the experts of %s have the shape %v, expected matrices", ErrBase, tensor.Quote(p.name),
			p.shape)
	case p.rank() == 2:
		s.experts = 1
	case p.rank() == 3 && p.experts == 0:
		if len(p.pieces) != 1 || !p.pieces[0].slice.Whole() {
			return nil, fmt.Errorf("%w: a stack of matrices that its file holds in pieces", ErrUnsupported)
		}
		s.experts, s.shape = p.shape[0], p.shape[1:]
	default:
		return nil, fmt.Errorf("%w: %s has %d dimensions, expected 2 or 3", ErrBase, tensor.Quote(p.name), p.rank())
	}
	if s.experts == 0 || s.experts > mostExperts {
		return nil, fmt.Errorf("%w: %s has the shape %v, expected a stack of 1 to %d matrices",
			ErrBase, tensor.Quote(p.name), p.shape, mostExperts)
	}
	return &s, nil
}

// orientations are those in which the factors of a module fit a parameter.
func (p *parameter) orientations(m *Module) orientation {
	s, err := p.asStack()
	if err != nil || m.A.Rows%s.experts != 0 {
		return 0
	}
	var ways orientation
	if m.A.Cols == s.shape[1] && m.B.Rows == s.shape[0] {
		ways |= asStored
	}
	// PEFT adds the product to a stack of one as it is, whichever sides it has taken them for.
	if s.experts > 1 && m.A.Cols == s.shape[0] && m.B.Rows == s.shape[1] {
		ways |= transposed
	}
	return ways
}

// String describes a parameter in messages.
func (p *parameter) String() string {
	_, leaf := cutLast(p.name)
	if p.experts > 0 {
		return fmt.Sprintf("%s, %d of %v", leaf, p.experts, p.shape)
	}
	return fmt.Sprintf("%s %v", leaf, p.shape)
}

func describe(params []*parameter) string {
	var list []string
	for _, p := range params {
		list = append(list, p.String())
	}
	return strings.Join(list, "; ")
}

// pairWithParameters puts the parameters that the modules are for into the order of the modules, the innermost first.
func (b *binder) pairWithParameters(a Weighted, w *wrappedModule) error {
	if n := len(w.modules); n != len(w.meant) {
		says := "target_parameters means"
		if empty(a.Config.Parameters) {
			says = "the base has"
		}
		return fmt.Errorf("%w: %s %d of its parameters (%s), and the file has lora_A and lora_B of %d",
			ErrBase, says, len(w.meant), describe(w.meant), n)
	}
	if len(w.meant) > 1 {
		registered, ok := b.parameterOrder(w)
		if !ok {
			return w.onlyAssignment()
		}
		slices.SortStableFunc(w.meant, func(x, y *parameter) int {
			_, p := cutLast(x.name)
			_, q := cutLast(y.name)
			return slices.Index(registered, p) - slices.Index(registered, q)
		})
	}
	for k, p := range w.meant {
		if m := w.modules[k]; p.orientations(m) == 0 {
			return fmt.Errorf("%w: lora_A %v and lora_B %v below %d base_layer are for %s by the order in which the model has "+
				"its parameters, and do not fit it, %s", ErrBase, m.A, m.B, m.WrapDepth, tensor.Quote(p.name), p)
		}
	}
	return nil
}

// parameterOrder is the order in which a module has its parameters, by what is known of the architecture, or of all
// that have parameters of these names. It returns false where neither says it.
func (b *binder) parameterOrder(w *wrappedModule) ([]string, bool) {
	var names []string
	for _, p := range w.meant {
		_, leaf := cutLast(p.name)
		names = append(names, leaf)
	}
	if r, ok := b.model.Registered(w.owner); ok {
		if !slices.ContainsFunc(names, func(n string) bool { return !slices.Contains(r.Parameters, n) }) {
			return r.Parameters, true
		}
	}
	return models.RegisteredOrder(names)
}

// mostAssignments is how many assignments are tried. No module that is known has more than nine parameters.
const mostAssignments = 1 << 12

// onlyAssignment gives the modules the parameters that they fit, where there is one way to do so and no rule.
func (w *wrappedModule) onlyAssignment() error {
	var found [][]*parameter
	tries := 0
	var choose func(chosen, free []*parameter)
	choose = func(chosen, free []*parameter) {
		if tries++; tries > mostAssignments || len(found) > 1 {
			return
		}
		if len(free) == 0 {
			found = append(found, slices.Clone(chosen))
			return
		}
		for k, p := range free {
			if p.orientations(w.modules[len(chosen)]) != 0 {
				choose(append(slices.Clone(chosen), p), slices.Delete(slices.Clone(free), k, k+1))
			}
		}
	}
	choose(nil, w.meant)
	m := w.modules[0]
	switch {
	case tries > mostAssignments:
		return fmt.Errorf("%w: the order of its %d parameters is not known, in which PEFT nests what adapts them",
			ErrUnsupported, len(w.meant))
	case len(found) == 0:
		return fmt.Errorf("%w: lora_A %v and lora_B %v, and those around them, fit its parameters in no order: %s",
			ErrBase, m.A, m.B, describe(w.meant))
	case len(found) > 1:
		return fmt.Errorf("%w: lora_A %v and lora_B %v fit %s as well as %s, and the order of the parameters, in which PEFT "+
			"nests what adapts them, is not known of this architecture", ErrUnsupported, m.A, m.B, found[0][0], found[1][0])
	}
	w.meant = found[0]
	return nil
}

// orientation says which way the stacks of one module were taken in: as the shapes of those that are no squares have
// it, for it is one for all of them, else as the version of PEFT has it.
func (w *wrappedModule) orientation(version string, isTransposed, known bool) (orientation, error) {
	var told orientation
	var by, square *Module
	for k, m := range w.modules {
		switch ways := w.meant[k].orientations(m); {
		case w.meant[k].rank() == 2 || w.meant[k].one(): // PEFT has but one way to take it
		case ways == asStored|transposed:
			square = m
		case told != 0 && told != ways:
			return 0, fmt.Errorf("%w: lora_A %v and lora_B %v fit its parameter in one way, and %v and %v theirs in the other, "+
				"expected one for all of a module", ErrBase, by.A, by.B, m.A, m.B)
		default:
			told, by = ways, m
		}
	}
	if told != 0 || square == nil {
		return told, nil
	}
	switch ways := stackOrientations(version, isTransposed, known); ways {
	case asStored, transposed:
		return ways, nil
	}
	return 0, fmt.Errorf("%w: lora_A %v and lora_B %v fit its square matrices both ways round, and %s has %s, which does "+
		"not tell how that release of PEFT took them", ErrUnsupported, square.A, square.B, configName, saysVersion(version))
}

// saysVersion names what a config says of the version of PEFT.
func saysVersion(version string) string {
	if version == "" {
		return "no peft_version"
	}
	return "the peft_version " + tensor.Quote(version)
}

// one reports whether a parameter is a stack of one matrix.
func (p *parameter) one() bool {
	return p.experts == 1 || p.experts == 0 && len(p.shape) == 3 && p.shape[0] == 1
}
