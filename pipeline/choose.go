package pipeline

import (
	"context"
	"fmt"
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
	dissolved   []string       // the types of schemes with changed weights that are read only: all are dequantised
}

func (b *planner) notice(format string, args ...any) {
	b.p.Notices = append(b.p.Notices, fmt.Sprintf(format, args...))
}

// check refuses what contradicts itself before anything is decided.
func (b *planner) check() error {
	if b.from.gguf == nil && b.Quantize != "keep" && b.Quantize != "none" {
		var err error
		if b.scheme, err = b.Schemes.ForType(b.Quantize); err != nil {
			if _, ok := fileType(b.Quantize); ok {
				err = fmt.Errorf("%s: %w: %s is a choice of types for the tensors of a model in a GGUF file", b.Path, ErrRefused,
					b.Quantize)
			}
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
	// Tensors that become a GGUF file's have each been recognised as the model's, experts in MXFP4 too.
	if b.from.gguf == nil && (b.Quantize != "keep" || b.Options.DType != 0) {
		if err := b.CheckReadable(); err != nil {
			return err
		}
	}
	if err := globs(b.Include).unmatched("include", b.from.Weights); err != nil {
		return err
	}
	return globs(b.Exclude).unmatched("exclude", b.from.Weights)
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
	if err := b.group(ctx, jobs); err != nil {
		return nil, err
	}
	if n, ok := b.scheme.(interface{ Notices() []string }); ok { // a scheme's own word on what it writes
		b.p.Notices = append(b.p.Notices, n.Notices()...)
	}
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
	keeps := w.Decoder != nil && b.Quantize == "keep" && b.holds(w) &&
		!slices.Contains(b.dissolved, w.Decoder.Spec().Type)
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
	case w.Decodes():
		b.decoded++
		b.changed = true
	}
	return Job{Weight: w.Name, DType: to, RoundTrip: b.roundTrip(w),
		Outputs: []Output{{Info: tensor.Info{Name: w.Name, DType: to, Shape: w.Shape}}}}, nil
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
		return w.trained() && (b.scheme == nil && w.Role.Quantized || b.scheme != nil && b.selected(w))
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
	}
	if w.Decodes() {
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
	if to == 0 || !w.DType.Numeric() || b.Origin() != nil && to == w.DType { // of a GGUF file it is what it was before
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
