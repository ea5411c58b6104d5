package report

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// Chart shows lines over one pair of axes.
type Chart struct {
	Title string
	X, Y  Axis
	Lines []Line
}

// Axis says what the values on an axis are.
type Axis struct {
	Name    string // what a value is, such as "rank" or "loss"
	Log2    bool   // values, all above 0, stand on a scale of powers of two, and those that have a point are marked
	Percent bool   // values are shares: the axis goes from 0 to 100%
}

// Line joins points, in their order.
type Line struct {
	Name   string // of what, where a chart has several; may be empty
	Points []Point
}

// Point is a pair of finite values.
type Point struct{ X, Y float64 }

// The measures of a chart.
const (
	plotWidth, plotHeight = 220, 120
	plotTop               = 10
	plotRight             = 16 // to the right of it half of a label
	tickMargin            = 6
	tickDepth             = 14 // from the foot of the plot to that of its labels
)

type drawnChart struct {
	Title         string
	Width, Height int
	Left, Right   int // of the plot
	Foot          int // where the labels of the axis stand
	Ticks         []label
	Grid          []label // horizontal lines, labelled to their left
	GridText      int     // where those labels end
	Lines         []drawnLine
	Legend        bool
	Name          string
}

type drawnLine struct {
	Name, Points, Class string
	Dots                []dot
}

type dot struct {
	X, Y float64
	Text string
}

// draw lays a chart out.
func (c *Chart) draw() *drawnChart {
	var xs, ys []float64
	for _, l := range c.Lines {
		for _, p := range l.Points {
			xs, ys = append(xs, p.X), append(ys, p.Y)
		}
	}
	if len(xs) == 0 {
		return nil
	}
	x, y := c.X.scale(xs), c.Y.scale(ys)
	d := &drawnChart{Title: c.Title, Name: c.X.Name, Foot: plotTop + plotHeight + tickDepth}
	for _, t := range y.ticks {
		text := c.Y.text(t)
		d.Grid = append(d.Grid, label{Y: toPixel(plotTop+plotHeight, -plotHeight, y.at(t)), Text: text})
		d.Left = max(d.Left, textWidth(text)+2*tickMargin)
	}
	d.GridText, d.Right = d.Left-tickMargin, d.Left+plotWidth
	d.Width, d.Height = d.Right+plotRight, d.Foot+2
	for i, t := range x.ticks {
		tick := label{toPixel(d.Left, plotWidth, x.at(t)), d.Foot, c.X.text(t)}
		if i+1 == len(x.ticks) { // the last one is always told
			for len(d.Ticks) > 0 && overlap(d.Ticks[len(d.Ticks)-1], tick) {
				d.Ticks = d.Ticks[:len(d.Ticks)-1]
			}
		}
		if len(d.Ticks) == 0 || !overlap(d.Ticks[len(d.Ticks)-1], tick) {
			d.Ticks = append(d.Ticks, tick)
		}
	}
	for i, l := range c.Lines {
		drawn := drawnLine{Name: l.Name, Class: fmt.Sprintf("line%d", i%lineClasses)}
		d.Legend = d.Legend || l.Name != "" && len(c.Lines) > 1
		var points []string
		for _, p := range l.Points {
			at := dot{
				X:    tenth(float64(d.Left) + plotWidth*x.at(p.X)),
				Y:    tenth(plotTop + float64(plotHeight*(1-y.at(p.Y)))),
				Text: fmt.Sprintf("%s %g: %.4g", c.X.Name, p.X, p.Y),
			}
			drawn.Dots = append(drawn.Dots, at)
			points = append(points, fmt.Sprintf("%g,%g", at.X, at.Y))
		}
		drawn.Points = strings.Join(points, " ")
		if len(points) > mostDots {
			drawn.Dots = nil
		}
		d.Lines = append(d.Lines, drawn)
	}
	return d
}

// overlap reports whether two texts, centred on their places, touch each other; the first stands to the left.
func overlap(a, b label) bool { return a.X+textWidth(a.Text)/2+2 > b.X-textWidth(b.Text)/2 }

const (
	lineClasses = 4  // colours in the style sheet
	mostDots    = 64 // of a line of more points the line alone is drawn
)

func tenth(x float64) float64 { return math.Round(x*10) / 10 }

func toPixel(from, length int, share float64) int {
	return from + int(math.Round(float64(length)*share))
}

// scale is where values stand on an axis, as a share of its length.
type scale struct {
	log         bool
	least, most float64 // after the logarithm
	ticks       []float64
}

func (s *scale) at(v float64) float64 {
	if s.log {
		v = math.Log2(v)
	}
	return (v - s.least) / (s.most - s.least)
}

// scale chooses the ends of an axis, and the values that are marked on it.
func (a *Axis) scale(values []float64) *scale {
	s := &scale{log: a.Log2}
	switch {
	case a.Percent:
		s.most, s.ticks = 1, []float64{1, 0.5, 0}
	case a.Log2:
		s.ticks = distinct(values)
		s.least, s.most = math.Log2(s.ticks[0]), math.Log2(s.ticks[len(s.ticks)-1])
		s.most = max(s.most, s.least+1)
	default:
		s.linear(distinct(values))
	}
	return s
}

// linear makes some three to six marks of 1, 2 or 5 times a power of ten, the outer ones around all values.
func (s *scale) linear(values []float64) {
	least, most := values[0], values[len(values)-1]
	if most == least {
		most = least + max(math.Abs(least), 1)
	}
	unit := math.Pow(10, math.Floor(math.Log10((most-least)/2)))
	step := unit
	for _, k := range []float64{2, 5, 10} {
		if (most-least)/step > 4 {
			step = k * unit
		}
	}
	from, to := math.Floor(least/step), math.Ceil(most/step)
	for k := from; k <= to; k++ {
		s.ticks = append(s.ticks, k*step)
	}
	s.least, s.most = from*step, to*step
}

// distinct lists values from the least to the largest, each once.
func distinct(values []float64) []float64 {
	return slices.Compact(slices.Sorted(slices.Values(values)))
}

func (a *Axis) text(v float64) string {
	switch {
	case a.Percent && v == 0:
		return "0"
	case a.Percent:
		return fmt.Sprintf("%g%%", 100*v)
	}
	return fmt.Sprintf("%.4g", v)
}
