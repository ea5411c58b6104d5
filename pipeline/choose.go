package pipeline

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/internal/nearest"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// planner is the state while a plan is made.
type planner struct {
	*checkpoint.Checkpoint
	Options
	from *Merged
	p    *Plan

	format      formats.Format // that is written
	scheme      quant.Scheme   // nil for keep and none
	spec        quant.Spec     // of scheme
	quantised   []*Weight      // what is in the scheme in the result
	unquantised []*Weight      // what transformers would quantise and stays plain
	extra       []*Weight      // what is quantised and transformers would leave
	decoded     int            // how many weights are dequantised
	changed     bool           // whether the scheme of any weight changes
	unfit       int            // how many were chosen that hold nothing to quantise
	uncast      []string       // what is not cast: types that only a scheme gives a meaning
}

func (b *planner) notice(format string, args ...any) {
	b.p.Notices = append(b.p.Notices, fmt.Sprintf(format, args...))
}

// check refuses what contradicts itself before anything is decided.
func (b *planner) check() error {
	if b.Quantize != "keep" && b.Quantize != "none" {
		var err error
		if b.scheme, err = b.Schemes.ForType(b.Quantize); err != nil {
			return err
		}
		if b.spec, err = b.scheme.Spec(b.Quantize, b.Params); err != nil {
			return err
		}
		b.spec.AllowNonFinite = b.AllowNonFinite
	}
	if b.Config != nil && b.Config.Quantization != nil && b.Config.Quantization.Kind() != '{' {
		return fmt.Errorf("%s: %w: its quantization_config is no JSON object", filepath.Join(b.Path, checkpoint.ConfigName),
			ErrRefused)
	}
	if b.Quantize != "keep" || b.Options.DType != 0 {
		if err := b.CheckReadable(); err != nil {
			return err
		}
	}
	if err := globs(b.Include).unmatched("include", b.from.Weights); err != nil {
		return err
	}
	return globs(b.Exclude).unmatched("exclude", b.from.Weights)
}

func (b *planner) target(dst string) (formats.Format, error) {
	byName, single := b.Formats.ForExtension(dst)
	b.p.SingleFile = single
	if extensions := written(b.Formats); !single { // a folder of that name is not what was meant
		meant, near := nearest.To(filepath.Ext(dst), extensions)
		did := ""
		if near = near && len(meant) >= longExtension; near {
			did = nearest.Hint(meant)
		}
		if near || formats.IsWeights(filepath.Base(dst)) {
			return nil, fmt.Errorf("%s: %w: no format that is written has this extension; known are %s%s",
				dst, ErrRefused, strings.Join(extensions, ", "), did)
		}
	}
	switch {
	case b.To != "":
		f, err := b.Formats.Lookup(b.To)
		if err == nil && single && byName.Name() != f.Name() {
			err = fmt.Errorf("%w: %s has the extension of %s, and %s is asked for", ErrRefused, dst, byName.Name(), f.Name())
		}
		return f, err
	case single:
		return byName, nil
	}
	if b.Format.ReadOnly() {
		return b.Formats.Lookup("safetensors")
	}
	return b.Format, nil
}

// longExtension is how long an extension is that nobody gives a folder by chance, mistyped or not.
const longExtension = len(".safetensors")

// written lists the extensions of the formats that are written.
func written(r *formats.Registry) []string {
	var list []string
	for _, f := range r.All() {
		if !f.ReadOnly() {
			list = append(list, f.Extensions()...)
		}
	}
	return list
}

// jobs decides the way of every weight.
func (b *planner) jobs(ctx context.Context) ([]Job, error) {
	jobs := make([]Job, 0, len(b.from.Weights))
	for _, w := range b.from.Weights {
		if ctx.Err() != nil {
			return nil, ErrInterrupted
		}
		if b.scheme != nil && w.Role.Tied != "" {
			same, err := b.sameAsTied(ctx, w)
			if err != nil {
				return nil, err
			}
			if same {
				b.notice("%s is tied to %s and not written", tensor.Quote(w.Name), tensor.Quote(w.Role.Tied))
				continue
			}
		}
		j, err := b.job(ctx, w)
		if err != nil {
			return nil, w.Failed(err)
		}
		arranged, err := b.arrange(ctx, w, j)
		if err != nil {
			return nil, w.Failed(err)
		}
		jobs = append(jobs, arranged...)
	}
	b.group(jobs)
	if b.scheme != nil && len(b.quantised) == 0 {
		err := fmt.Errorf("%s: %w: none of its %d tensors is one to be quantised to %s",
			b.Path, ErrRefused, len(b.from.Weights), b.Quantize)
		return nil, hint.With(err, hint.Hint{Option: "Include", Value: "GLOB", Effect: "chooses them by name"})
	}
	b.explain()
	return jobs, nil
}

