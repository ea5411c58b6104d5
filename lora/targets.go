package lora

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/internal/pyregex"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// targets is what a config says of the modules that are adapted. All of it is matched with run-time names.
type targets struct {
	list       []string  // target_modules, where it is a list; each stands for all names that end in it
	names      ends      // list
	expr       string    // target_modules, where it is a regular expression
	parameters ends      // target_parameters
	owners     ends      // the modules of those
	anyOwner   bool      // one of them names no module
	exclude    ends      // exclude_modules, where it is a list
	excluded   string    // or a regular expression
	layers     []int64   // layers_to_transform, which narrows a list; nil is all
	layerLists []string  // layers_pattern, regular expressions of the lists of layers
	saved      ends      // modules_to_save
	around     []pattern // those of modules_to_save that are more than a name to Python
}

// parseTargets reads the fields that select modules.
func (c *Config) parseTargets() (t targets, err error) {
	wrong := func(field string, v jsontext.Value, expected string) error {
		return fmt.Errorf("%w: %s is %s, expected %s", ErrMalformed, field, tensor.Quote(string(v)), expected)
	}
	// A list, a regular expression, or nothing.
	selection := func(field string, v jsontext.Value) (list []string, expr string, err error) {
		if empty(v) {
			return nil, "", nil
		}
		if json.Unmarshal(v, &list) != nil && json.Unmarshal(v, &expr) != nil {
			err = wrong(field, v, "a list of names or a regular expression")
		}
		return list, expr, err
	}
	if t.list, t.expr, err = selection("target_modules", c.Targets); err != nil {
		return t, err
	}
	exclude, excluded, err := selection("exclude_modules", c.Exclude)
	if err != nil {
		return t, err
	}
	t.names, t.exclude, t.excluded = endsOf(t.list), endsOf(exclude), excluded
	if !empty(c.Parameters) && stringList(c.Parameters) == nil { // what is for stacks of experts would not be told
		return t, wrong("target_parameters", c.Parameters, "a list of names")
	}
	t.parameters = endsOf(stringList(c.Parameters))
	var owners []string
	for _, parameter := range stringList(c.Parameters) {
		owner, _ := cutLast(parameter)
		owners = append(owners, owner)
		t.anyOwner = t.anyOwner || owner == ""
	}
	t.owners = endsOf(owners)
	if !empty(c.Layers) {
		var one int64
		if json.Unmarshal(c.Layers, &one) == nil {
			t.layers = []int64{one}
		} else if json.Unmarshal(c.Layers, &t.layers) != nil {
			return t, wrong("layers_to_transform", c.Layers, "a number or a list of numbers")
		}
	}
	if t.layerLists = stringList(c.LayerLists); t.layerLists == nil && !empty(c.LayerLists) {
		return t, wrong("layers_pattern", c.LayerLists, "a list of names")
	}
	if n := len(t.layerLists); n > mostRegexes {
		return t, fmt.Errorf("%w: layers_pattern has %d regular expressions, expected at most %d", ErrMalformed, n,
			mostRegexes)
	}
	t.saved = endsOf(stringList(c.ToSave))
	t.around, err = c.parseSaved(stringList(c.ToSave))
	return t, err
}

// parseSaved compiles modules_to_save, which PEFT takes for regular expressions where it keeps adapters out of them.
func (c *Config) parseSaved(list []string) (out []pattern, err error) {
	regexes := 0
	for _, key := range list {
		p := pattern{key: key}
		switch {
		case isName(key) && !strings.ContainsAny(key, `.^`):
			continue // the name says all
		case isName(key):
		case regexes == mostRegexes:
			return out, fmt.Errorf("%w: modules_to_save has more than %d regular expressions", ErrMalformed, mostRegexes)
		default:
			regexes++
			if p.re, err = c.compile(`(^|.*\.)` + key + `($|\..*)`); err != nil {
				return out, fmt.Errorf("modules_to_save: %w", err)
			}
		}
		out = append(out, p)
	}
	return out, nil
}

// ends are names, each of which stands for all that end in it as well, on whole parts.
type ends struct {
	names   map[string]bool
	lengths map[int]bool // of the names: a long name has many ends, and only those are looked up
}

func endsOf(list []string) ends {
	e := ends{map[string]bool{}, map[int]bool{}}
	for _, name := range list {
		e.names[name], e.lengths[len(name)] = true, true
	}
	return e
}

