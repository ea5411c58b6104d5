package lora

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/internal/pyregex"
	"github.com/lorakit/lorakit/tensor"
)

// Config is what an adapter_config.json says of the mathematics.
type Config struct {
	place       string         // where it stands, if not in an adapter_config.json
	PeftType    string         `json:"peft_type"`
	PeftVersion string         `json:"peft_version"`
	Rank        int            `json:"r"`
	Alpha       float64        `json:"lora_alpha"`
	RSLoRA      bool           `json:"use_rslora"`
	DoRA        bool           `json:"use_dora"`
	LoraBias    bool           `json:"lora_bias"`
	BiasMode    string         `json:"bias"`
	EnsureTie   bool           `json:"ensure_weight_tying"`
	Tokens      jsontext.Value `json:"trainable_token_indices"`
	BLayout     string         `json:"lora_B_layout"` // of unsloth: rank_major or grouped_by_expert
	Invocation  []int64        `json:"alora_invocation_tokens"`
	Targets     jsontext.Value `json:"target_modules"`
	Exclude     jsontext.Value `json:"exclude_modules"`
	Layers      jsontext.Value `json:"layers_to_transform"`
	LayerLists  jsontext.Value `json:"layers_pattern"`
	Parameters  jsontext.Value `json:"target_parameters"`
	ToSave      jsontext.Value `json:"modules_to_save"`
	Init        jsontext.Value `json:"init_lora_weights"`
	Base        string         `json:"-"` // base_model_name_or_path
	Mapping     jsontext.Value `json:"auto_mapping"`

	ranks, alphas patterns
	targets       targets
	kept          map[string][]bool          // of AdaLoRA: which directions are left, by module
	feedforward   jsontext.Value             // of IA3: the modules whose inputs are scaled
	fields        fields                     // of another method than LoRA: all of them
	regexes       map[string]*pyregex.Regexp // those of whole names, by their expression
	unknownFields []string                   // fields that are set and not known
	spent         time.Duration              // compiling and matching patterns
	raw           []byte
}

// pattern is an entry of rank_pattern or alpha_pattern, in the file's order.
type pattern struct {
	key   string
	value float64
	re    *pyregex.Regexp // nil where key is a name
}

// patterns are those of a field, of which the first that matches a name counts.
type patterns struct {
	list    []pattern
	names   map[string]int // the place of a key that stands for one name and all that end in it
	lengths map[int]bool   // of those
	others  []int          // the places of the rest
}

// add appends a pattern.
func (l *patterns) add(p pattern) {
	at := len(l.list)
	l.list = append(l.list, p)
	wild := strings.ContainsAny(strings.ReplaceAll(p.key, `\.`, ""), ".^")
	if p.re != nil || wild {
		l.others = append(l.others, at)
		return
	}
	name := strings.ReplaceAll(p.key, `\.`, ".")
	if l.names == nil {
		l.names, l.lengths = map[string]int{}, map[int]bool{}
	}
	if _, ok := l.names[name]; !ok {
		l.names[name], l.lengths[len(name)] = at, true
	}
}

// unsupported are the fields that change what an adapter computes and are not known here. A value that is null, false
// or empty switches them off.
var unsupported = []string{
	"arrow_config", "enable_lora", "kasa_config", "layer_replication", "monteclora_config",
	"use_bdlora", "use_qalora", "velora_config",
}

// known are the other fields of the configs of PEFT 0.21 and of those that write such folders: the ones that are
// looked at, and those that say how an adapter begins or is trained.
var known = []string{
	"alora_invocation_tokens", "alpha", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "beta1", "beta2",
	"bias", "corda_config",
	"d_initial", "decompose_both", "decompose_factor", "deltaT",
	"ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "feedforward_modules", "inference_mode",
	"init_ia3_weights", "init_lora_weights", "init_r", "init_weights",
	"layers_pattern", "layers_to_transform", "loftq_config", "lora_B_layout", "lora_alpha", "lora_bias", "lora_dropout",
	"lora_ga_config", "megatron_config", "megatron_core",
	"merge_weights", "module_dropout", "modules_to_save", "orth_reg_weight", "peft_type", "peft_version",
	"projection_prng_key", "prompt_prefix", "qalora_group_size", "r", "rank_dropout", "rank_dropout_scale",
	"rank_pattern", "revision", "runtime_config", "save_projection", "target_modules", "target_parameters", "target_r",
	"task_name", "task_type", "tfinal", "tinit", "total_step",
	"trainable_token_indices", "use_dora", "use_effective_conv2d", "use_rslora", "vera_dropout",
	"apply_GS", "block_share", "boft_block_num", "boft_block_size", "boft_dropout", "boft_n_butterfly_factor", "coft",
	"eps", "init_logits_std", "init_vector_bank_bound", "mini_r", "miss_dropout", "module_dropout", "n_frequency",
	"n_frequency_pattern", "num_cayley_neumann_terms", "num_vectors", "oft_block_size", "randlora_alpha",
	"randlora_dropout", "random_loc_seed", "save_only_topk_weights", "scaling", "sparse", "token_indices", "topk",
	"use_cayley_neumann", "vblora_dropout", "vector_length", "very_sparse",
}

