package lorakit

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dlclark/regexp2/v2"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// site is a run-time parameter that an adapter can be attached to.
type site struct {
	param   string // its run-time name
	kind    models.Kind
	out, in int // of its matrix, or of that of one expert; the width and the rows of an embedding
	experts int // how many are stacked; 0 for a single matrix
	rank    int
	alpha   float64
	// parameter says that PEFT takes it by target_parameters and not by its module.
	parameter bool
	// whole is the tensor of the file that has its values; nil where it is put together of
	// several.
	whole *checkpoint.Weight

	shape         tensor.Shape // of the matrix
	pieces, parts int          // tensors of the file it is made of; how many there are to a matrix
	odd           string       // a tensor that does not fit with the others, or ""
	idle          bool         // inside of torch's MultiheadAttention, which passes an adapter by
}

// module is the run-time name of the module that has the parameter.
func (s *site) module() string {
	if s.experts > 0 {
		return s.param[:strings.LastIndexByte(s.param, '.')]
	}
	return strings.TrimSuffix(s.param, ".weight")
}

// String names it as PEFT's users do.
func (s *site) String() string {
	if s.experts > 0 {
		return s.param
	}
	return s.module()
}

// survey lists the parameters that can be targets, in the order of the file, convolutions
// among them, so that none is passed over.
func survey(c *checkpoint.Checkpoint) []*site {
	var list []*site
	all := map[string]*site{}
	for _, w := range c.Weights {
		if !w.DType.Float() && w.DType != tensor.F64 {
			continue
		}
		for _, r := range w.Role.Runtime {
			s := all[r.Param]
			if s == nil {
				s = &site{param: r.Param, kind: w.Role.Kind}
				all[r.Param] = s
				list = append(list, s)
			}
			s.add(w, r)
		}
	}
	if c.Config != nil {
		if own, ok := ownLinears[c.Config.ModelType]; ok {
			for _, s := range list {
				if s.kind == own && len(s.shape) == 2 {
					s.kind = models.Linear
				}
			}
		}
	}
	list = slices.DeleteFunc(list, func(s *site) bool { return !s.target(all) })
	if head := tiedHead(c, list, all); head != nil {
		list = append(list, head)
	}
	return list
}

// add takes in a tensor of the file.
func (s *site) add(w *checkpoint.Weight, r models.Slice) {
	shape := slices.Clone(w.Shape)
	if r.FileParts > 1 && r.FileDim < len(shape) {
		shape[r.FileDim] /= int64(r.FileParts)
	}
	if n := len(shape); r.Transposed && n >= 2 {
		shape[n-1], shape[n-2] = shape[n-2], shape[n-1]
	}
	if s.parts = max(1, r.Parts); s.parts > 1 && r.Dim >= 0 && r.Dim < len(shape) {
		shape[r.Dim] *= int64(s.parts)
	}
	switch {
	case r.Expert >= 0:
		s.experts = max(s.experts, r.Expert+1)
	case s.kind == models.Expert && len(shape) == 3:
		s.experts = int(shape[0])
		shape = shape[1:]
	}
	if s.shape != nil && !slices.Equal(s.shape, shape) || r.Via != "" {
		s.odd = w.Name
	}
	s.shape = shape
	s.whole = nil
	if s.pieces++; s.pieces == 1 && r.Whole() {
		s.whole = w
	}
}

// target finishes what is known of a parameter, and reports whether it can be a target: the
// weight of a module, or a stack of experts.
func (s *site) target(all map[string]*site) bool {
	if len(s.shape) < 2 || s.experts == 0 && !strings.HasSuffix(s.param, ".weight") {
		return false
	}
	s.out, s.in = int(s.shape[0]), int(s.shape[1])
	s.parameter = s.experts > 0 || s.kind == models.Router
	switch s.kind {
	case models.Conv1D, models.Embedding:
		s.out, s.in = s.in, s.out
	case models.Other:
		// The last projection of torch's MultiheadAttention is a linear by a class of its own.
		outside, ok := strings.CutSuffix(s.param, ".out_proj.weight")
		if ok && len(s.shape) == 2 && (all[outside+".in_proj_weight"] != nil || all[outside+".q_proj_weight"] != nil) {
			s.kind, s.idle = models.Linear, true
		} else if len(s.shape) == 2 {
			return false
		}
	}
	return true
}

