package lora

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/svd"
	"github.com/lorakit/lorakit/tensor"
)

// CombineOptions say how Combine makes one adapter of several, by the rules of PEFT's
// add_weighted_adapter.
type CombineOptions struct {
	Type         string  // one of CombineTypes; a single adapter is always taken linearly
	Density      float64 // share of the values that pruning leaves, in (0, 1]
	MajoritySign string  // "total" (or empty) or "frequency"
	Rank         int     // of the svd types; 0 is the largest of the adapters
	Seed         uint64  // of the dare types
}

// CombineTypes lists the types of combination.
func CombineTypes() []string {
	return []string{"linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd",
		"dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"}
}

// contribution is a module of one of the adapters that are combined.
type contribution struct {
	adapter int
	a, b    kernels.Mat
	scale   float64 // weight * scaling
	weight  float64
	scaling float64
}

// Combine calls emit with each module of the combination, in the order of names. A module that some adapters have not
// is combined of those that have it; stacks of experts are combined expert by expert. Everything that the headers tell
// is checked before the first module is emitted; the values of one module at a time are in memory.
//
// A weight may be zero or negative, as in PEFT: the sign goes to A. What replaces a part of the base is
// not emitted: see Replacements.
func Combine(ctx context.Context, adapters []Weighted, o CombineOptions, emit func(Trained) error) error {
	if len(adapters) == 0 {
		return fmt.Errorf("%w: no adapter to combine, expected one or more", ErrUnsupported)
	}
	if err := o.Check(); err != nil {
		return err
	}
	if len(adapters) == 1 {
		if o.Rank != 0 {
			return fmt.Errorf("%s: %w: rank %d for a single adapter, whose rank only a resize changes", adapters[0].Path,
				ErrUnsupported, o.Rank)
		}
		o = CombineOptions{Type: "linear"}
	}
	sources, err := o.sources(adapters)
	if err != nil {
		return err
	}
	rank := o.Rank
	if rank == 0 {
		for _, a := range adapters {
			rank = max(rank, a.largestRank())
		}
	}
	var read Writer
	for _, name := range slices.Sorted(maps.Keys(sources)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		var list []contribution
		for _, s := range sources[name] {
			a, b, err := read.factors(adapters[s.adapter].Adapter, s.module)
			if err != nil {
				return err
			}
			w := adapters[s.adapter].Weight
			list = append(list, contribution{s.adapter, a, b, w * s.module.Scaling, w, s.module.Scaling})
		}
		t, err := o.combine(ctx, name, list, rank)
		if err != nil {
			return fmt.Errorf("module %s: %w", tensor.Quote(name), err)
		}
		for _, values := range [][]float32{t.A.Data, t.B.Data} {
			if i := slices.IndexFunc(values, func(v float32) bool { return v-v != 0 }); i >= 0 {
				return fmt.Errorf("module %s: %w: the combination has the value %v, expected finite numbers; its weights or "+
					"scalings are too large", tensor.Quote(name), ErrUnsupported, values[i])
			}
		}
		m := sources[name][0].module
		t.Name, t.Component, t.Form, t.Kernel = name, m.Component, m.Form, m.Kernel
		t.Parameter, t.turned = m.Parameter, m.turned
		if err := emit(t); err != nil {
			return err
		}
	}
	return nil
}

