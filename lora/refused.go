package lora

import (
	"fmt"
	"strings"

	"github.com/lorakit/lorakit/tensor"
)

// refused are PEFT's other types, and why an adapter of each is not merged.
var refused = map[string]string{
	// These have no delta.
	"PROMPT_TUNING":           onlyTokens,
	"MULTITASK_PROMPT_TUNING": onlyTokens,
	"P_TUNING":                onlyTokens,
	"CPT":                     onlyTokens,
	"PREFIX_TUNING":           onlyCache,
	"CARTRIDGE":               onlyCache,
	"ADAPTION_PROMPT":         "it adds prompts inside of the attention, and no delta to a weight",
	"SHADOW":                  "it changes what layers pass on by the input, so no one delta stands for it",
	"LILY":                    "it mixes its matrices by the input, so no one delta stands for it",
	"POLY":                    "it mixes several adapters by the task, so no one delta stands for it",
	"XLORA":                   "it mixes several adapters by the input, so no one delta stands for it",
	// These have one, by rules that are not known here.
	"ADAMSS":      otherMerge,
	"BEFT":        otherMerge,
	"C3A":         otherMerge,
	"DEFT":        otherMerge,
	"DELORA":      otherMerge,
	"FROD":        otherMerge,
	"GLORA":       otherMerge,
	"GRALORA":     otherMerge,
	"HIRA":        otherMerge,
	"OSF":         otherMerge,
	"PEANUT":      otherMerge,
	"PSOFT":       otherMerge,
	"PVERA":       otherMerge,
	"ROAD":        otherMerge,
	"SHIRA":       otherMerge,
	"SUPERTUNING": otherMerge,
	"TINYLORA":    otherMerge,
	"UNILORA":     otherMerge,
	"WAVEFT":      otherMerge,
}

const (
	onlyTokens = "it adds virtual tokens to the input, and no delta to a weight"
	onlyCache  = "it adds keys and values to the attention's cache, and no delta to a weight"
	otherMerge = "how it changes a weight is not known here; PEFT's merge_and_unload writes a checkpoint with it"
)

// errType says why an adapter of a type is not read.
func errType(name string) error {
	if why := refused[name]; why != "" {
		return fmt.Errorf("%w: peft_type is %s: %s", ErrUnsupported, name, why)
	}
	return fmt.Errorf("%w: peft_type is %s; known are %s", ErrUnsupported, tensor.Quote(name),
		strings.Join(methods(), ", "))
}