// check refuses a target that no adapter can be made for.
func (s *site) check(init string) error {
	// A gate has a row for each expert, or a single one: all-linear takes it with any rank.
	gate := (s.kind == models.Router || s.out == 1) && init != "pissa" && init != "olora"
	want := s.parts * max(1, s.experts)
	switch {
	case s.odd != "":
		return fmt.Errorf("module %s: %w: tensor %s does not fit with the others that it is made of", tensor.Quote(s.String()), ErrRefused, tensor.Quote(s.odd))
	case s.kind == models.Other:
		return fmt.Errorf("module %s: %w: it is a convolution, of shape %v; attach takes linear layers, embeddings and experts", tensor.Quote(s.String()), ErrRefused, s.shape)
	case s.kind == models.Expert && s.experts == 0:
		return fmt.Errorf("module %s: %w: it is an expert of a model whose architecture is not known here", tensor.Quote(s.String()), ErrRefused)
	case s.whole == nil && s.pieces != want:
		return fmt.Errorf("module %s: %w: the base has %d of the %d tensors that it is made of", tensor.Quote(s.String()), ErrRefused, s.pieces, want)
	case s.out < 1 || s.in < 1:
		return fmt.Errorf("module %s: %w: its shape is %v", tensor.Quote(s.String()), ErrRefused, s.shape)
	case s.rank > min(s.out, s.in) && !gate:
		return fmt.Errorf("module %s: %w: rank %d is larger than its matrix of %d x %d allows", tensor.Quote(s.String()), ErrRefused, s.rank, s.out, s.in)
	}
	return nil
}

// tiedHead is the output head that has its embedding's weight, and so no tensor of its own.
func tiedHead(c *checkpoint.Checkpoint, list []*site, all map[string]*site) *site {
	param := c.Model.Head() + ".weight"
	if param == ".weight" || all[param] != nil {
		return nil
	}
	for _, s := range list {
		if s.kind == models.Embedding && c.Model.Tensor(param, s.shape).Tied == s.param {
			head := *s
			head.param, head.kind = param, models.Linear
			head.out, head.in = s.in, s.out // the vocabulary, the width
			return &head
		}
	}
	return nil
}

// targets are what an adapter is attached to.
type targets struct {
	sites      []*site
	parameters []string // target_parameters
	doubled    bool     // gate_up_proj stands for two projections of the rank asked for
	notices    []string
}

// modules lists the target_modules.
func (t *targets) modules() []string {
	list := []string{}
	for _, s := range t.sites {
		if !s.parameter {
			list = append(list, s.module())
		}
	}
	return list
}

// key is the name that PEFT gives the module of a target in its file: of two parameters of one module the
// second is wrapped around the first.
func (t *targets) key(s *site) string {
	if s.experts > 0 && strings.HasSuffix(s.param, "."+gateUp) && slices.ContainsFunc(t.sites, func(o *site) bool { return o != s && o.experts > 0 && o.module() == s.module() }) {
		return s.module() + ".base_layer"
	}
	return s.module()
}

// chooseTargets finds what a target means, by the rules of PEFT.
func chooseTargets(c *checkpoint.Checkpoint, o AttachOptions, task string) (*targets, error) {
	p, err := newTargetPattern(o.Target)
	if err != nil {
		return nil, err
	}
	b := &chooser{targetPattern: p, task: task, head: c.Model.Head(), all: survey(c)}
	if c.Config != nil {
		b.fused = fusedExperts[c.Config.ModelType]
	}
	t := &targets{}
	if err := b.modules(); err != nil {
		return nil, err
	}
	if err := b.experts(t); err != nil {
		return nil, err
	}
	fused := false
	for _, s := range b.all {
		if !b.chosen[s] {
			if p.everything && s.kind == models.Expert && !c.Model.Known {
				return nil, fmt.Errorf("%w: target all-linear on a model with experts whose architecture is not known here: %s; --target attention, or names, take what they say", ErrRefused, s)
			}
			if p.everything && s.experts > 0 && len(t.notices) == 0 {
				t.notices = append(t.notices, fmt.Sprintf("experts such as %s are no linear layers of this architecture, and all-linear leaves them alone, as PEFT does", s))
			}
			continue
		}
		if last(s.module()) == "out_proj" && c.Config != nil && slices.Contains(fusedKernels, c.Config.ModelType) {
			if !p.everything {
				return nil, fmt.Errorf("module %s: %w: its weight goes to a kernel past an adapter, and PEFT refuses it for %s", tensor.Quote(s.String()), ErrRefused, c.Config.ModelType)
			}
			if !fused {
				fused = true
				t.notices = append(t.notices, fmt.Sprintf("modules such as %s are left out: their weights go to a kernel past an adapter, and PEFT refuses them", s))
			}
			continue
		}
		if s.idle && (o.Init == "pissa" || o.Init == "olora") {
			t.notices = append(t.notices, fmt.Sprintf("%s is left out: torch's MultiheadAttention reads its weight past an adapter, so that what --init %s takes out of it would be lost", s, o.Init))
			continue
		}
		s.rank, s.alpha = o.Rank, o.Alpha
		if t.doubled && strings.HasSuffix(s.param, "."+gateUp) {
			s.rank, s.alpha = 2*s.rank, 2*s.alpha
		}
		if err := s.check(o.Init); err != nil {
			return nil, err
		}
		t.sites = append(t.sites, s)
	}
	if len(t.sites) == 0 {
		var names []string
		for _, s := range b.all {
			if s.kind == models.Linear || s.kind == models.Conv1D {
				names = append(names, s.String())
			}
		}
		return nil, fmt.Errorf("%w: target %s matches none of its linear layers, such as %s", ErrRefused, tensor.Quote(o.Target), strings.Join(names[:min(3, len(names))], ", "))
	}
	for _, name := range p.names {
		if !b.used[name] {
			t.notices = append(t.notices, fmt.Sprintf("no module is called %s", tensor.Quote(name)))
		}
	}
	return t, nil
}

