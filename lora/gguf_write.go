package lora

import (
	"cmp"
	"fmt"
	"math"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/tensor"
)

// ggufTypes are those that a GGUF adapter is written in.
var ggufTypes = []gguf.Type{gguf.F32, gguf.F16, gguf.BF16, gguf.Q8_0}

// GGUFTypes lists what EncodeOptions.Type may be for a GGUF adapter.
func GGUFTypes() []string {
	var names []string
	for _, t := range ggufTypes {
		names = append(names, t.Name)
	}
	return names
}

// ggufWriter makes the tensors of a GGUF adapter.
type ggufWriter struct {
	*Adapter
	at    *gguf.Adapters
	typ   gguf.Type
	alpha float64
	// What has been placed, by the tensors of the base, in the order of the first module of each.
	order  []string
	places map[string]*ggufPlace
}

// ggufPlace are the modules for one tensor of the base: one, or all of a stack.
type ggufPlace struct {
	count   int64 // of a stack, else 0
	modules map[int64]*Module
	values  Output // of a tensor that is written whole
}

// encodeGGUF writes the file that llama.cpp loads beside a model.
func (a *Adapter) encodeGGUF(o EncodeOptions) (*Encoded, error) {
	if o.Base == nil {
		return nil, hint.With(fmt.Errorf("%w: a gguf adapter has the names of its base's GGUF file, and no base is given",
			ErrUnsupported), hint.Hint{Option: "Base", Value: "DIR", Effect: "names the folder of the base's config.json"})
	}
	w := &ggufWriter{Adapter: a, typ: gguf.F32, places: map[string]*ggufPlace{}}
	for _, t := range ggufTypes {
		if t.Name == o.Type {
			w.typ = t
		}
	}
	if o.Type != "" && w.typ.Name != o.Type {
		return nil, fmt.Errorf("%w: type %s; known are %s", ErrUnsupported, tensor.Quote(o.Type),
			choices(o.Type, GGUFTypes()))
	}
	var err error
	if w.at, err = o.Base.names(); err != nil {
		return nil, err
	}
	a.base, a.looked = nil, true // the base itself tells what the adapter's config may not
	if m, known := models.Load(o.Base.Config); known {
		a.base = m
	}
	if err := w.place(); err != nil {
		return nil, err
	}
	if w.alpha, err = w.commonAlpha(); err != nil {
		return nil, err
	}
	e := &Encoded{Format: "gguf"}
	if e.Metadata, err = w.keys(o); err != nil {
		return nil, err
	}
	for _, name := range w.order {
		out, err := w.outputs(name, w.places[name])
		if err != nil {
			return nil, err
		}
		e.Tensors = append(e.Tensors, out...)
	}
	if len(e.Tensors) == 0 {
		return nil, fmt.Errorf("%w: it has no factors", ErrUnsupported)
	}
	return e, nil
}

// place finds where each module is in GGUF.
func (w *ggufWriter) place() error {
	stacks, err := w.stacks()
	if err != nil {
		return err
	}
	of := map[*Module]stack{}
	for _, s := range stacks {
		of[s.Module] = s
	}
	modules, err := alone(w.Modules)
	if err != nil {
		return err
	}
	for i, m := range modules {
		if m.Base {
			continue // a copy of the base's own
		}
		if err := w.refused(m); err != nil {
			return err
		}
		s, stacked := of[w.Modules[i]]
		switch {
		case stacked:
			err = w.placeStack(s)
		case m.Experts > 0:
			err = w.placeSwitch(m)
		case m.Form == Replace:
			err = w.placeNorm(m)
		default:
			err = w.placeModule(m)
		}
		if t := cmp.Or(m.A.T, m.Value); err != nil {
			return w.failed(t, err)
		}
	}
	return nil
}

// otherMethod refuses an adapter of another method than LoRA, by the name of the first of its tensors. AdaLoRA's are
// the factors of LoRA but for a diagonal.
func (a *Adapter) otherMethod() error {
	if !a.Config.otherMethod() || a.Config.PeftType == adaLoRA {
		return nil
	}
	err := hint.With(fmt.Errorf("%w: %s has no place in a gguf adapter", ErrUnsupported, a.Config.PeftType), hint.Hint{
		Option: "To", Value: PEFT, Effect: "makes plain matrices of it, where there are such"})
	for i := range a.tensors {
		if t := &a.tensors[i]; strange(strings.Split(t.Name, ".")) {
			return a.failed(t, err)
		}
	}
	return a.named(err)
}

