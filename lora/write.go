package lora

import (
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

// AdapterFile is the name of the file of a PEFT adapter's tensors.
const AdapterFile = "adapter_model.safetensors"

// PEFTTensor is a tensor as PEFT names it.
type PEFTTensor struct {
	tensor.Info
	Values kernels.Mat
}

// PEFTTensors are the tensors that PEFT stores for a module, in float32.
func PEFTTensors(t Trained) []PEFTTensor {
	a, b := ".lora_A.weight", ".lora_B.weight"
	if t.Form == Embedding {
		a, b = ".lora_embedding_A", ".lora_embedding_B"
	}
	named := func(end string, m kernels.Mat) PEFTTensor {
		return PEFTTensor{tensor.Info{Name: peftPrefix + t.Name + end, DType: tensor.F32, Shape: tensor.Shape{int64(m.Rows), int64(m.Cols)}}, m}
	}
	return []PEFTTensor{named(a, t.A), named(b, t.B)}
}

// Settings are what an adapter_config.json is made of beside its modules.
type Settings struct {
	Like        *Config // whose base, task and orientation are kept, or nil
	Base        string  // base_model_name_or_path where Like has none
	TaskType    string
	FanInFanOut bool
	Init        string // init_lora_weights, true where empty
	Rank        int
	Alpha       float64
	// Ranks and Alphas are those of modules that differ from Rank and Alpha.
	Ranks  map[string]int
	Alphas map[string]float64
}

// PEFTConfig writes the adapter_config.json of an adapter of the named modules.
func PEFTConfig(s Settings, modules []string) ([]byte, error) {
	keep := map[string]jsontext.Value{}
	if s.Like != nil {
		var all map[string]jsontext.Value
		if err := json.Unmarshal(s.Like.raw, &all); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		for _, name := range []string{"task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", "auto_mapping"} {
			if v, ok := all[name]; ok {
				keep[name] = v
			}
		}
	}
	names := slices.Clone(modules)
	slices.Sort(names)
	ranks, alphas := map[string]int{}, map[string]float64{}
	for name, r := range s.Ranks {
		ranks[exactly(name)] = r
	}
	for name, a := range s.Alphas {
		alphas[exactly(name)] = a
	}
	fields := map[string]any{
		"peft_type": "LORA", "task_type": nil, "base_model_name_or_path": s.Base, "revision": nil, "auto_mapping": nil,
		"r": s.Rank, "lora_alpha": s.Alpha, "lora_dropout": 0.0, "target_modules": names, "exclude_modules": nil, "modules_to_save": nil,
		"bias": "none", "fan_in_fan_out": s.FanInFanOut, "inference_mode": true, "use_rslora": false, "use_dora": false, "lora_bias": false,
		"init_lora_weights": true, "rank_pattern": ranks, "alpha_pattern": alphas, "layers_to_transform": nil, "layers_pattern": nil,
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

// exactly is the regular expression of one name.
func exactly(name string) string { return strings.ReplaceAll(name, ".", `\.`) }

// Trained is a module that was computed, as PEFT stores it: A (rank x in) and B (out x rank), whose
// product B·A is the delta, with a scaling of 1. For an embedding A is rank x rows and
// B width x rank.
type Trained struct {
	Name string
	Form Form
	A, B kernels.Mat
	Rank int
}