// unknownFields lists the fields that are set and not known. One that switches something on is an error: PEFT calls
// what changes the mathematics use_ something.
func unknownFields(all map[string]jsontext.Value) (list []string, err error) {
	for _, name := range slices.Sorted(maps.Keys(all)) {
		switch {
		case empty(all[name]) || slices.Contains(known, name):
		case slices.Contains(unsupported, name) || strings.HasPrefix(name, "use_"):
			return nil, fmt.Errorf("%w: %s is %s, which changes what the adapter computes", ErrUnsupported, name,
				tensor.Quote(string(all[name])))
		default:
			list = append(list, name)
		}
	}
	return list, nil
}

// Regular expressions of a config are somebody else's program: these bound how long all of them may take together, and
// how many there are. What one may take is bounded by pyregex.
const (
	allMatches  = 10 * time.Second
	mostRegexes = 10_000 // of a field; names that are written out are not counted
)

// notConfig says what is wrong with JSON that is no config, without the words of the decoder's package.
func notConfig(b []byte, err error) error {
	wrong, ok := errors.AsType[*json.SemanticError](err)
	if !ok || wrong.JSONPointer == "" || wrong.JSONKind == 0 {
		return notObject(b, err)
	}
	return fmt.Errorf("found a %s at %s, expected another type or value of it",
		strings.Replace(wrong.JSONKind.String(), "[", "list", 1), tensor.Quote(string(wrong.JSONPointer)))
}

// parseConfig reads an adapter_config.json.
func parseConfig(b []byte) (Config, error) {
	c := Config{raw: b, Rank: 8, Alpha: 8} // PEFT's own, where they are absent
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("%w: %w", ErrMalformed, notConfig(b, err))
	}
	var all map[string]jsontext.Value
	if err := json.Unmarshal(b, &all); err != nil {
		return c, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if !slices.Contains(methods(), c.PeftType) {
		return c, errType(c.PeftType)
	}
	var err error
	if c.targets, err = c.parseTargets(); err != nil {
		return c, err
	}
	for _, name := range []string{"r", "lora_alpha"} {
		if v, ok := all[name]; ok && v.Kind() != '0' {
			return c, fmt.Errorf("%w: %s is %s, expected a number", ErrMalformed, name, tensor.Quote(string(v)))
		}
	}
	if err := json.Unmarshal(all["base_model_name_or_path"], &c.Base); err != nil {
		c.Base = "" // null, or no name
	}
	if c.unknownFields, err = unknownFields(all); err != nil {
		return c, err
	}
	if c.otherMethod() {
		return c, c.parseMethod(all)
	}
	if c.Rank <= 0 {
		return c, fmt.Errorf("%w: r is %d, expected 1 or more", ErrMalformed, c.Rank)
	}
	if !slices.Contains(append(ExpertLayouts(), ""), c.BLayout) {
		return c, fmt.Errorf("%w: lora_B_layout is %s, expected rank_major or grouped_by_expert", ErrUnsupported,
			tensor.Quote(c.BLayout))
	}
	if c.ranks, err = c.parsePatterns(all["rank_pattern"]); err != nil {
		return c, fmt.Errorf("rank_pattern: %w", err)
	}
	if c.alphas, err = c.parsePatterns(all["alpha_pattern"]); err != nil {
		return c, fmt.Errorf("alpha_pattern: %w", err)
	}
	return c, nil
}

// empty reports whether a JSON value switches a field off.
func empty(v jsontext.Value) bool {
	switch v.Kind() {
	case '[', '{':
		return strings.TrimSpace(string(v[1:len(v)-1])) == ""
	case '"':
		return string(v) == `""`
	case 't', '0':
		return false
	}
	return true
}