// of is the longest of them that a name ends in.
func (e ends) of(name string) (end string, ok bool) {
	for more := true; more; _, name, more = strings.Cut(name, ".") {
		if e.lengths[len(name)] && e.names[name] {
			return name, true
		}
	}
	return "", false
}

// have reports whether a name ends in one of them.
func (e ends) have(name string) bool {
	_, ok := e.of(name)
	return ok
}

// around lists those that a name has anywhere, as whole parts: of modules_to_save the modules that it is in, or is.
func (e ends) around(name string) []string {
	var list []string
	for more := true; more; _, name, more = strings.Cut(name, ".") {
		for n := range e.lengths {
			if n > 0 && (n == len(name) || n < len(name) && name[n] == '.') && e.names[name[:n]] {
				list = append(list, name[:n])
			}
		}
	}
	slices.Sort(list)
	return list
}

// inner lists those that others end in.
func (e ends) inner() map[string]bool {
	list := map[string]bool{}
	for name := range e.names {
		for {
			var more bool
			if _, name, more = strings.Cut(name, "."); !more {
				break
			}
			if e.lengths[len(name)] && e.names[name] {
				list[name] = true
			}
		}
	}
	return list
}

// targeted reports whether target_modules means a module.
func (c *Config) targeted(name string) (bool, error) {
	if c.targets.expr != "" {
		return c.matches("target_modules", c.targets.expr, name)
	}
	return c.targets.names.have(name), nil
}

// selects reports whether PEFT adapts a module: target_modules means it, and none of exclude_modules,
// modules_to_save and layers_to_transform leaves it out.
func (c *Config) selects(name string) (bool, error) {
	if ok, err := c.targeted(name); !ok || err != nil {
		return false, err
	}
	if c.targets.exclude.have(name) || c.SavesWhole(name) {
		return false, nil
	}
	if c.targets.excluded != "" {
		if out, err := c.matches("exclude_modules", c.targets.excluded, name); out || err != nil {
			return false, err
		}
	}
	if out, err := c.insideSaved(name); out || err != nil {
		return false, err
	}
	if c.targets.layers == nil || c.targets.expr != "" || c.targets.names.names[name] {
		return true, nil
	}
	layer, ok, err := c.layerOf(name)
	return ok && slices.Contains(c.targets.layers, layer), err
}

// insideSaved reports whether a module is one that modules_to_save matches as an expression, or in one.
func (c *Config) insideSaved(name string) (bool, error) {
	start := time.Now()
	defer func() { c.spent += time.Since(start) }()
	for _, p := range c.targets.around {
		ok, err := p.matchAround(name)
		if err != nil || c.spent+time.Since(start) > allMatches {
			return false, c.errMatch("modules_to_save", p.key, name, err)
		}
		if ok {
			return true, nil
		}
	}
	return false, nil
}

// layerOf is the number of the layer that a module is in: the first number behind a name that layers_pattern
// matches, or behind any.
func (c *Config) layerOf(name string) (layer int64, ok bool, err error) {
	lists := []string{`.*?\.[^.]*`}
	if len(c.targets.layerLists) > 0 {
		lists = nil
		for _, p := range c.targets.layerLists {
			lists = append(lists, `(?:^|.*?\.)`+p)
		}
	}
	for _, list := range lists {
		m, err := c.find("layers_pattern", list+`\.(?P<idx>\d+)\.`, name, (*pyregex.Regexp).Match)
		if err != nil {
			return 0, false, err
		}
		if m != nil {
			digits, _ := m.Group("idx")
			n, err := strconv.ParseInt(digits, 10, 64)
			return n, err == nil, nil
		}
	}
	return 0, false, nil
}

// matches reports whether the regular expression of a field matches a whole name.
func (c *Config) matches(field, expr, name string) (bool, error) {
	m, err := c.find(field, expr, name, (*pyregex.Regexp).FullMatch)
	return m != nil, err
}

// find matches a regular expression of a field with a name.
func (c *Config) find(
	field, expr, name string, match func(*pyregex.Regexp, string) (*pyregex.Match, error),
) (*pyregex.Match, error) {
	re := c.regexes[expr]
	if re == nil {
		var err error
		if re, err = c.compile(expr); err != nil {
			return nil, fmt.Errorf("%s: %s: %w", configName, field, err)
		}
		if c.regexes == nil {
			c.regexes = map[string]*pyregex.Regexp{}
		}
		c.regexes[expr] = re
	}
	start := time.Now()
	m, err := match(re, name)
	if c.spent += time.Since(start); err != nil || c.spent > allMatches {
		return nil, c.errMatch(field, expr, name, err)
	}
	return m, nil
}

