package lora

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/tensor"
)

// A GGUF adapter (llama.cpp) holds, for a tensor of its base's GGUF file, that tensor's name with .lora_a (rank, in)
// and .lora_b (out, rank) behind it; of the embedding (rows, rank) and (width, rank); of a stack of experts (experts,
// rank, in) and (experts, out, rank). One alpha, by the rank of each pair, is the factor of its delta. Names, and the
// order of the rows of lora_b, are those of the base's GGUF file, which only the base's config tells from those of the
// model.

// Base is what is known of the checkpoint that an adapter is for.
type Base struct {
	Path   string // as the adapter's config is to have it
	Config *models.Config
	// Tensors are those of its files, quantised ones as they would be plain; nil where only the config is at hand.
	Tensors []tensor.Info
	// Vocabulary says how many rows of its embedding have tokens, which is asked where the GGUF file of an architecture
	// has these alone; nil where it has all.
	Vocabulary func(architecture string) (int64, error)
}

// names are those of the base in GGUF.
func (b *Base) names() (*gguf.Adapters, error) {
	at, err := gguf.NewAdapters(b.Config, b.Tensors, b.Vocabulary)
	if err != nil && b.Path != "" {
		err = fmt.Errorf("%s: %w", b.Path, err)
	}
	return at, err
}

// What keys of a GGUF adapter are called, and the values that some have.
const (
	keyArchitecture = "general.architecture"
	keyType         = "general.type"
	keyVersion      = "general.quantization_version"
	keyAdapterType  = "adapter.type"
	keyAlpha        = "adapter.lora.alpha"
	keyTaskName     = "adapter.lora.task_name"
	keyPrefix       = "adapter.lora.prompt_prefix"
	keyInvocation   = "adapter.alora.invocation_tokens"
	ggufAdapter     = "adapter"
	ggufLoRA        = "lora"
	controlVector   = "controlvector"

	ggufA, ggufB   = ".lora_a", ".lora_b"
	ggufEmbedding  = "token_embd.weight"
	ggufHead       = "output.weight"
	ggufNormEnding = "_norm.weight"
)

// isGGUF reports whether metadata are those of an adapter of llama.cpp: a LoRA, or what else it has that goes with a
// model and is none.
func isGGUF(m formats.Metadata) bool {
	return m.Get(keyType) == ggufAdapter || m.Get(keyAdapterType) != nil || m.Get(keyArchitecture) == controlVector
}

