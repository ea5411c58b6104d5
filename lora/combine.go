package lora

import (
	"context"
	"fmt"
	"hash/fnv"
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
	Type         string  // one of CombineTypes
	Density      float64 // share of the values that pruning leaves, in (0, 1]
	MajoritySign string  // "total" (or empty) or "frequency"
	Rank         int     // of the svd types; 0 is the largest of the adapters
	Seed         uint64  // of the dare types
}

// CombineTypes lists the types of combination.
func CombineTypes() []string {
	return []string{"linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"}
}

// contribution is a module of one of the adapters that are combined.
type contribution struct {
	adapter int
	a, b    kernels.Mat
	scale   float64 // weight * scaling
	weight  float64
	scaling float64
}

// Combine calls emit with each module of the combination, in the order of names. A
// module that some adapters have not is combined of those that have it.
func Combine(ctx context.Context, adapters []Weighted, o CombineOptions, emit func(Trained) error) error {
	if err := o.check(); err != nil {
		return err
	}
	byName := map[string][]int{}
	modules := make([]map[string]*Module, len(adapters))
	largest := 0
	for i, a := range adapters {
		modules[i] = map[string]*Module{}
		for _, m := range a.Modules {
			if err := combinable(a.Adapter, m); err != nil {
				return err
			}
			if m.Base {
				continue // the base's own matrix, beside an adapter of it
			}
			modules[i][m.Name] = m
			byName[m.Name] = append(byName[m.Name], i)
			largest = max(largest, m.Rank)
		}
	}
	var names []string
	for name := range byName {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		var list []contribution
		first := modules[byName[name][0]][name]
		for _, i := range byName[name] {
			m := modules[i][name]
			if m.Form != first.Form || !slices.Equal(m.A.Shape[1:], first.A.Shape[1:]) || m.B.Shape[0] != first.B.Shape[0] {
				return fmt.Errorf("%s: module %s: %w: lora_A %v and lora_B %v, where %s has %v and %v", adapters[i].Path, tensor.Quote(name), ErrBase, m.A.Shape, m.B.Shape, adapters[byName[name][0]].Path, first.A.Shape, first.B.Shape)
			}
			if o.sameRank() && m.Rank != first.Rank {
				return fmt.Errorf("%s: module %s: %w: its rank is %d and that of %s is %d; %s needs equal ranks, cat and svd do not", adapters[i].Path, tensor.Quote(name), ErrUnsupported, m.Rank, adapters[byName[name][0]].Path, first.Rank, o.Type)
			}
			a, err := Floats(m.A)
			if err != nil {
				return fmt.Errorf("%s: %w", adapters[i].Path, err)
			}
			b, err := Floats(m.B)
			if err != nil {
				return fmt.Errorf("%s: %w", adapters[i].Path, err)
			}
			w := adapters[i].Weight
			list = append(list, contribution{i, kernels.MatOf(a, m.Rank, len(a)/m.Rank), kernels.MatOf(b, len(b)/m.Rank, m.Rank), w * m.Scaling, w, m.Scaling})
		}
		t, err := o.combine(ctx, name, list, largest)
		if err != nil {
			return fmt.Errorf("module %s: %w", tensor.Quote(name), err)
		}
		t.Name, t.Form = name, first.Form
		if err := emit(t); err != nil {
			return err
		}
	}
	return nil
}

