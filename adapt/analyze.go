package adapt

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/parallel"
	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// AnalyzeOptions say how the singular values of checkpoints and adapters are looked at.
type AnalyzeOptions struct {
	// Rank is how many leading singular values are found of a matrix whose sides are both above 1024; of any other, and
	// of an adapter, all are. 0 is 64.
	Rank int
	// Threads is how many modules are decomposed at once; 0 is one a processor.
	Threads int
}

// Check refuses what is wrong whatever is looked at.
func (o AnalyzeOptions) Check() error {
	if o.Rank < 0 {
		return fmt.Errorf("%w: rank is %d, expected 1 or more", ErrOption, o.Rank)
	}
	return nil
}

// values is how many singular values are found of a large matrix.
func (o AnalyzeOptions) values() int { return cmp.Or(o.Rank, 64) }

// AnalyzeAdapter looks at the singular values of an adapter's deltas.
func AnalyzeAdapter(ctx context.Context, a *lora.Adapter, o AnalyzeOptions) (*Analysis, error) {
	parts, err := a.Parts()
	if err != nil {
		return nil, err
	}
	r := &Analysis{Path: a.Path, Of: "adapter", Notices: a.Notices, Modules: make([]AnalyzedModule, len(parts))}
	runs := []int{0} // where the runs begin whose modules share tensors, which are then read once
	for i := 1; i < len(parts); i++ {
		if t := parts[i].A.T; t == nil || t != parts[i-1].A.T {
			runs = append(runs, i)
		}
	}
	order := new(models.Model).Order() // whose model is not known here
	err = parallel.Each(ctx, len(runs), o.Threads, func(ctx context.Context, run int) error {
		end := len(parts)
		if run+1 < len(runs) {
			end = runs[run+1]
		}
		var g lora.Spectrograph
		for i := runs[run]; i < end; i++ {
			if err := ctx.Err(); err != nil {
				return err
			}
			m := parts[i]
			s, err := g.Spectrum(a, m)
			if err != nil {
				return err
			}
			c := m.Contents()
			x := AnalyzedModule{
				Name: m.String(), Form: m.Form.String(), Shape: c.Shape, Experts: c.Experts,
				Rank: m.Rank, Alpha: m.Alpha, Scaling: m.Scaling, DoRA: m.Magnitude != nil,
				NeedsBase: s.NeedsBase, Norm: finite(s.Norm), place: order.Place(m.String()),
			}
			if s.Values != nil {
				x.SpectrumFigures = figures(s.Values, s.Norm*s.Norm, true, m.Rank)
			}
			r.Modules[i] = x
		}
		return nil
	})
	return r.finished(ctx, err)
}

