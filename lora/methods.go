package lora

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// PEFT's other methods whose folders are read. AdaLoRA, VeRA, RandLoRA and VB-LoRA are products of two matrices as
// LoRA is, LoHa and LoKr element-wise products of two such, MiSS repeats a small matrix, and FourierFT is a sum of
// waves. IA3 scales rows or columns. OFT, BOFT, HRA and the bat variant of MiSS make each row of a weight another one.
// LN tuning and trainable tokens replace values.
const (
	plainLoRA = "LORA"
	adaLoRA   = "ADALORA"
	loHa      = "LOHA"
	loKr      = "LOKR"
	veRA      = "VERA"
	ia3       = "IA3"
	oft       = "OFT"
	boft      = "BOFT"
	hra       = "HRA"
	miss      = "MISS"
	bone      = "BONE" // as MiSS was called before PEFT 0.17
	vbLoRA    = "VBLORA"
	fourierFT = "FOURIERFT"
	randLoRA  = "RANDLORA"
	lnTuning  = "LN_TUNING"
	tokens    = "TRAINABLE_TOKENS"
)

// methodParts are the names that each of them gives to its tensors, after the module's.
var methodParts = map[string][]string{
	adaLoRA: {"lora_A", "lora_B", "lora_E", "ranknum"},
	loHa:    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
	loKr:    {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
	veRA:    {"vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"},
	ia3:     {"ia3_l"},

	oft:       {"oft_R", "oft_embedding_R", "oft_r", "oft_s"},
	boft:      {"boft_R", "boft_s"},
	hra:       {"hra_u"},
	miss:      {"miss_block"},
	bone:      {"bone_block"},
	vbLoRA:    vbParts,
	fourierFT: {"fourierft_spectrum"},
	randLoRA:  {"randlora_A", "randlora_B", "randlora_lambda", "randlora_gamma"},
	lnTuning:  {"ln_tuning_layers"},
	tokens:    {"trainable_tokens_delta"},
}

// partStarts are the beginnings of all those names, by which a part of an adapter is told from a plain value.
var partStarts = []string{"lora_", "hada_", "lokr_", "vera_", "ia3_", "oft_", "boft_", "hra_", "miss_", "bone_",
	"vblora_",
	"fourierft_", "randlora_", "ln_tuning_", "trainable_tokens_"}

// methods lists the types of PEFT adapters that are known.
func methods() []string { return append([]string{plainLoRA}, slices.Sorted(maps.Keys(methodParts))...) }

// otherMethod reports whether an adapter is of one of PEFT's methods beside LoRA.
func (c *Config) otherMethod() bool { return c.PeftType != "" && c.PeftType != plainLoRA }

// largestRank bounds what a config may say of a rank; no weight has as many columns.
const largestRank = 1 << 20

// parseMethod reads what the config of another method than LoRA says of the mathematics.
func (c *Config) parseMethod(all map[string]jsontext.Value) error {
	for _, name := range slices.Sorted(maps.Keys(all)) {
		// PEFT does not look at use_rslora of AdaLoRA.
		known := name == "use_effective_conv2d" || name == "use_rslora" && c.PeftType == adaLoRA ||
			name == "use_cayley_neumann" && c.PeftType == oft
		if (strings.HasPrefix(name, "use_") && !known || name == "target_parameters") && !empty(all[name]) {
			return fmt.Errorf("%w: %s is %s, which is not known of %s", ErrUnsupported, name, tensor.Quote(string(all[name])),
				c.PeftType)
		}
	}
	c.RSLoRA, c.LoraBias = false, false
	c.fields = all
	if parse := parsers[c.PeftType]; parse != nil {
		c.Rank, c.Alpha = 0, 0
		return parse(c)
	}
	number := c.fields.number
	rank, alpha, ranks := "r", "alpha", 8.0
	switch c.PeftType {
	case adaLoRA:
		rank, alpha, ranks = "init_r", "lora_alpha", 12
	case veRA:
		ranks = 256
	case ia3:
		c.feedforward, c.Rank, c.Alpha = all["feedforward_modules"], 0, 0
		return nil
	}
	r, err := number(rank, ranks)
	if err != nil {
		return err
	}
	if !(r >= 1 && r <= largestRank) || r != float64(int(r)) {
		return fmt.Errorf("%w: %s is %g, expected a whole number from 1 to %d", ErrMalformed, rank, r, largestRank)
	}
	c.Rank = int(r)
	if c.PeftType == veRA {
		c.Alpha = r // the delta is as it comes out
		return nil
	}
	if c.Alpha, err = number(alpha, 8); err != nil {
		return err
	}
	if c.PeftType == adaLoRA {
		c.kept, err = parseKept(all["rank_pattern"])
		return err
	}
	if c.ranks, err = c.parsePatterns(all["rank_pattern"]); err != nil {
		return fmt.Errorf("rank_pattern: %w", err)
	}
	if c.alphas, err = c.parsePatterns(all["alpha_pattern"]); err != nil {
		return fmt.Errorf("alpha_pattern: %w", err)
	}
	return nil
}

// parsers read the fields of a method's config, and say of it what there is to say.
var parsers = map[string]func(c *Config) error{}

// fields are those of a config.
type fields map[string]jsontext.Value

// number is that of a field, or otherwise where the config has none.
func (f fields) number(name string, otherwise float64) (float64, error) {
	v, ok := f[name]
	if !ok {
		return otherwise, nil
	}
	var x float64
	if v.Kind() != '0' || json.Unmarshal(v, &x) != nil {
		return 0, fmt.Errorf("%w: %s is %s, expected a number", ErrMalformed, name, tensor.Quote(string(v)))
	}
	return x, nil
}

// whole is the whole number of a field, from least to largestRank.
func (f fields) whole(name string, otherwise, least int64) (int64, error) {
	x, err := f.number(name, float64(otherwise))
	if err == nil && (!(x >= float64(least) && x <= largestRank) || x != float64(int64(x))) {
		err = fmt.Errorf("%w: %s is %g, expected a whole number from %d to %d", ErrMalformed, name, x, least, largestRank)
	}
	return int64(x), err
}

// truth is the boolean of a field.
func (f fields) truth(name string, otherwise bool) (bool, error) {
	v, ok := f[name]
	if !ok {
		return otherwise, nil
	}
	var x bool
	if json.Unmarshal(v, &x) != nil || v.Kind() == 'n' {
		return false, fmt.Errorf("%w: %s is %s, expected true or false", ErrMalformed, name, tensor.Quote(string(v)))
	}
	return x, nil
}

// rankAndAlpha are those of a module, after the patterns.
func (c *Config) rankAndAlpha(name string) (rank int64, alpha float64, err error) {
	r, err := c.lookup("rank_pattern", c.ranks, name, float64(c.Rank))
	if err != nil {
		return 0, 0, err
	}
	if !(r >= 1 && r <= largestRank) || r != float64(int(r)) {
		return 0, 0, fmt.Errorf("%w: rank_pattern gives module %s the rank %g, expected a whole number from 1 to %d",
			ErrMalformed, tensor.Quote(name), r, largestRank)
	}
	alpha, err = c.lookup("alpha_pattern", c.alphas, name, c.Alpha)
	return int64(r), alpha, err
}

// parts are the tensors of a module by what they are of it.
type parts map[string]*formats.Tensor

// names lists them with their shapes, for messages.
func (p parts) String() string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(p)) {
		list = append(list, name+" "+p[name].Shape.String())
	}
	return strings.Join(list, ", ")
}