func (o *CombineOptions) check() error {
	switch {
	case !slices.Contains(CombineTypes(), o.Type):
		return fmt.Errorf("%w: type %q of combination; known are %s", ErrUnsupported, o.Type, strings.Join(CombineTypes(), ", "))
	case o.prunes() && !(o.Density > 0 && o.Density <= 1):
		return fmt.Errorf("%w: density %v for %s, expected more than 0 and at most 1", ErrUnsupported, o.Density, o.Type)
	case !o.prunes() && o.Density != 0:
		return fmt.Errorf("%w: density for %s, which prunes nothing", ErrUnsupported, o.Type)
	case !slices.Contains([]string{"", "total", "frequency"}, o.MajoritySign):
		return fmt.Errorf("%w: majority sign %q; known are total, frequency", ErrUnsupported, o.MajoritySign)
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

// combinable refuses what has no rule.
func combinable(a *Adapter, m *Module) error {
	what := ""
	switch {
	case m.Base && m.Form == Replace:
	case m.Magnitude != nil:
		what = "DoRA"
	case m.Form != Linear && m.Form != Embedding:
		what = "a part of the form " + m.Form.String()
	case m.Rank == 0 || m.Nest > 0:
		what = "an adapter of experts"
	}
	if what == "" {
		return nil
	}
	return fmt.Errorf("%s: module %s: %w: %s cannot be combined or resized, expected plain matrices", a.Path, tensor.Quote(m.String()), ErrUnsupported, what)
}

func (o *CombineOptions) combine(ctx context.Context, name string, list []contribution, largest int) (Trained, error) {
	rank := o.Rank
	if rank == 0 {
		rank = largest
	}
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
	case strings.HasSuffix(o.Type, "_svd"):
		var tasks [][]float32
		var weights []float64
		for _, c := range list {
			delta := kernels.NewMat(c.b.Rows, c.a.Cols)
			kernels.MulAdd(delta, c.b, c.a)
			for i := range delta.Data {
				delta.Data[i] *= float32(c.scaling)
			}
			tasks, weights = append(tasks, delta.Data), append(weights, c.weight)
		}
		sum := o.tasks(strings.TrimSuffix(o.Type, "_svd"), name, "delta", list, tasks, weights)
		d, err := svd.Truncated(ctx, svd.Dense(sum, list[0].b.Rows, list[0].a.Cols), svd.Options{Rank: min(rank, list[0].b.Rows, list[0].a.Cols), Iterations: 6})
		if err != nil {
			return Trained{}, err
		}
		return leading(d, rank), nil
	}
	var as, bs [][]float32
	var wa, wb []float64
	for _, c := range list {
		root := math.Sqrt(math.Abs(c.scale))
		as, bs, wb = append(as, c.a.Data), append(bs, c.b.Data), append(wb, root)
		wa = append(wa, math.Copysign(root, c.scale))
	}
	a := o.tasks(o.Type, name, "A", list, as, wa)
	b := o.tasks(o.Type, name, "B", list, bs, wb)
	c := list[0]
	return Trained{A: kernels.MatOf(a, c.a.Rows, c.a.Cols), B: kernels.MatOf(b, c.b.Rows, c.b.Cols), Rank: c.a.Rows}, nil
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

// leading makes a module of the leading singular values, all on B as PEFT does. A rank
// that a matrix does not have is filled with zeros.
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

// tasks adds tensors up by one of the rules of PEFT's merge_utils: prune, elect signs on what is
// left without its weights (Yadav et al., "TIES-Merging", 2023), weigh, add, divide by
// how many agree.
func (o *CombineOptions) tasks(kind, name, factor string, list []contribution, tensors [][]float32, weights []float64) []float32 {
	pruned := make([][]float32, len(tensors))
	for i, t := range tensors {
		switch {
		case kind == "linear" || o.Density >= 1:
			pruned[i] = t
		case strings.HasPrefix(kind, "dare"):
			pruned[i] = o.drop(t, list[i].adapter, name, factor)
		default:
			pruned[i] = prune(t, o.Density)
		}
	}
	sum := make([]float32, len(tensors[0]))
	ties := strings.HasSuffix(kind, "ties")
	for k := range sum {
		var majority, total float32
		if ties {
			for _, t := range pruned {
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
		for i, t := range pruned {
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

// prune keeps the largest magnitudes, the first of equals.
func prune(t []float32, density float64) []float32 {
	keep := int(density * float64(len(t)))
	order := make([]int, len(t))
	for i := range order {
		order[i] = i
	}
	magnitude := func(i int) float32 { return float32(math.Abs(float64(t[i]))) }
	slices.SortStableFunc(order, func(i, j int) int {
		switch x, y := magnitude(i), magnitude(j); {
		case x > y:
			return -1
		case x < y:
			return 1
		}
		return 0
	})
	out := make([]float32, len(t))
	for _, i := range order[:keep] {
		out[i] = t[i]
	}
	return out
}

// drop keeps each value with the probability of the density and rescales what is kept (Yu et al.,
// "Language Models are Super Mario", 2023). What is dropped depends on the seed, the
// adapter's place and the names alone.
func (o *CombineOptions) drop(t []float32, adapter int, name, factor string) []float32 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%d %s %s", adapter, name, factor) // never fails
	random := rand.New(rand.NewPCG(o.Seed, h.Sum64()))
	out := make([]float32, len(t))
	for i, v := range t {
		if random.Float64() < o.Density {
			out[i] = v / float32(o.Density)
		}
	}
	return out
}

// Resize calls emit with each module of a at another rank: the given one, or with rank 0
// the smallest that keeps the share energy of the squared norm of its delta. It works on
// the factors alone.
func Resize(ctx context.Context, a *Adapter, rank int, energy float64, emit func(Trained) error) error {
	for _, m := range a.Modules {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := combinable(a, m); err != nil {
			return err
		}
		if m.Base {
			continue
		}
		fa, err := Floats(m.A)
		if err != nil {
			return fmt.Errorf("%s: %w", a.Path, err)
		}
		fb, err := Floats(m.B)
		if err != nil {
			return fmt.Errorf("%s: %w", a.Path, err)
		}
		for i := range fb {
			fb[i] *= float32(m.Scaling)
		}
		d, err := svd.Product(kernels.MatOf(fb, len(fb)/m.Rank, m.Rank), kernels.MatOf(fa, m.Rank, len(fa)/m.Rank))
		if err != nil {
			return fmt.Errorf("%s: module %s: %w", a.Path, tensor.Quote(m.Name), err)
		}
		r := rank
		if r == 0 {
			r = min(max(1, svd.RankFor(d.S, d.Energy, energy)), max(1, len(d.S)))
		}
		if most := min(len(fb)/m.Rank, len(fa)/m.Rank); r > most {
			return fmt.Errorf("%s: module %s: %w: rank %d is larger than its matrix allows, %d", a.Path, tensor.Quote(m.Name), ErrBase, r, most)
		}
		t := leading(d, r)
		t.Name, t.Form = m.Name, m.Form
		if err := emit(t); err != nil {
			return err
		}
	}
	return nil
}
