package adapt

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/parallel"
	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/tensor"
)

// ExtractOptions say what adapter Extract makes.
type ExtractOptions struct {
	// Rank of every module; 0 with Energy takes the smallest that keeps that share of each module's change. One of them
	// is set.
	Rank   int
	Energy float64
	// Threads is how many modules are decomposed at once; 0 is one a processor.
	Threads     int
	Force       bool
	Seed        uint64
	FollowLinks bool // for who opens the checkpoints
}

// Check refuses what is wrong whatever the checkpoints are.
func (o ExtractOptions) Check() error { return checkRank(o.Rank, o.Energy) }

// checkRank refuses a rank and a share of the energy that are not one of them.
func checkRank(rank int, energy float64) error {
	if (rank > 0) == (energy > 0) || rank < 0 || energy < 0 || energy > 1 {
		return fmt.Errorf("%w: rank is %d and energy %v, expected one of them: a rank of 1 or more, or an energy "+
			"above 0 and at most 1", ErrOption, rank, energy)
	}
	return nil
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
	Destination string `json:"destination"`
	// Explained is the share of the squared norm of all changes, those of what is left out among them.
	Explained float64           `json:"explained"`
	Modules   []ExtractedModule `json:"modules"`
	// Whole are modules that the adapter has whole, in modules_to_save: embeddings of positions, which models read past
	// what PEFT would put around them.
	Whole []string `json:"whole,omitempty"`
	// LeftOut are tensors that differ and have no part in the adapter: norms, biases, convolutions. LeftOutMatrices are
	// those of them that are linear layers by their shape.
	LeftOut         []string `json:"left"`
	LeftOutMatrices []string `json:"left_matrices,omitempty"`

	held, changed float64 // of the squared norm of all changes
}

// Extract writes to out the adapter that leads from base to tuned: the truncated singular value decomposition of the
// difference of every linear layer, router, expert and embedding. A module that does not differ is left out.
func Extract(
	ctx context.Context, base, tuned *checkpoint.Checkpoint, out string, o ExtractOptions,
) (*Extraction, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	for _, c := range []*checkpoint.Checkpoint{base, tuned} {
		if err := c.CheckReadable(); err != nil {
			return nil, err
		}
	}
	if err := pipeline.CheckSpared(out, slices.Concat([]string{tuned.Path}, base.Paths(), tuned.Paths())...); err != nil {
		return nil, err
	}
	w, err := pipeline.NewAdapterWriter(base.Path, out, o.Force)
	if err != nil {
		return nil, err
	}
	defer w.Abort()

	r := &Extraction{Destination: out, Modules: []ExtractedModule{}, LeftOut: []string{}}
	changes, whole, err := r.compare(ctx, base, tuned)
	if err != nil {
		return nil, err
	}
	if err := checkLargest(changes, o.Rank); err != nil {
		return nil, err
	}
	modules, err := r.decompose(ctx, changes, o, w)
	if errors.Is(err, ErrInterrupted) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("%s, less %s: %w", tuned.Path, base.Path, err)
	}
	modules = append(modules, whole...)
	if len(r.Modules) == 0 {
		others := ""
		if len(r.LeftOut) > 0 {
			others = fmt.Sprintf(" that an adapter can have; what differs has no part in one: %s", formats.List(r.LeftOut))
		}
		return nil, fmt.Errorf("%s: %w: no linear layer, expert or embedding differs from that of %s%s",
			tuned.Path, ErrRefused, base.Path, others)
	}
	s := lora.Settings{Base: base.Path}
	if base.Config != nil && strings.HasSuffix(base.Config.Architecture, "ForCausalLM") {
		s.TaskType = "CAUSAL_LM"
	}
	for _, c := range changes {
		s.FanInFanOut = s.FanInFanOut || c.Kind == models.Conv1D
		s.EnsureTie = s.EnsureTie || c.ensuresTie() && c.differs
	}
	e, err := lora.New(out, s, modules).Encode(lora.EncodeOptions{To: lora.PEFT})
	if err != nil {
		return nil, err
	}
	return r, w.Write(ctx, e)
}

// change is a matrix of the base that an adapter can have a module for, and its like in the tuned checkpoint.
type change struct {
	*Target
	tuned *checkpoint.Weight
	// Of an embedding, the output head that is tied to it, and other embeddings that are.
	tiedHead       string
	tiedEmbeddings []string

	differs bool // set when it has been decomposed
}

