package lorakit

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/tensor"
)

// ExtractOptions say what adapter Extract makes.
type ExtractOptions struct {
	// Rank of every module; 0 with Energy takes the smallest that keeps that share of each
	// module's change. One of them is set.
	Rank   int
	Energy float64
	// Threads is how many modules are decomposed at once; 0 is one a processor.
	Threads int
	Force   bool
	Seed    uint64
}

// ExtractedModule says how much of a module's change its part of an adapter holds.
type ExtractedModule struct {
	Name          string    `json:"name"`
	Rank          int       `json:"rank"`
	Explained     float64   `json:"explained"`  // share of the squared norm of the change
	DeltaNorm     float64   `json:"delta_norm"` // of the whole change
	EffectiveRank float64   `json:"effective_rank"`
	Values        []float64 `json:"singular_values"`
}

// Extraction says what Extract has done.
type Extraction struct {
	Destination string            `json:"destination"`
	Explained   float64           `json:"explained"`
	Modules     []ExtractedModule `json:"modules"`
	// Whole are modules that the adapter has whole, in modules_to_save: embeddings of positions, which
	// models read past what PEFT would put around them.
	Whole []string `json:"whole,omitempty"`
	// Left are tensors that differ and have no part in the adapter: norms, biases, convolutions. Matrices are
	// those of them that are linear layers by their shape.
	Left     []string `json:"left"`
	Matrices []string `json:"left_matrices,omitempty"`
}

// Extract writes the adapter that leads from base to tuned: the truncated singular value
// decomposition of the difference of every linear layer, router, expert and embedding. A module
// that does not differ is left out.
func Extract(ctx context.Context, base, tuned, out string, o ExtractOptions) (*Extraction, error) {
	if (o.Rank > 0) == (o.Energy > 0) || o.Rank < 0 || o.Energy < 0 || o.Energy > 1 {
		return nil, fmt.Errorf("%w: rank is %d and energy %v, expected one of them: a rank of 1 or more, or an energy above 0 and at most 1", ErrOption, o.Rank, o.Energy)
	}
	if err := checkpoints(base, tuned); err != nil {
		return nil, err
	}
	if err := pipeline.CheckSpared(out, tuned); err != nil {
		return nil, err
	}
	a, err := checkpoint.Open(ctx, base)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	b, err := checkpoint.Open(ctx, tuned)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	w, err := pipeline.NewAdapterWriter(base, out, o.Force)
	if err != nil {
		return nil, err
	}
	defer w.Abort()

	r := &Extraction{Destination: out, Modules: []ExtractedModule{}, Left: []string{}}
	jobs, whole, err := r.compare(ctx, a, b)
	if err != nil {
		return nil, err
	}
	if err := fits(jobs, o.Rank); err != nil {
		return nil, err
	}
	modules, err := decompose(ctx, jobs, o, w, r)
	if err != nil {
		return nil, err
	}
	modules = append(modules, whole...)
	if len(r.Modules) == 0 {
		return nil, fmt.Errorf("%s: %w: no linear layer, expert or embedding differs from that of %s", tuned, ErrRefused, base)
	}
	s := lora.Settings{Base: base, FanInFanOut: slices.ContainsFunc(jobs, func(j extraction) bool { return j.flip })}
	if a.Config != nil && strings.HasSuffix(a.Config.Architecture, "ForCausalLM") {
		s.TaskType = "CAUSAL_LM"
	}
	for _, j := range jobs {
		s.EnsureTie = s.EnsureTie || j.ensured() && j.changed
	}
	e, err := lora.New(out, s, modules).Encode(lora.EncodeOptions{To: lora.PEFT})
	if err != nil {
		return nil, err
	}
	return r, w.Write(ctx, e)
}