// job decides the way of one weight.
func (b *planner) job(ctx context.Context, w *Weight) (Job, error) {
	selected := b.selected(w)
	if w.Decoder == nil && w.Encoding != (tensor.Encoding{}) && (selected || w.Change != nil || b.Quantize == "none") {
		return Job{}, fmt.Errorf("%w: it is stored as %s, which no scheme that is known reads", ErrRefused,
			tensor.Quote(w.Encoding.Name))
	}
	if selected && (w.Count() == 0 || w.DType.Integer()) {
		b.unfit++
		selected = false
	}
	if selected {
		b.quantised = append(b.quantised, w)
		if !w.Role.Quantized {
			b.extra = append(b.extra, w)
		}
		return b.quantiseJob(ctx, w)
	}
	if b.scheme != nil && b.loaderMayExpect(w) {
		b.unquantised = append(b.unquantised, w)
	}
	to := b.castTo(w)
	if b.Options.DType != 0 && !w.DType.Numeric() && !w.DType.Integer() {
		b.uncast = append(b.uncast, w.Name)
	}
	switch {
	case w.Change != nil && w.Decoder != nil && b.Quantize == "keep" && b.holds(w):
		spec := w.Decoder.Spec()
		scheme, err := b.Schemes.ForType(spec.Type)
		if err != nil {
			return Job{}, err
		}
		return encodeJob(ctx, w, w.DType, scheme, spec)
	case w.Change == nil && (w.Decoder == nil && to == w.Values || w.Decoder != nil && b.Quantize == "keep" && b.holds(w)):
		return copyJob(w), nil
	case w.Decoder != nil:
		b.decoded++
		b.changed = true
	}
	return Job{Weight: w.Name, DType: to, RoundTrip: b.roundTrip(w),
		Outputs: []Output{{Info: tensor.Info{Name: w.Name, DType: to, Shape: w.Shape}}}}, nil
}

// holds reports whether the format that is written has a place for a weight as it is stored.
func (b *planner) holds(w *Weight) bool {
	return !slices.ContainsFunc(w.Parts, func(p formats.Tensor) bool { return b.format.Holds(p.Info) != nil })
}

// roundTrip is the quantisation that a plain weight goes through, and back, before anything is added to it,
// or nil. Weights that are not quantised, as an output head, were not so when the adapter was trained either.
func (b *planner) roundTrip(w *Weight) *quant.Spec {
	if b.Options.RoundTrip == nil || w.Change == nil || w.Decoder != nil || len(w.Change.Updates) == 0 ||
		len(w.Shape) < 2 {
		return nil
	}
	if b.scheme == nil && !w.Role.Quantized || b.scheme != nil && !b.selected(w) {
		return nil
	}
	spec := *b.Options.RoundTrip
	spec.AllowNonFinite = b.AllowNonFinite
	return &spec
}

// loaderMayExpect reports whether a loader that goes by config.json alone may take a weight that stays plain for a
// quantised one.
func (b *planner) loaderMayExpect(w *Weight) bool {
	if w.Role.Quantized || w.Role.Stay != models.Free {
		return true
	}
	matrix := len(w.Shape) == 2 && strings.HasSuffix(w.Name, ".weight") && w.Role.Kind != models.Embedding
	return b.Known && !w.Role.Known && matrix
}

// selected reports whether a weight is to be quantised.
func (b *planner) selected(w *Weight) bool {
	switch {
	case b.scheme == nil, globs(b.Exclude).match(w.Name):
		return false
	case len(b.Include) > 0:
		return globs(b.Include).match(w.Name)
	}
	return w.Role.Quantized || b.PerExpert && w.Role.Kind == models.Expert
}

func (b *planner) quantiseJob(ctx context.Context, w *Weight) (Job, error) {
	if w.Role.Kind == models.Expert && len(w.Shape) > 2 && len(b.Include) == 0 {
		return Job{}, fmt.Errorf("%w: its experts are stored as one tensor of shape %v, and per-expert needs one tensor an "+
			"expert; they can be kept as they are", ErrRefused, w.Shape)
	}
	spec, to := b.spec, b.castTo(w)
	if w.Decoder != nil {
		have := w.Decoder.Spec()
		have.AllowNonFinite = spec.AllowNonFinite
		// A scheme that does not store what a weight was has nothing to cast.
		if w.Change == nil && have.Equal(spec) && (to == w.DType || w.Values != w.DType) {
			return copyJob(w), nil
		}
		b.decoded++
	}
	b.changed = true
	j, err := encodeJob(ctx, w, to, b.scheme, spec)
	j.RoundTrip = b.roundTrip(w)
	return j, err
}

// encodeJob quantises a weight.
func encodeJob(ctx context.Context, w *Weight, to tensor.DType, scheme quant.Scheme, spec quant.Spec) (Job, error) {
	j := Job{Weight: w.Name, DType: to, Encode: &spec}
	return j, j.place(ctx, scheme, w)
}