// parsePatterns reads an object of regular expressions and numbers in its order, which a map would lose.
func (c *Config) parsePatterns(v jsontext.Value) (list patterns, err error) {
	if empty(v) {
		return list, nil
	}
	d := jsontext.NewDecoder(strings.NewReader(string(v)))
	if t, err := d.ReadToken(); err != nil || t.Kind() != '{' {
		return list, fmt.Errorf("%w: expected a JSON object", ErrMalformed)
	}
	regexes := 0
	for d.PeekKind() == '"' {
		key, err := d.ReadToken()
		if err != nil {
			return list, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		p := pattern{key: key.String()}
		val, err := d.ReadToken()
		if err != nil || val.Kind() != '0' {
			return list, fmt.Errorf("%w: the value of %s is no number", ErrMalformed, tensor.Quote(p.key))
		}
		if p.value, err = val.Float(); err != nil {
			return list, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		if !isName(p.key) {
			if regexes++; regexes > mostRegexes {
				return list, fmt.Errorf("%w: more than %d regular expressions", ErrMalformed, mostRegexes)
			}
			if p.re, err = c.compile(`(.*\.)?(` + p.key + `)$`); err != nil { // as PEFT's get_pattern_key does
				return list, fmt.Errorf("key %s: %w", tensor.Quote(p.key), err)
			}
			if c.spent > allMatches {
				return list, fmt.Errorf("%w: its regular expressions take too long", ErrMalformed)
			}
		}
		list.add(p)
	}
	return list, nil
}

// isName reports whether a pattern is the name of a module or the end of one, written out, as nearly all are: an
// adapter with a rank for each of its modules has thousands, and as regular expressions they would take minutes.
func isName(key string) bool {
	key = strings.ReplaceAll(strings.TrimPrefix(key, "^"), `\.`, ".")
	return key != "" && strings.Trim(key, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.") == ""
}

// match reports whether a pattern matches a name as Python's re.match does with `(.*\.)?(key)$`.
func (p *pattern) match(name string) (bool, error) {
	if p.re != nil {
		m, err := p.re.Match(name)
		return m != nil, err
	}
	key, fromStart := strings.CutPrefix(p.key, "^")
	for key != "" {
		c := key[len(key)-1]
		key = key[:len(key)-1]
		escaped := c == '.' && strings.HasSuffix(key, `\`)
		if escaped {
			key = key[:len(key)-1]
		}
		r, n := utf8.DecodeLastRuneInString(name)
		if wild := c == '.' && !escaped; n == 0 || !wild && r != rune(c) {
			return false, nil
		}
		name = name[:len(name)-n]
	}
	return name == "" || !fromStart && name[len(name)-1] == '.', nil
}

// matchAround reports whether a pattern matches a name, or a beginning of it that is whole parts, as Python's re.match
// does with `(^|.*\.)key($|\..*)`.
func (p *pattern) matchAround(name string) (bool, error) {
	if p.re != nil {
		return p.match(name)
	}
	for {
		if ok, _ := p.match(name); ok {
			return true, nil
		}
		end := strings.LastIndexByte(name, '.')
		if end < 0 {
			return false, nil
		}
		name = name[:end]
	}
}

// compile prepares a regular expression, as PEFT gives it to Python.
func (c *Config) compile(expr string) (*pyregex.Regexp, error) {
	start := time.Now()
	re, err := pyregex.Compile(expr)
	c.spent += time.Since(start)
	switch {
	case errors.Is(err, pyregex.ErrUnsupported):
		return nil, fmt.Errorf("%w: regular expression %s: %w", ErrUnsupported, tensor.Quote(expr), err)
	case err != nil:
		return nil, fmt.Errorf("%w: regular expression %s: %w", ErrMalformed, tensor.Quote(expr), err)
	}
	return re, nil
}

// lookup returns the value of the first pattern that matches a name, or otherwise; field is what the patterns are
// called.
func (c *Config) lookup(field string, in patterns, name string, otherwise float64) (float64, error) {
	first := len(in.list)
	for end, more := name, true; more && in.names != nil; _, end, more = strings.Cut(end, ".") {
		if !in.lengths[len(end)] {
			continue
		}
		if at, ok := in.names[end]; ok {
			first = min(first, at)
		}
	}
	start := time.Now()
	defer func() { c.spent += time.Since(start) }()
	for _, at := range in.others {
		if at > first {
			break
		}
		p := in.list[at]
		ok, err := p.match(name)
		if err != nil || c.spent+time.Since(start) > allMatches {
			return 0, c.errMatch(field, p.key, name, err)
		}
		if ok {
			first = at
			break
		}
	}
	if first == len(in.list) {
		return otherwise, nil
	}
	return in.list[first].value, nil
}

// scale gives a module its rank, alpha and scaling, where have is the rank of its tensors.
func (c *Config) scale(m *Module, name string, have int64) error {
	r, err := c.lookup("rank_pattern", c.ranks, name, float64(c.Rank))
	if err != nil {
		return err
	}
	if m.Alpha, err = c.lookup("alpha_pattern", c.alphas, name, c.Alpha); err != nil {
		return err
	}
	if float64(have) != r && !(c.EnsureTie && m.isHead()) { // that has the rank of the embedding
		return c.errRank(name, have, r)
	}
	m.Rank = int(have)
	m.Scaling = m.Alpha / r
	if c.RSLoRA {
		m.Scaling = m.Alpha / math.Sqrt(r)
	}
	return nil
}

func (c *Config) errRank(name string, have int64, config float64) error {
	return fmt.Errorf("%w: module %s has rank %d in its tensors and %g by %s", ErrMalformed, tensor.Quote(name), have,
		config, cmp.Or(c.place, configName))
}

// Bytes returns the file that a config was read from, as it is. The caller does not change them.
func (c *Config) Bytes() []byte { return c.raw }

// order is how the columns of a stack's B lie.
func (c *Config) order() ExpertOrder {
	if c.BLayout == groupedByExpert {
		return Grouped
	}
	return RankMajor
}

// What lora_B_layout may say.
const (
	rankMajor       = "rank_major"
	groupedByExpert = "grouped_by_expert"
)

// ExpertLayouts lists what OpenOptions.ExpertLayout may be.
func ExpertLayouts() []string { return []string{rankMajor, groupedByExpert} }

// setLayout takes the layout of experts that a config leaves open from an option.
func (c *Config) setLayout(layout string) error {
	switch {
	case layout == "":
	case !slices.Contains(ExpertLayouts(), layout):
		return fmt.Errorf("%w: expert layout %s; known are %s", ErrUnsupported, tensor.Quote(layout),
			choices(layout, ExpertLayouts()))
	case empty(c.Parameters): // it has no stacks
	case c.BLayout != "" && c.BLayout != layout:
		return fmt.Errorf("%w: the expert layout %s is given, and lora_B_layout is %s", ErrMalformed, layout, c.BLayout)
	default:
		c.BLayout = layout
	}
	return nil
}

// residuals are the starts that take a part out of the base: PEFT computes it anew when it loads such an adapter.
var residuals = []string{"pissa", "olora", "corda", "loftq", "lora_ga"}

// Residual is the start of an adapter whose deltas are not for the base as it is, such as "pissa", else "".
func (c *Config) Residual() string {
	for _, start := range stringList(c.Init) {
		// PEFT takes some of them in any case: "OLoRA".
		if slices.ContainsFunc(residuals, func(r string) bool { return strings.HasPrefix(strings.ToLower(start), r) }) {
			return start
		}
	}
	return ""
}

// subtracts reports whether the start has been taken out of the base as it is. LoftQ's base is in four bits besides.
func (c *Config) subtracts() bool { return !strings.HasPrefix(strings.ToLower(c.Residual()), "loftq") }

// plainBase refuses an adapter whose deltas are not for the base as it is.
func (c *Config) plainBase() error {
	start := c.Residual()
	if start != "" && !c.subtracts() {
		return fmt.Errorf("%w: init_lora_weights is %s, whose deltas are for the base that PEFT makes as it loads the "+
			"adapter: in four bits, and without the part it started from", ErrUnsupported, tensor.Quote(start))
	}
	if start != "" {
		err := fmt.Errorf("%w: init_lora_weights is %s, whose deltas are for the base without the part it started from",
			ErrUnsupported, tensor.Quote(start))
		return hint.With(err, hint.Hint{
			Function: "Combine", Option: "Type", Value: "cat",
			Effect: "makes a plain one of it, with the weight 1, and of the adapter it started as, with -1",
		})
	}
	return nil
}