// compare finds what differs: modules to be decomposed, those to be kept whole, and the rest.
func (r *Extraction) compare(ctx context.Context, a, b *checkpoint.Checkpoint) (jobs []extraction, whole []*lora.Module, err error) {
	other := map[string]*checkpoint.Weight{}
	for _, x := range b.Weights {
		other[x.Name] = x
	}
	leave := func(w *checkpoint.Weight) {
		r.Left = append(r.Left, w.Name)
		if len(w.Shape) > 1 && w.Shape[len(w.Shape)-1] > 1 && w.Shape[len(w.Shape)-2] > 1 && len(w.Shape) < 4 {
			r.Matrices = append(r.Matrices, w.Name)
		}
	}
	for _, x := range a.Weights {
		y := other[x.Name]
		delete(other, x.Name)
		if y == nil || !slices.Equal(x.Shape, y.Shape) {
			return nil, nil, fmt.Errorf("%s: %w: tensor %s of shape %v has no counterpart of that shape in %s", a.Path, ErrRefused, tensor.Quote(x.Name), x.Shape, b.Path)
		}
		parts := matrices(x, kindFor(a, x))
		table := len(parts) == 1 && parts[0].ofPositions() && y.Decoder == nil
		if len(parts) > 0 && !table && !pastAdapters(a, parts) {
			for _, p := range parts {
				p.base, p.tuned = x, y
				p.parameter = p.parameter || byParameter(a, &p)
				jobs = append(jobs, p.ends(a.Model, other)...)
			}
			continue
		}
		same, err := checkpoint.SameValues(ctx, x, y)
		switch {
		case err != nil:
			return nil, nil, err
		case same:
		case table:
			r.Whole = append(r.Whole, parts[0].module)
			whole = append(whole, &lora.Module{Name: parts[0].module, Param: "weight", Form: lora.Replace, Value: &y.Parts[0]})
		default:
			leave(x)
		}
	}
	for _, y := range b.Weights {
		if other[y.Name] != nil { // the base has none
			leave(y)
		}
	}
	return jobs, whole, nil
}

// ends lists a module and, for an embedding, those that share its values. What tuned has a tensor of its own for
// leads away from the base's embedding; it is taken out of other.
func (j extraction) ends(m *models.Model, other map[string]*checkpoint.Weight) []extraction {
	if j.form != lora.Embedding {
		return []extraction{j}
	}
	var own []extraction
	for _, name := range m.SharedBy(j.module + ".weight") {
		end := j
		end.module = strings.TrimSuffix(name, ".weight")
		if y := other[name]; y != nil && slices.Equal(y.Shape, j.base.Shape) {
			delete(other, name)
			if end.tuned = y; end.module == m.Head() {
				end.form = lora.Linear
			}
			own = append(own, end)
		} else if end.module == m.Head() {
			j.head = end.module
		} else {
			j.shared = append(j.shared, end.module)
		}
	}
	return append([]extraction{j}, own...)
}

// ensured reports whether the head's factors follow from those of the embedding by ensure_weight_tying. PEFT
// heeds it for these names alone.
func (j *extraction) ensured() bool {
	return j.head == "lm_head" && (j.module == "embed_tokens" || strings.HasSuffix(j.module, ".embed_tokens"))
}

// ofPositions reports whether the module is an embedding of positions: its class may take other inputs than one of
// words, or none, when its weight is read as it is.
func (j *extraction) ofPositions() bool {
	name := last(j.module)
	return j.form == lora.Embedding && (strings.Contains(name, "position") || strings.HasPrefix(name, "rel_"))
}

// byParameter reports whether PEFT finds a linear layer by target_parameters alone: it takes the names of experts
// in target_modules for those of their stack, whatever module has them.
func byParameter(c *checkpoint.Checkpoint, j *extraction) bool {
	if c.Config == nil || j.form != lora.Linear || j.base.Role.Kind == models.Expert {
		return false
	}
	return fusedExperts[c.Config.ModelType][last(j.module)] != ""
}

// pastAdapters reports whether a weight goes to a kernel as it is, so that PEFT refuses an adapter.
func pastAdapters(c *checkpoint.Checkpoint, parts []extraction) bool {
	return c.Config != nil && strings.HasSuffix(parts[0].module, ".out_proj") && slices.Contains(fusedKernels, c.Config.ModelType)
}

// extraction is a matrix of the two checkpoints that an adapter can have a module for.
type extraction struct {
	module      string
	form        lora.Form
	parameter   bool     // see lora.Module
	head        string   // of an embedding: the output head that is tied to it
	shared      []string // and other embeddings that are
	base, tuned *checkpoint.Weight
	flip        bool  // GPT-2's Conv1D lies the other way round
	first       int64 // element of the weights
	rows, cols  int

	changed bool
}

// matrix reads the part of a weight.
func (j *extraction) matrix(w *checkpoint.Weight) *checkpoint.Matrix {
	if j.flip {
		return checkpoint.NewMatrix(w, true)
	}
	return checkpoint.NewMatrixAt(w, j.first, j.rows, j.cols)
}

// linear reports the run-time module of a weight that is the whole of a linear layer's.
func linear(w *checkpoint.Weight) (string, bool) {
	s := w.Role.Runtime
	ok := (w.Role.Kind == models.Linear || w.Role.Kind == models.Conv1D) && len(w.Shape) == 2 && len(s) == 1 && s[0].Whole() && (w.DType.Float() || w.DType == tensor.F64)
	if !ok {
		return "", false
	}
	return strings.CutSuffix(s[0].Param, ".weight")
}