// Replacements lists what goes with a combination of adapters as it is: new values of the base's weights and rows, and
// the base's own matrices that PEFT stores beside an adapter of an embedding. Adapters that bring different ones are
// an error, since one result cannot be for both. A new value is no delta, so it does not follow the weight of its
// adapter, which the notices say.
func Replacements(adapters []Weighted) (list []*Module, notices []string, err error) {
	type part struct {
		name string
		form Form // rows may be trained beside a copy of the base's own matrix
	}
	from := map[*Module]int{}
	byName := map[part]*Module{}
	naming, err := namingOf(adapters)
	if err != nil {
		return nil, nil, err
	}
	for i, a := range adapters {
		modules, err := naming(a.Adapter, a.Modules)
		if err != nil {
			return nil, nil, a.named(err)
		}
		for _, m := range modules {
			if m.Form != Replace && m.Form != Rows {
				continue
			}
			if a.Weight != 1 && !m.Base {
				notices = append(notices, fmt.Sprintf("%s of %s is taken as it is, whatever the weight %g of its adapter: %s",
					m.String(), a.Path, a.Weight, m.what()))
			}
			at := part{m.String(), m.Form}
			from[m] = i
			if o := byName[part{at.name, Replace + Rows - m.Form}]; o != nil && from[o] != i && !o.Base && !m.Base {
				return nil, nil, fmt.Errorf("%s: module %s: %w: %s, where an adapter before it has %s", a.Path,
					tensor.Quote(at.name), ErrBase, m.what(), o.what())
			}
			first := byName[at]
			if first == nil {
				byName[at] = m
				continue
			}
			same, err := sameBytes(first.Value, m.Value)
			if err != nil {
				return nil, nil, a.named(err)
			}
			if !same || !slices.Equal(first.Indices, m.Indices) {
				return nil, nil, fmt.Errorf("%s: module %s: %w: it brings another value than an adapter before it", a.Path,
					tensor.Quote(m.String()), ErrBase)
			}
		}
	}
	for _, at := range slices.SortedFunc(maps.Keys(byName),
		func(x, y part) int { return cmp.Or(strings.Compare(x.name, y.name), cmp.Compare(x.form, y.form)) }) {
		list = append(list, byName[at])
	}
	return list, notices, nil
}

// Tied reports whether all of the adapters that adapt an embedding or an output head keep the two tied, and one does.
func Tied(adapters []Weighted) bool {
	tied := false
	for _, a := range adapters {
		ends := slices.ContainsFunc(a.Modules, func(m *Module) bool { return m.Form == Embedding || m.isHead() })
		if ends && !a.Config.EnsureTie {
			return false
		}
		tied = tied || ends
	}
	return tied
}

// source is a module of the adapter with that number.
type source struct {
	adapter int
	module  *Module
}

