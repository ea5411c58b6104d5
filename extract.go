package lorakit

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

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
	// Left are tensors that differ and cannot be part of an adapter of linear layers.
	Left []string `json:"left"`
}

// Extract writes the adapter that leads from base to tuned: the truncated singular value
// decomposition of the difference of every linear layer.
func Extract(ctx context.Context, base, tuned, out string, o ExtractOptions) (*Extraction, error) {
	if (o.Rank > 0) == (o.Energy > 0) || o.Rank < 0 || o.Energy < 0 || o.Energy > 1 {
		return nil, fmt.Errorf("%w: rank is %d and energy %v, expected one of them: a rank of 1 or more, or an energy above 0 and at most 1", ErrOption, o.Rank, o.Energy)
	}
	a, err := pipeline.Open(base)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	b, err := pipeline.Open(tuned)
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
	other := map[string]*pipeline.Weight{}
	for _, x := range b.Weights {
		other[x.Name] = x
	}
	var jobs []extraction
	conv1D := false
	for _, x := range a.Weights {
		y := other[x.Name]
		delete(other, x.Name)
		if y == nil || !slices.Equal(x.Shape, y.Shape) {
			return nil, fmt.Errorf("%s: %w: tensor %s of shape %v has no counterpart of that shape in %s", base, ErrRefused, tensor.Quote(x.Name), x.Shape, tuned)
		}
		if module, ok := linear(x); ok {
			jobs = append(jobs, extraction{module: module, base: x, tuned: y})
			conv1D = conv1D || x.Role.Kind == models.Conv1D
			continue
		}
		same, err := pipeline.SameValues(ctx, x, y)
		if err != nil {
			return nil, err
		}
		if !same {
			r.Left = append(r.Left, x.Name)
		}
	}
	for _, y := range b.Weights {
		if other[y.Name] != nil { // the base has none
			r.Left = append(r.Left, y.Name)
		}
	}
	if err := decompose(ctx, jobs, o, w, r); err != nil {
		return nil, err
	}
	if len(r.Modules) == 0 {
		return nil, fmt.Errorf("%s: %w: no linear layer differs from that of %s", tuned, ErrRefused, base)
	}
	s := lora.Settings{Base: base, FanInFanOut: conv1D, Ranks: map[string]int{}, Alphas: map[string]float64{}}
	if a.Config != nil && strings.HasSuffix(a.Config.Architecture, "ForCausalLM") {
		s.TaskType = "CAUSAL_LM"
	}
	for _, m := range r.Modules {
		s.Rank = max(s.Rank, m.Rank)
	}
	s.Alpha = float64(s.Rank)
	for _, m := range r.Modules {
		if m.Rank != s.Rank {
			s.Ranks[m.Name], s.Alphas[m.Name] = m.Rank, float64(m.Rank)
		}
	}
	config, err := lora.PEFTConfig(s, w.Modules())
	if err != nil {
		return nil, err
	}
	return r, w.Finish(ctx, config)
}

// linear reports the run-time module of a weight that is the whole of a linear layer's.
func linear(w *pipeline.Weight) (string, bool) {
	s := w.Role.Runtime
	ok := (w.Role.Kind == models.Linear || w.Role.Kind == models.Conv1D) && len(w.Shape) == 2 && len(s) == 1 && s[0].Whole() && (w.DType.Float() || w.DType == tensor.F64)
	if !ok {
		return "", false
	}
	return strings.CutSuffix(s[0].Param, ".weight")
}

type extraction struct {
	module      string
	base, tuned *pipeline.Weight
	d           *svd.Decomposition
	done        chan struct{}
}

// decompose takes the modules apart, several at once, and writes them in their order.
func decompose(ctx context.Context, jobs []extraction, o ExtractOptions, w *pipeline.AdapterWriter, r *Extraction) error {
	threads := o.Threads
	if threads <= 0 {
		threads = runtime.GOMAXPROCS(0)
	}
	g, ctx := errgroup.WithContext(ctx)
	for i := range jobs {
		jobs[i].done = make(chan struct{})
	}
	slots := make(chan struct{}, threads)
	var ahead sync.WaitGroup
	g.Go(func() error {
		defer ahead.Wait()
		for i := range jobs {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return ErrInterrupted
			}
			ahead.Add(1)
			g.Go(func() error {
				defer ahead.Done()
				j := &jobs[i]
				flip := j.base.Role.Kind == models.Conv1D
				m := pipeline.NewMatrix(j.tuned, flip).Minus(pipeline.NewMatrix(j.base, flip))
				rows, cols := m.Dims()
				var err error
				if o.Rank > 0 {
					if o.Rank > min(rows, cols) {
						return fmt.Errorf("module %s: %w: rank %d is larger than its matrix of %d x %d allows", tensor.Quote(j.module), ErrRefused, o.Rank, rows, cols)
					}
					j.d, err = svd.Truncated(ctx, m, svd.Options{Rank: o.Rank, Seed: o.Seed})
				} else {
					j.d, err = svd.Energy(ctx, m, o.Energy, min(rows, cols), svd.Options{Seed: o.Seed})
				}
				if err != nil {
					return fmt.Errorf("module %s: %w", tensor.Quote(j.module), err)
				}
				close(j.done)
				return nil
			})
		}
		return nil
	})
	g.Go(func() error {
		var held, energy float64
		for i := range jobs {
			j := &jobs[i]
			select {
			case <-j.done:
			case <-ctx.Done():
				return ErrInterrupted
			}
			<-slots
			d := j.d
			j.d = nil
			if len(d.S) == 0 {
				continue // it does not differ
			}
			var sum float64
			for _, s := range d.S {
				sum += s * s
			}
			held, energy = held+sum, energy+d.Energy
			r.Modules = append(r.Modules, ExtractedModule{Name: j.module, Rank: len(d.S), Explained: sum / d.Energy, DeltaNorm: math.Sqrt(d.Energy), EffectiveRank: svd.EffectiveRank(d.S), Values: d.S})
			if err := w.Add(split(j.module, d)); err != nil {
				return err
			}
		}
		if energy > 0 {
			r.Explained = held / energy
		}
		return nil
	})
	return g.Wait()
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
