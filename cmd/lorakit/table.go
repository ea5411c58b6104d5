package main

import (
	"errors"
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

// longestName is how many characters of a name are shown: no name of a real tensor is cut. --json has them whole.
const longestName = 200

// leastName is how many characters of a name are shown at least before a column is left away for it.
const leastName = 24

// table prints rows in columns. On a terminal rows that would not fit lose columns, those that are needed least, and
// names the middle; elsewhere nothing is lost but of names that are longer than longestName.
type table struct {
	w     io.Writer
	rows  [][]string
	names []string // heads of the columns that may be cut, the first one first: without any, that of the widest
	spare []string // heads of the columns that may be left away, in this order
}

func newTable(w io.Writer, head ...string) *table { return &table{w: w, rows: [][]string{head}} }

func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = shorten(escape(c), longestName)
	}
	t.rows = append(t.rows, cells)
}

func (t *table) flush() {
	columns, ok := terminalWidth(t.w)
	if !ok {
		columns = math.MaxInt
	}
	for _, line := range t.lines(columns) {
		fmt.Fprintln(t.w, line)
	}
}

// lines are the rows, and what was left away, in at most so many columns as far as that can be.
func (t *table) lines(columns int) []string {
	head := t.rows[0]
	cells := make([][]string, len(head)) // by column
	widths := make([]int, len(head))
	for i := range head {
		for _, r := range t.rows {
			cells[i] = append(cells[i], r[i])
			widths[i] = max(widths[i], utf8.RuneCountInString(r[i]))
		}
	}
	names := t.names
	if len(names) == 0 {
		names = []string{head[slices.Index(widths, slices.Max(widths))]}
	}
	var left []string
	// total is the width of a row whose names have at most so many characters.
	total := func(most int) int {
		n := -2
		for i, h := range head {
			switch {
			case slices.Contains(left, h):
			case slices.Contains(names, h):
				n += min(widths[i], most) + 2
			default:
				n += widths[i] + 2
			}
		}
		return n
	}
	for _, h := range t.spare {
		if total(leastName) > columns && slices.Contains(head, h) {
			left = append(left, h)
		}
	}
	for _, least := range []int{12, 8} {
		for i, h := range head {
			if over := total(longestName) - columns; over > 0 && slices.Contains(names, h) && widths[i] > least {
				widths[i] = max(widths[i]-over, least)
			}
		}
	}
	for i, h := range head {
		if slices.Contains(names, h) {
			cells[i] = shortenAll(cells[i], widths[i])
		}
	}

	var lines []string
	for r := range t.rows {
		var b strings.Builder
		for i, h := range head {
			if !slices.Contains(left, h) {
				c := cells[i][r]
				b.WriteString(c + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c)+2))
			}
		}
		lines = append(lines, strings.TrimRight(b.String(), " "))
	}
	if len(left) > 0 {
		lines = append(lines, "no room for "+strings.Join(left, ", "))
	}
	return lines
}

// shorten cuts the middle out of what is longer than n characters.
func shorten(s string, n int) string { return cut(s, n, (n-1)/3) }

// cut leaves of what is longer than n characters the first few and the last ones.
func cut(s string, n, first int) string {
	r := []rune(s)
	if len(r) <= n || n < 3 {
		return s
	}
	return string(r[:first]) + "…" + string(r[len(r)-(n-1-first):])
}

// shortenAll cuts all in the same place: where the most of them stay different, for names of layers mostly differ in a
// number in their middle.
func shortenAll(list []string, n int) []string {
	longest := 0
	for _, s := range list {
		longest = max(longest, utf8.RuneCountInString(s))
	}
	if longest <= n {
		return list
	}
	most, place := 0, 0
	for first := range n {
		different := map[string]bool{}
		for _, s := range list[:min(len(list), 2000)] { // more say nothing new
			different[cut(s, n, first)] = true
		}
		if len(different) > most {
			most, place = len(different), first
		}
	}
	short := make([]string, len(list))
	for i, s := range list {
		short[i] = cut(s, n, place)
	}
	return short
}

// oneInFloat32 is the smallest number that float32 rounds to 1.
const oneInFloat32 = 1 - 0x1p-25

// share is a share of a whole to four digits, or as many as it takes where it is less than 1 and would be rounded
// up to that: 1 is what float32 does not tell from it.
func share(x float64) string {
	s := fmt.Sprintf("%.4f", x)
	for digits := 5; s[0] == '1' && x < oneInFloat32; digits++ {
		s = fmt.Sprintf("%.*f", digits, x)
	}
	return unsigned(s)
}

// unsigned takes the sign from a zero.
func unsigned(s string) string {
	if strings.Trim(s, "-0.%") == "" {
		return strings.TrimPrefix(s, "-")
	}
	return s
}

// percent is a share in percent, which is 100 only where nothing is missing.
func percent(x float64) string {
	s := fmt.Sprintf("%.1f%%", 100*x)
	if s == "100.0%" && x < oneInFloat32 {
		return "99.9%"
	}
	return unsigned(s)
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

// escape makes harmless what a name from a file could do to a terminal: control characters, and those that turn the
// direction of text.
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
	b, err := json.Marshal(v, jsontext.WithIndent("  "), jsontext.AllowInvalidUTF8(true), json.Deterministic(true),
		json.WithMarshalers(json.JoinMarshalers(json.MarshalToFunc(finiteOrNull), json.MarshalToFunc(finite32OrNull))))
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

func finite32OrNull(e *jsontext.Encoder, x float32) error {
	if y := float64(x); math.IsNaN(y) || math.IsInf(y, 0) {
		return e.WriteToken(jsontext.Null)
	}
	return errors.ErrUnsupported // it has fewer digits than a float64: the usual way
}