// kindFor is what a weight is to PEFT. The experts of gpt-oss lie (in, out), with gate and up interleaved; an
// adapter from here cannot hold those.
func kindFor(c *checkpoint.Checkpoint, w *checkpoint.Weight) models.Kind {
	kind := w.Role.Kind
	switch {
	case c.Config == nil:
	case kind == models.Expert && c.Config.ModelType == "gpt_oss":
		return models.Other
	case len(w.Shape) == 2:
		// A router of an own class is no linear layer by what it returns.
		if own, ok := ownLinears[c.Config.ModelType]; ok && own == kind && kind != models.Router {
			return models.Linear
		}
	}
	return kind
}

// matrices lists what of a weight an adapter can have modules for: a linear layer, an embedding or a
// router, the run-time modules that a fused tensor of the file holds, or experts, one by one.
func matrices(w *checkpoint.Weight, kind models.Kind) []extraction {
	n := len(w.Shape)
	if n < 2 || n > 3 || !w.DType.Float() && w.DType != tensor.F64 {
		return nil
	}
	rows, cols := int(w.Shape[n-2]), int(w.Shape[n-1])
	if rows == 0 || cols == 0 {
		return nil
	}
	var list []extraction
	for _, s := range w.Role.Runtime {
		if s.Via != "" || s.Transposed || s.FileParts > 1 && s.FileDim != n-2 {
			return nil
		}
		j := extraction{rows: rows / max(s.FileParts, 1), cols: cols, flip: kind == models.Conv1D}
		j.first = int64(s.FilePart * j.rows * cols)
		module, isWeight := strings.CutSuffix(s.Param, ".weight")
		switch {
		case kind == models.Expert:
			experts := expertMatrices(w, s, j)
			if experts == nil {
				return nil
			}
			list = append(list, experts...)
			continue
		case !isWeight || n != 2 || s.Parts > 1:
			return nil
		case kind == models.Embedding:
			j.form = lora.Embedding
		case kind == models.Router:
			j.parameter = true
		case kind != models.Linear && kind != models.Conv1D:
			return nil
		}
		if j.flip {
			j.rows, j.cols = j.cols, j.rows
		}
		j.module = module
		list = append(list, j)
	}
	return list
}

