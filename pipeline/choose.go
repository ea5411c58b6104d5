package pipeline

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
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

	format      formats.Format       // that is written
	scheme      quant.Scheme         // nil where nothing is quantised
	types       map[string]typed     // of scheme, that are asked for
	ruled       map[*Weight][]string // the types that rules leave a weight: the first, once the budget is spent
	quantised   []*Weight            // what is in the scheme in the result
	assigned    []quant.Assigned     // how
	unquantised []*Weight            // what transformers would quantise and stays plain
	extra       []*Weight            // what is quantised and transformers would leave
	decoded     int                  // how many weights are dequantised
	changed     bool                 // whether the scheme of any weight changes
	unfit       int                  // how many were chosen that hold nothing to quantise
	left        []string             // what was chosen and is left as it is, as the programs of the scheme leave it
	leftWhy     error                // of the first of them
	uncast      []string             // what is not cast: types that only a scheme gives a meaning
	dissolved   []string             // the types of schemes with changed weights that are read only: all are dequantised
}

func (b *planner) notice(format string, args ...any) {
	b.p.Notices = append(b.p.Notices, fmt.Sprintf(format, args...))
}

// check refuses what contradicts itself before anything is decided.
func (b *planner) check() error {
	if err := b.takeTypes(); err != nil {
		return err
	}
	if b.Config != nil && b.Config.Quantization != nil && b.Config.Quantization.Kind() != '{' {
		return fmt.Errorf("%s: %w: its quantization_config is no JSON object", filepath.Join(b.Path, checkpoint.ConfigName),
			ErrRefused)
	}
	// Tensors that become a GGUF file's have each been recognised as the model's, experts in MXFP4 too.
	if b.from.gguf == nil && (b.Quantize != "keep" || b.scheme != nil || b.Options.DType != 0) {
		if err := b.CheckReadable(); err != nil {
			return err
		}
	}
	if err := globs(b.Include).unmatched("include", b.from.Weights); err != nil {
		return err
	}
	if err := globs(b.Exclude).unmatched("exclude", b.from.Weights); err != nil {
		return err
	}
	return b.rule()
}

// jobs decides the way of every weight.
func (b *planner) jobs(ctx context.Context) ([]Job, error) {
	if b.from.gguf != nil {
		return b.targetJobs(ctx)
	}
	if err := b.dissolve(); err != nil {
		return nil, err
	}
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
		jobs = append(jobs, j)
	}
	jobs = b.withoutCalibration(jobs)
	if err := b.group(ctx, jobs); err != nil {
		return nil, err
	}
	if n, ok := b.scheme.(interface{ Notices() []string }); ok { // a scheme's own word on what it writes
		b.p.Notices = append(b.p.Notices, n.Notices()...)
	}
	if b.scheme != nil && len(b.quantised) == 0 {
		if b.Budget > 0 && b.p.Bits > 0 { // which a glob does not change
			return nil, fmt.Errorf("%s: %w: its weights have %.4f bits as they are, budget is %v, and nothing is left to be "+
				"quantised to %s", b.Path, ErrRefused, b.p.Bits, b.Budget,
				strings.Join(slices.Sorted(maps.Keys(b.types)), " or "))
		}
		err := fmt.Errorf("%s: %w: none of its %d tensors is one to be quantised to %s",
			b.Path, ErrRefused, len(b.from.Weights), strings.Join(slices.Sorted(maps.Keys(b.types)), " or "))
		if len(b.left) > 0 {
			return nil, fmt.Errorf("%w: %s %w", err, tensor.Quote(b.left[0]), b.leftWhy)
		}
		return nil, hint.With(err, hint.Hint{Option: "Include", Value: "GLOB", Effect: "chooses them by name"})
	}
	b.explain()
	return jobs, nil
}

// job decides the way of one weight.
func (b *planner) job(ctx context.Context, w *Weight) (Job, error) {
	typ := b.typeOf(w)
	if w.Decoder == nil && w.Encoding != (tensor.Encoding{}) && (typ != "" || w.Change != nil || b.Quantize == "none") {
		return Job{}, fmt.Errorf("%w: it is stored as %s, which no scheme that is known reads", ErrRefused,
			tensor.Quote(w.Encoding.Name))
	}
	if typ != "" && !fit(w) {
		b.unfit++
		typ = ""
	}
	if typ != "" {
		j, err := b.quantiseJob(ctx, w, typ)
		if !b.stays(w, err) {
			b.assign(w, b.types[typ].spec)
			if !j.Copy {
				b.changed = true
				if w.Decodes() {
					b.decoded++
				}
			}
			return j, err
		}
		if b.left = append(b.left, w.Name); len(b.left) == 1 {
			b.leftWhy = err
		}
	}
	if (b.Options.DType != 0 || b.Quantize == "none") && !w.DType.Numeric() && !w.DType.Integer() {
		b.uncast = append(b.uncast, w.Name)
	}
	if b.keeps(w) && b.scheme != nil {
		if err := b.keepBeside(w); err != nil {
			return Job{}, err
		}
	} else if b.scheme != nil && b.loaderMayExpect(w) {
		b.unquantised = append(b.unquantised, w)
	}
	j, err := b.unquantisedJob(ctx, w)
	if !j.Copy && j.Encode == nil && w.Decodes() {
		b.decoded++
		b.changed = true
	}
	return j, err
}

// keeps reports whether a weight that is quantised stays so where no type is chosen for it.
func (b *planner) keeps(w *Weight) bool {
	return w.Decoder != nil && b.Quantize == "keep" && b.holds(w) &&
		!slices.Contains(b.dissolved, w.Decoder.Spec().Type)
}

