// Package report draws what was found or done as one HTML page, from plain structs: sections of heat maps, line charts
// and tables. The page needs nothing else: no script, no font and no file from anywhere.
//
// Whoever has figures to show fills a Page. All text may hold anything: it is escaped.
package report

import (
	"bytes"
	_ "embed" // the template
	"html/template"
	"sync"
)

// Page is one page.
type Page struct {
	Title    string
	Lead     string // a sentence below the title
	Sections []Section
}

// Section is a part of a page. What it shows follows its heading in the order of the fields; one that shows nothing is
// left out.
type Section struct {
	Heading string
	Note    string // a sentence below the heading
	HeatMap *HeatMap
	Charts  []Chart // side by side
	Table   *Table
}

// Table is a table of text. The first column stands to the left, the others, which are numbers as a rule, to the right.
type Table struct {
	Header []string
	Rows   [][]string
}

// HTML draws the page.
func (p *Page) HTML() ([]byte, error) {
	d := drawnPage{Page: p}
	for _, s := range p.Sections {
		drawn := drawnSection{Section: s}
		if s.HeatMap != nil {
			drawn.Map = s.HeatMap.draw()
		}
		for i := range s.Charts {
			if c := s.Charts[i].draw(); c != nil {
				drawn.Charts = append(drawn.Charts, c)
			}
		}
		if drawn.Map != nil || drawn.Charts != nil || s.Table != nil && len(s.Table.Rows) > 0 {
			d.Sections = append(d.Sections, drawn)
		}
	}
	var b bytes.Buffer
	err := pageTemplate().Execute(&b, d)
	return b.Bytes(), err
}

//go:embed page.html
var pageText string

// pageTemplate is parsed when it is first used, as most programs start without it.
var pageTemplate = sync.OnceValue(func() *template.Template {
	return template.Must(template.New("page").Parse(pageText))
})

// What the template draws. Lengths are in pixels.
type (
	drawnPage struct {
		*Page
		Sections []drawnSection
	}
	drawnSection struct {
		Section
		Map    *drawnMap
		Charts []*drawnChart
	}
	label struct {
		X, Y int
		Text string
	}
)

// textWidth is some more than the width of a text in the small letters of a drawing.
func textWidth(text string) int {
	n := 0
	for range text {
		n++
	}
	return 7 * n
}