// readGGUF makes modules of the tensors of a GGUF file. Without a base they keep the names that they have there.
func (a *Adapter) readGGUF(m formats.Metadata, base *Base) error {
	var at *gguf.Adapters
	if err := a.checkGGUF(m); err != nil {
		return err
	}
	if base != nil {
		var err error
		if at, err = base.names(); err != nil {
			return err
		}
		if has := m.Get(keyArchitecture); has != at.Architecture() {
			return a.keyError(keyArchitecture, fmt.Errorf("%w: found %s, expected %s as its base has it", ErrBase,
				tensor.Quote(fmt.Sprint(has)), at.Architecture()))
		}
		a.Config.Base = base.Path
	}
	a.foreign = base == nil
	alpha, err := a.ggufAlpha(m)
	if err != nil {
		return err
	}
	for i := range a.tensors {
		if err := a.unpacked(&a.tensors[i]); err != nil {
			return err
		}
	}
	s := &Settings{Base: a.Config.Base}
	a.settings = s
	if err := a.ggufTexts(m, s); err != nil {
		return err
	}
	type pair struct{ a, b *formats.Tensor }
	pairs := map[string]pair{}
	for i := range a.tensors {
		t := &a.tensors[i]
		if name, ok := strings.CutSuffix(t.Name, ggufA); ok {
			pairs[name] = pair{t, pairs[name].b}
		} else if name, ok := strings.CutSuffix(t.Name, ggufB); ok {
			pairs[name] = pair{pairs[name].a, t}
		} else if err := a.ggufValue(t, at); err != nil {
			return a.failed(t, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(pairs)) {
		p := pairs[name]
		if p.a == nil || p.b == nil {
			has, lacks := p.a, ggufB
			if has == nil {
				has, lacks = p.b, ggufA
			}
			return a.failed(has, fmt.Errorf("%w: found no %s beside it", ErrMalformed, tensor.Quote(name+lacks)))
		}
		for _, t := range []*formats.Tensor{p.a, p.b} {
			if !t.DType.Float() && t.DType != tensor.F64 {
				return a.failed(t, wrongType(t))
			}
		}
		list, turned, err := ggufModules(name, p.a, p.b, at)
		if err != nil {
			return a.failed(p.b, err)
		}
		s.FanInFanOut = s.FanInFanOut || turned
		for _, x := range list {
			x.Alpha = alpha
			if alpha == 0 { // llama.cpp does not scale then
				x.Alpha = float64(x.Rank)
			}
			x.Scaling = x.Alpha / float64(x.Rank)
		}
		a.Modules = append(a.Modules, list...)
	}
	return nil
}

// checkGGUF refuses what is no LoRA adapter.
func (a *Adapter) checkGGUF(m formats.Metadata) error {
	const control = "it is a control vector, which adds to activations and to no weight"
	for _, k := range []struct {
		name, want string
	}{{keyType, ggufAdapter}, {keyAdapterType, ggufLoRA}} {
		switch v := m.Get(k.name); {
		case v == k.want:
		case m.Get(keyArchitecture) == controlVector || v == "control_vector":
			return fmt.Errorf("%s: %w: %s", a.Path, ErrUnsupported, control)
		case v == nil:
			return a.keyError(k.name, fmt.Errorf("%w: found none, expected %s", ErrMalformed, k.want))
		default:
			return a.keyError(k.name, fmt.Errorf("%w: found %s, expected %s", ErrUnsupported, tensor.Quote(fmt.Sprint(v)),
				k.want))
		}
	}
	if name, ok := m.Get(keyArchitecture).(string); !ok || name == "" {
		return a.keyError(keyArchitecture, fmt.Errorf("%w: found none, expected the name of an architecture", ErrMalformed))
	}
	return nil
}

func (a *Adapter) keyError(name string, err error) error {
	return fmt.Errorf("%s: key %s: %w", a.Path, tensor.Quote(name), err)
}

// ggufAlpha is the alpha of all modules, 0 where the file has none: then llama.cpp does not scale.
func (a *Adapter) ggufAlpha(m formats.Metadata) (float64, error) {
	switch v := m.Get(keyAlpha).(type) {
	case nil:
		a.Notices = append(a.Notices, fmt.Sprintf("%s: found no %s: the deltas are not scaled, as llama.cpp has it", a.Path,
			keyAlpha))
		return 0, nil
	case float32:
		// The shortest number that is the same float32, as it was given to whoever wrote it.
		alpha, err := strconv.ParseFloat(strconv.FormatFloat(float64(v), 'g', -1, 32), 64)
		if err != nil || v-v != 0 {
			return 0, a.keyError(keyAlpha, fmt.Errorf("%w: found %v, expected a finite number", ErrMalformed, v))
		}
		return alpha, nil
	default:
		return 0, a.keyError(keyAlpha, fmt.Errorf("%w: found a %T, expected a float32", ErrMalformed, v))
	}
}

// ggufTexts keeps what else an adapter says of itself.
func (a *Adapter) ggufTexts(m formats.Metadata, s *Settings) error {
	for key, to := range map[string]*string{keyTaskName: &s.TaskName, keyPrefix: &s.PromptPrefix} {
		v := m.Get(key)
		text, ok := v.(string)
		if v != nil && !ok {
			return a.keyError(key, fmt.Errorf("%w: found a %T, expected a string", ErrMalformed, v))
		}
		*to = text
	}
	v := m.Get(keyInvocation)
	tokens, ok := v.([]uint32)
	if v != nil && !ok {
		return a.keyError(keyInvocation, fmt.Errorf("%w: found a %T, expected uint32 numbers", ErrMalformed, v))
	}
	for _, t := range tokens {
		s.Invocation = append(s.Invocation, int64(t))
	}
	a.Config.Invocation = s.Invocation
	return nil
}

// unpacked makes numbers in blocks of ggml plain ones.
func (a *Adapter) unpacked(t *formats.Tensor) error {
	if t.Encoding == (tensor.Encoding{}) {
		return nil
	}
	typ, err := ggml.Parse(t.Encoding.Name)
	if err != nil || typ.Encoding() != t.Encoding || len(t.Shape) == 0 ||
		t.Shape[len(t.Shape)-1]%int64(typ.Elements()) != 0 {
		return a.failed(t, fmt.Errorf("%w: found the type %s, expected one of ggml's", ErrUnsupported, t.Encoding))
	}
	packed := *t
	*t = *computedTensor(&packed, func() ([]float32, error) {
		b := make([]byte, packed.Bytes)
		if _, err := packed.ReadAt(b, 0); err != nil {
			return nil, err
		}
		v := make([]float32, packed.Count())
		if bad := typ.Dequantize(v, b); bad >= 0 {
			return nil, a.failed(&packed, fmt.Errorf("%w: found a scale that is a NaN or an infinity in block %d of %v",
				ErrMalformed, bad, typ))
		}
		return v, nil
	}, packed.Shape...)
	return nil
}

// ggufValue takes up a tensor that is no factor: a norm, as mergekit leaves them in adapters.
func (a *Adapter) ggufValue(t *formats.Tensor, at *gguf.Adapters) error {
	if !strings.HasSuffix(t.Name, ggufNormEnding) || len(t.Shape) != 1 || t.Shape[0] < 1 {
		return fmt.Errorf("%w: found it with the shape %v, expected names that end in %s or %s, or norms", ErrUnsupported,
			t.Shape, ggufA, ggufB)
	}
	parameter := t.Name
	if at != nil {
		p, err := at.Parameter(t.Name, 0, t.Shape[0])
		if err != nil {
			return err
		}
		parameter = p.Names[0]
	}
	name, param := cutLast(parameter)
	a.Modules = append(a.Modules, &Module{Name: name, Param: param, Form: Replace, Value: t})
	return nil
}

// ggufModules makes modules of the factors for a tensor of the base: one, or one for each of a stack. turned is whether
// the checkpoint has the weight the other way round.
func ggufModules(name string, ta, tb *formats.Tensor, at *gguf.Adapters) (list []*Module, turned bool, err error) {
	bad := fmt.Errorf("%w: found lora_a with the shape %v and lora_b %v, expected (rank, in) and (out, rank), or "+
		"(experts, rank, in) and (experts, out, rank)", ErrMalformed, ta.Shape, tb.Shape)
	n := len(ta.Shape)
	if n < 2 || n > 3 || len(tb.Shape) != n || slices.Contains(ta.Shape, 0) || slices.Contains(tb.Shape, 0) {
		return nil, false, bad
	}
	m := &Module{Name: strings.TrimSuffix(name, ".weight"), Param: "weight"}
	if m.Name == "" {
		return nil, false, fmt.Errorf("%w: no tensor of the base is named", ErrMalformed)
	}
	count := int64(0)
	out, r := tb.Shape[n-2], tb.Shape[n-1]
	if r > largestRank {
		return nil, false, fmt.Errorf("%w: found the rank %d, expected at most %d", ErrMalformed, r, largestRank)
	}
	switch m.Rank = int(r); {
	case name == ggufEmbedding:
		if n != 2 || ta.Shape[1] != r {
			return nil, false, fmt.Errorf("%w: found lora_a with the shape %v and lora_b %v, expected (rows, rank) and (width, "+
				"rank) of an embedding", ErrMalformed, ta.Shape, tb.Shape)
		}
		m.Form, m.A, m.B, out = Embedding, matrixOf(ta).Transposed(), matrixOf(tb), ta.Shape[0]
	case n == 2 && ta.Shape[0] == r:
		m.A, m.B = matrixOf(ta), matrixOf(tb)
	case n == 3 && ta.Shape[1] == r && ta.Shape[0] == tb.Shape[0]:
		if count = ta.Shape[0]; count > mostExperts {
			return nil, false, fmt.Errorf("%w: found a stack of %d, expected at most %d", ErrMalformed, count, mostExperts)
		}
		in := ta.Shape[2]
		m.Experts, m.Order = count, Apart
		m.A = Matrix{T: ta, RowStride: in, ColStride: 1, Rows: count * r, Cols: in}
		m.B = Matrix{T: tb, RowStride: r, ColStride: 1, Rows: out, Cols: count * r}
	default:
		return nil, false, bad
	}
	if at == nil {
		return []*Module{m}, false, nil
	}
	p, err := at.Parameter(name, count, out)
	if err != nil {
		return nil, false, err
	}
	if p.Height > out && m.Form == Embedding { // rows without tokens stay as they are
		if p.Height > mostPadded/r {
			return nil, false, fmt.Errorf("%w: found the rank %d for an embedding of %d rows", ErrUnsupported, r, p.Height)
		}
		out, m.A = p.Height, padded(m.A.Transposed(), p.Height).Transposed()
	}
	if s := at.Shape(name); s != nil && count == 0 && (s[0] != out || s[1] != m.width()) {
		return nil, false, errShape(out, m.width(), s)
	}
	for e, parameter := range p.Names {
		x := *m
		if count > 0 {
			x.A, x.B = m.expert(int64(e), count)
			x.Experts, x.Order = 0, RankMajor
		}
		if x.Form != Embedding {
			x.B = x.B.chosen(p.Rows)
		}
		x.Name, x.Param = cutLast(parameter)
		list = append(list, &x)
	}
	return list, p.Turned, nil
}

// width is that of the matrix that a module is for.
func (m *Module) width() int64 {
	if m.Form == Embedding {
		return m.B.Rows
	}
	return m.A.Cols
}

func errShape(rows, cols int64, base tensor.Shape) error {
	return fmt.Errorf("%w: its factors are for a matrix of %d x %d, and the base has %d x %d", ErrBase, rows, cols,
		base[0], base[1])
}

// chosen is the matrix of some rows of another, in the order of their numbers; nil are all.
func (m Matrix) chosen(rows []int64) Matrix {
	if rows == nil {
		return m
	}
	step := int64(1)
	if len(rows) > 1 {
		step = rows[1] - rows[0]
	}
	even := step > 0
	for i := 1; i < len(rows) && even; i++ {
		even = rows[i]-rows[i-1] == step
	}
	if even {
		m.Offset += rows[0] * m.RowStride
		m.RowStride *= step
		m.Rows = int64(len(rows))
		return m
	}
	return matrixOf(computedTensor(m.T, func() ([]float32, error) {
		x, err := m.Read()
		if err != nil {
			return nil, err
		}
		v := make([]float32, 0, len(rows)*x.Cols)
		for _, i := range rows {
			for j := range x.Cols {
				v = append(v, x.Data[int(i)*x.RowStride+j*x.ColStride])
			}
		}
		return v, nil
	}, int64(len(rows)), m.Cols))
}

// errForeign says that a GGUF adapter has been opened without its base.
var errForeign = errors.New("its modules are named as llama.cpp names them, and only the config.json of its base " +
	"tells what they are")

// placed refuses an adapter whose modules have the names of GGUF.
func (a *Adapter) placed() error {
	if !a.foreign {
		return nil
	}
	return hint.With(fmt.Errorf("%s: %w: %w", a.Path, ErrUnsupported, errForeign), hint.Hint{Function: "Convert",
		Option: "Base", Value: "DIR", Effect: "makes a PEFT folder of it"})
}

// always refuses an adapter that is for the tokens behind some others alone, where its deltas would count for all.
func (c *Config) always() error {
	if len(c.Invocation) == 0 {
		return nil
	}
	return fmt.Errorf("%w: alora_invocation_tokens is set, which changes what the adapter computes: its deltas are for "+
		"the tokens behind those alone", ErrUnsupported)
}

// finiteAlpha reports whether float32 holds an alpha.
func finiteAlpha(alpha float64) bool { f := float32(alpha); return f-f == 0 && !math.IsNaN(alpha) }
