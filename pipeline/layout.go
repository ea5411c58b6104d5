package pipeline

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/internal/nearest"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// maxShards is as many as are read back by default.
const maxShards = 10_000

// diffusersStem is what the files of diffusers' models begin with: it looks for no others.
const diffusersStem = "diffusion_pytorch_model"

// layOut places the jobs' outputs in shards.
func (b *planner) layOut(ctx context.Context, dst string, jobs []Job, claimed []formats.File) error {
	var params int64
	elements := make(map[string]int64, len(b.from.Weights))
	for _, w := range b.from.Weights {
		elements[w.Name] = w.Count()
	}
	b.p.Quantized += len(b.quantised)
	for i := range jobs {
		params += elements[jobs[i].Weight]
	}
	opts := formats.Options{MaxShardSize: b.MaxShardSize, MaxTensors: b.MaxTensors, Metadata: b.from.metadata(),
		Parameters: params, Files: claimed}
	if b.p.SingleFile {
		if b.MaxTensors > 0 {
			return fmt.Errorf("%s: %w: it is one file, and max tensors is for the files of a folder", dst, ErrRefused)
		}
		opts.SingleFile = filepath.Base(dst)
	}
	if slices.ContainsFunc(b.Files(), func(name string) bool { return strings.HasPrefix(name, diffusersStem) }) {
		opts.Stem = diffusersStem
	}
	if err := b.p.place(ctx, b.format, jobs, opts); err != nil {
		return fmt.Errorf("%s: the result: %w", b.Path, err)
	}
	if len(b.p.Shards) > maxShards {
		err := fmt.Errorf("%s: %w: the result would have %d shards, expected at most %d",
			b.Path, ErrRefused, len(b.p.Shards), maxShards)
		return hint.With(err, hint.Hint{Option: "MaxShardSize", Value: "SIZE", Effect: "makes fewer if it is larger"})
	}
	return nil
}

// place lays the jobs' outputs out in shards; those of a job, and of a group, stand in one.
func (p *Plan) place(ctx context.Context, f formats.Format, jobs []Job, o formats.Options) error {
	var infos []tensor.Info
	var owner []*Output
	var jobOf []int
	first := map[string]int{} // the first job of a group
	for i := range jobs {
		at := i
		if g := jobs[i].Group; g != "" {
			if f, ok := first[g]; ok {
				at = f
			}
			first[g] = at
		}
		for k := range jobs[i].Outputs {
			infos = append(infos, jobs[i].Outputs[k].Info)
			o.Groups = append(o.Groups, at)
			jobOf = append(jobOf, i)
			owner = append(owner, &jobs[i].Outputs[k])
		}
	}
	layout, err := f.Layout(ctx, infos, o)
	if err != nil {
		return err
	}
	p.Format, p.Files = f.Name(), layout.Extra
	p.Notices = append(p.Notices, layout.Notices...)
	names := map[string]bool{}
	for _, s := range layout.Shards {
		if names[s.Name] || !filepath.IsLocal(s.Name) {
			return fmt.Errorf("format %s: found the shard %s, expected one with a name of its own in the folder: %w", f.Name(),
				tensor.Quote(s.Name), formats.ErrMalformed)
		}
		names[s.Name] = true
		shard := Shard{Name: s.Name, Size: s.Size, Frame: s.Frame}
		var members []int
		for i, t := range s.Tensors {
			owner[t].Offset = s.Offsets[i]
			members = append(members, jobOf[t])
		}
		slices.Sort(members) // jobs in the order of the source
		for _, m := range slices.Compact(members) {
			shard.Jobs = append(shard.Jobs, jobs[m])
		}
		p.Shards = append(p.Shards, shard)
	}
	return p.checkStreamed(f, o.Metadata)
}

// quantizationConfig is where most look for how weights are quantised.
const quantizationConfig = "quantization_config"

// editedConfig is config.json with what the plan changes in it.
func (b *planner) editedConfig() ([]byte, error) {
	var edits []models.Edit
	if b.Options.DType != 0 {
		edits = append(edits, models.SetDType(b.Options.DType.Torch()))
	}
	edits = append(edits, b.from.edits()...)
	switch {
	case b.scheme == nil && (b.Quantize == "none" || len(b.dissolved) > 0):
		for _, key := range b.Config.QuantizationKeys {
			edits = append(edits, models.Remove(key))
		}
	case b.scheme != nil && b.changed:
		key, object, err := b.scheme.Config(b.assigned, b.skipped())
		if err != nil {
			return nil, err
		}
		for _, old := range b.Config.QuantizationKeys {
			if old != key && old != quantizationConfig {
				edits = append(edits, models.Remove(old))
			}
		}
		edits = append(edits, models.Set(key, object))
		if key != quantizationConfig {
			edits = append(edits, models.Set(quantizationConfig, object))
		}
	}
	return models.EditConfig(b.ConfigJSON, edits...)
}

