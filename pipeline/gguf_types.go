package pipeline

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// target is what a weight of a GGUF file is written as: plain values of a type, or a type of a scheme.
type target struct {
	dtype tensor.DType
	typ   string
}

// chooseTypes says what each weight becomes. --quantize is the name of a file type, by whose rules llama.cpp gives each
// tensor a type, or of a block type, which all that are chosen get; a name of both is the file type, unless tensors are
// chosen by Include.
func (m *Merged) chooseTypes(o Options) error {
	m.gguf.targets = make([]target, len(m.Weights))
	file, isFile := fileType(o.Quantize)
	block, err := ggml.Parse(o.Quantize)
	switch {
	case err == nil && block.Valid() && (!isFile || len(o.Include) > 0):
		return m.byBlock(block, o)
	case isFile:
		return m.byFileType(file, o)
	case o.Quantize != "keep" && o.Quantize != "none":
		return fmt.Errorf("%w: a GGUF file has no %s, expected one of its own types, such as q4_k_m or q8_0", ErrRefused,
			tensor.Quote(o.Quantize))
	case o.DType == 0:
		return m.asTheyAre(o)
	}
	return m.asPlain(o)
}

// asPlain gives the weights that do not stay in blocks the type of a file of plain values.
func (m *Merged) asPlain(o Options) error {
	base, err := plainType(o.DType)
	if err != nil {
		return err
	}
	stay := 0
	for i, w := range m.Weights {
		t, ok := m.stays(w, o)
		if !ok {
			t = plain(base.Of(w.Info))
		} else {
			stay++
		}
		m.gguf.targets[i] = t
	}
	if stay == 0 || !m.gguf.own {
		m.setFileType(base.FileType)
	} else {
		m.Notices = append(slices.Clone(m.Notices), fmt.Sprintf("left in blocks, whatever the dtype: %s; quantize none "+
			"dequantises them", plural(stay, "weight")))
	}
	return nil
}

// FileTypes lists the names of the file types of GGUF that can be asked for.
func FileTypes() []string {
	var names []string
	for _, f := range ggml.FileTypes() {
		if _, ok := fileType(f.String()); ok {
			names = append(names, f.String())
		}
	}
	return names
}

// fileType finds a file type by its name; those without blocks are asked for by --dtype.
func fileType(name string) (ggml.FileType, bool) {
	for _, f := range ggml.FileTypes() {
		if f.String() == name && f != ggml.FileF32 && f != ggml.FileF16 && f != ggml.FileBF16 {
			return f, true
		}
	}
	return 0, false
}

// plainType is the type of a file of plain values.
func plainType(d tensor.DType) (gguf.Type, error) {
	for _, t := range []gguf.Type{gguf.F32, gguf.F16, gguf.BF16} {
		if t.DType == d {
			return t, nil
		}
	}
	return gguf.Type{}, fmt.Errorf("%w: found the type %v, expected F32, F16 or BF16, as models in GGUF have them",
		ErrRefused, d)
}

// plain is the target of a tensor that has its type.
func plain(t tensor.Info) target { return target{dtype: t.DType, typ: t.Encoding.Name} }

// stays reports whether a weight is in blocks of GGUF's and is to stay so, and as what.
func (m *Merged) stays(w *Weight, o Options) (target, bool) {
	s := w.stored()
	if s.Decoder == nil {
		return target{typ: s.Encoding.Name}, s.Encoding != (tensor.Encoding{})
	}
	typ := s.Decoder.Spec().Type
	if t, err := ggml.Parse(typ); err != nil || t.Unique() != typ || o.Quantize == "none" {
		return target{}, false
	}
	return target{typ: typ}, true
}

// asTheyAre keeps the types that weights have: of a model of transformers what llama.cpp wants in F32 becomes that.
func (m *Merged) asTheyAre(o Options) error {
	elements := map[tensor.DType]int64{}
	for i, w := range m.Weights {
		t, ok := m.stays(w, o)
		if !ok {
			d := w.stored().DType
			switch {
			case m.gguf.own && w.stored().Decoder != nil:
				d = tensor.F32 // nothing is lost; what it was before it was quantised is not known
			case !m.gguf.own && d == tensor.F64:
				d = tensor.F32
			}
			t = target{dtype: d}
			if base, err := plainType(d); err == nil {
				if !m.gguf.own {
					t = plain(base.Of(w.Info))
				}
				if t.dtype == d && len(w.Shape) > 1 {
					elements[d] += w.Count()
				}
			} else if !m.gguf.own {
				return fmt.Errorf("tensor %s: %w", tensor.Quote(w.Name), err)
			}
		}
		m.gguf.targets[i] = t
	}
	if m.gguf.own && o.Quantize == "keep" {
		return nil
	}
	most := tensor.F32
	for _, d := range []tensor.DType{tensor.F16, tensor.BF16} {
		if elements[d] > elements[most] {
			most = d
		}
	}
	base, err := plainType(most)
	m.setFileType(base.FileType)
	return err
}

