package lora

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
)

// peftOutputs are the tensors that PEFT stores for a module of another adapter. adapted has the modules
// that have factors: PEFT keeps what replaces a part of them one name deeper.
func (m *Module) peftOutputs(adapted []string) []Output {
	name := peftPrefix + m.Name + strings.Repeat(".base_layer", m.WrapDepth)
	value := func() string {
		if _, within := slices.BinarySearch(adapted, m.Name); within && !strings.Contains(m.Param, ".") {
			return peftPrefix + m.Name + ".base_layer." + m.Param
		}
		return peftPrefix + m.Name + "." + m.Param
	}
	switch m.Form {
	case Bias:
		return []Output{asItIs(name+".lora_B.bias", m.Value)}
	case Replace:
		return []Output{asItIs(value(), m.Value)}
	case Rows:
		return []Output{asItIs(name+".token_adapter.trainable_tokens_delta", m.Value)}
	}
	end := [2]string{".lora_A.weight", ".lora_B.weight"}
	if m.Form == Embedding {
		end = [2]string{".lora_embedding_A", ".lora_embedding_B"}
	}
	shapeA, shapeB := m.factorShapes()
	out := []Output{output(name+end[0], m.A, shapeA...), output(name+end[1], m.B, shapeB...)}
	if m.Magnitude != nil {
		out = append(out, asItIs(name+".lora_magnitude_vector", m.Magnitude))
	}
	return out
}

// encodePEFT writes the folder that PEFT loads.
func (a *Adapter) encodePEFT(experts string) (*Encoded, error) {
	modules, config := a.Modules, a.Config.raw
	rebuilt := a.Dialect != PEFT || experts != keepExperts
	if a.Dialect == GGUF && experts == keepExperts { // which has them as the checkpoint of its base does
		experts = perExpert
	}
	if rebuilt {
		var err error
		if experts == perExpert {
			modules, err = a.perExpert()
		} else {
			modules, err = a.apart()
		}
		if err != nil {
			return nil, err
		}
		if modules, err = alone(modules); err != nil {
			return nil, err
		}
		if experts == perExpert {
			if modules, err = evenRanks(modules); err != nil {
				return nil, err
			}
		} else {
			list, rest, err := a.families(modules)
			if err != nil {
				return nil, err
			}
			modules = rest
			for _, f := range list {
				parts, err := f.fuse()
				if err != nil {
					return nil, err
				}
				modules = append(modules, parts...)
			}
		}
		if config, err = a.peftConfig(modules); err != nil {
			return nil, err
		}
	}
	e := EncodePEFT(modules, config)
	if i := slices.IndexFunc(modules, func(m *Module) bool { return m.Component == imageModel }); i >= 0 {
		e.Notices = append(e.Notices, fmt.Sprintf("the modules keep the names of the model's authors, such as %s; as a "+
			"diffusers "+
			"adapter they get those of diffusers, where they are known", modules[i].Name))
	}
	return e, nil
}

// EncodePEFT makes the folder that PEFT loads of modules and an adapter_config.json that means them.
func EncodePEFT(modules []*Module, config []byte) *Encoded {
	e := &Encoded{Dialect: PEFT, Format: "safetensors", File: adapterFiles[0],
		Metadata: formats.Texts(map[string]string{"format": "pt"}), Config: config}
	names := adapted(modules)
	for _, m := range modules {
		e.Tensors = append(e.Tensors, m.peftOutputs(names)...)
	}
	return e
}

