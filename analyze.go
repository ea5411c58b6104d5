package lorakit

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// AnalyzeOptions say how Analyze looks.
type AnalyzeOptions struct {
	// Rank is how many leading singular values are found of a matrix whose sides are both
	// above 1024; of any other, and of an adapter, all are. 0 is 64.
	Rank int
	// Threads is how many modules are decomposed at once; 0 is one a processor.
	Threads int
	// Alpha and ExpertLayout are for an adapter that leaves them open, as in Adapter.
	Alpha        float64
	ExpertLayout string
	// HTML is a file that the analysis is also written to, as a page; Force replaces it.
	HTML  string
	Force bool
}

// Analysis is what Analyze finds.
type Analysis struct {
	Path  string `json:"path"`
	Tuned string `json:"tuned,omitempty"`
	// Of is what the modules' spectra are of: "adapter" (its deltas), "change" (tuned less base) or
	// "weights".
	Of string `json:"of"`
	// Norm is the Frobenius norm over all modules that have a spectrum.
	Norm    float64          `json:"norm"`
	Modules []AnalyzedModule `json:"modules"`
	Kinds   []AnalyzedKind   `json:"kinds"`
	// Others are, of a change, the tensors that are no matrix of a layer, an expert or an embedding and differ.
	Others []ChangedTensor `json:"others,omitempty"`
	// Left are, of weights, the matrices of layers that the file holds in other pieces than the model, which are not
	// decomposed.
	Left []string `json:"left,omitempty"`
	// Notices are what was assumed of an adapter.
	Notices []string `json:"notices,omitempty"`
}

// AnalyzedModule is a linear layer, or a module of an adapter.
type AnalyzedModule struct {
	Name string `json:"name"`
	// Kind is the end of the name that modules of other layers share: "q_proj". Layer is the first number in
	// the name, -1 where there is none.
	Kind  string `json:"kind"`
	Layer int    `json:"layer"`
	Form  string `json:"form"` // linear, conv1d; of an adapter also embedding, conv, bias, replace, rows
	// Shape is (out, in) of a linear layer, (rows, width) of an embedding.
	Shape tensor.Shape `json:"shape,omitempty"`
	// Of an adapter. Stacks of experts are taken apart; Experts is set for one that cannot be, and NeedsBase
	// where only the base tells how many experts there are.
	Experts   int64   `json:"experts,omitzero"`
	Rank      int     `json:"rank,omitzero"`
	Alpha     float64 `json:"alpha,omitzero"`
	Scaling   float64 `json:"scaling,omitzero"`
	DoRA      bool    `json:"dora,omitzero"`
	NeedsBase bool    `json:"needs_base,omitzero"`
	*ChangeFigures
	// Norm is the Frobenius norm; nil where it NeedsBase, and for integers.
	Norm *float64 `json:"norm,omitempty"`
	// The spectrum, but of biases and new values.
	*SpectrumFigures
	// NF4 is, of weights that are not quantised yet and no F64, the error that NF4 with double quantisation
	// would make.
	NF4 *QuantizationError `json:"nf4,omitempty"`
}

// ChangeFigures are, of a change, the norm of the base's weight, and that of the change over it.
type ChangeFigures struct {
	WeightNorm   float64 `json:"weight_norm"`
	RelativeNorm float64 `json:"relative_norm"`
}

// SpectrumFigures say how much of a matrix how few directions hold.
type SpectrumFigures struct {
	// EffectiveRank is the exponential of the entropy of s/sum(s) over the singular values s:
	// n for n equal ones. Where not Complete, it is that of the leading ones, and at most that of all.
	EffectiveRank float64 `json:"effective_rank"`
	// StableRank is the squared norm over the square of the largest singular value.
	StableRank float64 `json:"stable_rank"`
	// Complete is whether Values are all that are not zero.
	Complete bool `json:"complete"`
	// Needed has the smallest ranks that hold 50, 90, 95 and 99 % of the squared norm; a share that
	// Values do not reach is not listed.
	Needed []RankShare `json:"needed"`
	// Kept has the share that the leading 1, 2, 4, … values hold.
	Kept   []RankShare `json:"kept"`
	Values []float64   `json:"singular_values"`

	energy float64
}

// RankShare says that so many singular values hold that share of the squared norm.
type RankShare struct {
	Rank  int     `json:"rank"`
	Share float64 `json:"share"`
}

