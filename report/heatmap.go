package report

import (
	"fmt"
	"math"
)

// HeatMap shows a figure for every pair of a row and a column, the darker the larger.
type HeatMap struct {
	Rows, Columns []string
	RowName       string      // what a row is, such as "layer"
	Values        [][]float64 // by row and column; NaN where there is none
}

// The measures of a heat map.
const (
	cellHeight  = 20
	cellWidth   = 70 // at least
	widestCell  = 400
	mapTop      = 24
	textHeight  = 14 // from the top of a cell to the foot of its text
	labelMargin = 8
	darkDepth   = 0.65 // from here on white is easier to read than black
)

type drawnMap struct {
	Width, Height          int
	CellWidth, CellHeight  int
	FillHeight, TextHeight int // within a cell
	RowName                string
	Corner                 label // above the rows' labels
	Columns, Rows          []label
	Cells                  []cell
}

type cell struct {
	X, Y              int
	Fill              string
	Dark              bool
	Text, Row, Column string
}

// draw lays a map out; nil for one without values.
func (h *HeatMap) draw() *drawnMap {
	least, most := math.Inf(1), math.Inf(-1)
	for _, row := range h.Values {
		for _, v := range row {
			if !math.IsNaN(v) {
				least, most = min(least, v), max(most, v)
			}
		}
	}
	if least > most {
		return nil
	}
	d := &drawnMap{
		CellWidth: cellWidth, CellHeight: cellHeight, FillHeight: cellHeight - 1, TextHeight: textHeight,
		RowName: h.RowName,
	}
	for _, c := range h.Columns {
		d.CellWidth = max(d.CellWidth, min(12+textWidth(c), widestCell))
	}
	left := textWidth(h.RowName)
	for _, r := range h.Rows {
		left = max(left, textWidth(r))
	}
	left += 2 * labelMargin
	d.Corner = label{left - labelMargin, mapTop - labelMargin, h.RowName}
	for j, c := range h.Columns {
		d.Columns = append(d.Columns, label{left + j*d.CellWidth + d.CellWidth/2, mapTop - labelMargin, c})
	}
	for i, r := range h.Rows {
		top := mapTop + i*cellHeight
		d.Rows = append(d.Rows, label{left - labelMargin, top + textHeight, r})
		for j, v := range h.Values[i] {
			if math.IsNaN(v) {
				continue
			}
			depth := 0.0
			if most > least {
				depth = (v - least) / (most - least)
			}
			d.Cells = append(d.Cells, cell{
				X: left + j*d.CellWidth, Y: top, Fill: shade(depth), Dark: depth > darkDepth,
				Text: figure(v), Row: r, Column: h.Columns[j],
			})
		}
	}
	d.Width, d.Height = left+len(h.Columns)*d.CellWidth+2, mapTop+len(h.Rows)*cellHeight+2
	return d
}

func figure(v float64) string { return fmt.Sprintf("%.3g", v) }

// shade goes from nearly white to a deep blue.
func shade(depth float64) string {
	from, to := [3]float64{238, 243, 248}, [3]float64{23, 78, 130}
	var c [3]int
	for i := range c {
		c[i] = int(math.Round(from[i] + float64(depth*(to[i]-from[i]))))
	}
	return fmt.Sprintf("#%02x%02x%02x", c[0], c[1], c[2])
}
