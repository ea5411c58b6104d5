package lorakit

import (
	"bytes"
	_ "embed" // the template
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/storage"
)

//go:embed analyze.html
var analyzePage string

// analyzeTemplate is parsed when it is first used, as all that most commands can start without.
var analyzeTemplate = sync.OnceValue(func() *template.Template { return template.Must(template.New("analyze").Parse(analyzePage)) })

// checkPage refuses a page that may not be written, before any work is done.
func checkPage(src, file string, force bool) error {
	if err := pipeline.CheckDestination(src, file, pipeline.RunOptions{Force: force}); err != nil {
		return err
	}
	if info, err := os.Stat(file); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s: %w: it is no file that could be replaced", file, ErrRefused)
	}
	if info, err := os.Stat(filepath.Dir(file)); err != nil || !info.IsDir() {
		return fmt.Errorf("%s: %w: there is no folder %s", file, ErrRefused, filepath.Dir(file))
	}
	return nil
}

// writePage writes the analysis as one page that needs nothing else. It appears whole or not
// at all.
func (r *Analysis) writePage(file string, force bool) (err error) {
	var page bytes.Buffer
	if err := analyzeTemplate().Execute(&page, r.page()); err != nil {
		return err
	}
	f, err := os.Create(file + ".partial")
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(page.Bytes()); err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if _, err := os.Lstat(file); !force && !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, fmt.Errorf("%s: %w; --force replaces it", file, ErrExists))
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return err
	}
	return storage.SyncDir(filepath.Dir(file))
}

// What the template draws. Lengths are in pixels.
type (
	analysisPage struct {
		*Analysis
		Title  string
		Maps   []heatMap
		Charts []chart
	}
	heatMap struct {
		Title, Note   string
		Width, Height int
		Cell          int // width of a column
		Columns, Rows []label
		Cells         []cell
	}
	label struct {
		X, Y int
		Text string
	}
	cell struct {
		X, Y              int
		Fill              string
		Dark              bool
		Text, Layer, Kind string
	}
	chart struct {
		Title string
		Lines []line
		Ticks []label
		last  float64 // logarithm of the largest rank
	}
	line struct {
		Points, Class string
		Dots          []dot
	}
	dot struct {
		X, Y  float64
		Rank  int
		Share float64
	}
)

func (r *Analysis) page() *analysisPage {
	p := &analysisPage{Analysis: r}
	norm := func(m *AnalyzedModule) float64 { return *m.Norm }
	effective := func(m *AnalyzedModule) float64 { return m.EffectiveRank }
	note := ""
	if slices.ContainsFunc(r.Modules, func(m AnalyzedModule) bool { return m.SpectrumFigures != nil && !m.Complete }) {
		note = "Of large matrices only the leading singular values are known: their effective rank is at least the one shown."
	}
	switch r.Of {
	case "change":
		p.Title = "What changed from " + r.Path + " to " + r.Tuned
		p.Maps = append(p.Maps, r.heatMap("Norm of the change / norm of the weight", "", func(m *AnalyzedModule) float64 { return m.RelativeNorm }))
		p.Maps = append(p.Maps, r.heatMap("Norm of the change", "", norm))
	case "adapter":
		p.Title = "The adapter " + r.Path
		p.Maps = append(p.Maps, r.heatMap("Norm of the delta", "", norm))
	default:
		p.Title = "The weights of " + r.Path
		p.Maps = append(p.Maps, r.heatMap("Norm of the weight", "", norm))
	}
	p.Maps = append(p.Maps, r.heatMap("Effective rank", note, effective))
	for i := range r.Kinds {
		k := &r.Kinds[i]
		c := chart{Title: k.Kind}
		for _, kept := range [][]RankShare{k.Kept, k.NF4Kept} {
			if len(kept) > 0 {
				c.last = max(c.last, math.Log2(float64(kept[len(kept)-1].Rank)))
			}
		}
		c.draw(k.Kept, "")
		c.draw(k.NF4Kept, "nf4")
		if len(c.Lines) > 0 {
			p.Charts = append(p.Charts, c)
		}
	}
	if slices.ContainsFunc(r.Modules, func(m AnalyzedModule) bool { return m.NF4 != nil }) {
		p.Maps = append(p.Maps, r.heatMap("Relative error of NF4", "", func(m *AnalyzedModule) float64 {
			if m.NF4 == nil {
				return math.NaN()
			}
			return m.NF4.RelativeError
		}))
	}
	return p
}