// QuantizationError is what quantising makes of a weight, and how much of that an adapter could
// take back (attach with the init compensate).
type QuantizationError struct {
	RelativeError float64 `json:"relative_error"`
	SpectrumFigures
}

// AnalyzedKind is the mean over the modules of a kind that have a spectrum; Kept over those that are not zero.
type AnalyzedKind struct {
	Kind    string  `json:"kind"`
	Modules int     `json:"modules"`
	Norm    float64 `json:"norm"`
	*ChangeFigures
	EffectiveRank float64     `json:"effective_rank"`
	Complete      bool        `json:"complete"`
	Kept          []RankShare `json:"kept"`
	NF4Error      float64     `json:"nf4_error,omitzero"`
	NF4Kept       []RankShare `json:"nf4_kept,omitempty"`
}

// ChangedTensor is a tensor that differs; RelativeNorm is the norm of the change over that of the
// base's values, and Added is set where the base has none.
type ChangedTensor struct {
	Name         string       `json:"name"`
	Shape        tensor.Shape `json:"shape"`
	RelativeNorm float64      `json:"relative_norm"` // 0 where Added
	Added        bool         `json:"added,omitzero"`
}

const (
	defaultValues = 64
	// missing is the share of their energy that the leading values may miss: spectra that are looked at are
	// often flat, as that of a weight or of what rounding does. In white noise the last of 64 values is found
	// 0.6 % too small; the default finds it to 0.01 % and takes half as long again.
	missing = 1e-2
)

// Analyze looks at the singular values of an adapter's deltas, of a checkpoint's linear layers, or
// where tuned is not empty of the change from one checkpoint to the other. Of a checkpoint it also says what
// error NF4 would make.
func Analyze(ctx context.Context, path, tuned string, o AnalyzeOptions) (*Analysis, error) {
	if o.Rank < 0 {
		return nil, fmt.Errorf("%w: rank is %d, expected 1 or more", ErrOption, o.Rank)
	}
	o.Rank = cmp.Or(o.Rank, defaultValues)
	if o.HTML != "" {
		for _, src := range []string{path, cmp.Or(tuned, path)} {
			if err := checkPage(src, o.HTML, o.Force); err != nil {
				return nil, err
			}
		}
	}
	r := &Analysis{Path: path, Tuned: tuned, Modules: []AnalyzedModule{}}
	var err error
	switch {
	case tuned != "":
		for _, p := range []string{path, tuned} {
			if IsAdapter(p) {
				return nil, fmt.Errorf("%s: %w: it is an adapter, expected a checkpoint; the change from one checkpoint to another is analysed, or an adapter alone", p, ErrRefused)
			}
		}
		r.Of = "change"
		err = r.change(ctx, o)
	case IsAdapter(path):
		r.Of = "adapter"
		err = r.adapter(ctx, o)
	default:
		r.Of = "weights"
		err = r.weights(ctx, o)
	}
	if ctx.Err() != nil {
		return nil, ErrInterrupted
	}
	if err != nil {
		return nil, err
	}
	r.summarise()
	if o.HTML != "" {
		return r, r.writePage(o.HTML, o.Force)
	}
	return r, nil
}

// each calls f for the numbers below n, several at once.
func each(ctx context.Context, n, threads int, f func(ctx context.Context, i int) error) error {
	if threads <= 0 {
		threads = runtime.GOMAXPROCS(0)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(threads)
	for i := range n {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			return f(ctx, i)
		})
	}
	return g.Wait()
}

// adapter looks at each module of an adapter.
func (r *Analysis) adapter(ctx context.Context, o AnalyzeOptions) error {
	list, closeAll, err := openAlone([]Adapter{{Path: r.Path, Alpha: o.Alpha, ExpertLayout: o.ExpertLayout}})
	if err != nil {
		return err
	}
	defer closeAll()
	a := list[0].Adapter
	parts, err := a.Parts()
	if err != nil {
		return err
	}
	r.Notices = a.Notices
	r.Modules = make([]AnalyzedModule, len(parts))
	starts := []int{0} // of runs that share tensors, which are then read once
	for i := 1; i < len(parts); i++ {
		if t := parts[i].A.T; t == nil || t != parts[i-1].A.T {
			starts = append(starts, i)
		}
	}
	return each(ctx, len(starts), o.Threads, func(ctx context.Context, run int) error {
		var g lora.Spectrograph
		for i := starts[run]; i < len(parts) && (run+1 == len(starts) || i < starts[run+1]); i++ {
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
				Rank: m.Rank, Alpha: m.Alpha, Scaling: m.Scaling, DoRA: m.Magnitude != nil, NeedsBase: s.NeedsBase,
				Norm: number(s.Norm),
			}
			if s.Values != nil {
				x.SpectrumFigures = figures(s.Values, s.Norm*s.Norm, true, m.Rank)
			}
			r.Modules[i] = x
		}
		return nil
	})
}