// peftConfig is the adapter_config.json for modules that were made of those of an adapter.
func (a *Adapter) peftConfig(modules []*Module) ([]byte, error) {
	common := commonScales(modules)
	for _, m := range modules {
		if _, _, _, ok := splitExpert(m.Name); ok { // PEFT looks up no pattern for them
			common = scales{m.Rank, m.alpha(), m.Scaling}
			break
		}
	}
	var s Settings
	switch {
	case a.settings != nil:
		s = *a.settings
	case a.Dialect == PEFT:
		s.EnsureTie = a.Config.EnsureTie
		s.Like, s.Keep = &a.Config, slices.Concat(modelFields,
			[]string{"modules_to_save", "trainable_token_indices", "bias", "use_dora", "lora_bias", "ensure_weight_tying",
				"lora_dropout", "init_lora_weights", "alora_invocation_tokens", "task_name", "prompt_prefix"})
	default:
		s.Base = a.Config.Base
	}
	s.Rank, s.Alpha, s.Ranks, s.Alphas, s.Targets, s.Parameters = common.rank, common.alpha, map[string]int{},
		map[string]float64{}, []string{}, []string{}
	biases, ofAdapted, save := 0, 0, map[string]bool{}
	names, copied := adapted(modules), map[string]bool{}
	var looked []string
	for _, m := range modules {
		if m.Base {
			copied[m.Name] = true
		}
	}
	for _, m := range modules {
		full := m.Name
		switch {
		case m.A.T == nil:
			switch {
			case m.Form == Bias:
				s.LoraBias = true
			case m.Form == Rows:
				if s.Tokens == nil {
					s.Tokens = map[string][]int64{}
				}
				s.Tokens[m.Name] = m.Indices
			}
			if m.Form == Replace && m.Param == "bias" {
				biases++
				if _, ok := slices.BinarySearch(names, m.Name); ok {
					ofAdapted++
				}
			} else if m.Form == Replace && !m.Base {
				save[m.Name] = true
			}
			continue
		case m.Param != "weight":
			full += "." + m.Param
			s.Parameters = append(s.Parameters, full)
		default:
			if _, _, leaf, ok := splitExpert(m.Name); ok { // PEFT looks for the last part of an expert's name
				if !slices.Contains(s.Targets, leaf) {
					s.Targets = append(s.Targets, leaf)
				}
			} else if !slices.Contains(s.Parameters, full+".weight") && m.Parameter {
				s.Parameters = append(s.Parameters, full+".weight")
				full += ".weight"
			} else if s.EnsureTie && m.isHead() { // PEFT adapts it on its own
			} else if _, end := cutLast(full); copied[full] && slices.Contains(savedEmbeddings, end) {
				s.Targets = append(s.Targets, end)
			} else {
				s.Targets = append(s.Targets, full)
			}
		}
		looked = append(looked, full)
		if m.Magnitude != nil {
			s.DoRA = true
		}
		if m.Rank != s.Rank {
			s.Ranks[full] = m.Rank
		}
		if alpha := m.alpha(); alpha != s.Alpha {
			s.Alphas[full] = alpha
		}
	}
	s.names = endsOf(looked)
	if a.Dialect != PEFT {
		switch s.ToSave = slices.Sorted(maps.Keys(save)); {
		case biases > 0 && biases == ofAdapted:
			s.Bias = "lora_only"
		case biases > 0:
			s.Bias = "all"
		}
	}
	return PEFTConfig(s, nil)
}

// savedEmbeddings are the targets by whose bare name PEFT knows that an adapter brings the base's own
// matrices along.
var savedEmbeddings = []string{"embed_tokens", "lm_head"}

// modelFields are those of an adapter_config.json that tell of its model.
var modelFields = []string{"task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", "auto_mapping"}

// Settings are what an adapter_config.json is made of beside its modules.
type Settings struct {
	Like        *Config  // whose base, task and orientation are kept, or nil
	Keep        []string // the fields that are kept; nil are those of the model
	Base        string   // base_model_name_or_path where Like has none
	TaskType    string
	FanInFanOut bool
	Init        string // init_lora_weights, true where empty
	Rank        int
	Alpha       float64
	// Ranks and Alphas are those of modules that differ from Rank and Alpha.
	Ranks  map[string]int
	Alphas map[string]float64

	// Targets, where not nil, are the target_modules instead of the names of the modules.
	Targets    []string
	Parameters []string // target_parameters
	ToSave     []string // modules_to_save
	Bias       string   // "none" where empty
	DoRA       bool
	EnsureTie  bool // ensure_weight_tying
	LoraBias   bool
	Tokens     map[string][]int64 // trainable_token_indices
	Invocation []int64            // alora_invocation_tokens
	// TaskName and PromptPrefix are what llama.cpp shows of an adapter.
	TaskName, PromptPrefix string

	names ends // that Ranks and Alphas are looked up with
}