// setFileType notes what the file is as a whole, but that of experts in MXFP4 it is MXFP4_MOE.
func (m *Merged) setFileType(n uint32) {
	for i, w := range m.Weights {
		if m.gguf.targets[i].typ == "mxfp4" && w.Decoder == nil && n != gguf.Q8_0.FileType {
			n = uint32(ggml.FileMXFP4)
		}
	}
	m.gguf.keys = gguf.SetFileType(m.gguf.keys, n)
}

// byFileType gives each weight the type that llama.cpp gives it: its converter, for a model of transformers to q8_0,
// else llama-quantize.
func (m *Merged) byFileType(f ggml.FileType, o Options) error {
	types := make([]ggml.Type, len(m.Weights))
	if m.gguf.own || f != ggml.FileQ8_0 {
		tensors := make([]ggml.Tensor, len(m.Weights))
		for i, w := range m.Weights {
			tensors[i] = ggml.Tensor{Name: w.Name, Shape: w.Shape}
		}
		model, err := modelOf(m)
		if err != nil {
			return err
		}
		if types, err = ggml.TypeOf(f, tensors, model); err != nil {
			if errors.Is(err, ggml.ErrImportance) {
				return fmt.Errorf("%w: %w", ErrRefused, err)
			}
			return err
		}
	}
	for i, w := range m.Weights {
		switch t := types[i]; {
		case len(o.Include) > 0 && !m.matches(w, o.Include), m.matches(w, o.Exclude):
			m.gguf.targets[i] = m.unquantised(w, o)
		case w.Decoder == nil && w.Encoding != (tensor.Encoding{}):
			m.gguf.targets[i] = target{typ: w.Encoding.Name}
		case !m.gguf.own && f == ggml.FileQ8_0:
			m.gguf.targets[i] = plain(gguf.Q8_0.Of(w.Info))
		case t == ggml.Keep:
			m.gguf.targets[i] = m.unquantised(w, o)
		case t == ggml.F16: // of rows that are no whole blocks
			m.gguf.targets[i] = target{dtype: tensor.F16}
		default:
			m.gguf.targets[i] = target{typ: t.Encoding().Name}
		}
	}
	m.setFileType(uint32(f))
	return nil
}

// unquantised is the target of a weight that no type is chosen for.
func (m *Merged) unquantised(w *Weight, o Options) target {
	if t, ok := m.stays(w, o); ok {
		return t
	}
	d := cmp.Or(o.DType, w.stored().DType)
	if w.stored().Decoder != nil && m.gguf.own {
		d = cmp.Or(o.DType, tensor.F32)
	}
	base, err := plainType(d)
	if err != nil || m.gguf.own && o.DType == 0 {
		return target{dtype: d}
	}
	return plain(base.Of(w.Info))
}

// byBlock gives the weights that are chosen exactly one type.
func (m *Merged) byBlock(block ggml.Type, o Options) error {
	for i, w := range m.Weights {
		chosen := m.matches(w, o.Include)
		if len(o.Include) == 0 {
			chosen = ggml.Quantised(ggml.Tensor{Name: w.Name, Shape: w.Shape})
		}
		if chosen && !m.matches(w, o.Exclude) {
			m.gguf.targets[i] = target{typ: block.Encoding().Name}
		} else {
			m.gguf.targets[i] = m.unquantised(w, o)
		}
	}
	if f, ok := ggml.FileOf(block); ok {
		m.setFileType(uint32(f))
	}
	return nil
}

// matches reports whether a glob matches a weight: its name in the file, or that of a weight that it is made of.
func (m *Merged) matches(w *Weight, list []string) bool {
	return globs(list).match(w.Name) || slices.ContainsFunc(w.made, globs(list).match)
}

// modelOf is what the choice of types has to know, by the keys.
func modelOf(m *Merged) (ggml.Model, error) {
	k := m.gguf.keys
	model := ggml.Model{Architecture: gguf.Architecture(k)}
	for name, to := range map[string]*int{
		"block_count": &model.Blocks, "attention.head_count": &model.Heads, "attention.head_count_kv": &model.KVHeads,
		"expert_count": &model.Experts,
	} {
		n, ok, err := gguf.Count(k, model.Architecture+"."+name)
		if err != nil {
			return model, err
		}
		if ok {
			*to = n
		} else if name == "attention.head_count_kv" {
			model.KVHeads = -1
		}
	}
	if model.KVHeads < 0 { // as many as there are heads
		model.KVHeads = model.Heads
	}
	return model, nil
}