// expertMatrices lists the matrices of single experts that a tensor holds, under the names that an
// adapter has for them.
func expertMatrices(w *checkpoint.Weight, s models.Slice, whole extraction) []extraction {
	at := strings.LastIndexByte(s.Param, '.')
	if at < 0 || s.FileParts > 1 || s.Parts > 1 && s.Dim != 0 && s.Dim != len(w.Shape)-2 {
		return nil
	}
	stack, param := s.Param[:at], s.Param[at+1:]
	projs := map[string][]string{"gate_up_proj": {"gate_proj", "up_proj"}, "down_proj": {"down_proj"}}[param]
	if projs == nil || !strings.HasSuffix(stack, ".experts") {
		return nil
	}
	if s.Parts > 1 {
		if s.Parts != len(projs) {
			return nil
		}
		projs = projs[s.Part : s.Part+1]
	}
	if whole.rows%len(projs) != 0 {
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
	var list []extraction
	for i, e := range experts {
		for k, proj := range projs {
			j := whole
			j.rows /= len(projs)
			j.first = int64(i)*int64(whole.rows)*int64(whole.cols) + int64(k)*int64(j.rows)*int64(j.cols)
			j.module = fmt.Sprintf("%s.%d.%s", stack, e, proj)
			list = append(list, j)
		}
	}
	return list
}

// fits refuses a rank that none of the matrices has.
func fits(jobs []extraction, rank int) error {
	var largest *extraction
	for i := range jobs {
		if j := &jobs[i]; largest == nil || min(j.rows, j.cols) > min(largest.rows, largest.cols) {
			largest = j
		}
	}
	if largest != nil && rank > min(largest.rows, largest.cols) {
		return fmt.Errorf("module %s: %w: rank %d is larger than its matrix of %d x %d allows, and no other is larger", tensor.Quote(largest.module), ErrRefused, rank, largest.rows, largest.cols)
	}
	return nil
}

// decompose takes the modules apart, several at once, and keeps them in their order.
func decompose(ctx context.Context, jobs []extraction, o ExtractOptions, w *pipeline.AdapterWriter, r *Extraction) ([]*lora.Module, error) {
	if o.Threads <= 0 {
		o.Threads = runtime.GOMAXPROCS(0)
	}
	var modules []*lora.Module
	keep := func(t lora.Trained) error {
		m, err := w.Spool(t)
		modules = append(modules, m)
		return err
	}
	var held, energy float64
	err := inOrder(ctx, len(jobs), o.Threads, func(ctx context.Context, i int) (*svd.Decomposition, error) {
		d, err := jobs[i].decompose(ctx, o)
		if err != nil {
			err = fmt.Errorf("module %s: %w", tensor.Quote(jobs[i].module), err)
		}
		return d, err
	}, func(i int, d *svd.Decomposition) error {
		j := &jobs[i]
		if j.changed = len(d.S) > 0; !j.changed {
			return nil
		}
		var sum float64
		for _, s := range d.S {
			sum += float64(s * s)
		}
		held, energy = held+sum, energy+d.Energy
		r.Modules = append(r.Modules, ExtractedModule{Name: j.module, Rank: len(d.S), Explained: sum / d.Energy, DeltaNorm: math.Sqrt(d.Energy), EffectiveRank: svd.EffectiveRank(d.S), Values: d.S})
		for _, t := range j.trained(d) {
			if err := keep(t); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, interrupted(ctx, err)
	}
	if energy > 0 {
		r.Explained = held / energy
	}
	for _, j := range unchangedExperts(jobs) {
		if err := keep(lora.Trained{Name: j.module, Rank: 1, A: kernels.NewMat(1, j.cols), B: kernels.NewMat(j.rows, 1)}); err != nil {
			return nil, err
		}
	}
	return modules, nil
}

// decompose decomposes the change of one module.
func (j *extraction) decompose(ctx context.Context, o ExtractOptions) (*svd.Decomposition, error) {
	m := j.matrix(j.tuned).Minus(j.matrix(j.base))
	if o.Rank == 0 {
		return svd.Energy(ctx, m, o.Energy, min(j.rows, j.cols), svd.Options{Seed: o.Seed})
	}
	// All of a small matrix, as a router's, is of a lower rank.
	return svd.Truncated(ctx, m, svd.Options{Rank: min(o.Rank, j.rows, j.cols), Seed: o.Seed, Iterations: extractIterations})
}

// extractIterations bounds the passes over a change. One that training has made settles in two to four; of one that is all noise,
// whose leading directions hold as little as any, six find all but 3 % of what the best of rank 16 hold, at a third of
// the time of all but 1e-4 (torch.svd_lowrank with q=24 misses 14 % in the same time).
const extractIterations = 6

// trained makes modules of a decomposition: of an embedding the head that is tied to it as well.
func (j *extraction) trained(d *svd.Decomposition) []lora.Trained {
	t := split(j.module, d)
	t.Parameter = j.parameter
	if j.form != lora.Embedding {
		return []lora.Trained{t}
	}
	// The delta (rows x width) is B·A here; an embedding's is (B·A) transposed.
	e := lora.Trained{Name: t.Name, Form: lora.Embedding, Rank: t.Rank, A: t.B.T(), B: t.A.T()}
	list := []lora.Trained{e}
	for _, name := range j.shared {
		e.Name = name
		list = append(list, e)
	}
	if j.head != "" {
		t.Name = j.head
		list = append(list, t)
	}
	return list
}

// unchangedExperts lists the experts that do not differ among others of their stack that do: a
// stack has all of them, and gate and up together.
func unchangedExperts(jobs []extraction) []extraction {
	key := func(j extraction) string {
		parts := strings.Split(j.module, ".")
		n := len(parts)
		if j.base.Role.Kind != models.Expert || n < 3 {
			return ""
		}
		if parts[n-1] == "down_proj" {
			return strings.Join(parts[:n-2], ".") + " down"
		}
		return strings.Join(parts[:n-2], ".")
	}
	changed := map[string]bool{}
	for _, j := range jobs {
		changed[key(j)] = changed[key(j)] || j.changed
	}
	return slices.DeleteFunc(slices.Clone(jobs), func(j extraction) bool { k := key(j); return k == "" || j.changed || !changed[k] })
}

// split makes a module of a decomposition: math.Sqrt(S) goes to each side.
func split(module string, d *svd.Decomposition) lora.Trained {
	k := len(d.S)
	t := lora.Trained{Name: module, Form: lora.Linear, Rank: k, A: kernels.NewMat(k, d.V.Rows), B: kernels.NewMat(d.U.Rows, k)}
	for q, s := range d.S {
		root := float32(math.Sqrt(s))
		for i := range d.U.Rows {
			t.B.Data[i*k+q] = d.U.Data[i*d.U.RowStride+q*d.U.ColStride] * root
		}
		for i := range d.V.Rows {
			t.A.Data[q*d.V.Rows+i] = d.V.Data[i*d.V.RowStride+q*d.V.ColStride] * root
		}
	}
	return t
}