// have reports whether a module has exactly these tensors.
func (p parts) have(names ...string) bool {
	for _, name := range names {
		if p[name] == nil {
			return false
		}
	}
	return len(p) == len(names)
}

// without are the tensors but for some.
func (p parts) without(names ...string) parts {
	rest := maps.Clone(p)
	for _, name := range names {
		delete(rest, name)
	}
	return rest
}

// readMethod makes modules of the tensors that are a method's own, and returns the others: values that were trained
// whole.
func (a *Adapter) readMethod(tensors []formats.Tensor) ([]formats.Tensor, error) {
	switch a.Config.PeftType {
	case lnTuning:
		return a.readLN(tensors)
	case tokens:
		return a.readTokens(tensors)
	}
	modules, rest, err := a.gather(tensors)
	if err != nil {
		return nil, err
	}
	var shared parts // what is there once for all modules
	switch a.Config.PeftType {
	case veRA:
		shared, err = a.sharedVeRA(modules)
	case randLoRA:
		shared, err = a.sharedRandLoRA(modules)
	case vbLoRA:
		shared, err = a.sharedVBLoRA(modules)
	}
	if err != nil {
		return nil, err
	}
	if a.Config.PeftType == oft {
		a.noteSeries()
	}
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		var m *Module
		switch p := modules[name]; a.Config.PeftType {
		case adaLoRA:
			m, err = a.Config.adaLoRA(name, p)
		case loHa:
			m, err = a.Config.loHa(name, p)
		case loKr:
			m, err = a.Config.loKr(name, p)
		case veRA:
			m, err = a.Config.veRA(name, p, shared)
		case ia3:
			m, err = a.Config.ia3(name, p)
		case oft:
			m, err = a.Config.oft(name, p)
		case boft:
			m, err = a.Config.boft(name, p)
		case hra:
			m, err = a.Config.hra(name, p)
		case miss, bone:
			m, err = a.Config.miss(name, p)
		case vbLoRA:
			m, err = a.Config.vbLoRA(name, p, shared)
		case fourierFT:
			m, err = a.Config.fourierFT(name, p)
		case randLoRA:
			m, err = a.Config.randLoRA(name, p, shared)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: module %s: %w", a.Path, tensor.Quote(name), err)
		}
		if m == nil { // without a direction left
			a.Notices = append(a.Notices, fmt.Sprintf("%s: its rank_pattern leaves it a rank of 0, so it adds nothing", name))
			continue
		}
		if m.A.T != nil || m.Form == Transformed {
			for _, of := range []parts{modules[name], shared} {
				for _, key := range slices.Sorted(maps.Keys(of)) {
					m.made = append(m.made, of[key])
				}
			}
		}
		a.Modules = append(a.Modules, m)
	}
	if a.Config.PeftType == adaLoRA {
		for _, name := range slices.Sorted(maps.Keys(a.Config.kept)) {
			if modules[name] == nil {
				return nil, fmt.Errorf("%s: %w: rank_pattern names module %s, which has no tensors", a.Path, ErrMalformed,
					tensor.Quote(name))
			}
		}
	}
	return rest, nil
}

