package compressedtensors

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/internal/pyregex"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

const (
	method    = "compressed-tensors"
	configKey = "quantization_config"
	// regex begins a target that is an expression of Python; the others are names of modules or of their classes.
	regex = "re:"
)

// config is a quantization_config.
type config struct {
	format       string
	targets      targets
	ignore       targets
	static       bool   // activations are quantised by scales that are stored
	cache        bool   // so is the cache
	twice        string // what is wrong where a target is there twice
	once         sync.Once
	class, other *target // that are names of classes
	// patience is what is left of the time for expressions, which are from a file.
	patience time.Duration
	// online is a place where a transform is applied while the model runs, "" for none.
	online string
}

// group is how the weights are stored that its targets name.
type group struct {
	name    string
	Targets []string `json:"targets"`
	Weights *weights `json:"weights"`
	Format  string   `json:"format"`

	Inputs  activations `json:"input_activations"`
	Outputs activations `json:"output_activations"`
}

// activations are the settings of what goes into a module, or comes out: an object, or null.
type activations jsontext.Value

// UnmarshalJSONFrom keeps the value as it is.
func (a *activations) UnmarshalJSONFrom(dec *jsontext.Decoder) error {
	v, err := dec.ReadValue()
	*a = activations(v.Clone())
	return err
}

// static reports whether they are quantised by numbers that are stored, and not by those of the moment alone.
func (a activations) static() bool {
	var s struct {
		Dynamic any `json:"dynamic"` // false, true or "local"
	}
	return jsontext.Value(a).Kind() == '{' && json.Unmarshal(a, &s) == nil && s.Dynamic != true
}

// weights are the settings of codes and scales.
type weights struct {
	Bits      int    `json:"num_bits"`
	Type      string `json:"type"`
	Symmetric *bool  `json:"symmetric"`
	Group     *int64 `json:"group_size"`
	Strategy  string `json:"strategy"`
	Block     []any  `json:"block_structure"`
	Order     any    `json:"actorder"`
}

// ordered reports whether inputs that follow one another need not be of one group, which compressed-tensors has given
// up.
func (w *weights) ordered() bool {
	text, _ := w.Order.(string)
	return w.Order == true || strings.EqualFold(text, "group") || strings.EqualFold(text, "dynamic")
}

// targets are those of all groups, or of the list of what is ignored.
type targets struct {
	names map[string]*target // of modules, or of their classes
	exprs []*target          // in the order in which they are tried
}

// target names modules.
type target struct {
	text   string
	group  *group
	isExpr bool
	expr   *pyregex.Regexp
	err    error // why it is none
}

// readConfig reads a quantization_config; nil is another scheme's.
func readConfig(object []byte) (*config, error) {
	var named struct {
		Method string `json:"quant_method"`
	}
	if json.Unmarshal(object, &named) != nil || named.Method != method {
		return nil, nil
	}
	fail := func(format string, args ...any) (*config, error) {
		return nil, fmt.Errorf("config.json: %s: %w: %s", configKey, quant.ErrMalformed, fmt.Sprintf(format, args...))
	}
	var c struct {
		Format   string         `json:"format"`
		Groups   jsontext.Value `json:"config_groups"`
		Ignore   []string       `json:"ignore"`
		Cache    activations    `json:"kv_cache_scheme"`
		Sparsity struct {
			Format string `json:"format"`
		} `json:"sparsity_config"`
		Transforms transforms `json:"transform_config"`
	}
	if err := json.Unmarshal(object, &c); err != nil {
		return fail("%s", oneLine(err))
	}
	if f := c.Sparsity.Format; f != "" && f != "dense" {
		return fail("its sparsity_config has the format %s, expected weights that are not sparse", tensor.Quote(f))
	}
	groups, err := readGroups(c.Groups)
	if err != nil {
		return fail("%s", oneLine(err))
	}
	read := &config{format: c.Format, cache: c.Cache.static(), patience: 10 * time.Second,
		online: c.Transforms.online()}
	for _, g := range groups {
		read.static = read.static || g.Inputs.static() || g.Outputs.static()
		for _, text := range g.Targets {
			if other := read.targets.add(text, g); other != nil && read.twice == "" {
				read.twice = fmt.Sprintf("names the target %s twice, in %s and in %s", tensor.Quote(text),
					tensor.Quote(other.group.name), tensor.Quote(g.name))
			}
		}
	}
	// As compressed-tensors looks for the group of a module: expressions by their text.
	slices.SortFunc(read.targets.exprs, func(a, b *target) int { return cmp.Compare(a.text, b.text) })
	for _, text := range c.Ignore {
		read.ignore.add(text, nil)
	}
	return read, nil
}

