package adapt

import (
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// Target is a module of the running model that an adapter can have a part for: a linear layer, an embedding, a router,
// a stack of experts, or one expert of it.
type Target struct {
	// Param is the run-time name of the parameter that the adapter changes: "model.layers.0.mlp.up_proj.weight". One
	// expert of a stack has the name that an adapter of single experts gives it.
	Param string
	// Kind is what PEFT takes the module for.
	Kind models.Kind
	// Out and In are the sides of its matrix, or of that of each expert; of an embedding the width and the rows.
	Out, In int
	// Experts is how many matrices the parameter stacks; 0 for a single one.
	Experts int
	// ByParameter says that PEFT finds it by target_parameters, and not by its module.
	ByParameter bool
	// Weight is the tensor of the file that holds its values; nil where they are spread over several, or are only a
	// part of one.
	Weight *checkpoint.Weight

	// Of what takeApart makes: the element of Weight that its matrix begins at, the run-time parameter that it is or is
	// in, and which of the projections that the parameter joins.
	first int64
	stack *Target
	part  int

	shape     tensor.Shape // of the matrix, as it lies at run time
	tensors   int          // of the file, that it is made of
	perMatrix int          // how many tensors each matrix is made of
	apart     bool         // each expert has its own
	misfit    string       // a tensor that does not fit with the others that it is made of, or ""
	bypassed  bool         // inside of torch's MultiheadAttention, which reads the weight past an adapter
	mixedRows bool         // the rows of gate and up take turns in it
}

// Module is the run-time name of the module that has the parameter.
func (t *Target) Module() string {
	if t.Experts > 0 {
		return t.Param[:strings.LastIndexByte(t.Param, '.')]
	}
	return strings.TrimSuffix(t.Param, ".weight")
}

// String names it as PEFT's users do.
func (t *Target) String() string {
	if t.Experts > 0 {
		return t.Param
	}
	return t.Module()
}

// refused is an error of kind ErrRefused that names it.
func (t *Target) refused(format string, args ...any) error {
	return fmt.Errorf("module %s: %w: %s", tensor.Quote(t.String()), ErrRefused, fmt.Sprintf(format, args...))
}

// form is what an adapter's module for it is.
func (t *Target) form() lora.Form {
	if t.Kind == models.Embedding {
		return lora.Embedding
	}
	return lora.Linear
}

// dims are the rows and columns of its matrix as it is read: (out, in), and (rows, width) of an embedding.
func (t *Target) dims() (rows, cols int) {
	if t.Kind == models.Embedding {
		return t.In, t.Out
	}
	return t.Out, t.In
}

// matrix reads the values that a weight has where Weight has this target's: Weight itself, or its like in another
// checkpoint.
func (t *Target) matrix(w *checkpoint.Weight) *checkpoint.Matrix {
	if t.Kind == models.Conv1D { // lies the other way round
		return checkpoint.NewMatrix(w, true)
	}
	rows, cols := t.dims()
	return checkpoint.NewMatrixAt(w, t.first, rows, cols)
}

// Targets lists what of a checkpoint an adapter can have modules for, a run-time parameter each, in the order of the
// file. Convolutions are among them, of Kind Other, so that none is passed over without a word. An output head that has
// no tensor of its own, since it is tied to the embedding, comes last.
func Targets(c *checkpoint.Checkpoint) []*Target {
	var list []*Target
	byParam := map[string]*Target{}
	for _, w := range c.Weights {
		if !holdsNumbers(w) {
			continue
		}
		for _, s := range w.Role.Runtime {
			t := byParam[s.Param]
			if t == nil {
				t = &Target{Param: s.Param, Kind: w.Role.Kind}
				byParam[s.Param] = t
				list = append(list, t)
			}
			t.add(w, s)
		}
	}
	if c.Config != nil {
		own, ok := lora.OwnLinear(c.Config.ModelType)
		for _, t := range list {
			if ok && t.Kind == own && len(t.shape) == 2 {
				t.Kind = models.Linear
			}
			t.mixedRows = t.Experts > 0 && lora.HasInterleavedExperts(c.Config.ModelType)
		}
	}
	list = slices.DeleteFunc(list, func(t *Target) bool { return !t.complete(byParam) })
	if head := tiedHead(c, list, byParam); head != nil {
		list = append(list, head)
	}
	return list
}

func holdsNumbers(w *checkpoint.Weight) bool { return w.DType.Float() || w.DType == tensor.F64 }

// add takes in a tensor of the file, which has the values of a slice of the parameter.
func (t *Target) add(w *checkpoint.Weight, s models.Slice) {
	shape, fits := s.Shape(w.Shape)
	if !fits {
		shape = slices.Clone(w.Shape)
	}
	t.perMatrix = max(1, s.Parts)
	switch {
	case s.Expert >= 0:
		t.Experts, t.apart = max(t.Experts, s.Expert+1), true
	case t.Kind == models.Expert && len(shape) == 3:
		t.Experts = int(shape[0])
		shape = shape[1:]
	}
	if !fits || t.shape != nil && !slices.Equal(t.shape, shape) || s.Via != "" {
		t.misfit = w.Name
	}
	t.shape = shape
	t.Weight = nil
	if t.tensors++; t.tensors == 1 && s.Whole() {
		t.Weight = w
	}
}

// complete finishes what is known of a parameter, and reports whether it can be a target: the weight of a module, or a
// stack of experts.
func (t *Target) complete(byParam map[string]*Target) bool {
	if len(t.shape) < 2 || t.Experts == 0 && !strings.HasSuffix(t.Param, ".weight") {
		return false
	}
	t.Out, t.In = int(t.shape[0]), int(t.shape[1])
	t.ByParameter = t.Experts > 0 || t.Kind == models.Router
	switch t.Kind {
	case models.Conv1D, models.Embedding:
		t.Out, t.In = t.In, t.Out
	case models.Other:
		// The last projection of torch's MultiheadAttention is a linear by a class of its own.
		attention, ok := strings.CutSuffix(t.Param, ".out_proj.weight")
		ok = ok && (byParam[attention+".in_proj_weight"] != nil || byParam[attention+".q_proj_weight"] != nil)
		if ok && len(t.shape) == 2 {
			t.Kind, t.bypassed = models.Linear, true
		} else if len(t.shape) == 2 {
			return false
		}
	}
	return true
}

// tiedHead is the output head that has its embedding's weight, and so no tensor of its own.
func tiedHead(c *checkpoint.Checkpoint, list []*Target, byParam map[string]*Target) *Target {
	param := c.Model.Head() + ".weight"
	if param == ".weight" || byParam[param] != nil {
		return nil
	}
	for _, t := range list {
		if t.Kind == models.Embedding && c.Model.Tensor(param, t.shape).Tied == t.Param {
			head := *t
			head.Param, head.Kind = param, models.Linear
			head.Out, head.In = t.In, t.Out // the vocabulary, the width
			return &head
		}
	}
	return nil
}

// takeApart takes targets apart into single matrices, as they are decomposed: each linear layer, router and embedding,
// and each expert of a stack by the name that an adapter of single experts has for it. The matrices are listed by the
// tensor of the file that holds them, in the order in which it does. A tensor that is not made of such matrices alone
// is not in the map.
func takeApart(c *checkpoint.Checkpoint, targets []*Target) map[*checkpoint.Weight][]*Target {
	byParam := map[string]*Target{}
	for _, t := range targets {
		byParam[t.Param] = t
	}
	apart := map[*checkpoint.Weight][]*Target{}
	for _, w := range c.Weights {
		var list []*Target
		for _, s := range w.Role.Runtime {
			t := byParam[s.Param]
			if t == nil {
				list = nil
				break
			}
			within := t.within(w, s)
			if list = append(list, within...); within == nil {
				list = nil
				break
			}
		}
		if list != nil {
			apart[w] = list
		}
	}
	return apart
}

// within lists the single matrices that a tensor of the file holds of a target; nil where it holds another part of it.
func (t *Target) within(w *checkpoint.Weight, s models.Slice) []*Target {
	n := len(w.Shape)
	if !holdsNumbers(w) || n < 2 || n > 3 || s.Via != "" || s.Transposed || s.FileParts > 1 && s.FileDim != n-2 {
		return nil
	}
	rows, cols := int(w.Shape[n-2]), int(w.Shape[n-1])
	if rows == 0 || cols == 0 {
		return nil
	}
	rows /= max(s.FileParts, 1)
	m := &Target{Param: t.Param, Kind: t.Kind, Out: rows, In: cols, Weight: w, stack: t}
	m.first = int64(s.FilePart * rows * cols)
	if w.Role.Kind == models.Expert {
		return m.experts(s)
	}
	if w.Role.Kind == models.Router { // never a linear layer, even where its class is one
		m.Kind, m.ByParameter = models.Router, true
	}
	if n != 2 || s.Parts > 1 || t.bypassed || !strings.HasSuffix(t.Param, ".weight") {
		return nil
	}
	switch m.Kind {
	case models.Linear, models.Router:
	case models.Embedding:
		m.Out, m.In = cols, rows
	case models.Conv1D:
		m.Out, m.In = cols, rows
		if s.FileParts > 1 { // is turned round as a whole
			return nil
		}
	default:
		return nil
	}
	return []*Target{m}
}

// experts lists the matrices of single experts in a tensor. t describes that of the first expert.
func (t *Target) experts(s models.Slice) []*Target {
	w := t.Weight
	at := strings.LastIndexByte(s.Param, '.')
	if at < 0 || s.FileParts > 1 || s.Parts > 1 && s.Dim != 0 && s.Dim != len(w.Shape)-2 || t.stack.mixedRows {
		return nil
	}
	stack, param := s.Param[:at], s.Param[at+1:]
	projections := map[string][]string{lora.GateUp: {"gate_proj", "up_proj"}, "down_proj": {"down_proj"}}[param]
	if param == "up_proj" && w.Role.Known { // of experts without a gate
		projections = []string{param}
	}
	if projections == nil || !strings.HasSuffix(stack, ".experts") {
		return nil
	}
	if s.Parts > 1 {
		if s.Parts != len(projections) {
			return nil
		}
		projections = projections[s.Part : s.Part+1]
		t.part = s.Part
	}
	if t.Out%len(projections) != 0 {
		return nil
	}
	experts := []int{s.Expert}
	if s.Expert < 0 {
		if len(w.Shape) != 3 {
			return nil
		}
		experts = experts[:0]
		for e := range int(w.Shape[0]) {
			experts = append(experts, e)
		}
	} else if len(w.Shape) != 2 {
		return nil
	}
	var list []*Target
	for i, e := range experts {
		for k, projection := range projections {
			m := *t
			m.Out /= len(projections)
			m.part += k
			m.first = int64(i)*int64(t.Out)*int64(t.In) + int64(k)*int64(m.Out)*int64(m.In)
			m.Param = fmt.Sprintf("%s.%d.%s", stack, e, projection)
			list = append(list, &m)
		}
	}
	return list
}