// PEFTConfig writes the adapter_config.json of an adapter of the named modules.
func PEFTConfig(s Settings, modules []string) ([]byte, error) {
	keep := map[string]jsontext.Value{}
	if s.Like != nil && s.Like.raw != nil { // it has been in a PEFT folder
		var all map[string]jsontext.Value
		if err := json.Unmarshal(s.Like.raw, &all); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		fields := s.Keep
		if fields == nil {
			fields = modelFields
		}
		for _, name := range fields {
			if v, ok := all[name]; ok {
				keep[name] = v
			}
		}
	}
	if s.Targets != nil {
		modules = s.Targets
	}
	names := slices.Clone(modules)
	slices.Sort(names)
	ranks, alphas := map[string]int{}, map[string]float64{}
	if s.names.names == nil {
		s.names = endsOf(modules)
	}
	within := s.names.inner()
	for name, r := range s.Ranks {
		ranks[exactly(name, within)] = r
	}
	for name, a := range s.Alphas {
		alphas[exactly(name, within)] = a
	}
	fields := map[string]any{
		"peft_type": "LORA", "task_type": nil, "auto_mapping": nil, "inference_mode": true,
		// A path of Unix may be no text in UTF-8, and JSON is one.
		"base_model_name_or_path": strings.ToValidUTF8(s.Base, "\ufffd"), "revision": nil,
		"r": s.Rank, "lora_alpha": s.Alpha, "rank_pattern": ranks, "alpha_pattern": alphas, "lora_dropout": 0.0,
		"target_modules": names, "exclude_modules": nil, "layers_to_transform": nil, "layers_pattern": nil,
		"modules_to_save": nil, "bias": "none", "fan_in_fan_out": s.FanInFanOut, "init_lora_weights": true,
		"use_rslora": false, "use_dora": s.DoRA, "lora_bias": s.LoraBias,
	}
	if len(s.Parameters) > 0 { // and the sides of stacks are those of a version
		fields["peft_version"] = writtenVersion
		fields["target_parameters"] = slices.Sorted(slices.Values(s.Parameters))
	}
	if len(s.ToSave) > 0 {
		fields["modules_to_save"] = s.ToSave
	}
	if len(s.Tokens) > 0 {
		fields["trainable_token_indices"] = s.Tokens
	}
	if s.EnsureTie {
		fields["ensure_weight_tying"] = true
	}
	if s.Bias != "" {
		fields["bias"] = s.Bias
	}
	if len(s.Invocation) > 0 {
		fields["alora_invocation_tokens"] = s.Invocation
	}
	if s.TaskName != "" {
		fields["task_name"] = s.TaskName
	}
	if s.PromptPrefix != "" {
		fields["prompt_prefix"] = s.PromptPrefix
	}
	if s.TaskType != "" {
		fields["task_type"] = s.TaskType
	}
	if s.Init != "" {
		fields["init_lora_weights"] = s.Init
	}
	for name, v := range keep {
		fields[name] = v
	}
	b, err := json.Marshal(fields, json.Deterministic(true), jsontext.WithIndent("  "))
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}

// exactly is the pattern of one name. Those in within are the end of another one too, which a start keeps
// out.
func exactly(name string, within map[string]bool) string {
	if within[name] {
		return "^" + regexp.QuoteMeta(name)
	}
	return regexp.QuoteMeta(name)
}