// refused says of a part that a GGUF adapter has no place for, by the name of its tensor, that it has none.
func (w *ggufWriter) refused(m *Module) error {
	t, what := m.Value, m.what()
	switch {
	case m.Magnitude != nil:
		t = m.Magnitude
	case m.Form == Linear, m.Form == Embedding, m.Form == Replace && m.Param == "weight" && len(m.Value.Shape) == 1:
		return nil
	case m.Form == Conv:
		t = m.A.T
	case m.Form == Replace && m.Param == "bias":
		what = "a trained bias"
	}
	if t == nil {
		return fmt.Errorf("module %s: %w: %s has no place in a gguf adapter", tensor.Quote(m.String()), ErrUnsupported, what)
	}
	return w.failed(t, fmt.Errorf("%w: %s has no place in a gguf adapter", ErrUnsupported, what))
}

// add takes up a module for a tensor of the base.
func (w *ggufWriter) add(name string, count, index int64, m *Module) error {
	p := w.places[name]
	if p == nil {
		p = &ggufPlace{count: count, modules: map[int64]*Module{}}
		w.places[name] = p
		w.order = append(w.order, name)
	}
	if p.modules[index] != nil || p.count != count {
		return fmt.Errorf("%w: it is for %s, which another module is for too", ErrMalformed, tensor.Quote(name))
	}
	p.modules[index] = m
	return nil
}

// placeModule places a module of one weight, which may be one of a stack.
func (w *ggufWriter) placeModule(m *Module) error {
	x := *m
	if m.Flat {
		return fmt.Errorf("%w: its name has underscores for dots, which only the base tells apart", ErrUnsupported)
	}
	rows := x.B.Rows
	if x.Form == Embedding {
		rows = x.A.Cols
	}
	list, err := w.at.Places(m.Name+".weight", rows)
	if err != nil {
		return err
	}
	if len(list) != 1 {
		return fmt.Errorf("%w: it is in %d tensors of a GGUF file, expected one", ErrUnsupported, len(list))
	}
	p := list[0]
	switch {
	case p.Tensor == ggufEmbedding && x.Form == Linear: // as a matrix (rows, width)
		x.Form, x.A, x.B = Embedding, x.B.Transposed(), x.A.Transposed()
	case p.Tensor == ggufEmbedding:
	case x.Form == Embedding:
		return fmt.Errorf("%w: an adapter of the embedding %s, of which llama.cpp has none but of %s", ErrUnsupported,
			p.Tensor, ggufEmbedding)
	}
	if s := w.at.Shape(p.Tensor); s != nil && (s[0] != rows || s[1] != x.width()) {
		return errShape(rows, x.width(), s)
	}
	if x.Form == Embedding {
		x.A = x.A.Transposed().chosen(p.Rows).Transposed()
	} else {
		x.B = x.B.chosen(p.Rows)
	}
	return w.add(p.Tensor, p.Count, p.Index, &x)
}

// placeStack places what PEFT has for a parameter that holds all experts.
func (w *ggufWriter) placeStack(s stack) error {
	for e := range s.experts {
		a, b := s.expert(e)
		list, err := w.at.Places(s.Name+"."+s.param, b.Rows)
		if err != nil {
			return err
		}
		for _, p := range list {
			x := *s.Module
			x.A, x.B, x.Experts = a, b.chosen(p.Rows), 0
			if err := w.add(p.Tensor, s.experts, e, &x); err != nil {
				return err
			}
		}
	}
	return nil
}

// placeSwitch places what MLX has for all experts.
func (w *ggufWriter) placeSwitch(m *Module) error {
	block, proj, ok := switchStack(m.Name)
	if !ok {
		return fmt.Errorf("%w: a stack of experts of that name", ErrUnsupported)
	}
	for e := range m.Experts {
		x := m.single(block, e, proj, strings.Contains(block, ".block_sparse_moe."))
		x.A, x.B = m.expert(e, m.Experts)
		if err := w.placeModule(x); err != nil {
			return err
		}
	}
	return nil
}

// placeNorm places a norm's weight, which takes the place of the base's.
func (w *ggufWriter) placeNorm(m *Module) error {
	list, err := w.at.Places(m.Name+"."+m.Param, m.Value.Shape[0])
	if err != nil {
		return err
	}
	for _, p := range list {
		if !strings.HasSuffix(p.Tensor, ggufNormEnding) {
			return fmt.Errorf("%w: %s has no place in a gguf adapter", ErrUnsupported, m.what())
		}
		if err := w.add(p.Tensor, p.Count, p.Index, m); err != nil {
			return err
		}
		out := asItIs(p.Tensor, m.Value)
		out.As = w.typ.Of(out.Info)
		w.places[p.Tensor].values = out
	}
	return nil
}

