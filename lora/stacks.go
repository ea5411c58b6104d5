package lora

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// An adapter whose base is not at hand is told by its config which parameters of which modules it is for, and by what
// is known of the architectures in which order a module has them and how their matrices lie.

// stack is a module of an adapter for a parameter that holds all experts, as PEFT has it.
type stack struct {
	*Module
	param   string
	experts int64
	sides   orientation         // asStored where A is for the inputs of the function
	layouts []models.Registered // what its model may have, as far as that is known
}

// expert views A and B of an expert, whose product is for its matrix (out x in).
func (s stack) expert(e int64) (a, b Matrix) {
	a, b = s.Module.expert(e, s.experts)
	if s.sides == transposed {
		return b.Transposed(), a.Transposed()
	}
	return a, b
}

// mostExperts is how many a stack has at most: each becomes a module, and the largest of models have a few
// hundred.
const mostExperts = 1 << 16

// errStack says that a conversion needs what only the base knows.
var errStack = errors.New("only its base tells which parameters of experts it is for")

// model is what is known of an adapter's base by the class that PEFT notes in auto_mapping, nil where it does not.
func (a *Adapter) model() *models.Model {
	if a.looked {
		return a.base
	}
	a.looked = true
	var mapping struct {
		Class string `json:"base_model_class"`
	}
	if len(a.Config.Mapping) == 0 || json.Unmarshal(a.Config.Mapping, &mapping) != nil || mapping.Class == "" {
		return nil
	}
	config, err := json.Marshal(map[string]any{"architectures": []string{mapping.Class}})
	if err != nil {
		return nil
	}
	c, err := models.ParseConfig(config)
	if err != nil {
		return nil
	}
	if m, known := models.Load(c); known {
		a.base = m
	}
	return a.base
}

// layouts are what a module with stacks of experts may be: one where the class of the base is known, else all that
// architectures have under the end of its name.
func (a *Adapter) layouts(module string) (list []models.Registered) {
	if m := a.model(); m != nil {
		if r, ok := m.Registered(module); ok {
			return []models.Registered{r}
		}
	}
	for _, s := range models.Stacks(module) {
		list = append(list, s.Registered)
	}
	return list
}

// ungated reports whether experts have no gate, so that up_proj is a parameter of its own.
func ungated(layouts []models.Registered) bool {
	for _, r := range layouts {
		has := func(p string) bool { return slices.Contains(r.Parameters, p) }
		if !has("up_proj") || has("gate_proj") || has("gate_up_proj") {
			return false
		}
	}
	return len(layouts) > 0
}

// gateBeforeUp refuses a stack in which gate and up take turns, or may do so. Those of gpt-oss do, whose modules are
// called as those of most models are: where nothing but the name of the base tells them apart, the notice says what
// was assumed.
func (a *Adapter) gateBeforeUp(s stack) error {
	turns, usual := false, false
	for _, r := range s.layouts {
		turns = turns || r.Interleaved
		usual = usual || !r.InputsFirst
	}
	base := plainName(a.Config.Base)
	switch {
	case !turns:
	case !usual && !namesGated(base, s.Name) || strings.Contains(base, "gptoss"):
		return fmt.Errorf("module %s: %w: gate and up take turns in the experts of gpt-oss, or may do so, where single "+
			"experts have one after the other", tensor.Quote(s.Name), ErrUnsupported)
	default:
		const notice = "the base is not told by the adapter: its experts are taken for those of a model that has gate " +
			"before up, as all but gpt-oss have"
		if !slices.Contains(a.Notices, notice) {
			a.Notices = append(a.Notices, notice)
		}
	}
	return nil
}

// namesGated reports whether the plain name of a base has in it a type of models that have gate before up under a
// module's name. An adapter that transformers has made of single experts says the version of PEFT that they were of,
// which took stacks the other way round: its sides alone are those of gpt-oss.
func namesGated(base, module string) bool {
	return slices.ContainsFunc(models.Stacks(module), func(s models.Stack) bool {
		return !s.Interleaved && slices.ContainsFunc(s.Types, func(t string) bool {
			return strings.Contains(base, plainName(t))
		})
	})
}