// The measures of a heat map and of a chart.
const (
	cellHeight              = 20
	mapLeft, mapTop         = 44, 24
	chartWidth, chartHeight = 220.0, 120.0
	chartLeft, chartTop     = 34.0, 8.0
)

// heatMap lays out a figure of all modules with a spectrum: a row a layer, a column a kind. Modules
// that share a place, as experts do, have their mean shown.
func (r *Analysis) heatMap(title, note string, figure func(*AnalyzedModule) float64) heatMap {
	h := heatMap{Title: title, Note: note, Cell: 70}
	for _, k := range r.Kinds { // a letter is some six wide
		h.Cell = max(h.Cell, min(12+6*utf8.RuneCountInString(k.Kind), 400))
	}
	column := map[string]int{}
	for i, k := range r.Kinds {
		column[k.Kind] = i
		h.Columns = append(h.Columns, label{mapLeft + i*h.Cell + h.Cell/2, mapTop - 8, k.Kind})
	}
	type place struct{ layer, column int }
	sums, counts := map[place]float64{}, map[place]int{}
	var places []place
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
		if counts[p] == 0 {
			places = append(places, p)
			layers = append(layers, p.layer)
		}
		sums[p] += v
		counts[p]++
	}
	slices.Sort(layers)
	layers = slices.Compact(layers)
	row := map[int]int{}
	name := func(layer int) string {
		if layer == math.MaxInt {
			return "–"
		}
		return fmt.Sprint(layer)
	}
	for i, l := range layers {
		row[l] = i
		h.Rows = append(h.Rows, label{mapLeft - 8, mapTop + i*cellHeight + cellHeight*7/10, name(l)})
	}
	least, most := math.Inf(1), math.Inf(-1)
	for _, p := range places {
		v := sums[p] / float64(counts[p])
		least, most = min(least, v), max(most, v)
	}
	for _, p := range places {
		v := sums[p] / float64(counts[p])
		depth := 0.0
		if most > least {
			depth = (v - least) / (most - least)
		}
		h.Cells = append(h.Cells, cell{
			X: mapLeft + p.column*h.Cell, Y: mapTop + row[p.layer]*cellHeight, Fill: shade(depth), Dark: depth > 0.5,
			Text: fmt.Sprintf("%.3g", v), Layer: name(p.layer), Kind: r.Kinds[p.column].Kind,
		})
	}
	h.Width, h.Height = mapLeft+len(r.Kinds)*h.Cell+2, mapTop+len(layers)*cellHeight+2
	return h
}

// shade goes from nearly white to a deep blue.
func shade(depth float64) string {
	from, to := [3]float64{238, 243, 248}, [3]float64{23, 78, 130}
	var c [3]int
	for i := range c {
		c[i] = int(math.Round(from[i] + float64(depth*(to[i]-from[i]))))
	}
	return fmt.Sprintf("#%02x%02x%02x", c[0], c[1], c[2])
}

// draw adds the line of what ranks hold; the ranks are on a scale of powers of two.
func (c *chart) draw(kept []RankShare, class string) {
	if len(kept) == 0 {
		return
	}
	l := line{Class: class}
	var points []string
	for _, k := range kept {
		d := dot{chartLeft + chartWidth*math.Log2(float64(k.Rank))/max(c.last, 1), chartTop + float64(chartHeight*(1-k.Share)), k.Rank, k.Share}
		d.X, d.Y = math.Round(d.X*10)/10, math.Round(d.Y*10)/10
		l.Dots = append(l.Dots, d)
		points = append(points, fmt.Sprintf("%g,%g", d.X, d.Y))
		if len(c.Lines) == 0 {
			c.Ticks = append(c.Ticks, label{int(d.X), int(chartTop + chartHeight + 14), fmt.Sprint(k.Rank)})
		}
	}
	l.Points = strings.Join(points, " ")
	c.Lines = append(c.Lines, l)
}