// commonAlpha is the alpha that is written: that of the config, else that of most modules. llama.cpp divides it by the
// rank of each tensor, and takes 0 for the rank.
func (w *ggufWriter) commonAlpha() (float64, error) {
	common := commonScales(w.Modules)
	alpha := common.alpha
	if w.Dialect == PEFT && w.Config.PeftType == plainLoRA {
		if alpha = w.Config.Alpha; w.Config.RSLoRA {
			alpha *= math.Sqrt(float64(w.Config.Rank))
		}
	}
	if alpha == 0 {
		alpha = float64(max(common.rank, 1)) // the factors are 0 instead
	}
	if f := float32(alpha); f == 0 || !finiteAlpha(alpha) {
		return 0, fmt.Errorf("%w: its alpha is %g, which float32 cannot hold", ErrUnsupported, alpha)
	}
	return alpha, nil
}

// factor is what lora_b is multiplied with, so that the alpha that is written gives the module's scaling.
func (w *ggufWriter) factor(m *Module) float64 {
	f := m.Scaling / (w.alpha / float64(m.Rank))
	if math.Abs(f-1) < 1e-12 { // the same, computed in another order
		return 1
	}
	return f
}

// outputs are the tensors of the modules for one tensor of the base.
func (w *ggufWriter) outputs(name string, p *ggufPlace) ([]Output, error) {
	if p.values.From.T != nil {
		return []Output{p.values}, nil
	}
	var out []Output
	if p.count == 0 {
		m := p.modules[0]
		a, b := m.A, m.B
		if m.Form == Embedding {
			a = a.Transposed()
		}
		out = []Output{output(name+ggufA, a, a.Rows, a.Cols), output(name+ggufB, b, b.Rows, b.Cols).scaled(w.factor(m))}
	} else {
		list, err := p.stack(name)
		if err != nil {
			return nil, err
		}
		rank := int64(list[0].Rank)
		out = mlxStack(name, list, rank, w.alpha/float64(rank))
	}
	for i := range out {
		out[i].As = w.typ.Of(out[i].Info)
	}
	return out, nil
}

// stack is all modules of a stack, with one rank.
func (p *ggufPlace) stack(name string) ([]*Module, error) {
	var list []*Module
	for e := range p.count {
		m := p.modules[e]
		if m == nil {
			return nil, fmt.Errorf("tensor %s: %w: found %d of %d experts, and not number %d; a stack has all of them",
				tensor.Quote(name), ErrUnsupported, len(p.modules), p.count, e)
		}
		list = append(list, m)
	}
	list, err := evenRanks(list)
	if err != nil {
		return nil, err
	}
	for _, m := range list[1:] {
		if x := list[0]; m.A.Cols != x.A.Cols || m.B.Rows != x.B.Rows || m.Rank != x.Rank {
			return nil, fmt.Errorf("module %s: %w: lora_A %v and lora_B %v, where the first expert has %v and %v; a stack has "+
				"one shape", tensor.Quote(m.Name), ErrUnsupported, m.A, m.B, x.A, x.B)
		}
	}
	return list, nil
}

// keys are all that llama.cpp's converter writes for an adapter.
func (w *ggufWriter) keys(o EncodeOptions) (formats.Metadata, error) {
	m := formats.Metadata{
		{Name: keyArchitecture, Value: w.at.Architecture()}, {Name: keyType, Value: ggufAdapter},
		{Name: keyAdapterType, Value: ggufLoRA}, {Name: keyAlpha, Value: float32(w.alpha)},
	}
	var said struct {
		TaskName   string         `json:"task_name"`
		Prefix     string         `json:"prompt_prefix"`
		Invocation jsontext.Value `json:"invocation_string"`
		ALoRA      jsontext.Value `json:"alora_invocation_string"`
	}
	if w.Config.raw != nil {
		if err := json.Unmarshal(w.Config.raw, &said); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, notConfig(w.Config.raw, err))
		}
	}
	if s := w.settings; s != nil {
		said.TaskName, said.Prefix = s.TaskName, s.PromptPrefix
	}
	texts := []formats.Pair{{Name: keyTaskName, Value: said.TaskName}, {Name: keyPrefix, Value: said.Prefix}}
	for i, given := range []string{o.TaskName, o.PromptPrefix} {
		if given != "" {
			texts[i].Value = given
		}
		if texts[i].Value != "" {
			m = append(m, texts[i])
		}
	}
	tokens := w.Config.Invocation
	if len(tokens) == 0 && (!empty(said.Invocation) || !empty(said.ALoRA)) {
		return nil, fmt.Errorf("%w: its config has an invocation_string, which only a tokenizer makes tokens of, and no "+
			"alora_invocation_tokens, expected these", ErrUnsupported)
	}
	if len(tokens) > 0 {
		var list []uint32
		for _, t := range tokens {
			if t < 0 || t > math.MaxUint32 {
				return nil, fmt.Errorf("%w: alora_invocation_tokens has %d, expected a token", ErrMalformed, t)
			}
			list = append(list, uint32(t))
		}
		m = append(m, formats.Pair{Name: keyInvocation, Value: list})
	}
	return append(m, formats.Pair{Name: keyVersion, Value: uint32(2)}), nil
}