// sources finds the modules to combine, by name, and checks that they go together.
func (o *CombineOptions) sources(adapters []Weighted) (map[string][]source, error) {
	byName := map[string][]source{}
	if err := o.plainBase(adapters); err != nil {
		return nil, err
	}
	naming, err := namingOf(adapters)
	if err != nil {
		return nil, err
	}
	for i, a := range adapters {
		if w := a.Weight; math.IsNaN(w) || math.IsInf(w, 0) {
			return nil, fmt.Errorf("%s: %w: weight %v, expected a finite number", a.Path, ErrUnsupported, w)
		}
		list, err := plainModules(a.Adapter, naming)
		if err != nil {
			return nil, err
		}
		for _, m := range list {
			byName[m.Name] = append(byName[m.Name], source{i, m})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		first := byName[name][0]
		m, path := first.module, adapters[first.adapter].Path
		if err := o.bounded(m); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		for _, s := range byName[name][1:] {
			n, other := s.module, adapters[s.adapter].Path
			if n.Form != m.Form || !slices.Equal(n.Kernel, m.Kernel) || n.A.Cols != m.A.Cols || n.B.Rows != m.B.Rows {
				return nil, fmt.Errorf("%s: module %s: %w: %s with lora_A %v and lora_B %v, where %s has %s with %v and %v", other,
					tensor.Quote(name), ErrBase, n.Form, n.A, n.B, path, m.Form, m.A, m.B)
			}
			if o.sameRank() && n.Rank != m.Rank {
				return nil, fmt.Errorf("%s: module %s: %w: its rank is %d and that of %s is %d; %s needs equal ranks, cat and svd "+
					"do not", other, tensor.Quote(name), ErrUnsupported, n.Rank, path, m.Rank, o.Type)
			}
		}
	}
	return byName, nil
}

// maxDense bounds the elements of a delta that is built whole: factors of a few megabytes can have a product that no
// machine holds.
const maxDense = 1 << 31

// bounded refuses a module whose delta would have to be built whole and is too large.
func (o *CombineOptions) bounded(m *Module) error {
	if rows, cols := m.B.Rows, m.A.Cols; o.dense() && rows > 0 && cols > maxDense/rows {
		return fmt.Errorf("module %s: %w: %s needs its whole delta of %d x %d, expected at most %d elements",
			tensor.Quote(m.Name), ErrUnsupported, o.Type, rows, cols, maxDense)
	}
	return nil
}

// largestRank is the largest rank of an adapter or of its rank_pattern, used or not.
func (a *Adapter) largestRank() int {
	rank := a.Config.Rank
	for _, p := range a.Config.ranks.list {
		rank = max(rank, int(min(p.value, math.MaxInt32)))
	}
	for _, m := range a.Modules {
		rank = max(rank, m.Rank)
	}
	return rank
}

// Check refuses options that are wrong whatever the adapters.
func (o *CombineOptions) Check() error {
	switch {
	case !slices.Contains(CombineTypes(), o.Type):
		return fmt.Errorf("%w: type %s of combination; known are %s", ErrUnsupported, tensor.Quote(o.Type),
			choices(o.Type, CombineTypes()))
	case o.prunes() && !(o.Density > 0 && o.Density <= 1):
		return fmt.Errorf("%w: density %v for %s, expected more than 0 and at most 1", ErrUnsupported, o.Density, o.Type)
	case !o.prunes() && o.Density != 0:
		return fmt.Errorf("%w: density %v for %s, which prunes nothing", ErrUnsupported, o.Density, o.Type)
	case !slices.Contains([]string{"", "total", "frequency"}, o.MajoritySign):
		return fmt.Errorf("%w: majority sign %s; known are %s", ErrUnsupported, tensor.Quote(o.MajoritySign),
			choices(o.MajoritySign, []string{"total", "frequency"}))
	case o.MajoritySign != "" && !strings.Contains(o.Type, "ties"):
		return fmt.Errorf("%w: a majority sign for %s, which elects none", ErrUnsupported, o.Type)
	case o.Rank != 0 && !strings.HasSuffix(o.Type, "svd"):
		return fmt.Errorf("%w: a rank for %s; that of the result follows from the adapters", ErrUnsupported, o.Type)
	case o.Rank < 0:
		return fmt.Errorf("%w: rank %d, expected 1 or more", ErrUnsupported, o.Rank)
	}
	return nil
}

func (o *CombineOptions) prunes() bool {
	return o.Type != "linear" && o.Type != "cat" && o.Type != "svd"
}

func (o *CombineOptions) sameRank() bool {
	return o.Type != "cat" && !strings.HasSuffix(o.Type, "svd")
}

// dense reports whether the type works on whole deltas, not on factors.
func (o *CombineOptions) dense() bool { return strings.HasSuffix(o.Type, "_svd") }

// plainBase refuses adapters whose combination would not be for the base as it is. Where one has taken its start
// out of the base, that is so if the weights, of the start among them, sum up to zero: what it took out, it adds again.
func (o *CombineOptions) plainBase(adapters []Weighted) error {
	var sum, size float64
	for _, a := range adapters {
		sum, size = sum+a.Weight, size+math.Abs(a.Weight)
	}
	whole := math.Abs(sum) <= 1e-9*size && (o.Type == "cat" || o.Type == "svd") // the other types are no sums
	for _, a := range adapters {
		if err := a.Config.always(); err != nil {
			return a.named(err)
		}
		if err := a.Config.plainBase(); err != nil && !(whole && a.Config.subtracts()) {
			return a.named(err)
		}
	}
	return nil
}

// plainModules lists the modules of an adapter that are plain matrices, single experts of stacks among
// them; Replacements are left out, and any other is refused.
func plainModules(a *Adapter, naming naming) ([]*Module, error) {
	all, err := a.apart()
	if err == nil {
		all, err = naming(a, all)
	}
	if err != nil {
		return nil, a.named(err)
	}
	var list []*Module
	adapted := map[string]bool{}
	for _, m := range all {
		what := ""
		switch {
		case m.Form == Replace || m.Form == Rows:
			continue
		case m.Magnitude != nil:
			what = "DoRA"
		case m.A.T == nil:
			what = m.what()
		}
		if what != "" {
			return nil, fmt.Errorf("%s: module %s: %w: %s cannot be combined, expected plain matrices", a.Path,
				tensor.Quote(m.String()), ErrUnsupported, what)
		}
		list = append(list, m)
		adapted[m.Name] = true
	}
	for _, m := range all {
		if m.Base && !adapted[m.Name] {
			return nil, fmt.Errorf("%s: module %s: %w: a matrix of the base with no lora_A and lora_B beside it", a.Path,
				tensor.Quote(m.Name), ErrUnsupported)
		}
	}
	return list, nil
}

// factors reads A (r x in) and B (out x r) of a plain module, each by rows. What w has read of the tensors that
// experts share is not read again.
func (w *Writer) factors(a *Adapter, m *Module) (fa, fb kernels.Mat, err error) {
	for _, f := range []struct {
		from Matrix
		to   *kernels.Mat
	}{{m.A, &fa}, {m.B, &fb}} {
		v, err := w.Values(Output{Info: f.from.T.Info, From: f.from, Scale: 1})
		if err != nil {
			return fa, fb, a.named(err)
		}
		*f.to = kernels.MatOf(v, int(f.from.Rows), int(f.from.Cols))
	}
	return fa, fb, nil
}

// combine makes a module of its contributions; rank is for the svd types, and cut to what the matrix has.
func (o *CombineOptions) combine(ctx context.Context, name string, list []contribution, rank int) (Trained, error) {
	rows, cols := list[0].b.Rows, list[0].a.Cols
	rank = min(rank, rows, cols)
	switch {
	case o.Type == "cat":
		return concatenate(list, func(c contribution, a float32) float32 {
			return float32(float32(a*float32(c.weight)) * float32(c.scaling))
		}), nil
	case o.Type == "svd":
		whole := concatenate(list, func(c contribution, a float32) float32 { return float32(a * float32(c.scale)) })
		d, err := svd.Product(whole.B, whole.A)
		if err != nil {
			return Trained{}, err
		}
		return leading(d, rank), nil
	case o.dense():
		sum, err := o.deltas(ctx, name, list)
		if err != nil {
			return Trained{}, err
		}
		d, err := svd.Truncated(ctx, svd.Dense(sum, rows, cols), svd.Options{Rank: rank, Product: prunedProduct})
		if err != nil {
			return Trained{}, err
		}
		return leading(d, rank), nil
	}
	var as, bs [][]float32
	var wa, wb []float64
	for _, c := range list {
		root := math.Sqrt(math.Abs(c.scale))
		o.sparsify(c.a.Data, c.adapter, name, "A")
		o.sparsify(c.b.Data, c.adapter, name, "B")
		as, bs, wb = append(as, c.a.Data), append(bs, c.b.Data), append(wb, root)
		wa = append(wa, math.Copysign(root, c.scale))
	}
	c := list[0]
	return Trained{A: kernels.MatOf(o.mix(as, wa), c.a.Rows, c.a.Cols),
		B: kernels.MatOf(o.mix(bs, wb), c.b.Rows, c.b.Cols), Rank: c.a.Rows}, nil
}

// prunedProduct bounds the error of a pruned sum's leading part, relative to the sum. PEFT decomposes it exactly, and
// pruning leaves a flat tail, in which a rank may cut between values that are close together.
const prunedProduct = 1e-6

// deltas combines whole deltas.
func (o *CombineOptions) deltas(ctx context.Context, name string, list []contribution) ([]float32, error) {
	var tasks [][]float32
	var weights []float64
	for _, c := range list {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		delta := kernels.NewMat(c.b.Rows, c.a.Cols)
		kernels.MulAdd(delta, c.b, c.a)
		for i := range delta.Data {
			delta.Data[i] *= float32(c.scaling)
			if v := delta.Data[i]; v-v != 0 {
				return nil, fmt.Errorf("%w: the delta of adapter %d has the value %v, expected finite numbers", ErrMalformed,
					c.adapter+1, v)
			}
		}
		o.sparsify(delta.Data, c.adapter, name, "delta")
		tasks, weights = append(tasks, delta.Data), append(weights, c.weight)
	}
	return o.mix(tasks, weights), nil
}

// concatenate stacks factors, so that ranks add up; A is scaled.
func concatenate(list []contribution, scaled func(contribution, float32) float32) Trained {
	rank := 0
	for _, c := range list {
		rank += c.a.Rows
	}
	t := Trained{Rank: rank, A: kernels.NewMat(rank, list[0].a.Cols), B: kernels.NewMat(list[0].b.Rows, rank)}
	at := 0
	for _, c := range list {
		for i, v := range c.a.Data {
			t.A.Data[at*c.a.Cols+i] = scaled(c, v)
		}
		for i := range c.b.Rows {
			copy(t.B.Data[i*rank+at:], c.b.Data[i*c.b.Cols:(i+1)*c.b.Cols])
		}
		at += c.a.Rows
	}
	return t
}

// leading makes a module of the leading singular values, all on B as PEFT does. A rank that a matrix does not have is
// filled with zeros.
func leading(d *svd.Decomposition, rank int) Trained {
	t := Trained{Rank: rank, A: kernels.NewMat(rank, d.V.Rows), B: kernels.NewMat(d.U.Rows, rank)}
	for q := range min(rank, len(d.S)) {
		for i := range d.U.Rows {
			t.B.Data[i*rank+q] = float32(float64(d.U.Data[i*d.U.RowStride+q*d.U.ColStride]) * d.S[q])
		}
		for i := range d.V.Rows {
			t.A.Data[q*d.V.Rows+i] = d.V.Data[i*d.V.RowStride+q*d.V.ColStride]
		}
	}
	return t
}

// sparsify prunes t in place, as the type says.
func (o *CombineOptions) sparsify(t []float32, adapter int, name, factor string) {
	switch {
	case !o.prunes() || o.Density >= 1:
	case strings.HasPrefix(o.Type, "dare"):
		o.drop(t, adapter, name, factor)
	default:
		prune(t, o.Density)
	}
}

// mix adds pruned tensors up by the rules of PEFT's merge_utils: for the ties types elect the sign of each element on
// the values without their weights (Yadav et al., "TIES-Merging", 2023), leave out what has another one, weigh, add,
// and divide by how many agree; else weigh and add.
func (o *CombineOptions) mix(tensors [][]float32, weights []float64) []float32 {
	sum := make([]float32, len(tensors[0]))
	ties := strings.Contains(o.Type, "ties")
	for k := range sum {
		var majority, total float32
		if ties {
			for _, t := range tensors {
				if o.MajoritySign == "frequency" {
					majority += sign(t[k])
				} else {
					majority += t[k]
				}
			}
			if majority >= 0 {
				majority = 1
			} else {
				majority = -1
			}
		}
		agree := 0
		for i, t := range tensors {
			if ties && sign(t[k]) != majority {
				continue
			}
			agree++
			total += float32(t[k] * float32(weights[i]))
		}
		if ties {
			total /= float32(max(agree, 1))
		}
		sum[k] = total
	}
	return sum
}

func sign(x float32) float32 {
	switch {
	case x > 0:
		return 1
	case x < 0:
		return -1
	}
	return 0
}

// prune sets all to zero but the share density of the largest magnitudes, the first of equals. Magnitudes are in the
// order of their bits, so two counts of 16 bits each find the smallest that is kept.
func prune(t []float32, density float64) {
	keep := int(density * float64(len(t)))
	if keep == 0 {
		clear(t)
		return
	}
	magnitude := func(v float32) uint32 { return math.Float32bits(v) &^ (1 << 31) }
	// at finds where the count from the top reaches n, and how many of that value it takes.
	at := func(counts []int, n int) (uint32, int) {
		i := len(counts) - 1
		for ; counts[i] < n; i-- {
			n -= counts[i]
		}
		return uint32(i), n
	}
	upper, lower := make([]int, 1<<15), make([]int, 1<<16)
	for _, v := range t {
		upper[magnitude(v)>>16]++
	}
	high, rest := at(upper, keep)
	for _, v := range t {
		if m := magnitude(v); m>>16 == high {
			lower[m&0xffff]++
		}
	}
	low, equals := at(lower, rest)
	smallest := high<<16 | low
	for i, v := range t {
		switch m := magnitude(v); {
		case m > smallest:
		case m == smallest && equals > 0:
			equals--
		default:
			t[i] = 0
		}
	}
}

// drop keeps each value with the probability of the density, rescaled, and sets the others to zero (Yu et al.,
// "Language Models are Super Mario", 2023). What is dropped depends on the seed, the adapter's place and the names
// alone.
func (o *CombineOptions) drop(t []float32, adapter int, name, factor string) {
	h := fnv.New64a()
	fmt.Fprintf(h, "%d %s %s", adapter, name, factor) // never fails
	random := rand.New(rand.NewPCG(o.Seed, h.Sum64()))
	for i, v := range t {
		t[i] = 0
		if random.Float64() < o.Density {
			t[i] = v / float32(o.Density)
		}
	}
}
