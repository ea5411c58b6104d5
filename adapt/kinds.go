package adapt

import (
	"math"
	"slices"
	"strconv"
	"strings"
)

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

// kindsAsInModel lists the kinds in the order in which a layer of the model has them. Of an adapter, whose model is not
// known, it is that of most models.
func (r *Analysis) kindsAsInModel() []AnalyzedKind {
	places := map[string][]int{}
	for i := range r.Modules {
		m := &r.Modules[i]
		if p, ok := places[m.Kind]; !ok || slices.Compare(m.place, p) < 0 {
			places[m.Kind] = m.place
		}
	}
	kinds := slices.Clone(r.Kinds)
	slices.SortStableFunc(kinds, func(a, b AnalyzedKind) int { return slices.Compare(places[a.Kind], places[b.Kind]) })
	return kinds
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

// shortest finds for each pattern the shortest end of it that no other has, and that begins with a name: "q_proj", but
// "attn.c_proj" beside "mlp.c_proj".
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