// unquantisedJob is the way of a weight for which no type is chosen.
func (b *planner) unquantisedJob(ctx context.Context, w *Weight) (Job, error) {
	to, keeps := b.castTo(w), b.keeps(w)
	switch {
	case w.Change != nil && keeps:
		spec := w.Decoder.Spec()
		scheme, err := b.Schemes.ForType(spec.Type)
		if err != nil {
			return Job{}, err
		}
		return encodeJob(ctx, w, w.DType, scheme, spec)
	case w.Change == nil && (w.Decoder == nil && to == w.Values && !w.Composed() || keeps):
		return copyJob(w), nil
	}
	return Job{Weight: w.Name, DType: to, RoundTrip: b.roundTrip(w),
		Outputs: []Output{{Info: tensor.Info{Name: w.Name, DType: to, Shape: w.Shape}}}}, nil
}

// stays reports whether a weight that a type cannot hold is left as it is: the programs of the type leave such ones,
// and nobody has named it.
func (b *planner) stays(w *Weight, err error) bool {
	return errors.Is(err, quant.ErrLeftPlain) && !b.named(w)
}

// fit reports whether a weight holds something to quantise.
func fit(w *Weight) bool { return w.Count() > 0 && !w.DType.Integer() }

// assign notes that a weight is in the scheme in the result, and how.
func (b *planner) assign(w *Weight, s quant.Spec) {
	b.quantised = append(b.quantised, w)
	b.assigned = append(b.assigned, quant.Assigned{Name: w.Name, Spec: s})
	if !w.Role.Quantized {
		b.extra = append(b.extra, w)
	}
}

// keepBeside assigns a weight that stays as it is quantised beside others that rules give types of a scheme: that has
// to be its own.
func (b *planner) keepBeside(w *Weight) error {
	spec := w.Decoder.Spec()
	scheme, err := b.Schemes.ForType(spec.Type)
	if err != nil {
		return err
	}
	if scheme.Name() != b.scheme.Name() {
		err := fmt.Errorf("%w: it is in %s of %s, and rules bring types of %s, where a checkpoint has one of them",
			ErrRefused, spec.Type, scheme.Name(), b.scheme.Name())
		return hint.With(err, hint.Hint{Option: "Quantize", Value: "none", Effect: "makes what no rule matches plain"})
	}
	b.assign(w, spec)
	return nil
}

// dissolve finds what cannot be written again as it was: types that are read only, of weights that are changed. As a
// config.json promises that all weights in a scheme are so, all of its types go.
func (b *planner) dissolve() error {
	for _, w := range b.from.Weights {
		if w.Change == nil || w.Decoder == nil || b.Quantize != "keep" {
			continue
		}
		typ := w.Decoder.Spec().Type
		scheme, err := b.Schemes.ForType(typ)
		if err != nil {
			return err
		}
		types := scheme.Types()
		if slices.Contains(b.dissolved, typ) ||
			!slices.ContainsFunc(types, func(t quant.Type) bool { return t.Name == typ && t.ReadOnly }) {
			continue
		}
		for _, t := range types {
			b.dissolved = append(b.dissolved, t.Name)
		}
		b.notice("%s is read only: what is merged is not written as %s again, and all weights in it are dequantised", typ,
			typ)
	}
	return nil
}

// holds reports whether the format that is written has a place for a weight as it is stored.
func (b *planner) holds(w *Weight) bool {
	return !slices.ContainsFunc(w.Parts, func(p formats.Tensor) bool { return b.format.Holds(p.Info) != nil })
}

// roundTrip is the quantisation that a plain weight goes through, and back, before anything is added to it,
// or nil. Weights that are not quantised, as an output head, were not so when the adapter was trained either.
func (b *planner) roundTrip(w *Weight) *quant.Spec {
	trained := func(w *Weight) bool {
		_, all := b.types[b.Quantize] // that are chosen
		return w.trained() && (!all && w.Role.Quantized || b.typeOf(w) != "")
	}
	if b.Options.RoundTrip == nil ||
		!trained(w) && !slices.ContainsFunc(w.pieces, func(p piece) bool { return trained(p.of) }) {
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

func (b *planner) quantiseJob(ctx context.Context, w *Weight, typ string) (Job, error) {
	if w.Role.Kind == models.Expert && len(w.Shape) > 2 && !b.named(w) && !b.loaderNamed(w) {
		return Job{}, fmt.Errorf("%w: its experts are stored as one tensor of shape %v, and per-expert needs one tensor an "+
			"expert; they can be kept as they are", ErrRefused, w.Shape)
	}
	to, t := b.castTo(w), b.types[typ]
	if w.Decoder != nil {
		have := w.Decoder.Spec()
		have.AllowNonFinite = t.spec.AllowNonFinite
		// A scheme that does not store what a weight was has nothing to cast.
		if w.Change == nil && have.Equal(t.spec) && (to == w.DType || w.Values != w.DType) {
			return copyJob(w), nil
		}
	}
	j, err := encodeJob(ctx, w, to, t.scheme, t.spec)
	if errors.Is(err, quant.ErrUnsupported) {
		err = hint.With(err, hint.Hint{Option: "Exclude", Value: "GLOB", Effect: "leaves it plain"})
	}
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
	t := tensor.Info{Name: w.Name, DType: j.DType, Shape: w.Shape}
	if j.flips(w) {
		t.Shape = w.Shape.Transposed()
	}
	return t
}

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
	if to == 0 || !w.DType.Numeric() || w.Calibration ||
		b.Origin() != nil && to == w.DType { // of a GGUF file it is what it was before
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
