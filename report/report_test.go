package report

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// elements parses a page and counts its elements.
func elements(t *testing.T, page []byte) map[string]int {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(string(page)))
	d.Strict, d.AutoClose, d.Entity = false, xml.HTMLAutoClose, xml.HTMLEntity
	counts := map[string]int{}
	for {
		x, err := d.Token()
		if errors.Is(err, io.EOF) {
			return counts
		}
		require.NoError(t, err)
		if s, ok := x.(xml.StartElement); ok {
			counts[s.Name.Local]++
		}
	}
}

// TestPage has all parts, with text that is markup.
func TestPage(t *testing.T) {
	const evil = `x"><script>alert(1)</script>`
	p := Page{
		Title: evil, Lead: evil,
		Sections: []Section{
			{Heading: evil, Note: evil, HeatMap: &HeatMap{
				Rows: []string{"0", evil}, Columns: []string{"a", evil}, RowName: evil,
				Values: [][]float64{{1, 2}, {math.NaN(), 4}},
			}},
			{Heading: "charts", Charts: []Chart{
				{Title: evil, X: Axis{Name: evil, Log2: true}, Y: Axis{Percent: true}, Lines: []Line{
					{Name: evil, Points: []Point{{1, 0.25}, {2, 0.5}, {4, 1}}},
					{Name: "b", Points: []Point{{1, 0}, {4, 1}}},
				}},
				{Title: "nothing"},
			}},
			{Heading: "table", Table: &Table{Header: []string{evil, "b"}, Rows: [][]string{{evil, "1"}}}},
			{Heading: "left out", HeatMap: &HeatMap{}, Charts: []Chart{{}}, Table: &Table{Header: []string{"a"}}},
		},
	}
	page, err := p.HTML()
	require.NoError(t, err)
	text := string(page)
	require.NotContains(t, text, "<script")
	require.NotContains(t, text, "http")
	require.NotContains(t, text, "ZgotmplZ")
	require.NotContains(t, text, "NaN")
	require.NotContains(t, text, "left out")
	counts := elements(t, page)
	require.Equal(t, 3, counts["rect"])
	require.Equal(t, 1, counts["figure"])
	require.Equal(t, 2, counts["polyline"])
	require.Equal(t, 5, counts["circle"])
	require.Equal(t, 3, counts["h2"])
	require.Equal(t, 2, counts["td"])
	again, err := p.HTML()
	require.NoError(t, err)
	require.Equal(t, page, again)
}

// TestLabelsFit: no label of a chart is cut at an edge, and none covers another.
func TestLabelsFit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Chart{
			X: Axis{Name: "rank", Log2: rapid.Bool().Draw(t, "log")}, Y: Axis{Percent: rapid.Bool().Draw(t, "percent")},
		}
		n := rapid.IntRange(1, 40).Draw(t, "points")
		var l Line
		for range n {
			l.Points = append(l.Points, Point{
				X: rapid.Float64Range(1, 1e5).Draw(t, "x"), Y: rapid.Float64Range(0, 1).Draw(t, "y"),
			})
		}
		if !c.Y.Percent {
			factor := rapid.Float64Range(-1e6, 1e6).Draw(t, "factor")
			for i := range l.Points {
				l.Points[i].Y *= factor
			}
		}
		c.Lines = []Line{l}
		d := c.draw()
		for _, g := range d.Grid {
			require.GreaterOrEqual(t, d.GridText-textWidth(g.Text), 0, g.Text)
		}
		require.GreaterOrEqual(t, len(d.Grid), 2)
		end := math.MinInt
		for _, x := range d.Ticks {
			require.Greater(t, x.X-textWidth(x.Text)/2, end, "%v", d.Ticks)
			end = x.X + textWidth(x.Text)/2
		}
		require.NotEmpty(t, d.Ticks)
		require.LessOrEqual(t, len(d.Ticks), n+6)
		for _, p := range d.Lines[0].Dots {
			require.True(t, p.X >= float64(d.Left) && p.X <= float64(d.Right), "%v", p)
			require.True(t, p.Y >= plotTop && p.Y <= plotTop+plotHeight, "%v", p)
		}
	})
}

// TestTicks are where people expect them.
func TestTicks(t *testing.T) {
	for _, c := range []struct {
		axis   Axis
		values []float64
		want   []float64
	}{
		{Axis{Percent: true}, []float64{0.2}, []float64{1, 0.5, 0}},
		{Axis{Log2: true}, []float64{8, 1, 2, 4, 8}, []float64{1, 2, 4, 8}},
		{Axis{}, []float64{0.1, 9.5}, []float64{0, 5, 10}},
		{Axis{}, []float64{2.31, 2.34}, []float64{2.31, 2.32, 2.33, 2.34}},
		{Axis{}, []float64{-3, 6}, []float64{-5, 0, 5, 10}},
		{Axis{}, []float64{7, 7}, []float64{6, 8, 10, 12, 14}},
	} {
		require.InDeltaSlice(t, c.want, c.axis.scale(c.values).ticks, 1e-9, "%v", c.values)
	}
}