// errMatch is why an expression is not matched: err, or that all take too long.
func (c *Config) errMatch(field, expr, name string, err error) error {
	if errors.Is(err, pyregex.ErrUnsupported) {
		return fmt.Errorf("%s: %s: %w: the regular expression %s on %s: %w", configName, field, ErrUnsupported,
			tensor.Quote(expr), tensor.Quote(name), err)
	}
	return fmt.Errorf("%s: %s: %w: the regular expression %s takes too long on %s", configName, field, ErrMalformed,
		tensor.Quote(expr), tensor.Quote(name))
}

// patternName is the name that rank_pattern and alpha_pattern are matched with: that of a module, or of a
// parameter where only target_parameters can mean it, as a router's "gate.weight".
func (c *Config) patternName(m *Module) string {
	full := m.Name + "." + m.Param
	if c.targets.parameters.have(full) && !c.targets.names.have(m.Name) {
		return full
	}
	return m.Name
}

// wrappers are what the classes that models are loaded with put before the names of their modules. An adapter
// whose keys were renamed from one to the other keeps the expressions that were written for the first.
var wrappers = []string{"model.language_model.", "language_model.model.", "language_model.", "model."}

// rewrapped lists the names that a module has within the wrappers, its own first.
func rewrapped(name string) []string {
	inner := name
	for _, w := range wrappers {
		if rest, ok := strings.CutPrefix(name, w); ok {
			inner = rest
			break
		}
	}
	list := []string{name, inner}
	for _, w := range wrappers {
		list = append(list, w+inner)
	}
	return list
}

// silent reports whether a config does not say which modules are adapted.
func (t *targets) silent() bool {
	return len(t.list) == 0 && t.expr == "" && len(t.parameters.names) == 0 || strings.EqualFold(t.expr, "all-linear")
}

// CheckTargets refuses an adapter with tensors of modules that its config leaves out: PEFT would not look at
// them. Bind does so too, and knows more of the parameters of experts.
func (a *Adapter) CheckTargets() error {
	owner := func(name, _ string) bool { return a.Config.targets.anyOwner || a.Config.targets.owners.have(name) }
	if err := a.checkTargets(owner); err != nil {
		return a.named(err)
	}
	return nil
}

// checkTargets is CheckTargets, where parameter reports whether target_parameters means a parameter of a module.
func (a *Adapter) checkTargets(parameter func(module, param string) bool) error {
	c := &a.Config
	if c.targets.silent() {
		return nil
	}
	for _, m := range a.Modules {
		if !m.targeted() {
			continue
		}
		names := rewrapped(cmp.Or(m.selectedAs, m.Name))
		if slices.ContainsFunc(names, func(name string) bool { return parameter(name, m.Param) }) {
			continue
		}
		meant, err := c.selectsFirst(names)
		if err != nil {
			return err
		}
		if !meant && !a.ensuredEnd(m) {
			return c.errNotMeant(m)
		}
	}
	return nil
}

// selectsFirst is selects for the first of a module's names that target_modules means: what leaves a module out
// under its own name does not hold for another one.
func (c *Config) selectsFirst(names []string) (bool, error) {
	for _, name := range names {
		if ok, err := c.targeted(name); err != nil {
			return false, err
		} else if ok {
			return c.selects(name)
		}
	}
	return false, nil
}