// place finds the tensors that the job's encoder makes of the weight.
func (j *Job) place(ctx context.Context, scheme quant.Scheme, w *Weight) error {
	e, err := scheme.Encoder(ctx, *j.Encode, j.encoded(w))
	if err != nil {
		return err
	}
	j.Outputs = nil
	for _, out := range e.Outputs() {
		j.Outputs = append(j.Outputs, Output{Info: out})
	}
	return nil
}

// encoded is the weight as the job's encoder sees it: Conv1D is turned round first, as transformers does.
func (j *Job) encoded(w *Weight) tensor.Info {
	t := tensor.Info{Name: j.name(), DType: j.DType, Shape: w.Shape}
	if j.Rows != nil {
		t.Shape = slices.Clone(w.Shape)
		t.Shape[0] = j.Rows.Count
	}
	if j.flips(w) {
		t.Shape = w.Shape.Transposed()
	}
	return t
}

// name is that of the weight in the result.
func (j *Job) name() string { return cmp.Or(j.Name, j.Weight) }

// flips reports whether the values are turned round before they are quantised.
func (j *Job) flips(w *Weight) bool {
	return j.Encode != nil && w.Flips()
}

func copyJob(w *Weight) Job {
	j := Job{Weight: w.Name, Copy: true, DType: w.DType}
	for _, p := range w.Parts {
		j.Outputs = append(j.Outputs, Output{Info: p.Info})
	}
	return j
}

// castTo is the dtype that the values of a weight get.
func (b *planner) castTo(w *Weight) tensor.DType {
	to := b.Options.DType
	if to == 0 || !w.DType.Numeric() {
		return w.DType
	}
	if to == tensor.F16 && w.Role.KeepFloat32 || to != tensor.F32 && w.Role.KeepFloat32Strict {
		return tensor.F32 // as transformers loads it
	}
	return to
}

// sameAsTied reports whether a weight that the config ties to another has that one's very bytes, so that nothing is
// lost without it.
func (b *planner) sameAsTied(ctx context.Context, w *Weight) (bool, error) {
	i := slices.IndexFunc(b.from.Weights, func(o *Weight) bool {
		return len(o.Role.Runtime) == 1 && o.Role.Runtime[0].Whole() && o.Role.Runtime[0].Param == w.Role.Tied
	})
	if i < 0 {
		return false, nil // it is the only one that is stored
	}
	same, err := checkpoint.SameBytes(ctx, w.Weight, b.from.Weights[i].Weight)
	if err == nil && !same {
		b.notice("%s is tied to %s by config.json, but differs from it: it is kept", tensor.Quote(w.Name),
			tensor.Quote(w.Role.Tied))
	}
	return same, err
}

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
	experts, others := 0, []string(nil)
	for _, w := range b.extra {
		if w.Role.Kind == models.Expert {
			experts++
		} else {
			others = append(others, w.Name)
		}
	}
	switch {
	case b.PerExpert && experts > 0:
		loaders := "no program that is known reads them"
		for _, t := range b.scheme.Types() {
			if t.Name == b.Quantize && t.ExpertLoaders != "" {
				loaders = "for " + t.ExpertLoaders
			}
		}
		b.notice("experts: %s in %s, one tensor an expert, %s; transformers does not load such a folder",
			plural(experts, "tensor"), b.Quantize, loaders)
	case experts > 0:
		b.notice("experts: %s in %s, chosen by name; transformers does not load such a folder", plural(experts, "tensor"),
			b.Quantize)
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

// globs matches whole tensor names. * stands for any characters, dots included, ? for one.
type globs []string

func (g globs) match(name string) bool {
	for _, pattern := range g {
		if matchGlob(pattern, name) {
			return true
		}
	}
	return false
}

// matchGlob goes back to the last star only, so it takes at most len(pattern) times len(name) steps.
func matchGlob(pattern, name string) bool {
	p, n := 0, 0
	star, mark := -1, 0
	for n < len(name) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, n
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == name[n]):
			p++
			n++
		case star >= 0:
			mark++
			p, n = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// unmatched is an error where a glob matches no weight: most likely a mistake.
func (g globs) unmatched(what string, weights []*Weight) error {
	for _, pattern := range g {
		found := false
		for _, w := range weights {
			if found = matchGlob(pattern, w.Name); found {
				break
			}
		}
		if !found {
			return fmt.Errorf("%w: %s %s matches none of the %d tensors%s", ErrRefused, what, tensor.Quote(pattern),
				len(weights), meant(pattern, weights))
		}
	}
	return nil
}

// meant suggests for a glob that matches nothing another word between its dots, where no name has that one.
func meant(pattern string, weights []*Weight) string {
	var words []string
	known := map[string]bool{}
	for _, w := range weights {
		for word := range strings.SplitSeq(w.Name, ".") {
			if !known[word] {
				known[word] = true
				words = append(words, word)
			}
		}
	}
	for word := range strings.SplitSeq(pattern, ".") {
		if !known[word] && !strings.ContainsAny(word, "*?") {
			return nearest.Suggestion(word, words)
		}
	}
	return ""
}