// plainName is a name in small letters, without what people write between its words.
func plainName(name string) string {
	return strings.NewReplacer("-", "", "_", "").Replace(strings.ToLower(name))
}

// stacks finds the modules for stacks of experts without their base: what target_parameters names, in the order in
// which a model has them, and the ranks of the config. They get their Rank, Alpha and Scaling.
func (a *Adapter) stacks() ([]stack, error) {
	parameters := stringList(a.Config.Parameters)
	if len(parameters) == 0 {
		return nil, nil
	}
	groups := map[string][]*Module{}
	var order []string
	for _, m := range a.Modules {
		if m.Form != Linear || m.Param != "weight" || m.Experts > 0 {
			continue
		}
		if ok, err := a.Config.targeted(m.Name); ok || err != nil {
			if err != nil {
				return nil, err
			}
			continue
		}
		if groups[m.Name] == nil {
			order = append(order, m.Name)
		}
		groups[m.Name] = append(groups[m.Name], m)
	}
	var all []stack
	for _, name := range order {
		list, err := a.group(name, groups[name], parameters)
		if err != nil {
			return nil, fmt.Errorf("module %s: %w", tensor.Quote(name), err)
		}
		all = append(all, list...)
	}
	return all, nil
}

// group names the parameters of the modules that are nested in one.
func (a *Adapter) group(name string, modules []*Module, parameters []string) ([]stack, error) {
	slices.SortFunc(modules, func(x, y *Module) int { return y.WrapDepth - x.WrapDepth }) // the innermost is the first
	params, layouts, err := a.meant(name, len(modules), parameters)
	if err != nil {
		return nil, err
	}
	var list []stack
	for i, m := range modules {
		s := stack{Module: m, param: params[i], layouts: layouts}
		full := name + "." + s.param
		r, err := a.Config.lookup("rank_pattern", a.Config.ranks, full, float64(a.Config.Rank))
		if err != nil {
			return nil, err
		}
		rank := int64(r)
		if rank < 1 || float64(rank) != r || m.A.Rows%rank != 0 {
			return nil, fmt.Errorf("%w: its lora_A %v is no stack of the rank %g", ErrMalformed, m.A, r)
		}
		if n := m.A.Rows / rank; n > mostExperts {
			return nil, fmt.Errorf("%w: its lora_A %v has %d experts of the rank %d, expected at most %d",
				ErrMalformed, m.A, n, rank, mostExperts)
		}
		if err := a.Config.scale(m, full, rank); err != nil {
			return nil, err
		}
		if s.experts = m.A.Rows / rank; s.param == "weight" && s.experts == 1 {
			continue // a plain matrix, as a router's
		}
		list = append(list, s)
	}
	return list, a.tellSides(list)
}

// meant names the parameters of a module that target_parameters means, in the order in which the module has them, with
// what such a module may be.
func (a *Adapter) meant(name string, n int, parameters []string) ([]string, []models.Registered, error) {
	var params []string
	var layouts []models.Registered
	for _, r := range a.layouts(name) {
		var list []string
		for _, p := range r.Parameters {
			if a.Config.meansParameter(name, p) {
				list = append(list, p)
			}
		}
		switch {
		case len(list) != n:
		case params == nil || slices.Equal(params, list):
			params, layouts = list, append(layouts, r)
		default:
			return nil, nil, fmt.Errorf("%w: %w, %s as well as %s",
				ErrUnsupported, errStack, strings.Join(params, ", "), strings.Join(list, ", "))
		}
	}
	if params != nil {
		return params, layouts, nil
	}
	// One of a model that is not known, or with one parameter.
	_, end := cutLast(name)
	var dotted, bare []string
	for _, t := range parameters {
		_, last := cutLast(t)
		full := name + "." + last
		switch {
		case full != t && !strings.HasSuffix(full, "."+t) || slices.Contains(dotted, last) || slices.Contains(bare, last):
		case last == t:
			bare = append(bare, last)
		default:
			dotted = append(dotted, last)
		}
	}
	params = dotted
	if end == "experts" || n > 1 || len(dotted) == 0 { // a bare name fits any module
		params = append(params, bare...)
	}
	if len(params) != n {
		return nil, nil, fmt.Errorf("%w: %w", ErrUnsupported, errStack)
	}
	if n > 1 {
		var ok bool
		if params, ok = models.RegisteredOrder(params); !ok {
			return nil, nil, fmt.Errorf("%w: %w", ErrUnsupported, errStack)
		}
	}
	return params, []models.Registered{{Parameters: params}}, nil
}

