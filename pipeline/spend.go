package pipeline

import (
	"cmp"
	"container/heap"
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/quant"
)

// choice is a weight for which rules leave several types, or several weights that share what a scheme measures, and so
// get the same one.
type choice struct {
	name    string // of its first weight
	weights []*Weight
	options []option // the smallest first
	at      int      // the one that is taken
}

// option is a type that a choice may get.
type option struct {
	typ   string
	jobs  []Job // of its weights
	bytes int64 // of all tensors that they become
	err   float64
}

// spend takes a type for every weight for which rules leave several, so that all that is quantised has at most Budget
// bits a weight: the smallest for each, and then, as long as it fits, the step that lessens the error most for each
// byte that it adds.
func (b *planner) spend(ctx context.Context) error {
	choices, err := b.choices(ctx)
	if err != nil {
		return err
	}
	if len(choices) == 0 {
		return fmt.Errorf("%s: %w: budget has no weight to choose a type for: the rules that leave several match only "+
			"tensors that hold integers or nothing, or that no type of them holds", b.Path, ErrRefused)
	}
	bytes, elements, err := b.settled(ctx)
	if err != nil {
		return err
	}
	for _, c := range choices {
		bytes += c.options[0].bytes
		for _, w := range c.weights {
			elements += w.Count()
		}
	}
	bits := func(n int64) float64 { return 8 * float64(n) / float64(elements) }
	if bits(bytes) > b.Budget {
		err := fmt.Errorf("%s: %w: with the smallest type for each, its weights have %.4f bits, and budget is %v", b.Path,
			ErrRefused, bits(bytes), b.Budget)
		least := math.Ceil(bits(bytes)*1e4) / 1e4
		return hint.With(err, hint.Hint{Option: "Budget", Value: fmt.Sprint(least), Effect: "is the least"})
	}
	if err := measure(ctx, b, choices); err != nil {
		return err
	}
	bytes = improve(choices, bytes, func(bytes int64) bool { return bits(bytes) <= b.Budget })
	count := map[string]int{}
	for _, c := range choices {
		for _, w := range c.weights {
			typ := c.options[c.at].typ
			b.ruled[w] = []string{typ}
			count[typ]++
		}
	}
	var list []string
	for _, typ := range slices.Sorted(maps.Keys(count)) {
		list = append(list, fmt.Sprintf("%d in %s", count[typ], typ))
		if len(list) == 1 {
			list[0] = fmt.Sprintf("%s in %s", plural(count[typ], "weight"), typ)
		}
	}
	b.p.Bits = bits(bytes)
	b.notice("budget %v: %.4f bits a weight: %s", b.Budget, b.p.Bits, strings.Join(list, ", "))
	return nil
}

// choices finds what there is to choose. A type that cannot hold a weight is no option of it.
func (b *planner) choices(ctx context.Context) ([]*choice, error) {
	var open []*Weight
	for _, w := range b.from.Weights {
		if len(b.ruled[w]) > 1 && fit(w) {
			open = append(open, w)
		}
	}
	var list []*choice
	var lacking []string // of which a type is no option
	var why error
	for _, weights := range b.together(open) {
		c, byName := &choice{weights: weights}, map[string]*Weight{}
		for _, w := range weights {
			byName[w.Name] = w
			if c.name == "" || w.Name < c.name {
				c.name = w.Name
			}
		}
		var refused error
		for _, typ := range b.ruled[weights[0]] {
			o := option{typ: typ}
			var err error
			for _, w := range weights {
				var j Job
				if j, err = b.jobIn(ctx, w, typ); err != nil {
					err = w.Failed(err)
					break
				}
				for i := range j.Outputs {
					size, err := j.Outputs[i].Size()
					if err != nil {
						return nil, w.Failed(err)
					}
					o.bytes += size
				}
				o.jobs = append(o.jobs, j)
			}
			if err != nil {
				refused = cmp.Or(refused, err)
				continue
			}
			if _, err := b.share(ctx, o.jobs, byName); err != nil {
				return nil, err
			}
			c.options = append(c.options, o)
		}
		switch {
		case len(c.options) > 0:
		case b.stays(weights[0], refused):
			continue
		default:
			return nil, refused
		}
		if refused != nil {
			lacking, why = append(lacking, c.name), cmp.Or(why, refused)
		}
		slices.SortStableFunc(c.options, func(x, y option) int { return cmp.Compare(x.bytes, y.bytes) })
		list = append(list, c)
	}
	if len(lacking) > 0 {
		b.notice("a type of the rules is left out for %s, of the first since %v", plural(len(lacking), "weight"), why)
	}
	return list, nil
}