// chooser finds what a pattern means for a model.
type chooser struct {
	targetPattern
	task   string
	head   string
	fused  map[string]string // of fusedExperts
	all    []*site
	chosen map[*site]bool
	old    map[string]bool // names of fused that are meant
	used   map[string]bool // names of the pattern that matched
}

// modules chooses modules. One that shares its name with what experts had is left to
// experts: PEFT cannot tell them apart.
func (b *chooser) modules() error {
	b.chosen, b.old, b.used = map[*site]bool{}, map[string]bool{}, map[string]bool{}
	for _, s := range b.all {
		name := s.module()
		if s.parameter || b.leaves(s) {
			continue
		}
		hit, err := b.match(name, b.used)
		if err != nil {
			return err
		}
		if !hit {
			continue
		}
		if leaf := last(name); b.fused[leaf] != "" {
			b.old[leaf] = true
			continue
		}
		b.chosen[s] = true
	}
	return nil
}

// leaves reports whether a module is never chosen: what PEFT trains whole for a task, and of all
// linear layers the output head.
func (b *chooser) leaves(s *site) bool {
	name := s.module()
	if isWhole(name, b.task) {
		return true
	}
	linear := s.kind == models.Linear || s.kind == models.Conv1D
	if !b.everything {
		return b.attention && !linear
	}
	unknown := s.whole != nil && !s.whole.Role.Known && !s.whole.Role.Quantized // a head by its name
	return !linear || name == b.head || last(name) == "lm_head" || unknown
}

// experts chooses the parameters of experts and routers.
func (b *chooser) experts(t *targets) error {
	if err := b.oldNames(); err != nil {
		return err
	}
	wanted := map[string]bool{}
	parts := map[string][]string{}
	for name, param := range b.fused {
		if b.old[name] {
			wanted[param] = true
		} else if param == gateUp {
			parts["without"] = append(parts["without"], name)
		}
		if b.old[name] && param == gateUp {
			parts["with"] = append(parts["with"], name)
		}
	}
	if t.doubled = len(parts["with"]) == 2; len(parts["with"]) == 1 {
		return fmt.Errorf("%w: target %s without %s: in this model they are one parameter, %s", ErrRefused, parts["with"][0], parts["without"][0], gateUp)
	}
	direct := map[string]bool{} // named as they are at run time
	for _, name := range b.names {
		direct[name] = true
	}
	for _, s := range b.all {
		for _, set := range []map[string]bool{wanted, direct} {
			for end := range set {
				if s.param != end && !strings.HasSuffix(s.param, "."+end) || !s.parameter && !wanted[end] {
					continue
				}
				if b.fused == nil {
					return fmt.Errorf("module %s: %w: the experts and routers of this architecture are no targets of PEFT's all-linear, and attach takes no others", tensor.Quote(s.String()), ErrRefused)
				}
				s.parameter, b.chosen[s], b.used[end] = true, true, true
				if !slices.Contains(t.parameters, end) {
					t.parameters = append(t.parameters, end)
				}
			}
		}
	}
	slices.Sort(t.parameters)
	return nil
}