// checkTargets refuses modules that have tensors and that the config leaves out, and modules that it means by a name
// by which no tensors are there. Single ones without tensors are told of: those of another part of the base may have
// the same names.
func (b *binder) checkTargets(i int, a Weighted) error {
	c := &a.Config
	err := a.checkTargets(func(module, param string) bool { return c.targets.parameters.have(module + "." + param) })
	if err == nil {
		err = b.checkReplaced(a)
	}
	if err != nil || c.otherMethod() || len(c.targets.list) == 0 {
		return err
	}
	used := map[string]bool{}
	for _, m := range a.Modules {
		if end, ok := c.targets.names.of(m.Name); ok && m.A.T != nil {
			used[end] = true
		}
	}
	var missing []string
	for _, full := range b.names {
		p := b.params[full]
		name, weight := strings.CutSuffix(full, ".weight")
		if !weight || p.kind != models.Linear && p.kind != models.Conv1D && p.kind != models.Embedding ||
			b.bound[claimKey(i, false, p)] != nil {
			continue
		}
		if ok, err := c.selects(name); err != nil {
			return err
		} else if !ok {
			continue
		}
		if end, _ := c.targets.names.of(name); !used[end] {
			return fmt.Errorf("module %s: %w: target_modules means it by %s, and the file has no lora_A and lora_B of any such "+
				"module", tensor.Quote(name), ErrMalformed, tensor.Quote(end))
		}
		missing = append(missing, name)
	}
	if n := len(missing); n > 0 {
		more := ""
		if n > 3 {
			more = ", ..."
		}
		b.out.Notices = append(b.out.Notices, fmt.Sprintf("%s: target_modules also means %d modules of the base that it has "+
			"no tensors of, and leaves as they are: %s%s", a.Path, n, strings.Join(missing[:min(n, 3)], ", "), more))
	}
	return nil
}

// checkReplaced refuses an adapter whose config says that it replaces modules or rows, and which has none. Names in
// modules_to_save that the base does not have mean nothing: PEFT lists two for every classifier.
func (b *binder) checkReplaced(a Weighted) error {
	c := &a.Config
	if !empty(c.Tokens) && !slices.ContainsFunc(a.Modules, func(m *Module) bool { return m.Form == Rows }) {
		return fmt.Errorf("%s: %w: trainable_token_indices is set, and the file has no trainable_tokens_delta", configName,
			ErrMalformed)
	}
	brought := map[string]bool{}
	for _, m := range a.Modules {
		if m.A.T == nil {
			for _, saved := range c.targets.saved.around(m.Name) {
				brought[saved] = true
			}
		}
	}
	for _, full := range b.names {
		name, _ := cutLast(full)
		for _, saved := range c.targets.saved.around(name) {
			if !brought[saved] {
				return fmt.Errorf("module %s: %w: modules_to_save means it by %s, and the file has no weight or bias of any such "+
					"module", tensor.Quote(name), ErrMalformed, tensor.Quote(saved))
			}
		}
	}
	return nil
}

// SavesWhole reports whether modules_to_save means a module or one that it is in: it has no factors then.
func (c *Config) SavesWhole(name string) bool { return len(c.targets.saved.around(name)) > 0 }

// TrainsWhole reports whether PEFT trains a copy of a module or of one that it is in, by modules_to_save. It looks at
// the ends of names and not at their parts: norm means input_layernorm too.
func (c *Config) TrainsWhole(name string) bool {
	for {
		for _, saved := range stringList(c.ToSave) {
			if saved != "" && strings.HasSuffix(name, saved) {
				return true
			}
		}
		i := strings.LastIndexByte(name, '.')
		if i < 0 {
			return false
		}
		name = name[:i]
	}
}

// errNotMeant says that a config leaves out a module that has tensors.
func (c *Config) errNotMeant(m *Module) error {
	meant := slices.Concat(c.targets.list, stringList(c.Parameters))
	if c.targets.expr != "" {
		meant = append(meant, c.targets.expr)
	}
	fields := "target_modules"
	for _, f := range []struct {
		name  string
		value jsontext.Value
	}{{"target_parameters", c.Parameters}, {"exclude_modules", c.Exclude}, {"modules_to_save", c.ToSave},
		{"layers_to_transform", c.Layers}} {
		if !empty(f.value) {
			fields += ", " + f.name
		}
	}
	return fmt.Errorf("module %s: %w: it has tensors, and by %s's %s it is not adapted, expected one of %s",
		tensor.Quote(m.String()), ErrMalformed, configName, fields, names(meant))
}

// ensuredEnd reports whether a module is an end of a tie of which another end is adapted too: with
// ensure_weight_tying PEFT adapts all, and names one.
func (a *Adapter) ensuredEnd(m *Module) bool {
	return a.Config.EnsureTie && slices.ContainsFunc(a.Modules, func(o *Module) bool {
		switch {
		case o == m || o.A.T == nil:
			return false
		case o.Form == Embedding && m.Form == Embedding:
			return o.A.Cols == m.A.Cols && o.B.Rows == m.B.Rows
		}
		return (o.Form == Embedding || m.Form == Embedding) && o.A.Cols == m.B.Rows && o.B.Rows == m.A.Cols
	})
}
