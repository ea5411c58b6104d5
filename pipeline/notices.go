package pipeline

import (
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// explain tells the user what he may not expect of the choice of weights.
func (b *planner) explain() {
	if b.decoded > 0 {
		b.notice("dequantised: %s", plural(b.decoded, "weight"))
	}
	if len(b.uncast) > 0 {
		b.notice("not cast, since only a scheme gives their types a meaning: %s", list(b.uncast, 3))
	}
	if b.scheme == nil {
		return
	}
	if !b.Known {
		what := "there is no config.json"
		if b.Config != nil {
			what = "the architecture " + tensor.Quote(b.Config.Architecture) + " is not known"
		}
		if len(b.Include) == 0 {
			b.notice("%s: weights are chosen by their names and shapes, and it is not promised that transformers loads the "+
				"result", what)
		}
	}
	if b.Known && b.Config.Assumed {
		b.notice("config.json names no architecture that is known: taken for %s, after its model_type",
			tensor.Quote(b.Config.Architecture))
	}
	guessed := 0
	for _, w := range b.quantised {
		if b.Known && !w.Role.Known {
			guessed++
		}
	}
	if guessed > 0 && len(b.Include) == 0 {
		b.notice("%s are not among those of %s: chosen by their names and shapes", plural(guessed, "tensor"),
			b.Config.Architecture)
	}
	if b.unfit > 0 {
		b.notice("left as they are, since they hold integers or nothing: %s that were chosen by name",
			plural(b.unfit, "tensor"))
	}
	experts, others, types := 0, []string(nil), []string(nil)
	for _, w := range b.extra {
		if w.Role.Kind == models.Expert {
			experts++
			if t := b.typeOf(w); !slices.Contains(types, t) {
				types = append(types, t)
			}
		} else {
			others = append(others, w.Name)
		}
	}
	switch {
	case b.PerExpert && experts > 0:
		loaders := "no program that is known reads them"
		for _, t := range b.scheme.Types() {
			if slices.Contains(types, t.Name) && t.ExpertLoaders != "" {
				loaders = "for " + t.ExpertLoaders
			}
		}
		b.notice("experts: %s in %s, one tensor an expert, %s; transformers does not load such a folder",
			plural(experts, "tensor"), strings.Join(types, " and "), loaders)
	case experts > 0:
		b.notice("experts: %s in %s, chosen by name; transformers does not load such a folder", plural(experts, "tensor"),
			strings.Join(types, " and "))
	default:
		n := 0
		for _, w := range b.from.Weights {
			if w.Role.Kind == models.Expert {
				n++
			}
		}
		if n > 0 {
			b.notice("experts: %s not quantised, as transformers loads them; per-expert quantises them", plural(n, "tensor"))
		}
	}
	if len(others) > 0 && b.Known {
		b.notice("quantised, though transformers would not: %s; it is not promised that it loads the result", list(others, 3))
	}
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// list joins the first n names.
func list(names []string, n int) string {
	var quoted []string
	for _, s := range names[:min(n, len(names))] {
		quoted = append(quoted, tensor.Quote(s))
	}
	s := strings.Join(quoted, ", ")
	if more := len(names) - n; more > 0 {
		s += fmt.Sprintf(" and %d more", more)
	}
	return s
}
