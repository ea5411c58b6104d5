package lora

import (
	"strings"

	"github.com/lorakit/lorakit/models"
)

// inModel is the name that a key of PEFT has in the model: without PEFT's prefix, and without what frameworks have put
// before it and into it.
func inModel(key string) string {
	name := key
	if strings.Contains(key, "_module.") || strings.Contains(key, "_orig_mod.") {
		name = models.WithoutWrappers(key)
	}
	if before, inside, ok := strings.Cut(name, peftPrefix); ok && strings.ReplaceAll(before, "module.", "") == "" {
		return inside
	}
	return name
}