// weights looks at each linear layer, and at what NF4 makes of it.
func (r *Analysis) weights(ctx context.Context, o AnalyzeOptions) error {
	c, err := checkpoint.Open(ctx, r.Path)
	if err != nil {
		return err
	}
	defer c.Close()
	var list []extraction
	for _, w := range c.Weights {
		if err := r.filled(r.Path, w); err != nil {
			return err
		}
		parts := matrices(w, kindFor(c, w))
		for _, p := range parts {
			if p.form != lora.Embedding {
				p.base = w
				list = append(list, p)
			}
		}
		if k := w.Role.Kind; parts == nil && (k == models.Linear || k == models.Conv1D || k == models.Expert || k == models.Router) {
			r.Left = append(r.Left, w.Name)
		}
	}
	if len(list) == 0 {
		return fmt.Errorf("%s: %w: it has no linear layer to analyse", r.Path, ErrRefused)
	}
	r.Modules = make([]AnalyzedModule, len(list))
	return each(ctx, len(list), o.Threads, func(ctx context.Context, i int) error {
		j := &list[i]
		w, x, whole, err := j.base, j.analyzed(), j.matrix(j.base), error(nil)
		if x.SpectrumFigures, err = spectrum(ctx, whole, o.Rank); err != nil {
			return r.failed(r.Path, w, err)
		}
		norm := math.Sqrt(x.energy)
		x.Norm = &norm
		if _, all := linear(w); all && w.Decoder == nil && w.DType.Float() {
			low, err := checkpoint.Quantized(ctx, w, qloraNF4)
			if err != nil {
				return fmt.Errorf("%s: %w", r.Path, err)
			}
			e, err := spectrum(ctx, whole.Minus(j.matrix(low)), o.Rank)
			if err != nil {
				return r.failed(r.Path, w, err)
			}
			x.NF4 = &QuantizationError{over(math.Sqrt(e.energy), norm), *e}
		}
		r.Modules[i] = x
		return nil
	})
}

// change looks at the difference of each linear layer, and which other tensors differ.
func (r *Analysis) change(ctx context.Context, o AnalyzeOptions) error {
	a, err := checkpoint.Open(ctx, r.Path)
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := checkpoint.Open(ctx, r.Tuned)
	if err != nil {
		return err
	}
	defer b.Close()
	other := map[string]*checkpoint.Weight{}
	for _, y := range b.Weights {
		other[y.Name] = y
	}
	var pairs []extraction
	var rest, restTuned checkpoint.Checkpoint // tensors of no linear layer
	for _, x := range a.Weights {
		y := other[x.Name]
		if y == nil {
			return fmt.Errorf("%s: %w: there is no tensor %s, which %s has with the shape %v", r.Tuned, ErrRefused, tensor.Quote(x.Name), r.Path, x.Shape)
		}
		if !slices.Equal(x.Shape, y.Shape) {
			return fmt.Errorf("%s: %w: tensor %s has the shape %v, expected %v as in %s", r.Tuned, ErrRefused, tensor.Quote(x.Name), y.Shape, x.Shape, r.Path)
		}
		delete(other, x.Name)
		if err := r.filled(r.Path, x); err != nil {
			return err
		}
		parts := matrices(x, kindFor(a, x))
		for _, p := range parts {
			p.base, p.tuned = x, y
			pairs = append(pairs, p)
		}
		if parts == nil {
			rest.Weights, restTuned.Weights = append(rest.Weights, x), append(restTuned.Weights, y)
		}
	}
	compared, err := checkpoint.Compare(ctx, &rest, &restTuned)
	if err != nil {
		return fmt.Errorf("%s and %s: %w", r.Path, r.Tuned, err)
	}
	for _, d := range compared.Tensors {
		if d.MaxAbs > 0 {
			r.Others = append(r.Others, ChangedTensor{Name: d.Name, Shape: d.Shape, RelativeNorm: min(d.RelRMS, math.MaxFloat64)})
		}
	}
	for _, y := range b.Weights {
		if other[y.Name] != nil {
			r.Others = append(r.Others, ChangedTensor{Name: y.Name, Shape: y.Shape, Added: true})
		}
	}
	r.Modules = make([]AnalyzedModule, len(pairs))
	return each(ctx, len(pairs), o.Threads, func(ctx context.Context, i int) error {
		j := &pairs[i]
		w, x, whole := j.base, j.analyzed(), j.matrix(j.base)
		energy, err := whole.Energy()
		if err != nil {
			return fmt.Errorf("%s: %w", r.Path, err)
		}
		if energy-energy != 0 {
			return r.failed(r.Path, w, svd.ErrNonFinite)
		}
		if x.SpectrumFigures, err = spectrum(ctx, j.matrix(j.tuned).Minus(whole), o.Rank); err != nil {
			return r.failed(r.Tuned, w, err)
		}
		norm := math.Sqrt(x.energy)
		weight := math.Sqrt(energy)
		x.Norm, x.ChangeFigures = &norm, &ChangeFigures{weight, over(norm, weight)}
		r.Modules[i] = x
		return nil
	})
}

