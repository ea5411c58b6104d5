package lora

import (
	"slices"
	"strings"

	"github.com/lorakit/lorakit/models"
)

// What PEFT 0.21.2 knows of models by name, and no config.json says: which modules it trains whole, which it takes for
// linear layers, which it refuses, and what the names of experts stand for.

// GateUp is the parameter of a stack of experts that has two of their projections, one below the other.
const GateUp = "gate_up_proj"

// trainedWhole has, by task, the modules that PEFT trains whole without being asked (modules_to_save).
var trainedWhole = map[string][]string{
	"SEQ_CLS":      {"classifier", "score"},
	"TOKEN_CLS":    {"classifier", "score"},
	"QUESTION_ANS": {"qa_outputs"},
}

// TrainedWhole lists the modules that PEFT trains whole for a task, without being asked.
func TrainedWhole(task string) []string { return trainedWhole[task] }

// IsTrainedWhole reports whether a module or parameter is one that PEFT trains whole for a task, or lies below one. It
// goes by the ends of names, so that a pre_classifier is one too.
func IsTrainedWhole(name, task string) bool {
	return slices.ContainsFunc(trainedWhole[task], func(m string) bool { return strings.Contains(name+".", m+".") })
}

// TaskType is the task that PEFT knows the model's class by, "" where it has none for it. The function has reports
// whether a part of a name is in any of the checkpoint's names.
func TaskType(c *models.Config, has func(part string) bool) string {
	if c == nil {
		return ""
	}
	class := c.Architecture
	switch {
	case strings.HasSuffix(class, "ForCausalLM"), strings.HasSuffix(class, "LMHeadModel"):
		return "CAUSAL_LM"
	case strings.HasSuffix(class, "ForSequenceClassification"):
		return "SEQ_CLS"
	case strings.HasSuffix(class, "ForTokenClassification"):
		return "TOKEN_CLS"
	case strings.HasSuffix(class, "ForQuestionAnswering"):
		return "QUESTION_ANS"
	case strings.HasSuffix(class, "ForConditionalGeneration") && c.EncoderDecoder() &&
		(has("encoder.embed_tokens.") || has("shared.weight")):
		return "SEQ_2_SEQ_LM" // one that reads text: PEFT's class wants input_ids
	case strings.HasSuffix(class, "Model") && !c.EncoderDecoder() &&
		(has("word_embeddings.") || has("embed_tokens.")) && !has("vision") && !has("visual"):
		return "FEATURE_EXTRACTION"
	}
	return ""
}

// ownLinears has, by model type, the kind that models gives to matrices whose modules are torch.nn.Linear by a class
// of the architecture's own.
var ownLinears = map[string]models.Kind{
	"falcon": models.Other, "llama4": models.Router, "llama4_text": models.Router, "phimoe": models.Router,
}

// OwnLinear returns the kind of the matrices that PEFT takes for linear layers in models of a type, since their class
// is derived from torch.nn.Linear; false where there are none.
func OwnLinear(modelType string) (models.Kind, bool) {
	kind, ok := ownLinears[modelType]
	return kind, ok
}

// fusedKernels are the model types whose out_proj goes to a kernel as it is, past an adapter.
var fusedKernels = []string{"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}

// GoesToKernel reports whether PEFT refuses a module of a model type, because its weight goes to a kernel as it is and
// an adapter around it would not be run.
func GoesToKernel(modelType, module string) bool {
	_, end := cutLast(module)
	return end == "out_proj" && slices.Contains(fusedKernels, modelType)
}

// HasInterleavedExperts reports whether the stacks of a model type lie (in, out), with the rows of gate and up taking
// turns.
func HasInterleavedExperts(modelType string) bool { return modelType == "gpt_oss" }

// StackedExperts returns, for a model type, what PEFT makes of the names that the projections of experts and the router
// had before transformers stacked them: parameters, one of which (GateUp) stands for two projections. It is nil for
// models whose experts are no targets.
func StackedExperts(modelType string) map[string]string { return stackedExperts[modelType] }

// stackedExperts is PEFT's utils/transformers_weight_conversion.py.
var stackedExperts = func() map[string]map[string]string {
	mixtral := map[string]string{"gate": "gate.weight", "w1": GateUp, "w3": GateUp, "w2": "down_proj"}
	qwen2 := map[string]string{"gate": "gate.weight", "gate_proj": GateUp, "up_proj": GateUp, "down_proj": "down_proj"}
	all := map[string]map[string]string{}
	for _, t := range []string{"mixtral", "minimax", "minimax_m2"} {
		all[t] = mixtral
	}
	for _, t := range []string{
		"afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
		"exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
		"longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
		"qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
	} {
		all[t] = qwen2
	}
	return all
}()