// transforms are rotations of weights and activations.
type transforms struct {
	Groups map[string]struct {
		Apply []struct {
			Location string `json:"location"`
		} `json:"apply"`
	} `json:"config_groups"`
}

// online is a location of what is applied to activations: the weights before or behind it are turned, so that they are
// not the model's without it. What is applied to weights is done.
func (t transforms) online() string {
	for _, name := range slices.Sorted(maps.Keys(t.Groups)) {
		for _, a := range t.Groups[name].Apply {
			if a.Location != "weight_input" && a.Location != "weight_output" {
				return tensor.Quote(a.Location)
			}
		}
	}
	return ""
}

// unread is the layout of weights that are not read.
func (c *config) unread() quant.Layout {
	if c.online == "" {
		return quant.Layout{}
	}
	return quant.Layout{Name: "rotated weights, whose transform_config has a transform at " + c.online +
		" while the model runs", Advice: "take the checkpoint that it was made from"}
}

// add takes a target in, but for one that is there, which it returns.
func (l *targets) add(text string, g *group) *target {
	if other := l.names[text]; other != nil {
		return other
	}
	if l.names == nil {
		l.names = map[string]*target{}
	}
	t := &target{text: text, group: g}
	l.names[text] = t // an expression too, which is no module's name
	if t.isExpr = strings.HasPrefix(text, regex); t.isExpr {
		l.exprs = append(l.exprs, t)
	}
	return nil
}

// class reports whether a target may be the name of a class of modules.
func (t *target) class() bool { return !t.isExpr && !strings.Contains(t.text, ".") }

// readGroups reads an object of groups in their order.
func readGroups(object jsontext.Value) ([]*group, error) {
	if object.Kind() != '{' {
		return nil, fmt.Errorf("its config_groups are no object")
	}
	dec := jsontext.NewDecoder(bytes.NewReader(object))
	if _, err := dec.ReadToken(); err != nil {
		return nil, err
	}
	var groups []*group
	for dec.PeekKind() == '"' {
		name, err := dec.ReadToken()
		if err != nil {
			return nil, err
		}
		g := &group{name: name.String()}
		if err := json.UnmarshalDecode(dec, g); err != nil {
			return nil, fmt.Errorf("the group %s: %w", tensor.Quote(g.name), err)
		}
		groups = append(groups, g)
	}
	_, err := dec.ReadToken()
	return groups, err
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

// matches reports whether a module's name begins with what the expression of a target is for.
func (t *target) matches(module string) (bool, error) {
	if t.expr == nil && t.err == nil {
		t.expr, t.err = pyregex.Compile(strings.TrimPrefix(t.text, regex))
	}
	if t.err != nil {
		return false, t.err
	}
	m, err := t.expr.Match(module)
	return m != nil, err
}

// find returns the target that names a module, by its name or by an expression, or nil.
func (c *config) find(l *targets, module string) (*target, error) {
	if t := l.names[module]; t != nil && !t.isExpr {
		return t, nil
	}
	for _, t := range l.exprs {
		start := time.Now()
		matches, err := t.matches(module)
		if c.patience -= time.Since(start); c.patience <= 0 {
			err = pyregex.ErrTimeout
		}
		if matches && err == nil {
			return t, nil
		}
		if err != nil {
			return nil, fmt.Errorf("the target %s: %w", tensor.Quote(t.text), err)
		}
	}
	return nil, nil
}

// groupOf finds the group of a module whose weight is quantised: by its name, an expression, or the name of a class,
// which any may be of.
func (c *config) groupOf(module string) (*group, error) {
	fail := func(format string, args ...any) (*group, error) {
		return nil, fmt.Errorf("%w: the %s of config.json %s", quant.ErrMalformed, configKey, fmt.Sprintf(format, args...))
	}
	if c.twice != "" {
		return fail("%s", c.twice)
	}
	t, err := c.find(&c.targets, module)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", quant.ErrMalformed, err)
	}
	if t != nil {
		return t.group, nil
	}
	class, several := c.classes()
	if several != nil {
		return fail("has several groups for classes of modules, %s and %s, of which none is known to be its own",
			tensor.Quote(class.text), tensor.Quote(several.text))
	}
	if class == nil {
		return fail("has no group with a target for it")
	}
	return class.group, nil
}