// filled refuses a linear layer without elements.
func (r *Analysis) filled(path string, w *checkpoint.Weight) error {
	if _, ok := linear(w); ok && w.Count() == 0 {
		return fmt.Errorf("%s: tensor %s: %w: its shape is %v, expected at least one element", path, tensor.Quote(w.Name), ErrRefused, w.Shape)
	}
	return nil
}

// analyzed begins what is told of a matrix of a checkpoint.
func (j *extraction) analyzed() AnalyzedModule {
	form := j.form.String()
	if j.flip {
		form = models.Conv1D.String()
	}
	return AnalyzedModule{Name: j.module, Form: form, Shape: tensor.Shape{int64(j.rows), int64(j.cols)}}
}

func (r *Analysis) failed(path string, w *checkpoint.Weight, err error) error {
	return fmt.Errorf("%s: tensor %s: %w", path, tensor.Quote(w.Name), err)
}

// spectrum finds the singular values of a matrix, all or the leading ones.
func spectrum(ctx context.Context, m svd.Matrix, rank int) (*SpectrumFigures, error) {
	rows, cols := m.Dims()
	s, err := svd.Values(ctx, m, svd.Options{Rank: min(rank, rows, cols), Missing: missing})
	if err != nil {
		return nil, err
	}
	// Of a matrix of low rank the leading values may be all: what is left out is zero.
	complete := s.Complete || len(s.S) < min(rank, rows, cols)
	if zero := slices.Index(s.S, 0); zero >= 0 {
		s.S = s.S[:zero]
	}
	return figures(s.S, s.Energy, complete, min(rows, cols)), nil
}

// figures makes what is told of singular values; energy is the squared norm, and rank what
// there could be of them.
func figures(values []float64, energy float64, complete bool, rank int) *SpectrumFigures {
	if values == nil {
		values = []float64{}
	}
	f := &SpectrumFigures{
		EffectiveRank: svd.EffectiveRank(values), StableRank: svd.StableRank(values, energy),
		Complete: complete, Needed: []RankShare{}, Kept: []RankShare{}, Values: values, energy: energy,
	}
	if energy == 0 {
		return f
	}
	for _, share := range []float64{0.5, 0.9, 0.95, 0.99} {
		if k := svd.RankFor(values, energy, share); k <= len(values) {
			f.Needed = append(f.Needed, RankShare{k, share})
		}
	}
	if !complete {
		rank = len(values)
	}
	for _, k := range doublings(rank) {
		f.Kept = append(f.Kept, RankShare{k, f.keptBy(k)})
	}
	return f
}

// doublings are 1, 2, 4, … and last n.
func doublings(n int) []int {
	var list []int
	for k := 1; k < n; k *= 2 {
		list = append(list, k)
	}
	return append(list, n)
}

// keptBy is the share of the squared norm that the k leading values hold.
func (f *SpectrumFigures) keptBy(k int) float64 {
	var sum float64
	for _, v := range f.Values[:min(k, len(f.Values))] {
		sum += float64(v * v)
	}
	return min(sum/f.energy, 1)
}