// skipped is the list of modules that a loader must not expect to be quantised, nil where its own choice is what was
// done.
func (b *planner) skipped() []string {
	if b.Known {
		var plain []string
		for _, w := range b.unquantised {
			plain = append(plain, w.Modules()...)
		}
		extra := map[string]bool{}
		for _, w := range b.extra {
			if w.Role.Kind != models.Expert {
				for _, m := range w.Modules() {
					extra[m] = true
				}
			}
		}
		if b.kind().Experts == quant.ListedExperts {
			plain = append(plain, b.expertModules()...)
		}
		if len(plain)+len(extra) == 0 {
			return nil
		}
		// The list replaces the loader's choice, so it is never null here, and names all that stays plain.
		list := append([]string{}, b.Model.Skipped()...)
		listed := make(map[string]bool, len(list))
		for _, m := range list {
			listed[m] = true
		}
		for _, m := range append(plain, b.plainLinears()...) {
			if !listed[m] {
				listed[m] = true
				list = append(list, m)
			}
		}
		return slices.DeleteFunc(list, func(m string) bool { return extra[m] })
	}
	// The loader's choice is not known: name every matrix that stays.
	skip := []string{}
	for _, w := range b.plainMatrices() {
		if module, ok := strings.CutSuffix(w.Name, ".weight"); ok {
			skip = append(skip, module)
		}
	}
	return skip
}

// plainExperts lists the experts that are not quantised.
func (b *planner) plainExperts() []*Weight {
	quantised := make(map[*Weight]bool, len(b.extra))
	for _, w := range b.extra {
		quantised[w] = true
	}
	var plain []*Weight
	for _, w := range b.from.Weights {
		if w.Role.Kind == models.Expert && !quantised[w] {
			plain = append(plain, w)
		}
	}
	return plain
}

// expertModules names the modules of all experts of a layer that are not quantised, as the program has them, and as the
// file where that is another name.
func (b *planner) expertModules() []string {
	var names []string
	add := func(name string) {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, w := range b.plainExperts() {
		for _, s := range w.Role.Runtime {
			if at := strings.LastIndexByte(s.Param, '.'); at > 0 {
				add(s.Param[:at])
			}
			if at := strings.LastIndex(w.Name, fmt.Sprintf(".%d.", s.Expert)); at > 0 && s.Expert >= 0 {
				add(w.Name[:at])
			}
		}
	}
	return names
}

// plainLinears names the linear modules that are not quantised, but for those that a loader keeps in float32 whatever
// the list says.
func (b *planner) plainLinears() []string {
	var names []string
	for _, w := range b.plainMatrices() {
		if linear := w.Role.Kind == models.Linear || w.Role.Kind == models.Conv1D; linear && !w.Role.KeepFloat32 {
			names = append(names, w.Modules()...)
		}
	}
	return names
}

// plainMatrices lists what is two-dimensional and not quantised.
func (b *planner) plainMatrices() []*Weight {
	quantised := make(map[*Weight]bool, len(b.quantised))
	for _, w := range b.quantised {
		quantised[w] = true
	}
	var plain []*Weight
	for _, w := range b.from.Weights {
		if len(w.Shape) == 2 && !quantised[w] {
			plain = append(plain, w)
		}
	}
	return plain
}

// WritesGGUF reports whether a result is written with the names and keys of llama.cpp: whether ToGGUF is to make it.
func WritesGGUF(m *Merged, dst string, o Options) (bool, error) {
	b := planner{Checkpoint: m.Base, Options: o, from: m, p: &Plan{}}
	f, err := b.outputFormat(dst)
	return err == nil && f.Name() == gguf.Format, err
}

// outputFormat is the format that is written: the one that is asked for, that of dst's extension, or the source's.
func (b *planner) outputFormat(dst string) (formats.Format, error) {
	byName, single := b.Formats.ForExtension(dst)
	b.p.SingleFile = single
	if extensions := written(b.Formats); !single { // a folder of that name is not what was meant
		meant, near := nearest.To(filepath.Ext(dst), extensions)
		did := ""
		if near = near && len(meant) >= longExtension; near {
			did = nearest.Hint(meant)
		}
		if near || b.Formats.IsWeights(filepath.Base(dst)) {
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
	if b.Format.ReadOnly() || b.NamedByGGUF() || b.Origin() != nil { // a folder is a model of transformers
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
