package pipeline

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// explain tells the user what he may not expect of the choice of weights.
func (b *planner) explain() {
	if b.decoded > 0 {
		b.notice("dequantised: %s", plural(b.decoded, "weight"))
	}
	if len(b.uncast) > 0 {
		b.notice("left in the types that they have, since only a scheme gives these a meaning: %s", list(b.uncast, 3))
	}
	b.explainNames()
	if b.scheme == nil {
		return
	}
	if !b.Known {
		what := "there is no config.json"
		if b.Config != nil {
			what = "the architecture " + tensor.Quote(b.Config.Architecture) + " is not known"
		}
		if len(b.Include) == 0 {
			b.notice("%s: weights are chosen by their names and shapes, and it is not promised that %s loads the result", what,
				cmp.Or(b.kind().Loader, "transformers"))
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
	if len(b.left) > 0 {
		b.notice("left as they are, as %s leaves such weights: %s, of which the first %v", cmp.Or(b.kind().Loader,
			"the scheme's program"), list(b.left, 3), b.leftWhy)
	}
	b.explainExperts()
	var others []string
	for _, w := range b.extra {
		if w.Role.Kind != models.Expert {
			others = append(others, w.Name)
		}
	}
	if len(others) > 0 && b.Known && b.kind().Experts != quant.NotTransformers {
		b.notice("quantised, though transformers would not: %s; it is not promised that it loads the result", list(others, 3))
	}
}

// kind is the type by which transformers takes experts: of those that experts are in, or where none is, all weights,
// one beside which it does not load them as they are, or else the first. One such weight is enough for it to fail.
func (b *planner) kind() quant.Type {
	weights, refused := b.quantised, []quant.ExpertSupport{quant.QuantizedExperts, quant.NoExperts}
	experts := slices.DeleteFunc(slices.Clone(b.extra), func(w *Weight) bool { return w.Role.Kind != models.Expert })
	if len(experts) > 0 {
		weights, refused = experts, []quant.ExpertSupport{quant.PlainExperts, quant.NoExperts}
	}
	if len(weights) == 0 {
		return quant.Type{}
	}
	used := map[string]bool{}
	for _, w := range weights {
		used[b.typeIn(w)] = true
	}
	types := slices.DeleteFunc(slices.Clone(b.scheme.Types()), func(t quant.Type) bool { return !used[t.Name] })
	i := slices.IndexFunc(types, func(t quant.Type) bool { return slices.Contains(refused, t.Experts) })
	if i < 0 {
		first := b.typeIn(weights[0])
		i = slices.IndexFunc(types, func(t quant.Type) bool { return t.Name == first })
	}
	if i < 0 {
		return quant.Type{}
	}
	return types[i]
}

// typeIn is the type that a weight in the scheme has in the result: one that is chosen, or the one that it keeps.
func (b *planner) typeIn(w *Weight) string {
	if typ := b.typeOf(w); typ != "" {
		return typ
	}
	return w.Decoder.Spec().Type
}

// explainExperts tells who loads the experts as they are now.
func (b *planner) explainExperts() {
	quantised, plain, apart, own, types := 0, 0, false, false, []string(nil)
	for _, w := range b.extra {
		if w.Role.Kind == models.Expert && !b.loaderNamed(w) {
			quantised++
			if t := b.typeIn(w); !slices.Contains(types, t) {
				types = append(types, t)
			}
		}
	}
	for _, w := range b.plainExperts() {
		plain++
		apart = apart || len(w.Shape) == 2
		own = own || b.loaderNamed(w)
	}
	t := b.kind()
	whom := "for " + t.ExpertLoaders
	switch t.Experts {
	case quant.AnyExperts, quant.ListedExperts, quant.QuantizedExperts:
		whom += " and transformers"
	case quant.PlainExperts, quant.NoExperts:
		if t.ExpertLoaders == "" {
			whom = "which no program that is known reads"
		} else {
			whom += ", and not for transformers"
		}
	}
	in := strings.Join(types, " and ")
	switch {
	case b.PerExpert && quantised > 0:
		b.notice("experts: %s in %s, one tensor an expert, %s", plural(quantised, "tensor"), in, whom)
	case quantised > 0:
		b.notice("experts: %s in %s, chosen by name, %s", plural(quantised, "tensor"), in, whom)
	case plain == 0:
	case own:
		b.notice("experts: %s not quantised; per-expert quantises them", plural(plain, "tensor"))
	case t.Experts == quant.NotTransformers:
		b.notice("experts: %s not quantised; per-expert quantises them, %s", plural(plain, "tensor"), whom)
	case apart && (t.Experts == quant.QuantizedExperts || t.Experts == quant.NoExperts):
		b.notice("experts: %s not quantised, which transformers does not load beside %s; per-expert quantises them, %s",
			plural(plain, "tensor"), t.Name, whom)
	default:
		b.notice("experts: %s not quantised, as transformers loads them; per-expert quantises them", plural(plain, "tensor"))
	}
}

// explainNames tells of weights that transformers does not find under their names, where the result is not for the
// program whose names they are.
func (b *planner) explainNames() {
	if !b.leaves() {
		return
	}
	by := map[string][]string{}
	for _, w := range b.from.Weights {
		if p := w.Role.Program; p != "" && !b.loaderNamed(w) {
			by[p] = append(by[p], w.Name)
		}
	}
	for _, program := range slices.Sorted(maps.Keys(by)) {
		b.notice("stacks of experts keep the names of %s, and transformers does not load such a folder: %s", program,
			list(by[program], 3))
	}
}

// loaderNamed reports whether a weight has the name that it has in the program that the result is for.
func (b *planner) loaderNamed(w *Weight) bool {
	return b.scheme != nil && w.Role.Program != "" && slices.ContainsFunc(b.scheme.Types(), func(t quant.Type) bool {
		return t.Loader == w.Role.Program
	})
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

// remarks are what schemes have said of weights that they have written, a sentence for all of which they have said the
// same.
func remarks(weights map[string][]string) []string {
	var said []string
	for text, names := range weights {
		what := "tensor "
		if len(names) > 1 {
			what = "tensors "
		}
		said = append(said, what+list(slices.Sorted(slices.Values(names)), 3)+": "+text)
	}
	slices.Sort(said)
	return said
}