// classes returns a target that is the name of a class, and another of another group, where there are any.
func (c *config) classes() (class, other *target) {
	c.once.Do(func() {
		for _, text := range slices.Sorted(maps.Keys(c.targets.names)) {
			switch t := c.targets.names[text]; {
			case !t.class():
			case c.class == nil:
				c.class = t
			case c.other == nil && t.group != c.class.group:
				c.other = t
			}
		}
	})
	return c.class, c.other
}

// ignored reports whether a module stays plain, or nothing is known of it.
func (c *config) ignored(module string) bool {
	if t, err := c.find(&c.ignore, module); t != nil || err != nil {
		return true
	}
	class, _ := c.classes()
	t, err := c.find(&c.targets, module)
	return class == nil && t == nil && err == nil
}

// spec is how a group stores its weights. Which of the formats of a group without one it is, the codes tell.
func (g *group) spec(codes tensor.Info) (spec, error) {
	fail := func(format string, args ...any) (spec, error) {
		return spec{}, fmt.Errorf("%w: the group %s of config.json: %s", quant.ErrMalformed, tensor.Quote(g.name),
			fmt.Sprintf(format, args...))
	}
	w := g.Weights
	if w == nil {
		return fail("it has no weights, and %s is %v", tensor.Quote(codes.Name), codes.DType)
	}
	if w.ordered() {
		return fail("found the actorder %v, expected weight or null: groups in the order of activations are not read",
			w.Order)
	}
	s := spec{bits: w.Bits, strategy: strategy(strings.ToLower(w.Strategy))}
	if w.Symmetric != nil {
		s.asymmetric = !*w.Symmetric
	}
	if w.Group != nil && *w.Group > 0 {
		s.group = *w.Group
	}
	if s.strategy == "" {
		switch {
		case w.Group == nil:
			s.strategy = perTensor
		case *w.Group == -1:
			s.strategy = perChannel
		default:
			s.strategy, s.group = perGroup, *w.Group
		}
	}
	if s.strategy == perGroup || s.strategy == grouped {
		if w.Group == nil {
			return fail("found no group_size for groups")
		}
		s.group = *w.Group
	}
	kind := strings.ToLower(cmp.Or(w.Type, "int"))
	if kind != "int" && kind != "float" {
		return fail("found the type %s, expected int or float", tensor.Quote(w.Type))
	}
	if w.Bits < 1 || w.Bits > 8 {
		return fail("found num_bits %d, expected 1 to 8", w.Bits)
	}
	switch {
	case kind == "float" && w.Bits == 4 && s.strategy == grouped:
		s.format = nvfp4Packed
	case kind == "float" && w.Bits == 4:
		s.format = mxfp4Packed
	case kind == "float" && w.Bits == 8 && g.Format == mxfp8Quantized:
		s.format = mxfp8Quantized
	case kind == "float" && w.Bits == 8:
		s.format = floatQuantized
	case kind == "float":
		return fail("found floats of %d bits, expected 4 or 8", w.Bits)
	case codes.DType == tensor.I8:
		s.format = intQuantized
	default:
		s.format = packQuantized
	}
	either := g.Format == naiveQuantized && (s.format == floatQuantized || s.format == intQuantized)
	if g.Format != "" && g.Format != s.format && !either {
		return fail("found the format %s for weights of %d bits as %v, expected %s", tensor.Quote(g.Format), w.Bits, kind,
			s.format)
	}
	if s.strategy == perBlock {
		if len(w.Block) != 2 {
			return fail("found the block_structure %v, expected two numbers", w.Block)
		}
		for i, n := range w.Block {
			f, _ := n.(float64)
			if f != float64(int32(f)) {
				return fail("found the block_structure %v, expected two numbers", w.Block)
			}
			s.block[i] = int64(f)
		}
	}
	if err := s.check(); err != nil {
		return fail("%s", err)
	}
	return s, nil
}

// Declaration knows its own quantization_config. Modules stay plain that its list says it ignores, or that no target
// names.
func (Scheme) Declaration(object []byte) (quant.Declaration, bool) {
	c, err := readConfig(object)
	if err != nil {
		return quant.Declaration{}, true // Find says what is wrong
	}
	if c == nil {
		return quant.Declaration{}, false
	}
	return quant.Declaration{Skips: c.ignored, Unread: c.unread()}, true
}