// compare finds what differs: modules to be decomposed, those to be kept whole, and the rest.
func (r *Extraction) compare(
	ctx context.Context, base, tuned *checkpoint.Checkpoint,
) (changes []*change, whole []*lora.Module, err error) {
	other := map[string]*checkpoint.Weight{}
	for _, y := range tuned.Weights {
		if !y.Calibration {
			other[y.Name] = y
		}
	}
	matrices := takeApart(base, Targets(base))
	for _, x := range base.Weights {
		if x.Calibration {
			continue
		}
		y := other[x.Name]
		delete(other, x.Name)
		if y == nil || !slices.Equal(x.Shape, y.Shape) {
			return nil, nil, fmt.Errorf("%s: %w: tensor %s of shape %v has no counterpart of that shape in %s",
				base.Path, ErrRefused, tensor.Quote(x.Name), x.Shape, tuned.Path)
		}
		parts := matrices[x]
		table := len(parts) == 1 && parts[0].ofPositions() && y.Decoder == nil
		if len(parts) > 0 && !table && !passesAdapters(base, parts[0]) {
			for _, t := range parts {
				t.ByParameter = t.ByParameter || onlyByParameter(base, t)
				changes = append(changes, (&change{Target: t, tuned: y}).withTied(base.Model, other)...)
			}
			continue
		}
		same, err := checkpoint.SameValues(ctx, x, y)
		switch {
		case err != nil:
			return nil, nil, err
		case same:
			continue
		case table:
			m := parts[0].Module()
			r.Whole = append(r.Whole, m)
			whole = append(whole, &lora.Module{Name: m, Param: "weight", Form: lora.Replace, Value: &y.Parts[0]})
		default:
			r.leaveOut(x)
		}
		squared, err := squaredChange(ctx, x, y)
		if err == nil && squared-squared != 0 {
			err = fmt.Errorf("%s: tensor %s: %w", tuned.Path, tensor.Quote(y.Name), svd.ErrNonFinite)
		}
		if err != nil {
			return nil, nil, err
		}
		if r.changed += squared; table {
			r.held += squared
		}
	}
	for _, y := range tuned.Weights {
		if other[y.Name] != nil { // the base has none
			r.leaveOut(y)
		}
	}
	return changes, whole, nil
}

// squaredChange is the squared norm of the change of a tensor; that of what is no floating-point number is 0.
func squaredChange(ctx context.Context, x, y *checkpoint.Weight) (float64, error) {
	if !x.DType.Numeric() || !y.DType.Numeric() || x.Count() == 0 {
		return 0, nil
	}
	rows, cols := 1, int(x.Count())
	if n := len(x.Shape); n > 1 {
		cols = int(x.Shape[n-1])
		rows = int(x.Count()) / cols
	}
	return energy(ctx, minus(checkpoint.NewMatrixAt(y, 0, rows, cols), checkpoint.NewMatrixAt(x, 0, rows, cols)))
}

// leaveOut tells of a tensor that has no part in the adapter.
func (r *Extraction) leaveOut(w *checkpoint.Weight) {
	r.LeftOut = append(r.LeftOut, w.Name)
	if n := len(w.Shape); n > 1 && w.Shape[n-1] > 1 && w.Shape[n-2] > 1 && n < 4 {
		r.LeftOutMatrices = append(r.LeftOutMatrices, w.Name)
	}
}

// withTied lists a change and, of an embedding, those of the modules that share its values. What the tuned checkpoint
// has a tensor of its own for leads away from the base's embedding; it is taken out of other.
func (c *change) withTied(m *models.Model, other map[string]*checkpoint.Weight) []*change {
	list := []*change{c}
	if c.form() != lora.Embedding {
		return list
	}
	for _, name := range m.SharedBy(c.Module() + ".weight") {
		isHead := strings.TrimSuffix(name, ".weight") == m.Head()
		if y := other[name]; y != nil && slices.Equal(y.Shape, c.Weight.Shape) {
			delete(other, name)
			t := *c.Target
			if t.Param = name; isHead {
				t.Kind, t.Out, t.In = models.Linear, c.In, c.Out
			}
			list = append(list, &change{Target: &t, tuned: y})
		} else if isHead {
			c.tiedHead = m.Head()
		} else {
			c.tiedEmbeddings = append(c.tiedEmbeddings, strings.TrimSuffix(name, ".weight"))
		}
	}
	return list
}

// ensuresTie reports whether the head's factors follow from those of the embedding by ensure_weight_tying. PEFT heeds
// it for these names alone.
func (c *change) ensuresTie() bool {
	module := c.Module()
	return c.tiedHead == "lm_head" && (module == "embed_tokens" || strings.HasSuffix(module, ".embed_tokens"))
}

// ofPositions reports whether the module is an embedding of positions: its class may take other inputs than one of
// words, or none, when its weight is read as it is.
func (t *Target) ofPositions() bool {
	name := last(t.Module())
	return t.Kind == models.Embedding && (strings.Contains(name, "position") || strings.HasPrefix(name, "rel_"))
}

// onlyByParameter reports whether PEFT finds a linear layer by target_parameters alone: it takes the names of experts
// in target_modules for those of their stack, whatever module has them.
func onlyByParameter(c *checkpoint.Checkpoint, t *Target) bool {
	if c.Config == nil || t.form() != lora.Linear || t.Weight.Role.Kind == models.Expert {
		return false
	}
	return lora.StackedExperts(c.Config.ModelType)[last(t.Module())] != ""
}

