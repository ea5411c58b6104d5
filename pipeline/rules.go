package pipeline

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Rule gives the weights whose whole name its glob matches a type of a scheme, or "keep", with which they are not
// quantised.
type Rule struct{ Glob, Type string }

// keepType is the type of a rule that leaves weights as they are.
const keepType = "keep"

// ParseRule reads GLOB=TYPE. The type begins behind the last equals sign.
func ParseRule(text string) (Rule, error) {
	at := strings.LastIndexByte(text, '=')
	if at < 1 || at == len(text)-1 {
		return Rule{}, fmt.Errorf("%w: the rule %s, expected GLOB=TYPE, such as *.down_proj.weight=mlx8", ErrOption,
			tensor.Quote(text))
	}
	return Rule{text[:at], text[at+1:]}, nil
}

func (r Rule) String() string { return r.Glob + "=" + r.Type }

// checkRules refuses rules that are wrong whatever the checkpoint is.
func (o *Options) checkRules() error {
	choices := false
	for i, r := range o.Rules {
		if r.Type != keepType {
			scheme, err := quant.ForType(r.Type)
			if err == nil {
				_, err = scheme.Spec(r.Type, o.Params)
			} else {
				err = quant.Default.Unknown(r.Type, keepType)
			}
			if err != nil {
				return fmt.Errorf("%w: the rule %s: %w", ErrOption, tensor.Quote(r.String()), err)
			}
		}
		for _, before := range o.Rules[:i] {
			switch {
			case before == r:
				return fmt.Errorf("%w: the rule %s is there twice", ErrOption, tensor.Quote(r.String()))
			case before.Glob == r.Glob && o.Budget == 0:
				err := fmt.Errorf("%w: the rule %s comes behind %s, which wins", ErrOption, tensor.Quote(r.String()),
					tensor.Quote(before.String()))
				return hint.With(err, hint.Hint{Option: "Budget", Value: "BPW", Effect: "chooses between them"})
			case before.Glob == r.Glob:
				choices = true
			}
		}
	}
	if o.Budget == 0 {
		return nil
	}
	if !(o.Budget > 0) || math.IsInf(o.Budget, 0) {
		return fmt.Errorf("%w: budget is %v, expected bits a weight, such as 4.5", ErrOption, o.Budget)
	}
	if !choices {
		return fmt.Errorf("%w: budget chooses between the types of rules with one glob, and no two have one: '*=mlx4' and "+
			"'*=mlx8', say", ErrOption)
	}
	return nil
}

// typed is a type that weights are quantised to.
type typed struct {
	scheme quant.Scheme
	spec   quant.Spec
}

// takeTypes finds the schemes of the types that are asked for. A checkpoint of one config.json has one scheme.
func (b *planner) takeTypes() error {
	b.types = map[string]typed{}
	asked := make([]string, 0, 1+len(b.Rules))
	if b.from.gguf == nil && b.Quantize != "keep" && b.Quantize != "none" {
		asked = append(asked, b.Quantize)
	}
	for _, r := range b.Rules {
		if r.Type != keepType {
			asked = append(asked, r.Type)
		}
	}
	for _, name := range asked {
		if b.from.gguf != nil {
			if _, err := ggml.Parse(name); err != nil {
				return fmt.Errorf("%s: %w: a rule gives %s, and a GGUF file has types of its own, such as q6_k", b.Path,
					ErrRefused, tensor.Quote(name))
			}
			continue
		}
		scheme, err := b.Schemes.ForType(name)
		if err != nil {
			if _, ok := fileType(name); ok {
				err = fmt.Errorf("%s: %w: %s is a choice of types for the tensors of a model in a GGUF file", b.Path, ErrRefused,
					name)
			}
			return err
		}
		spec, err := scheme.Spec(name, b.Params)
		if err != nil {
			return err
		}
		if b.scheme != nil && b.scheme.Name() != scheme.Name() {
			return fmt.Errorf("%s: %w: %s is a type of %s and %s one of %s, and a checkpoint has one of them: lorakit formats "+
				"lists the types of each", b.Path, ErrRefused, asked[0], b.scheme.Name(), name, scheme.Name())
		}
		spec.AllowNonFinite = b.AllowNonFinite
		b.scheme, b.types[name] = scheme, typed{scheme, spec}
	}
	return nil
}

// nameBlocks gives the types that are asked for the names that their blocks have in a GGUF file, also where another
// scheme has a type of that name.
func (b *planner) nameBlocks() {
	name := func(typ string) string {
		if block, err := ggml.Parse(typ); err == nil {
			return block.Unique()
		}
		return typ
	}
	b.Quantize = name(b.Quantize)
	b.Rules = slices.Clone(b.Rules)
	for i := range b.Rules {
		b.Rules[i].Type = name(b.Rules[i].Type)
	}
}

// rule finds the types that rules give weights. The first glob that matches a name wins. A rule is about the weights
// that are quantised anyway, which norms and biases are not; one that matches none of these takes what it matches, as
// Include does.
func (b *planner) rule() error {
	var list globs
	for _, r := range b.Rules {
		list = append(list, r.Glob)
	}
	if err := list.unmatched("rule", b.from.Weights); err != nil {
		return err
	}
	about := map[string]bool{} // weights that are quantised anyway
	for _, w := range b.from.Weights {
		if !b.chosen(w) {
			continue
		}
		for _, glob := range list {
			about[glob] = about[glob] || b.from.matches(w, []string{glob})
		}
	}
	b.ruled = map[*Weight][]string{}
	taken := map[string]bool{}
	for _, w := range b.from.Weights {
		chosen := b.chosen(w)
		decides := func(r Rule) bool {
			return (chosen || !about[r.Glob] && len(b.Include) == 0) && b.from.matches(w, []string{r.Glob})
		}
		first := slices.IndexFunc(b.Rules, decides)
		if first < 0 || w.Calibration || b.from.matches(w, b.Exclude) {
			continue
		}
		glob := b.Rules[first].Glob
		taken[glob] = true
		for _, r := range b.Rules[first:] {
			if r.Glob == glob {
				b.ruled[w] = append(b.ruled[w], r.Type)
			}
		}
	}
	for _, r := range b.Rules {
		if !taken[r.Glob] {
			return fmt.Errorf("%s: %w: the rule %s decides for no tensor: all that it matches are taken by a rule before it, "+
				"or not chosen by include and exclude", b.Path, ErrRefused, tensor.Quote(r.String()))
		}
	}
	return nil
}

// chosen reports whether a weight is one to be quantised where nothing but the model, Include and Exclude say so.
func (b *planner) chosen(w *Weight) bool {
	switch {
	case w.Calibration, b.from.matches(w, b.Exclude):
		return false
	case len(b.Include) > 0:
		return b.from.matches(w, b.Include)
	case b.from.gguf != nil:
		return ggml.Quantised(ggml.Tensor{Name: w.Name, Shape: w.Shape})
	}
	return w.Role.Quantized || b.PerExpert && w.Role.Kind == models.Expert
}

// typeOf is the type that a weight is quantised to, "" where it is not.
func (b *planner) typeOf(w *Weight) string {
	if types := b.ruled[w]; types != nil {
		if types[0] == keepType {
			return ""
		}
		return types[0]
	}
	if _, ok := b.types[b.Quantize]; ok && b.chosen(w) {
		return b.Quantize
	}
	return ""
}

// named reports whether a weight is quantised since its name was given, whatever it is in the model.
func (b *planner) named(w *Weight) bool { return len(b.Include) > 0 || !b.chosen(w) }
