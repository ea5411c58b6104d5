package checkpoint

import (
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// peftPrefix is what PEFT puts before the names of the model that it wraps.
const peftPrefix = "base_model.model."

// dataParallel is what DataParallel and DeepSpeed put before names. A model may have a module of that name.
const dataParallel = "module"

// withoutWrappers returns a name without what wrappers, PEFT's among them, have put into it.
func withoutWrappers(name string) string {
	for {
		inner := strings.TrimPrefix(models.WithoutWrappers(name, dataParallel), peftPrefix)
		if inner == name {
			return name
		}
		name = inner
	}
}

// unwrap takes off what wrappers have put into the names of the tensors. It does so only where the architecture knows
// every matrix by its name without them, and none by its name with them; else it returns the tensors as they are.
func unwrap(tensors []formats.Tensor, m *models.Model) ([]formats.Tensor, string) {
	if !m.Known {
		return tensors, ""
	}
	names := make([]string, len(tensors))
	taken := make(map[string]bool, len(tensors))
	changed, first := 0, -1
	for i, t := range tensors {
		names[i] = withoutWrappers(t.Name)
		if taken[names[i]] {
			return tensors, "" // two would have one name
		}
		taken[names[i]] = true
		if names[i] == t.Name {
			continue
		}
		if changed++; first < 0 {
			first = i
		}
		if len(t.Shape) < 2 { // a buffer that the model does not keep, as inv_freq
			continue
		}
		if !m.Tensor(names[i], t.Shape).Known || m.Has(t.Name, len(t.Shape)) {
			return tensors, ""
		}
	}
	if changed == 0 {
		return tensors, ""
	}
	out := slices.Clone(tensors)
	for i := range out {
		out[i].Name = names[i]
	}
	return out, fmt.Sprintf("a wrapper's parts are taken off the names of %d tensors: %s is %s", changed,
		tensor.Quote(tensors[first].Name), tensor.Quote(names[first]))
}