// Config returns a quantization_config whose targets name the modules of the weights, so that it needs no list of
// others: a target stands for those whose names differ in numbers only, unless that would take in what skip lists.
// Other members are those of compressed-tensors' presets.
func (Scheme) Config(weights []quant.Assigned, skip []string) (key string, object []byte, err error) {
	if len(weights) == 0 {
		return "", nil, fmt.Errorf("%w: no weights, expected at least one", quant.ErrUnsupported)
	}
	type assigned struct {
		spec    spec
		modules []string
	}
	var groups []*assigned
	formats := map[string]bool{}
	for _, w := range weights {
		s, err := private(w.Spec)
		if err != nil {
			return "", nil, fmt.Errorf("tensor %s: %w", tensor.Quote(w.Name), err)
		}
		s.allowNonFinite = false
		i := slices.IndexFunc(groups, func(g *assigned) bool { return g.spec == s })
		if i < 0 {
			i = len(groups)
			groups = append(groups, &assigned{spec: s})
			formats[s.format] = true
		}
		groups[i].modules = append(groups[i].modules, strings.TrimSuffix(w.Name, weightEnd))
	}
	owner := map[string]int{} // the group of a name without its numbers, -1 for several
	claim := func(module string, group int) {
		p := withoutNumbers(module)
		if had, ok := owner[p]; ok && had != group {
			group = -1
		}
		owner[p] = group
	}
	for i, g := range groups {
		for _, m := range g.modules {
			claim(m, i)
		}
	}
	for _, m := range skip {
		claim(m, -1)
	}
	ordered := jsontext.Value{'{'}
	for i, g := range groups {
		var targets []string
		seen := map[string]bool{}
		for _, m := range g.modules {
			t := m
			if p := withoutNumbers(m); p != "" && owner[p] == i {
				t = regex + p
			}
			if !seen[t] {
				seen[t] = true
				targets = append(targets, t)
			}
		}
		b, err := json.Marshal(g.spec.settings(targets), json.Deterministic(true))
		if err != nil {
			return "", nil, err
		}
		if i > 0 {
			ordered = append(ordered, ',')
		}
		ordered = append(fmt.Appendf(ordered, "%q:", fmt.Sprintf("group_%d", i)), b...)
	}
	format := groups[0].spec.format
	if len(formats) > 1 {
		format = mixedPrecision
	}
	if skip == nil {
		skip = []string{}
	}
	object, err = json.Marshal(map[string]any{
		"quant_method": method, "format": format, "quantization_status": "compressed",
		"config_groups": append(ordered, '}'), "ignore": skip, "global_compression_ratio": nil, "kv_cache_scheme": nil,
	}, json.Deterministic(true))
	return configKey, object, err
}

// number is a part of a module's name that is one, and what it is of.
var number = regexp.MustCompile(`(?:^|\.)([^.]+\.[0-9]+(?:\.|$))`)

// numbers are the parts that are numbers, of a name as an expression.
var numbers = regexp.MustCompile(`(\\\.)[0-9]+(\\\.|$)`)

// withoutNumbers is an expression for the modules whose names differ from this one in numbers only, and in what stands
// before the first of them: that is not always the same in a file and in a program. It is empty for a name without
// numbers.
func withoutNumbers(module string) string {
	at := number.FindStringSubmatchIndex(module)
	if at == nil {
		return ""
	}
	p := regexp.QuoteMeta(module[at[2]:])
	for {
		next := numbers.ReplaceAllString(p, `${1}\d+${2}`)
		if next == p {
			return `(?:.*\.)?` + p + "$"
		}
		p = next
	}
}

// settings is a group as compressed-tensors writes it. Activations are quantised as its presets have it where that
// needs no data.
func (s spec) settings(targets []string) map[string]any {
	kind := "float"
	if s.integer() {
		kind = "int"
	}
	w := map[string]any{"num_bits": s.bits, "type": kind, "symmetric": !s.asymmetric, "strategy": string(s.strategy),
		"group_size": nil, "dynamic": false}
	if s.group > 0 {
		w["group_size"] = s.group
	}
	if s.strategy == perBlock {
		w["block_structure"] = s.block[:]
	}
	switch s.format {
	case nvfp4Packed:
		w["scale_dtype"] = "torch.float8_e4m3fn"
	case mxfp4Packed, mxfp8Quantized:
		w["scale_dtype"] = "torch.uint8"
	}
	var inputs any
	activations := func(strategy string, group any) any {
		return map[string]any{"num_bits": 8, "type": kind, "symmetric": true, "strategy": strategy, "group_size": group,
			"dynamic": true}
	}
	switch {
	case s.format == floatQuantized && s.strategy == perBlock:
		inputs = activations("group", s.block[1])
	case s.format == floatQuantized && s.strategy == perChannel, s.format == intQuantized:
		inputs = activations("token", nil)
	}
	return map[string]any{"targets": targets, "weights": w, "input_activations": inputs, "output_activations": nil,
		"format": s.format}
}