// targetJobs are the jobs of a GGUF file.
func (b *planner) targetJobs(ctx context.Context) ([]Job, error) {
	var jobs []Job
	again := 0
	for i, w := range b.from.Weights {
		if ctx.Err() != nil {
			return nil, ErrInterrupted
		}
		t := b.from.gguf.targets[i]
		if types := b.ruled[w]; types != nil {
			t = b.targetFor(w, types[0])
		}
		j, err := b.targetJob(ctx, w, t)
		if err != nil {
			return nil, w.Failed(err)
		}
		if w.Decodes() && !j.Copy {
			b.decoded++
			if j.Encode != nil {
				again++
			}
		}
		if j.Encode != nil || j.Copy && j.DType == 0 {
			b.p.Quantized++
		}
		jobs = append(jobs, j)
	}
	groupParts(b.from.Weights, jobs)
	if again > 0 {
		b.notice("quantised again, which loses more than once from full precision: %s", plural(again, "weight"))
	} else if b.decoded > 0 {
		b.notice("dequantised: %s", plural(b.decoded, "weight"))
	}
	return jobs, nil
}

// targetFor is the target of a weight for which a rule has decided.
func (b *planner) targetFor(w *Weight, typ string) target {
	if block, err := ggml.Parse(typ); err == nil {
		return target{typ: block.Encoding().Name}
	}
	return b.from.unquantised(w, b.Options) // keep
}

// groupParts has the jobs that have parts of one changed weight stand in one shard, where what is kept of an adapter in
// it can be measured.
func groupParts(weights []*Weight, jobs []Job) {
	first := map[*Weight]int{}
	for i := range jobs {
		for _, p := range weights[i].pieces {
			k, ok := first[p.of]
			if !ok {
				first[p.of] = i
				continue
			}
			jobs[k].Group = cmp.Or(jobs[k].Group, jobs[k].Weight)
			jobs[i].Group = jobs[k].Group
		}
	}
}

// targetJob is the job of one weight.
func (b *planner) targetJob(ctx context.Context, w *Weight, t target) (Job, error) {
	changed := w.changed()
	if t.typ == "" {
		if !t.dtype.Numeric() && t.dtype != w.Values {
			return Job{}, fmt.Errorf("%w: found the type %v, which is not cast to %v", ErrRefused, w.DType, t.dtype)
		}
		if !changed && w.Decoder == nil && w.Values == t.dtype && !w.Composed() {
			return copyJob(w), nil
		}
		if !w.Values.Numeric() {
			return Job{}, fmt.Errorf("%w: found the type %v, expected numbers that can be cast to %v", ErrRefused, w.DType,
				t.dtype)
		}
		return Job{Weight: w.Name, DType: t.dtype, RoundTrip: b.roundTrip(w),
			Outputs: []Output{{Info: tensor.Info{Name: w.Name, DType: t.dtype, Shape: w.Shape}}}}, nil
	}
	if !changed && w.Decoder == nil && w.Encoding.Name == t.typ {
		return copiedBlocks(w), nil
	}
	typ, err := ggml.Parse(t.typ)
	if err != nil {
		return Job{}, fmt.Errorf("%w: it is stored as %s, which is not known", ErrRefused, tensor.Quote(t.typ))
	}
	name := typ.Unique()
	scheme, err := b.Schemes.ForType(name)
	if err != nil {
		return Job{}, err
	}
	if !changed && w.Decoder != nil && w.Decoder.Spec().Type == name {
		return copiedBlocks(w), nil
	}
	if typ.ReadOnly() {
		err := fmt.Errorf("%w: it is %v, which is not written without an importance matrix", ErrRefused, typ)
		return Job{}, hint.With(err, hint.Hint{Option: "Quantize", Value: "q4_k_m", Effect: "writes types that are"})
	}
	spec, err := scheme.Spec(name, quant.Params{{Name: "validated", Value: true}})
	if err != nil {
		return Job{}, err
	}
	spec.AllowNonFinite = b.AllowNonFinite
	to := tensor.F32
	if !changed && w.Values.Float() {
		to = w.Values
	}
	j := Job{Weight: w.Name, DType: to, Encode: &spec, RoundTrip: b.roundTrip(w)}
	return j, j.place(ctx, scheme, w)
}

// copiedBlocks is the job of a weight whose blocks stay as they are.
func copiedBlocks(w *Weight) Job {
	j := copyJob(w)
	j.DType = 0
	return j
}