// gather sorts a method's tensors by module. Keys may end in the adapter's name.
func (a *Adapter) gather(tensors []formats.Tensor) (modules map[string]parts, rest []formats.Tensor, err error) {
	own := methodParts[a.Config.PeftType]
	modules = map[string]parts{}
	for i := range tensors {
		t := &tensors[i]
		name := inModel(t.Name)
		words := strings.Split(name, ".")
		at := -1
		for k := max(1, len(words)-2); k < len(words); k++ {
			if slices.Contains(own, words[k]) {
				at = k
				break
			}
		}
		if at < 0 {
			if strange(words) {
				return nil, nil, a.failed(t, fmt.Errorf("%w: its name is none that PEFT gives to a part of a %s adapter",
					ErrUnsupported, a.Config.PeftType))
			}
			rest = append(rest, *t)
			continue
		}
		module := strings.Join(words[:at], ".")
		if withoutLayers(module) == "" {
			return nil, nil, a.failed(t, fmt.Errorf("%w: no module is named", ErrMalformed))
		}
		if modules[module] == nil {
			modules[module] = parts{}
		}
		if o := modules[module][words[at]]; o != nil {
			return nil, nil, a.failed(t, fmt.Errorf("%w: %s says the same", ErrMalformed, tensor.Quote(o.Name)))
		}
		modules[module][words[at]] = t
	}
	return modules, rest, nil
}

// strange reports whether a word of a name is of an adapter, so that it is not a plain value.
func strange(words []string) bool {
	return slices.ContainsFunc(words, func(w string) bool {
		return slices.ContainsFunc(partStarts, func(start string) bool { return strings.HasPrefix(w, start) })
	})
}

// asLoRA is an adapter of another method as one of LoRA, to be written.
func (a *Adapter) asLoRA() (*Adapter, error) {
	if err := a.plain(); err != nil {
		return nil, a.named(err)
	}
	n := *a
	n.Dialect, n.Config.PeftType = "", plainLoRA
	n.Notices = slices.Clone(a.Notices)
	full := 0
	for _, m := range a.Modules {
		if m.Hadamard != nil && int64(m.Rank) == min(m.B.Rows, m.A.Cols) {
			full++
		}
	}
	if full > 0 {
		n.Notices = append(n.Notices, fmt.Sprintf("%d of the deltas have the rank of a whole weight as plain matrices, "+
			"which are larger than it is; merge, and extract an adapter of the rank you want", full))
	}
	n.settings = &Settings{Like: &a.Config,
		Keep: slices.Concat(modelFields, []string{"modules_to_save", "trainable_token_indices"})}
	return &n, nil
}

// plain refuses an adapter of which a module is none of plain matrices.
func (a *Adapter) plain() error {
	for _, m := range a.Modules {
		err := error(nil)
		switch {
		case m.Form == Scale:
			err = fmt.Errorf("%w: IA3 scales weights, which no plain matrices do", ErrUnsupported)
		case m.Form == Transformed:
			err = fmt.Errorf("%w: %s multiplies weights, which no plain matrices do", ErrUnsupported, a.Config.PeftType)
		case m.selectedAs != "":
			err = fmt.Errorf("%w: %s replaces values, which no plain matrices do", ErrUnsupported, a.Config.PeftType)
		case m.fit != nil && a.Config.PeftType == veRA:
			err = fmt.Errorf("%w: VeRA's shared matrices are as wide as the widest module, and how many inputs this one "+
				"has only its base tells", ErrUnsupported)
		case m.fit != nil:
			err = fmt.Errorf("%w: the tensors of %s do not say how many inputs this one has, only its base tells",
				ErrUnsupported, a.Config.PeftType)
		}
		if err != nil {
			return fmt.Errorf("module %s: %w", tensor.Quote(m.String()), err)
		}
	}
	return nil
}
