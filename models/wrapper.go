package models

import (
	"slices"
	"strings"
)

// wrappers are the parts of names that training frameworks put before or between those of the model: torch.compile,
// FSDP and its older releases, checkpointed activations, Lightning. No model has modules of these names.
var wrappers = []string{
	"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module",
}

// WithoutWrappers is the name of a tensor without what training frameworks have put into it, and without the other
// parts that are given.
func WithoutWrappers(name string, others ...string) string {
	parts := strings.Split(name, ".")
	return strings.Join(slices.DeleteFunc(parts, func(p string) bool {
		return slices.Contains(wrappers, p) || slices.Contains(others, p)
	}), ".")
}
