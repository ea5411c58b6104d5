package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit"
)

func printAdapter(w io.Writer, r *lorakit.AdapterInspection) {
	t := newTable(w, "DTYPE", "MODULE", "FORM", "A", "B", "RANK", "ALPHA", "SCALING", "NORM")
	t.names, t.spare = []string{"MODULE"}, []string{"DTYPE", "A", "B", "ALPHA", "FORM"}
	for _, m := range r.Modules {
		form, a, b, rank, alpha, scaling := formOf(m.Form, m.DoRA, m.NeedsBase, m.Experts), "-", m.Shape.String(), "-", "-",
			"-"
		if m.Base {
			form = "base's own"
		}
		if m.A != nil {
			a, b = m.A.String(), m.B.String()
		}
		if m.Rank > 0 {
			rank, alpha, scaling = fmt.Sprint(m.Rank), fmt.Sprintf("%g", m.Alpha), fmt.Sprintf("%.4g", m.Scaling)
		}
		t.row(m.DType.String(), m.Name, form, a, b, rank, alpha, scaling, figure(m.Norm))
	}
	t.flush()

	fmt.Fprintln(w)
	_, terminal := terminalWidth(w)
	line := func(name, format string, args ...any) {
		text := escape(fmt.Sprintf(format, args...))
		if terminal { // where a list of many targets would fill the screen
			text = shorten(text, longestName)
		}
		fmt.Fprintf(w, "%-13s %s\n", name, text)
	}
	if r.PeftVersion != "" {
		line("dialect", "%s, %s, written by PEFT %s", r.Dialect, r.Type, r.PeftVersion)
	} else {
		line("dialect", "%s", r.Dialect)
	}
	if r.Base != "" {
		line("base", "%s", r.Base)
	}
	if r.Rank > 0 {
		scaling := "alpha / rank"
		if r.RSLoRA {
			scaling = "alpha / sqrt(rank), rsLoRA"
		}
		line("rank, alpha", "%d, %g; scaling is %s", r.Rank, r.Alpha, scaling)
	}
	if n := len(r.Patterns); n > 0 {
		p := r.Patterns[0]
		line("patterns", "%s of another rank or alpha, the first is %s with %d, %g", count(n, "module"), p.Name, p.Rank,
			p.Alpha)
	}
	if r.DoRA {
		line("DoRA", "yes: the norms are those of scaling * B·A")
	}
	for _, x := range []struct {
		name  string
		value jsontext.Value
	}{{"targets", r.Targets}, {"parameters of", r.Parameters}, {"saved whole", r.ModulesToSave}} {
		if s := strings.Trim(string(x.value), "[]\""); s != "" {
			line(x.name, "%s", strings.Join(strings.Fields(strings.ReplaceAll(s, "\"", "")), " "))
		}
	}
	if r.Bias != "" && r.Bias != "none" {
		line("bias", "%s", r.Bias)
	}
	if len(r.Starts) > 0 {
		line("started as", "%s", strings.Join(r.Starts, ", "))
	}
	line("format", "%s", strings.Join(r.Files, ", "))
	line("parameters", "%s in %s", humanize.Comma(r.Trained), count(len(r.Modules), "module"))
	line("size", "%s", humanize.IBytes(uint64(r.Bytes)))
}

// formOf says what a module of an adapter does.
func formOf(form string, dora, needsBase bool, experts int64) string {
	switch {
	case needsBase:
		return "needs base" // which alone tells its layout
	case experts > 0:
		return count(int(experts), "expert")
	case dora:
		return form + ", DoRA"
	}
	return form
}

// figure is a norm, or a dash for none.
func figure(x *float64) string {
	if x == nil {
		return "-"
	}
	return fmt.Sprintf("%.4g", *x)
}