// over is a quotient of norms that JSON can hold: 0 of 0 is 0.
func over(a, b float64) float64 {
	if a == 0 {
		return 0
	}
	return min(a/b, math.MaxFloat64)
}

// number is nil for what is none.
func number(x float64) *float64 {
	if x-x != 0 {
		return nil
	}
	return &x
}

// summarise names the kinds of the modules and takes the means over each.
func (r *Analysis) summarise() {
	patterns := make([]string, len(r.Modules))
	for i := range r.Modules {
		m := &r.Modules[i]
		patterns[i], m.Layer = pattern(m.Name)
	}
	kinds := shortest(patterns)
	byKind := map[string][]*AnalyzedModule{}
	var order []string
	var energy float64
	for i := range r.Modules {
		m := &r.Modules[i]
		m.Kind = kinds[patterns[i]]
		if m.SpectrumFigures == nil {
			continue
		}
		energy += m.energy
		if byKind[m.Kind] == nil {
			order = append(order, m.Kind)
		}
		byKind[m.Kind] = append(byKind[m.Kind], m)
	}
	r.Norm = math.Sqrt(energy)
	r.Kinds = []AnalyzedKind{}
	for _, kind := range order {
		list := byKind[kind]
		k := AnalyzedKind{Kind: kind, Modules: len(list), Complete: true}
		var spectra, errors []*SpectrumFigures
		if r.Of == "change" {
			k.ChangeFigures = &ChangeFigures{}
		}
		n := float64(len(list))
		for _, m := range list {
			k.Norm += *m.Norm / n
			if m.ChangeFigures != nil {
				k.WeightNorm += m.WeightNorm / n
				k.RelativeNorm += m.RelativeNorm / n
			}
			k.EffectiveRank += m.EffectiveRank / n
			k.Complete = k.Complete && m.Complete
			spectra = append(spectra, m.SpectrumFigures)
			if m.NF4 != nil {
				k.NF4Error += m.NF4.RelativeError / n
				errors = append(errors, &m.NF4.SpectrumFigures)
			}
		}
		k.Kept = meanKept(spectra)
		if len(errors) > 0 {
			k.NF4Kept = meanKept(errors)
		}
		r.Kinds = append(r.Kinds, k)
	}
}

// meanKept is the mean of what ranks hold of spectra that are not zero, as far as all of them are known.
func meanKept(list []*SpectrumFigures) []RankShare {
	list = slices.DeleteFunc(list, func(f *SpectrumFigures) bool { return f.energy == 0 })
	all, known := 0, math.MaxInt
	for _, f := range list {
		last := f.Kept[len(f.Kept)-1].Rank
		all = max(all, last)
		if !f.Complete {
			known = min(known, last)
		}
	}
	shares := []RankShare{}
	if len(list) == 0 {
		return shares
	}
	for _, k := range doublings(min(all, known)) {
		x := RankShare{Rank: k}
		for _, f := range list {
			x.Share += f.keptBy(k) / float64(len(list))
		}
		shares = append(shares, x)
	}
	return shares
}

// pattern is a name with stars for the numbers in it, and the first of them, or -1.
func pattern(name string) (string, int) {
	parts := strings.Split(name, ".")
	layer := -1
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 10, 31)
		if err != nil {
			continue
		}
		if parts[i] = "*"; layer < 0 {
			layer = int(n)
		}
	}
	return strings.Join(parts, "."), layer
}

// shortest finds for each pattern the shortest end of it that no other has, and that begins with
// a name: "q_proj", but "attn.c_proj" beside "mlp.c_proj".
func shortest(patterns []string) map[string]string {
	const most = 8 // parts; what is longer is taken whole
	kinds := map[string]string{}
	holders := map[string]int{} // of an end, how many patterns have it
	ends := func(p string, f func(end string) bool) {
		at := len(p)
		for range most {
			at = strings.LastIndexByte(p[:at], '.')
			if end := p[at+1:]; !strings.HasPrefix(end, "*") && !f(end) || at < 0 {
				return
			}
		}
	}
	for _, p := range patterns {
		if _, ok := kinds[p]; !ok {
			kinds[p] = p
			ends(p, func(end string) bool { holders[end]++; return true })
		}
	}
	for p := range kinds {
		ends(p, func(end string) bool {
			if holders[end] > 1 {
				return true
			}
			kinds[p] = end
			return false
		})
	}
	return kinds
}