// AnalyzeWeights looks at the singular values of a checkpoint's linear layers, experts and routers, and at the error
// that NF4 would make of each.
func AnalyzeWeights(ctx context.Context, c *checkpoint.Checkpoint, o AnalyzeOptions) (*Analysis, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	if err := c.CheckReadable(); err != nil {
		return nil, err
	}
	r := &Analysis{Path: c.Path, Of: "weights"}
	matrices := takeApart(c, Targets(c))
	var list []*Target
	for _, w := range c.Weights {
		if err := checkFilled(c, w); err != nil {
			return nil, err
		}
		parts := matrices[w]
		for _, t := range parts {
			if t.form() != lora.Embedding {
				list = append(list, t)
			}
		}
		if parts == nil {
			switch w.Role.Kind {
			case models.Linear, models.Conv1D, models.Expert, models.Router:
				r.LeftOut = append(r.LeftOut, w.Name)
			}
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s: %w: it has no linear layer to analyse", c.Path, ErrRefused)
	}
	r.Modules = make([]AnalyzedModule, len(list))
	order := c.Model.Order()
	err := parallel.Each(ctx, len(list), o.Threads, func(ctx context.Context, i int) (err error) {
		t := list[i]
		w, x, m := t.Weight, t.analyzed(order), t.matrix(t.Weight)
		if x.SpectrumFigures, err = spectrum(ctx, m, o.values()); err != nil {
			return failed(c, w, err)
		}
		norm := math.Sqrt(x.energy)
		x.Norm = &norm
		if isLinear(w) && !w.Decodes() && w.DType.Float() {
			low, err := checkpoint.Quantized(ctx, w, qloraNF4)
			if err != nil {
				return fmt.Errorf("%s: %w", c.Path, err)
			}
			e, err := spectrum(ctx, minus(m, t.matrix(low)), o.values())
			if err != nil {
				return failed(c, w, err)
			}
			x.NF4 = &QuantizationError{quotient(math.Sqrt(e.energy), norm), *e}
		}
		r.Modules[i] = x
		return nil
	})
	return r.finished(ctx, err)
}

// AnalyzeChange looks at the singular values of the difference of each linear layer, expert, router and embedding of
// two checkpoints, and at which other tensors differ.
func AnalyzeChange(ctx context.Context, base, tuned *checkpoint.Checkpoint, o AnalyzeOptions) (*Analysis, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	for _, c := range []*checkpoint.Checkpoint{base, tuned} {
		if err := c.CheckReadable(); err != nil {
			return nil, err
		}
	}
	r := &Analysis{Path: base.Path, Tuned: tuned.Path, Of: "change"}
	changes, err := r.compare(ctx, base, tuned)
	if err != nil {
		return r.finished(ctx, err)
	}
	r.Modules = make([]AnalyzedModule, len(changes))
	order := base.Model.Order()
	err = parallel.Each(ctx, len(changes), o.Threads, func(ctx context.Context, i int) error {
		c := changes[i]
		w, x, m := c.Weight, c.analyzed(order), c.matrix(c.Weight)
		all, err := energy(ctx, m)
		if err != nil {
			return fmt.Errorf("%s: %w", base.Path, err)
		}
		if all-all != 0 {
			return failed(base, w, svd.ErrNonFinite)
		}
		if x.SpectrumFigures, err = spectrum(ctx, minus(c.matrix(c.tuned), m), o.values()); err != nil {
			return failed(tuned, w, err)
		}
		norm, weight := math.Sqrt(x.energy), math.Sqrt(all)
		x.Norm, x.ChangeFigures = &norm, &ChangeFigures{weight, quotient(norm, weight)}
		r.Modules[i] = x
		return nil
	})
	return r.finished(ctx, err)
}

// compare pairs the matrices of two checkpoints, and tells which other tensors differ.
func (r *Analysis) compare(ctx context.Context, base, tuned *checkpoint.Checkpoint) ([]*change, error) {
	other := map[string]*checkpoint.Weight{}
	for _, y := range tuned.Weights {
		if !y.Calibration {
			other[y.Name] = y
		}
	}
	matrices := takeApart(base, Targets(base))
	var changes []*change
	var rest, restTuned checkpoint.Checkpoint // tensors that are none of them
	for _, x := range base.Weights {
		if x.Calibration {
			continue
		}
		y := other[x.Name]
		if y == nil {
			return nil, fmt.Errorf("%s: %w: there is no tensor %s, which %s has with the shape %v",
				tuned.Path, ErrRefused, tensor.Quote(x.Name), base.Path, x.Shape)
		}
		if !slices.Equal(x.Shape, y.Shape) {
			return nil, fmt.Errorf("%s: %w: tensor %s has the shape %v, expected %v as in %s",
				tuned.Path, ErrRefused, tensor.Quote(x.Name), y.Shape, x.Shape, base.Path)
		}
		delete(other, x.Name)
		if err := checkFilled(base, x); err != nil {
			return nil, err
		}
		for _, t := range matrices[x] {
			changes = append(changes, &change{Target: t, tuned: y})
		}
		if matrices[x] == nil {
			rest.Weights, restTuned.Weights = append(rest.Weights, x), append(restTuned.Weights, y)
		}
	}
	compared, err := checkpoint.Compare(ctx, &rest, &restTuned)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", base.Path, tuned.Path, err)
	}
	for _, d := range compared.Tensors {
		if d.MaxAbs > 0 {
			relative := min(d.RelRMS, math.MaxFloat64)
			r.Others = append(r.Others, ChangedTensor{Name: d.Name, Shape: d.Shape, RelativeNorm: relative})
		}
	}
	for _, y := range tuned.Weights {
		if other[y.Name] != nil {
			r.Others = append(r.Others, ChangedTensor{Name: y.Name, Shape: y.Shape, Added: true})
		}
	}
	return changes, nil
}

// finished completes an analysis whose modules are known.
func (r *Analysis) finished(ctx context.Context, err error) (*Analysis, error) {
	if ctx.Err() != nil {
		return nil, ErrInterrupted
	}
	if err != nil {
		return nil, err
	}
	r.summarise()
	return r, nil
}

// checkFilled refuses a linear layer without elements.
func checkFilled(c *checkpoint.Checkpoint, w *checkpoint.Weight) error {
	if isLinear(w) && w.Count() == 0 {
		return fmt.Errorf("%s: tensor %s: %w: its shape is %v, expected at least one element",
			c.Path, tensor.Quote(w.Name), ErrRefused, w.Shape)
	}
	return nil
}

// isLinear reports whether a weight is the whole of a linear layer's, which transformers can quantise.
func isLinear(w *checkpoint.Weight) bool {
	s := w.Role.Runtime
	return (w.Role.Kind == models.Linear || w.Role.Kind == models.Conv1D) && len(w.Shape) == 2 && holdsNumbers(w) &&
		len(s) == 1 && s[0].Whole() && strings.HasSuffix(s[0].Param, ".weight")
}

// analyzed begins what is told of a matrix of a checkpoint.
func (t *Target) analyzed(order *models.Order) AnalyzedModule {
	form := t.form().String()
	if t.Kind == models.Conv1D {
		form = models.Conv1D.String()
	}
	rows, cols := t.dims()
	return AnalyzedModule{
		Name: t.Module(), Form: form, Shape: tensor.Shape{int64(rows), int64(cols)},
		place: append(order.Place(t.stack.Param), t.part),
	}
}

// failed says of an error which tensor of which checkpoint it is about.
func failed(c *checkpoint.Checkpoint, w *checkpoint.Weight, err error) error {
	return fmt.Errorf("%s: tensor %s: %w", c.Path, tensor.Quote(w.Name), err)
}