// together parts weights into those that get one type: they have the same choice, and a type of it in which they share
// what is measured. Each part has the order of the weights.
func (b *planner) together(weights []*Weight) [][]*Weight {
	byName, of := map[string]*Weight{}, map[*Weight]*[]*Weight{}
	names := map[string][]string{} // by the choice
	for _, w := range weights {
		byName[w.Name], of[w] = w, &[]*Weight{w}
		key := strings.Join(b.ruled[w], "\n")
		names[key] = append(names[key], w.Name)
	}
	for _, key := range slices.Sorted(maps.Keys(names)) {
		for typ := range strings.SplitSeq(key, "\n") {
			t := b.types[typ]
			grouper, ok := t.scheme.(quant.Grouper)
			if !ok {
				continue
			}
			for _, members := range grouper.Groups(t.spec, names[key]) {
				first := of[byName[members[0]]]
				for _, name := range members[1:] {
					other := of[byName[name]]
					if other == first {
						continue
					}
					*first = append(*first, *other...)
					for _, w := range *other {
						of[w] = first
					}
				}
			}
		}
	}
	var parts [][]*Weight
	seen := map[*[]*Weight]bool{}
	for _, w := range weights {
		if part := of[w]; !seen[part] {
			seen[part] = true
			parts = append(parts, *part)
		}
	}
	return parts
}

// jobIn is the way of a weight that gets a type.
func (b *planner) jobIn(ctx context.Context, w *Weight, typ string) (Job, error) {
	switch {
	case b.from.gguf != nil:
		return b.targetJob(ctx, w, b.targetFor(w, typ))
	case typ == keepType:
		return b.unquantisedJob(ctx, w)
	}
	return b.quantiseJob(ctx, w, typ)
}

// settled is the bytes and the elements of the weights that are quantised to a type that is certain.
func (b *planner) settled(ctx context.Context) (bytes, elements int64, err error) {
	for i, w := range b.from.Weights {
		if len(b.ruled[w]) > 1 || !fit(w) {
			continue
		}
		typ := b.typeOf(w)
		var j Job
		switch {
		case typ != "":
			j, err = b.jobIn(ctx, w, typ)
		case b.from.gguf != nil && b.ruled[w] == nil && b.from.gguf.targets[i].typ != "":
			j, err = b.targetJob(ctx, w, b.from.gguf.targets[i])
		case b.ruled[w] == nil && b.Quantize == "keep" && w.Decoder != nil:
			j, err = b.unquantisedJob(ctx, w)
		default:
			continue
		}
		switch {
		case err == nil:
		case b.stays(w, err):
			continue
		default:
			return 0, 0, w.Failed(err)
		}
		for k := range j.Outputs {
			size, err := j.Outputs[k].Size()
			if err != nil {
				return 0, 0, w.Failed(err)
			}
			bytes += size
		}
		elements += w.Count()
	}
	return bytes, elements, nil
}

// step is a larger type that a choice may get instead of the one that it has.
type step struct {
	c        *choice
	from, to int
	drop     float64 // of the error
	bytes    int64   // that it adds
}

// rate is how much the error drops for each byte: of what adds none, infinitely.
func (s *step) rate() float64 {
	if s.bytes == 0 {
		return math.Inf(1)
	}
	return s.drop / float64(s.bytes)
}

// steps is a heap of them, the best first: of equal ones that of the earlier name, then that to the smaller type.
type steps []step

func (s steps) Len() int      { return len(s) }
func (s steps) Swap(i, k int) { s[i], s[k] = s[k], s[i] }
func (s steps) Less(i, k int) bool {
	return cmp.Or(cmp.Compare(s[k].rate(), s[i].rate()), strings.Compare(s[i].c.name, s[k].c.name),
		cmp.Compare(s[i].to, s[k].to)) < 0
}
func (s *steps) Push(x any) { *s = append(*s, x.(step)) }
func (s *steps) Pop() any {
	last := (*s)[len(*s)-1]
	*s = (*s)[:len(*s)-1]
	return last
}

// improve takes the best step that fits, again and again, and returns the bytes that are taken in the end.
func improve(choices []*choice, bytes int64, fits func(bytes int64) bool) int64 {
	var open steps
	offer := func(c *choice) {
		have := &c.options[c.at]
		for to := range c.options {
			o := &c.options[to]
			if drop := have.err - o.err; o.bytes >= have.bytes && drop > 0 {
				heap.Push(&open, step{c, c.at, to, drop, o.bytes - have.bytes})
			}
		}
	}
	for _, c := range choices {
		offer(c)
	}
	for len(open) > 0 {
		s := heap.Pop(&open).(step)
		if s.from != s.c.at || !fits(bytes+s.bytes) { // which it never will: what is left only gets less
			continue
		}
		bytes += s.bytes
		s.c.at = s.to
		offer(s.c)
	}
	return bytes
}
