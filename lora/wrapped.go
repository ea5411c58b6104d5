package lora

import (
	"slices"
	"strings"
)

// wrapperParts are the parts of names that training frameworks put before or between those of the model:
// torch.compile, FSDP and its older releases, checkpointed activations, Lightning. No model has modules of these names.
var wrapperParts = []string{
	"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module",
}

// inModel is the name that a key of PEFT has in the model: without PEFT's prefix, and without what frameworks have put
// before it and into it.
func inModel(key string) string {
	name := key
	if strings.Contains(key, "_module.") || strings.Contains(key, "_orig_mod.") {
		parts := strings.Split(key, ".")
		parts = slices.DeleteFunc(parts, func(p string) bool { return slices.Contains(wrapperParts, p) })
		name = strings.Join(parts, ".")
	}
	if before, inside, ok := strings.Cut(name, peftPrefix); ok && strings.ReplaceAll(before, "module.", "") == "" {
		return inside
	}
	return name
}
