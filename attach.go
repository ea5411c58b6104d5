package lorakit

import (
	"context"
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/dlclark/regexp2/v2"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// AttachOptions say what adapter Attach makes.
type AttachOptions struct {
	Rank  int     // 0 is 8
	Alpha float64 // 0 is 16
	// Target is "all-linear" (or empty), "attention", names joined by commas that match whole ends of
	// module names, or a regular expression of Python that matches whole names.
	Target string
	// Init is "kaiming" (or empty), PEFT's default, "gaussian", or "compensate": the best
	// answer of this rank to the error that NF4 with double quantisation makes of each
	// weight.
	Init  string
	Seed  uint64
	Force bool
}

// AttachedModule is a module of a new adapter.
type AttachedModule struct {
	Name string `json:"name"`
	In   int    `json:"in"`
	Out  int    `json:"out"`
	// Before and After are, for compensate, the relative error of the quantised weight
	// without and with the adapter.
	Before float64 `json:"error_before,omitempty"`
	After  float64 `json:"error_after,omitempty"`
}

// Attachment says what Attach has done.
type Attachment struct {
	Destination string           `json:"destination"`
	Rank        int              `json:"rank"`
	Alpha       float64          `json:"alpha"`
	Parameters  int64            `json:"parameters"`
	Unchanged   bool             `json:"output_unchanged"` // every delta is zero
	Modules     []AttachedModule `json:"modules"`
}

var inits = []string{"kaiming", "gaussian", "compensate"}

// Attach writes a new adapter for base. With the inits kaiming and gaussian B is zero, so
// that the model's output is what it was.
func Attach(ctx context.Context, base, out string, o AttachOptions) (*Attachment, error) {
	if o.Rank == 0 {
		o.Rank = 8
	}
	if o.Alpha == 0 {
		o.Alpha = 16
	}
	if o.Init == "" {
		o.Init = "kaiming"
	}
	known := false
	for _, name := range inits {
		known = known || name == o.Init
	}
	if !known {
		return nil, fmt.Errorf("%w: init %q is unknown; known are %s", ErrOption, o.Init, strings.Join(inits, ", "))
	}
	if o.Rank < 0 || o.Alpha < 0 || math.IsNaN(o.Alpha) || math.IsInf(o.Alpha, 0) {
		return nil, fmt.Errorf("%w: rank is %d and alpha %v, expected positive numbers", ErrOption, o.Rank, o.Alpha)
	}
	c, err := pipeline.Open(base)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	targets, err := attachTargets(c, o.Target)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", base, err)
	}
	w, err := pipeline.NewAdapterWriter(base, out, o.Force)
	if err != nil {
		return nil, err
	}
	defer w.Abort()
	r := &Attachment{Destination: out, Rank: o.Rank, Alpha: o.Alpha, Unchanged: true}
	s := lora.Settings{Base: base, Rank: o.Rank, Alpha: o.Alpha}
	for _, x := range targets {
		if ctx.Err() != nil {
			return nil, ErrInterrupted
		}
		name, _ := linear(x)
		flip := x.Role.Kind == models.Conv1D
		s.FanInFanOut = s.FanInFanOut || flip
		rows, cols := pipeline.NewMatrix(x, flip).Dims()
		if o.Rank > min(rows, cols) {
			return nil, fmt.Errorf("module %s: %w: rank %d is larger than its matrix of %d x %d allows", tensor.Quote(name), ErrRefused, o.Rank, rows, cols)
		}
		m := AttachedModule{Name: name, In: cols, Out: rows}
		t := lora.Trained{Name: name, Form: lora.Linear, Rank: o.Rank, A: kernels.NewMat(o.Rank, cols), B: kernels.NewMat(rows, o.Rank)}
		if o.Init == "compensate" {
			if err := compensate(ctx, x, flip, o, &t, &m); err != nil {
				return nil, err
			}
		} else {
			start(t.A.Data, name, o, cols)
		}
		for _, v := range t.B.Data {
			r.Unchanged = r.Unchanged && v == 0
		}
		r.Parameters += int64(len(t.A.Data) + len(t.B.Data))
		r.Modules = append(r.Modules, m)
		if err := w.Add(t); err != nil {
			return nil, err
		}
	}
	if c.Config != nil && strings.HasSuffix(c.Config.Architecture, "ForCausalLM") {
		s.TaskType = "CAUSAL_LM"
	}
	config, err := lora.PEFTConfig(s, w.Modules())
	if err != nil {
		return nil, err
	}
	return r, w.Finish(ctx, config)
}

// start fills A: from the same seed the same values, whatever other modules there are.
func start(a []float32, module string, o AttachOptions, in int) {
	h := fnv.New64a()
	h.Write([]byte(module)) // never fails
	random := rand.New(rand.NewPCG(o.Seed, h.Sum64()))
	bound := 1 / math.Sqrt(float64(in)) // Kaiming's for a = sqrt(5)
	for i := range a {
		if o.Init == "gaussian" {
			a[i] = float32(random.NormFloat64() / float64(o.Rank))
		} else {
			a[i] = float32((2*random.Float64() - 1) * bound)
		}
	}
}