// oldNames finds which names of older releases the pattern means: "w1" or "gate_proj", now a
// part of a parameter.
func (b *chooser) oldNames() error {
	for name := range b.fused {
		switch {
		case b.everything:
			b.old[name] = true
		case b.regex != nil:
			for _, s := range b.all {
				if !s.parameter {
					continue
				}
				tried := s.module() // of a router
				if s.experts > 0 {
					tried += "." + name
				}
				if last(tried) != name || b.fused[name] != last(s.param) && s.experts > 0 {
					continue
				}
				hit, err := b.match(tried, nil)
				if err != nil {
					return err
				}
				b.old[name] = b.old[name] || hit
			}
		}
		for _, n := range b.names {
			if n == name || strings.HasSuffix(n, "."+name) {
				b.old[name], b.used[n] = true, true
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
	regex                 *regexp2.Regexp
	names                 []string
}

func newTargetPattern(target string) (targetPattern, error) {
	switch {
	case target == "" || strings.EqualFold(target, "all-linear"):
		return targetPattern{everything: true}, nil
	case target == "attention":
		return targetPattern{attention: true}, nil
	case strings.ContainsAny(target, `\*+?()[]{}|^$`):
		re, err := regexp2.Compile(`\A(?:`+target+`)\z`, regexp2.None)
		if err != nil {
			return targetPattern{}, fmt.Errorf("%w: target %s: %w", ErrOption, tensor.Quote(target), err)
		}
		re.MatchTimeout = 250 * time.Millisecond
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
func (p *targetPattern) match(module string, used map[string]bool) (bool, error) {
	switch {
	case p.everything:
		return true, nil
	case p.attention:
		return inAttention(module), nil
	case p.regex != nil:
		ok, err := p.regex.MatchString(module)
		if err != nil {
			err = fmt.Errorf("%w: target %s takes too long on %s", ErrRefused, tensor.Quote(p.target), tensor.Quote(module))
		}
		return ok, err
	}
	hit := false
	for _, name := range p.names {
		if module == name || strings.HasSuffix(module, "."+name) {
			hit, used[name] = true, true
		}
	}
	return hit, nil
}

// taskType is the task that PEFT knows the model's class by, "" where it has none for it.
func taskType(c *checkpoint.Checkpoint) string {
	if c.Config == nil {
		return ""
	}
	class := c.Config.Architecture
	has := func(part string) bool {
		return slices.ContainsFunc(c.Weights, func(w *checkpoint.Weight) bool { return strings.Contains(w.Name, part) })
	}
	switch {
	case strings.HasSuffix(class, "ForCausalLM"), strings.HasSuffix(class, "LMHeadModel"):
		return "CAUSAL_LM"
	case strings.HasSuffix(class, "ForSequenceClassification"):
		return "SEQ_CLS"
	case strings.HasSuffix(class, "ForTokenClassification"):
		return "TOKEN_CLS"
	case strings.HasSuffix(class, "ForQuestionAnswering"):
		return "QUESTION_ANS"
	case strings.HasSuffix(class, "ForConditionalGeneration") && c.Config.EncoderDecoder() && (has("encoder.embed_tokens.") || has("shared.weight")):
		return "SEQ_2_SEQ_LM" // one that reads text: PEFT's class wants input_ids
	case strings.HasSuffix(class, "Model") && !c.Config.EncoderDecoder() && (has("word_embeddings.") || has("embed_tokens.")) && !has("vision") && !has("visual"):
		return "FEATURE_EXTRACTION"
	}
	return ""
}

// trainedWhole names the modules that PEFT trains whole for a task, without being asked: no
// target is in them.
var trainedWhole = map[string][]string{
	"SEQ_CLS":      {"classifier", "score"},
	"TOKEN_CLS":    {"classifier", "score"},
	"QUESTION_ANS": {"qa_outputs"},
}

// isWhole reports whether a module or parameter is one that PEFT trains whole for a task, or below one: it
// goes by the ends of names, so that a pre_classifier is one too.
func isWhole(name, task string) bool {
	return slices.ContainsFunc(trainedWhole[task], func(m string) bool { return strings.Contains(name+".", m+".") })
}

const gateUp = "gate_up_proj"

// ownLinears has, by model type, the kind of the matrices whose modules are torch.nn.Linear by a class of the
// architecture's own.
var ownLinears = map[string]models.Kind{"falcon": models.Other, "llama4": models.Router, "llama4_text": models.Router, "phimoe": models.Router}

// fusedKernels are the model types whose out_proj goes to a kernel as it is, past an adapter, so that PEFT refuses it.
var fusedKernels = []string{"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}

// fusedExperts has, by model type, what PEFT makes of the names that the projections of experts
// and the router had before transformers stacked them: parameters, one of which stands
// for two projections (PEFT 0.21.2, utils/transformers_weight_conversion.py). Models
// that are not here have no targets in their experts.
var fusedExperts = func() map[string]map[string]string {
	mixtral := map[string]string{"gate": "gate.weight", "w1": gateUp, "w3": gateUp, "w2": "down_proj"}
	qwen2 := map[string]string{"gate": "gate.weight", "gate_proj": gateUp, "up_proj": gateUp, "down_proj": "down_proj"}
	all := map[string]map[string]string{}
	for _, t := range []string{"mixtral", "minimax", "minimax_m2"} {
		all[t] = mixtral
	}
	for _, t := range []string{
		"afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
		"glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe",
		"qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
	} {
		all[t] = qwen2
	}
	return all
}()