// functionSides says which orientation A and B of a stack are for the function, where PEFT has taken its matrices in
// the way stored.
func functionSides(r models.Registered, stored orientation) orientation {
	if r.InputsFirst {
		stored ^= asStored | transposed
	}
	return stored
}

// tellSides finds which way the stacks of one module were taken in, which is one for all of them: that in which they
// fit together, else that which the version of PEFT has for what the module may be.
func (a *Adapter) tellSides(list []stack) error {
	if len(list) == 0 {
		return nil
	}
	var ways orientation
	for _, r := range list[0].layouts {
		ways |= functionOrientations(r, a.Config.PeftVersion, list[0].experts)
	}
	at := map[string]stack{}
	for _, s := range list {
		at[s.param] = s
	}
	if up, down := at["gate_up_proj"], at["down_proj"]; up.Module != nil && down.Module != nil {
		fit := orientation(0)
		if up.A.Cols == down.B.Rows && up.B.Rows == 2*down.A.Cols {
			fit |= asStored
		}
		if up.B.Rows == down.A.Cols && up.A.Cols == 2*down.B.Rows {
			fit |= transposed
		}
		if fit == 0 || up.experts != down.experts {
			return fmt.Errorf("%w: lora_A %v and lora_B %v of gate_up_proj and %v and %v of down_proj do not go together",
				ErrMalformed, up.A, up.B, down.A, down.B)
		}
		ways = fit
	}
	if ways == asStored|transposed {
		return fmt.Errorf("%w: %s has %s, which does not tell whether lora_A %v or lora_B %v is for the inputs of its "+
			"experts; its base does", ErrUnsupported, configName, saysVersion(a.Config.PeftVersion), list[0].A, list[0].B)
	}
	for i := range list {
		list[i].sides = ways
		list[i].layouts = a.agreeing(list[i], ways)
	}
	return nil
}

// agreeing are the layouts with which a version of PEFT takes stacks in that way; all where it does so with none, as
// with the layouts of older releases of transformers.
func (a *Adapter) agreeing(s stack, sides orientation) []models.Registered {
	var list []models.Registered
	for _, r := range s.layouts {
		if functionOrientations(r, a.Config.PeftVersion, s.experts)&sides != 0 {
			list = append(list, r)
		}
	}
	if len(list) == 0 {
		return s.layouts
	}
	return list
}

// functionOrientations are the ways in which a version of PEFT may have taken a stack of so many experts, as seen by
// its function.
func functionOrientations(r models.Registered, version string, experts int64) orientation {
	stored := stackOrientations(version, r.IsTransposed, true)
	if experts == 1 { // whose product is added as it is
		stored = asStored
	}
	var ways orientation
	for _, w := range []orientation{asStored, transposed} {
		if stored&w != 0 {
			ways |= functionSides(r, w)
		}
	}
	return ways
}

// writtenVersion is the release of PEFT by whose rules adapters are written.
const writtenVersion = "0.21.2"

// rewritten is the way in which the factors of a stack that single experts are put together to are written: asStored
// where A is for the inputs of the function. It is that of the models which the stack may be of, by the way it was in.
func (s stack) rewritten() (orientation, error) {
	var ways orientation
	for _, r := range s.layouts {
		ways |= functionOrientations(r, writtenVersion, s.experts)
	}
	if ways == asStored|transposed {
		return 0, fmt.Errorf("%w: %w", ErrUnsupported, errStack)
	}
	return ways, nil
}
