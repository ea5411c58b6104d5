package adapt

import (
	"fmt"
	"math"
	"slices"

	"github.com/lorakit/lorakit/report"
)

// Page shows an analysis: maps of the layers and kinds of modules, and what the leading ranks hold. Kinds stand in the
// order of the model.
func (r *Analysis) Page() *report.Page {
	p := &report.Page{Lead: fmt.Sprintf("%d modules, norm %.4g over all.", len(r.Modules), r.Norm)}
	kinds := r.kindsAsInModel()
	addMap := func(title, note string, figure func(*AnalyzedModule) float64) {
		s := report.Section{Heading: title, Note: note, HeatMap: r.heatMap(kinds, figure)}
		p.Sections = append(p.Sections, s)
	}
	norm := func(m *AnalyzedModule) float64 { return *m.Norm }
	switch r.Of {
	case "change":
		p.Title = "What changed from " + r.Path + " to " + r.Tuned
		relative := func(m *AnalyzedModule) float64 { return m.RelativeNorm }
		addMap("Norm of the change / norm of the weight", "", relative)
		addMap("Norm of the change", "", norm)
	case "adapter":
		p.Title = "The adapter " + r.Path
		addMap("Norm of the delta", "", norm)
	default:
		p.Title = "The weights of " + r.Path
		addMap("Norm of the weight", "", norm)
	}
	note := ""
	if slices.ContainsFunc(r.Modules, func(m AnalyzedModule) bool { return m.SpectrumFigures != nil && !m.Complete }) {
		note = "Of large matrices only the leading singular values are known: their effective rank is at least the " +
			"one shown."
	}
	addMap("Effective rank", note, func(m *AnalyzedModule) float64 { return m.EffectiveRank })
	if slices.ContainsFunc(r.Modules, func(m AnalyzedModule) bool { return m.NF4 != nil }) {
		addMap("Relative error of NF4", "", func(m *AnalyzedModule) float64 {
			if m.NF4 == nil {
				return math.NaN()
			}
			return m.NF4.RelativeError
		})
	}
	p.Sections = append(p.Sections, r.rankCharts(kinds), r.kindTable(kinds), r.changedTable())
	return p
}

// heatMap has a figure of all modules with a spectrum: a row a layer, a column a kind. Of modules that share a
// place, as experts do, it has the mean.
func (r *Analysis) heatMap(kinds []AnalyzedKind, figure func(*AnalyzedModule) float64) *report.HeatMap {
	h := &report.HeatMap{RowName: "layer"}
	column := map[string]int{}
	for i, k := range kinds {
		column[k.Kind] = i
		h.Columns = append(h.Columns, k.Kind)
	}
	type place struct{ layer, column int }
	sums, counts := map[place]float64{}, map[place]int{}
	var layers []int
	for i := range r.Modules {
		m := &r.Modules[i]
		if m.SpectrumFigures == nil {
			continue
		}
		v := figure(m)
		if math.IsNaN(v) {
			continue
		}
		p := place{m.Layer, column[m.Kind]}
		if m.Layer < 0 {
			p.layer = math.MaxInt // what is in no layer comes last
		}
		layers = append(layers, p.layer)
		sums[p] += v
		counts[p]++
	}
	slices.Sort(layers)
	for _, layer := range slices.Compact(layers) {
		name := "–"
		if layer != math.MaxInt {
			name = fmt.Sprint(layer)
		}
		values := make([]float64, len(kinds))
		for i := range values {
			p := place{layer, i}
			values[i] = sums[p] / float64(counts[p]) // NaN where there is none
		}
		h.Rows, h.Values = append(h.Rows, name), append(h.Values, values)
	}
	return h
}

// rankCharts shows what share of the squared norm the leading ranks hold, a chart a kind.
func (r *Analysis) rankCharts(kinds []AnalyzedKind) report.Section {
	s := report.Section{Heading: "Share of the squared norm that the leading ranks hold", Note: "Mean over the layers."}
	if r.Of == "weights" {
		s.Note = "Mean over the layers; in orange the same of the error that NF4 makes, which is what an adapter " +
			"takes back that starts from it (compensate)."
	}
	for _, k := range kinds {
		c := report.Chart{
			Title: k.Kind, X: report.Axis{Name: "rank", Log2: true}, Y: report.Axis{Name: "share", Percent: true},
		}
		for _, kept := range [][]RankShare{k.Kept, k.NF4Kept} {
			var l report.Line
			for _, x := range kept {
				l.Points = append(l.Points, report.Point{X: float64(x.Rank), Y: x.Share})
			}
			c.Lines = append(c.Lines, l)
		}
		s.Charts = append(s.Charts, c)
	}
	return s
}

// kindTable has the means of each kind.
func (r *Analysis) kindTable(kinds []AnalyzedKind) report.Section {
	t := &report.Table{Header: []string{"kind", "modules", "norm"}}
	if r.Of == "change" {
		t.Header = append(t.Header, "norm / W")
	}
	t.Header = append(t.Header, "effective rank")
	if r.Of == "weights" {
		t.Header = append(t.Header, "error of NF4")
	}
	for _, k := range kinds {
		row := []string{k.Kind, fmt.Sprint(k.Modules), fmt.Sprintf("%.4g", k.Norm)}
		if r.Of == "change" {
			row = append(row, fmt.Sprintf("%.4g", k.RelativeNorm))
		}
		rank := fmt.Sprintf("%.1f", k.EffectiveRank)
		if !k.Complete {
			rank = "≥ " + rank
		}
		row = append(row, rank)
		if r.Of == "weights" {
			nf4 := "–" // of experts and routers, which stay in 16 bit
			if k.NF4Kept != nil {
				nf4 = fmt.Sprintf("%.5f", k.NF4Error)
			}
			row = append(row, nf4)
		}
		t.Rows = append(t.Rows, row)
	}
	return report.Section{Heading: "By kind, means", Table: t}
}

// changedTable has the tensors that differ and have no spectrum.
func (r *Analysis) changedTable() report.Section {
	t := &report.Table{Header: []string{"tensor", "shape", "change / norm"}}
	for _, o := range r.Others {
		change := fmt.Sprintf("%.4g", o.RelativeNorm)
		if o.Added {
			change = "new"
		}
		t.Rows = append(t.Rows, []string{o.Name, o.Shape.String(), change})
	}
	return report.Section{Heading: "Other tensors that differ", Table: t}
}