// compensate makes the adapter of the error that quantising a weight makes.
func compensate(ctx context.Context, x *pipeline.Weight, flip bool, o AttachOptions, t *lora.Trained, m *AttachedModule) error {
	if x.Decoder != nil {
		return fmt.Errorf("module %s: %w: its weight is quantised already, and compensate needs what it was", tensor.Quote(t.Name), ErrRefused)
	}
	low, err := pipeline.Quantized(x, quant.Spec{Type: "nf4", BlockSize: 64, DoubleQuant: true})
	if err != nil {
		return err
	}
	whole := pipeline.NewMatrix(x, flip)
	d, err := svd.Truncated(ctx, whole.Minus(pipeline.NewMatrix(low, flip)), svd.Options{Rank: o.Rank, Seed: o.Seed, Iterations: 6})
	if err != nil {
		return fmt.Errorf("module %s: %w", tensor.Quote(t.Name), err)
	}
	var kept float64
	for _, s := range d.S {
		kept += s * s
	}
	norm, err := whole.Energy()
	if err != nil {
		return err
	}
	if norm > 0 {
		m.Before, m.After = math.Sqrt(d.Energy/norm), math.Sqrt(max(0, d.Energy-kept)/norm)
	}
	part := split(t.Name, d)
	scale := float32(math.Sqrt(float64(o.Rank) / o.Alpha)) // on both sides, against alpha / rank
	k := part.Rank
	for q := range k {
		for i := range part.B.Rows {
			t.B.Data[i*o.Rank+q] = part.B.Data[i*k+q] * scale
		}
		for i := range part.A.Cols {
			t.A.Data[q*part.A.Cols+i] = part.A.Data[q*part.A.Cols+i] * scale
		}
	}
	return nil
}

// attachTargets lists the linear layers that a target means, in the order of the file.
func attachTargets(c *pipeline.Checkpoint, target string) ([]*pipeline.Weight, error) {
	match, err := matcher(target)
	if err != nil {
		return nil, err
	}
	head := map[string]bool{}
	for _, m := range c.Model.Skipped() {
		head[m] = true
	}
	var list []*pipeline.Weight
	var names []string
	experts := false
	for _, w := range c.Weights {
		experts = experts || w.Role.Kind == models.Expert
		name, ok := linear(w)
		if !ok {
			continue
		}
		names = append(names, name)
		if (target == "" || target == "all-linear") && head[name] {
			continue
		}
		hit, err := match(name)
		if err != nil {
			return nil, err
		}
		if hit {
			list = append(list, w)
		}
	}
	for _, w := range list {
		if name, _ := linear(w); experts && !inAttention(name) {
			return nil, fmt.Errorf("%w: target %s takes %s, and PEFT adapts the experts of such a model in its place, which attach does not; --target attention takes what it can", ErrRefused, tensor.Quote(target), name)
		}
	}
	if len(list) == 0 {
		if len(names) > 3 {
			names = names[:3]
		}
		return nil, fmt.Errorf("%w: target %s matches none of its linear layers, such as %s", ErrRefused, tensor.Quote(target), strings.Join(names, ", "))
	}
	return list, nil
}

// inAttention reports whether a module belongs to an attention block.
func inAttention(name string) bool {
	inside := strings.ToLower(name[:max(0, strings.LastIndexByte(name, '.'))])
	return strings.Contains(inside, "attn") || strings.Contains(inside, "attention")
}

// matcher prepares a target.
func matcher(target string) (func(name string) (bool, error), error) {
	switch {
	case target == "" || target == "all-linear":
		return func(string) (bool, error) { return true, nil }, nil
	case target == "attention":
		return func(name string) (bool, error) { return inAttention(name), nil }, nil
	case strings.ContainsAny(target, `\*+?()[]{}|^$`):
		re, err := regexp2.Compile(`\A(?:`+target+`)\z`, regexp2.None)
		if err != nil {
			return nil, fmt.Errorf("%w: target %s: %w", ErrOption, tensor.Quote(target), err)
		}
		re.MatchTimeout = 250 * time.Millisecond
		return func(name string) (bool, error) {
			ok, err := re.MatchString(name)
			if err != nil {
				err = fmt.Errorf("%w: target %s takes too long on %s", ErrRefused, tensor.Quote(target), tensor.Quote(name))
			}
			return ok, err
		}, nil
	}
	ends := strings.Split(target, ",")
	return func(name string) (bool, error) {
		for _, e := range ends {
			if e = strings.TrimSpace(e); name == e || strings.HasSuffix(name, "."+e) {
				return true, nil
			}
		}
		return false, nil
	}, nil
}
