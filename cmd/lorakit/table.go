package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/term"
)

// longestName is how many characters of a name are shown: no name of a real tensor
// is cut. --json has them whole.
const longestName = 200

// table prints rows in columns. On a terminal the widest column, that of names, is cut in the
// middle where a row would not fit; elsewhere only what is longer than longestName.
type table struct {
	w    io.Writer
	rows [][]string
}

func newTable(w io.Writer, head ...string) *table { return &table{w: w, rows: [][]string{head}} }

func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = shorten(escape(c), longestName)
	}
	t.rows = append(t.rows, cells)
}

func (t *table) flush() {
	widths := make([]int, len(t.rows[0]))
	total := 0
	for i := range widths {
		for _, r := range t.rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(r[i]))
		}
		total += widths[i] + 2
	}
	if columns, ok := terminalWidth(t.w); ok && total > columns {
		names := slices.Index(widths, slices.Max(widths))
		widths[names] = max(widths[names]-(total-columns), min(widths[names], 16))
	}
	var b strings.Builder
	for _, r := range t.rows {
		for i, c := range r {
			c = shorten(c, widths[i])
			b.WriteString(c)
			if i < len(r)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c)+2))
			}
		}
		line := strings.TrimRight(b.String(), " ")
		fmt.Fprintln(t.w, line)
		b.Reset()
	}
}

// shorten cuts the middle out of what is longer than n characters.
func shorten(s string, n int) string {
	r := []rune(s)
	if len(r) <= n || n < 3 {
		return s
	}
	tail := (n - 1) * 2 / 3
	return string(r[:n-1-tail]) + "…" + string(r[len(r)-tail:])
}

// terminalWidth is the number of columns of the terminal behind w, if there is one.
func terminalWidth(w io.Writer) (int, bool) {
	if o, ok := w.(*output); ok {
		w = o.Writer
	}
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0, false
	}
	columns, _, err := term.GetSize(int(f.Fd()))
	return columns, err == nil
}

// escape makes harmless what a name from a file could do to a terminal: control
// characters, and those that turn the direction of text.
func escape(s string) string {
	var b strings.Builder
	for _, r := range s {
		if unicode.IsPrint(r) && r != utf8.RuneError {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}

// printJSON writes v as one object. What is not finite, such as the kept share of a merge that has
// overflowed, is null, since JSON has no number for it.
func printJSON(w io.Writer, v any) error {
	b, err := json.Marshal(v, jsontext.WithIndent("  "), jsontext.AllowInvalidUTF8(true), json.Deterministic(true), json.WithMarshalers(json.MarshalToFunc(finiteOrNull)))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", b)
	return err
}

func finiteOrNull(e *jsontext.Encoder, x float64) error {
	if math.IsNaN(x) || math.IsInf(x, 0) {
		return e.WriteToken(jsontext.Null)
	}
	return e.WriteToken(jsontext.Float(x))
}