// passesAdapters reports whether a weight goes to a kernel as it is, so that PEFT refuses an adapter, or is a stack of
// experts that PEFT takes the other way round than single ones.
func passesAdapters(c *checkpoint.Checkpoint, t *Target) bool {
	if c.Config == nil {
		return false
	}
	if t.Weight != nil && t.Weight.Role.Kind == models.Expert {
		stack, _, _ := strings.Cut(t.Module(), ".experts.")
		r, _ := c.Model.Registered(stack + ".experts")
		return r.IsTransposed
	}
	return lora.GoesToKernel(c.Config.ModelType, t.Module())
}

// checkLargest refuses a rank that none of the matrices has.
func checkLargest(changes []*change, rank int) error {
	var largest *change
	for _, c := range changes {
		if largest == nil || min(c.Out, c.In) > min(largest.Out, largest.In) {
			largest = c
		}
	}
	if largest == nil {
		return nil
	}
	if rows, cols := largest.dims(); rank > min(rows, cols) {
		return largest.refused("rank %d is larger than its matrix of %d x %d allows, and no other is larger",
			rank, rows, cols)
	}
	return nil
}

// decompose takes the modules apart, several at once, and keeps them in their order.
func (r *Extraction) decompose(
	ctx context.Context, changes []*change, o ExtractOptions, w *pipeline.AdapterWriter,
) ([]*lora.Module, error) {
	var modules []*lora.Module
	keep := func(t lora.Trained) error {
		m, err := w.Spool(t)
		modules = append(modules, m)
		return err
	}
	decompose := func(ctx context.Context, i int) (*svd.Decomposition, error) {
		d, err := changes[i].decompose(ctx, o)
		if err != nil {
			err = fmt.Errorf("module %s: %w", tensor.Quote(changes[i].Module()), err)
		}
		return d, err
	}
	err := parallel.InOrder(ctx, len(changes), o.Threads, decompose, func(i int, d *svd.Decomposition) error {
		c := changes[i]
		if c.differs = len(d.S) > 0; !c.differs {
			return nil
		}
		sum := heldEnergy(d)
		r.held, r.changed = r.held+sum, r.changed+d.Energy
		r.Modules = append(r.Modules, ExtractedModule{
			Name: c.Module(), Rank: len(d.S), Explained: sum / d.Energy, DeltaNorm: math.Sqrt(d.Energy),
			EffectiveRank: svd.EffectiveRank(d.S), Values: d.S,
		})
		for _, t := range c.trained(d) {
			if err := keep(t); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, orInterrupted(ctx, err)
	}
	if r.changed > 0 {
		r.Explained = r.held / r.changed
	}
	for _, c := range unchangedExperts(changes) {
		zero := lora.Trained{Name: c.Module(), Rank: 1, A: kernels.NewMat(1, c.In), B: kernels.NewMat(c.Out, 1)}
		if err := keep(zero); err != nil {
			return nil, err
		}
	}
	return modules, nil
}

// extractIterations bounds the passes over a change. One that training has made settles in two to four; of one that is
// all noise, whose leading directions hold as little as any, six find all but 3 % of what the best of rank 16 hold, at
// a third of the time of all but 1e-4 (torch.svd_lowrank with q=24 misses 14 % in the same time).
const extractIterations = 6

// decompose decomposes the change of one module.
func (c *change) decompose(ctx context.Context, o ExtractOptions) (*svd.Decomposition, error) {
	m := minus(c.matrix(c.tuned), c.matrix(c.Weight))
	most := min(c.Out, c.In)
	if o.Rank == 0 {
		return svd.Energy(ctx, m, o.Energy, most, svd.Options{Seed: o.Seed})
	}
	// All of a small matrix, as a router's, is of a lower rank.
	return svd.Truncated(ctx, m, svd.Options{Rank: min(o.Rank, most), Seed: o.Seed, Iterations: extractIterations})
}

// trained makes modules of a decomposition: of an embedding the modules that are tied to it as well.
func (c *change) trained(d *svd.Decomposition) []lora.Trained {
	t := lora.Trained{Name: c.Module(), Form: lora.Linear, Rank: len(d.S), Parameter: c.ByParameter}
	t.A, t.B = factors(d, t.Rank, 1)
	if c.form() != lora.Embedding {
		return []lora.Trained{t}
	}
	// The delta (rows x width) is B·A here; an embedding's is (B·A) transposed.
	e := lora.Trained{Name: t.Name, Form: lora.Embedding, Rank: t.Rank, A: t.B.T(), B: t.A.T()}
	list := []lora.Trained{e}
	for _, name := range c.tiedEmbeddings {
		e.Name = name
		list = append(list, e)
	}
	if c.tiedHead != "" {
		t.Name = c.tiedHead
		list = append(list, t)
	}
	return list
}

// unchangedExperts lists the experts that do not differ among others of their stack that do: a stack has all of them,
// and gate and up together.
func unchangedExperts(changes []*change) []*change {
	stack := func(c *change) string { return c.stack.Param }
	changed := map[string]bool{}
	for _, c := range changes {
		if c.Kind == models.Expert && c.differs {
			changed[stack(c)] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(changes), func(c *change) bool {
		return c.Kind != models.Expert || c.differs || !changed[stack(c)]
	})
}
