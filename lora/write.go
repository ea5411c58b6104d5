package lora

import (
	"fmt"
	"maps"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

// Trained is a module that was computed: A (rank x in) and B (out x rank), whose product B·A, times Scaling, is the
// delta. For an embedding A is rank x rows and B width x rank; for a convolution in counts the elements of its kernel.
type Trained struct {
	Name      string
	Component string // see Module
	Form      Form
	A, B      kernels.Mat
	Rank      int
	Scaling   float64 // 0 stands for 1
	Kernel    tensor.Shape
	Magnitude *formats.Tensor // of DoRA, kept from the adapter that it was made of
	Parameter bool            // see Module
	turned    bool            // see Module
	// Held of Energy, the squared norm of what is decomposed, is in A and B; of Resize.
	Held, Energy float64
}

// Module is t with its factors where they have been written: A and B by rows.
func (t Trained) Module(a, b *formats.Tensor) *Module {
	m := &Module{
		Name: t.Name, Component: t.Component, Param: "weight", Form: t.Form, A: matrixOf(a), B: matrixOf(b), Kernel: t.Kernel,
		Magnitude: t.Magnitude, Parameter: t.Parameter, turned: t.turned, Rank: t.Rank, Scaling: t.Scaling,
	}
	if m.Scaling == 0 {
		m.Scaling = 1
	}
	m.Alpha = m.Scaling * float64(m.Rank)
	return m
}

// New makes an adapter of modules, for PEFT: s says what does not follow from them. It has the path for messages.
func New(path string, s Settings, modules []*Module) *Adapter {
	a := &Adapter{Path: path, Modules: modules, settings: &s}
	if s.Like != nil {
		a.Config.Base, a.Config.Mapping = s.Like.Base, s.Like.Mapping
	} else {
		a.Config.Base = s.Base
	}
	if s.EnsureTie {
		tie(a.Modules)
	}
	a.sort()
	return a
}

// tie gives an output head the factors of the embedding that it is tied to, the other way round, as
// ensure_weight_tying has them. That is the one of the name that PEFT goes by, embed_tokens, else the only one of its
// size: an embedding of positions may have as many rows.
func tie(modules []*Module) {
	for _, h := range modules {
		if !h.isHead() {
			continue
		}
		var fitting []*Module
		for _, e := range modules {
			if e.Form == Embedding && h.B.Rows == e.A.Cols && h.A.Cols == e.B.Rows && h.A.Rows == e.A.Rows {
				fitting = append(fitting, e)
			}
		}
		at := slices.IndexFunc(fitting, func(e *Module) bool { _, name := cutLast(e.Name); return name == "embed_tokens" })
		if at < 0 && len(fitting) == 1 {
			at = 0
		}
		if at >= 0 {
			h.A, h.B = fitting[at].B.Transposed(), fitting[at].A.Transposed()
		}
	}
}

// isHead reports whether a module is an output head.
func (m *Module) isHead() bool {
	return m.Form == Linear && slices.Contains(heads, m.Name+"."+m.Param)
}

// DialectFor is the dialect in which an adapter that is made of a is written to a path: its own where that is one file
// and the path names one, else PEFT.
func (a *Adapter) DialectFor(path string) string {
	f, single := formats.Default.ForExtension(path)
	if single && f.Name() == "safetensors" && (a.Dialect == Kohya || a.Dialect == Diffusers) {
		return a.Dialect
	}
	return PEFT
}

// Output is a tensor to be written. Info has the type in which its values lie now.
type Output struct {
	tensor.Info
	From  Matrix
	Scale float64 // of the values; 1 leaves them as they are
	// As, where it has a name, is what the tensor is written as. Else that is Info, or with the type that all are cast to.
	As tensor.Info
}

// output is a tensor of the values of a matrix.
func output(name string, from Matrix, shape ...int64) Output {
	return Output{Info: tensor.Info{Name: name, DType: from.T.DType, Shape: shape}, From: from, Scale: 1}
}

// asItIs is a tensor under another name.
func asItIs(name string, t *formats.Tensor) Output {
	return Output{Info: tensor.Info{Name: name, DType: t.DType, Shape: t.Shape}, From: matrixOf(t), Scale: 1}
}

// scaled is a tensor whose values are multiplied, so that they no longer fit their type.
func (o Output) scaled(by float64) Output {
	if by != 1 {
		o.Scale, o.DType = by, tensor.F32
	}
	return o
}

// Stored returns the tensor whose values the output has, as they lie in its file; nil where they have to be
// made.
func (o Output) Stored() *formats.Tensor {
	if _, ok := o.From.T.Data.(computed); ok || o.Scale != 1 || !o.From.plain() {
		return nil
	}
	return o.From.T
}

// Writer makes the values of outputs, one after the other. Its zero value is ready; it keeps what it has read for
// those that follow.
type Writer struct{ read reader }

// Values makes the values of an output, by rows.
func (w *Writer) Values(o Output) ([]float32, error) {
	m, err := w.read.matrix(o.From)
	if err != nil {
		return nil, err
	}
	v := make([]float32, 0, m.Rows*m.Cols)
	for i := range m.Rows {
		if m.ColStride == 1 {
			v = append(v, m.Data[i*m.RowStride:i*m.RowStride+m.Cols]...)
			continue
		}
		for j := range m.Cols {
			v = append(v, m.Data[i*m.RowStride+j*m.ColStride])
		}
	}
	if o.Scale != 1 {
		for i := range v {
			v[i] *= float32(o.Scale)
		}
	}
	return v, checkFinite(&formats.Tensor{Info: o.Info, File: o.From.T.File}, v, 0)
}

// Encoded is an adapter in one of the Dialects, ready to be written.
type Encoded struct {
	Dialect string
	Format  string // of the file of tensors
	// File is the name of the file of tensors in a folder, beside an adapter_config.json with the bytes of
	// Config; empty where the adapter is that one file.
	File     string
	Config   []byte
	Tensors  []Output
	Metadata formats.Metadata
	Notices  []string
}

// EncodeOptions say how an adapter is written.
type EncodeOptions struct {
	To      string // one of Dialects; empty keeps that of the adapter
	Experts string // one of ExpertChoices; empty is "keep", what the dialect has
	// Of a GGUF adapter: Base is what it is for, Type one of GGUFTypes, where empty is f32. TaskName and PromptPrefix,
	// where not empty, are put in place of what the adapter says of itself.
	Base                         *Base
	Type, TaskName, PromptPrefix string
}

// Encode makes an adapter one of another dialect, with the same delta. Headers are read, and where experts are joined
// or split their factors. What a dialect has no place for is an error.
func (a *Adapter) Encode(o EncodeOptions) (*Encoded, error) {
	if o.To == "" {
		o.To = a.Dialect
	}
	if o.Experts == "" {
		o.Experts = keepExperts
	}
	if !slices.Contains(ExpertChoices(), o.Experts) {
		return nil, fmt.Errorf("%w: experts %s; known are %s", ErrUnsupported, tensor.Quote(o.Experts),
			choices(o.Experts, ExpertChoices()))
	}
	if err := a.placed(); err != nil {
		return nil, err
	}
	if err := a.Config.always(); err != nil && o.To != PEFT && o.To != GGUF {
		return nil, a.named(err)
	}
	if o.To == GGUF {
		if err := a.otherMethod(); err != nil {
			return nil, err
		}
	}
	if start := a.Config.Residual(); start != "" && (o.To != PEFT || a.Dialect == Diffusers) {
		return nil, fmt.Errorf("%s: %w: init_lora_weights is %s, whose deltas are for the base without the part it started "+
			"from, which only PEFT works out", a.Path, ErrUnsupported, tensor.Quote(start))
	}
	if a.Config.otherMethod() {
		var err error
		if a, err = a.asLoRA(); err != nil {
			return nil, err
		}
	}
	var e *Encoded
	var err error
	switch o.To {
	case PEFT:
		e, err = a.encodePEFT(o.Experts)
	case Kohya:
		e, err = a.encodeKohya(o.Experts)
	case Diffusers:
		e, err = a.encodeDiffusers(o.Experts)
	case MLX:
		e, err = a.encodeMLX(o.Experts)
	case LoRALib:
		e, err = a.encodeLoRALib(o.Experts)
	case GGUF:
		e, err = a.encodeGGUF(o)
	default:
		return nil, fmt.Errorf("%w: dialect %s; known are %s", ErrUnsupported, tensor.Quote(o.To), choices(o.To, Dialects()))
	}
	if err != nil {
		return nil, a.named(err)
	}
	e.Dialect = o.To
	e.Notices = append(slices.Clone(a.Notices), e.Notices...)
	other := o.To
	if o.To == MLX {
		other = a.Dialect
	}
	for _, m := range a.Modules {
		if m.Form == Embedding && !a.Config.EnsureTie && (a.Dialect == MLX) != (o.To == MLX) {
			e.Notices = append(e.Notices, fmt.Sprintf("%s: on a model whose output head is tied to it, an mlx adapter changes "+
				"the head too, a %s adapter the embedding alone", m.Name, other))
		}
	}
	return e, nil
}

// noPlace says that a dialect cannot hold a module, and what helps.
func noPlace(m *Module, what, dialect string, hints ...hint.Hint) error {
	err := fmt.Errorf("module %s: %w: %s has no place in a %s adapter",
		tensor.Quote(m.String()), ErrUnsupported, what, dialect)
	return hint.With(err, hints...)
}

// what names what is special about a module.
func (m *Module) what() string {
	switch {
	case m.Magnitude != nil:
		return "DoRA"
	case m.Form == Embedding:
		return "an embedding"
	case m.Form == Conv:
		return "a convolution"
	case m.Form == Bias:
		return "lora_bias"
	case m.Form == Replace:
		return "a replaced weight"
	case m.Form == Rows:
		return "trained rows of an embedding"
	case m.Form == Scale:
		return "a vector of IA3"
	case m.Form == Transformed:
		return "a transform of a weight"
	}
	return "a linear layer"
}

// scales are the rank, the alpha and the scaling that most modules have, and so the ones a dialect states
// for all.
type scales struct {
	rank    int
	alpha   float64
	scaling float64
}

// alpha is what gives the scaling by the rank.
func (m *Module) alpha() float64 {
	if m.Alpha/float64(m.Rank) == m.Scaling {
		return m.Alpha // and not what a division and a product leave of it
	}
	return m.Scaling * float64(m.Rank)
}

func commonScales(modules []*Module) scales {
	counts := map[scales]int{}
	var best scales
	for _, m := range modules {
		if m.A.T == nil {
			continue
		}
		s := scales{m.Rank, m.alpha(), m.Scaling}
		if counts[s]++; counts[s] > counts[best] {
			best = s
		}
	}
	return best
}

// adapted lists the names of the modules that have factors, each once.
func adapted(modules []*Module) []string {
	names := map[string]bool{}
	for _, m := range modules {
		if m.A.T != nil {
			names[m.Name] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}
