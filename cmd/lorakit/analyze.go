package main

import (
	"cmp"
	"fmt"
	"io"
	"math"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func analyzeCommand() *cobra.Command {
	var o lorakit.AnalyzeOptions
	var asJSON bool
	var parse func([]string) ([]lorakit.Adapter, error)
	c := &cobra.Command{
		Use:   "analyze BASE|ADAPTER|BASE TUNED",
		Short: "Show the singular values, norms and ranks of an adapter, a change or weights",
		Long: `analyze looks at the singular values of matrices, and says for every module how large
it is and how many ranks hold how much of it:

  ADAPTER      the deltas of an adapter: which layers it changes, and what rank it would need
  BASE TUNED   the change from one checkpoint to another: what rank an extract needs
  BASE         the weights of the linear layers, and the error that NF4 makes of each:
               what rank an adapter needs that takes it back (attach --init compensate)

Of matrices whose sides are both above 1024 the --rank leading values are found, and the
effective rank is then a lower bound, marked ≥; of all others, and of adapters, all are.`,
		Example: `  lorakit analyze my-lora
  lorakit analyze llama llama-tuned --html change.html
  lorakit analyze llama --json`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(c *cobra.Command, args []string) error {
			if o.Rank < 1 {
				return usageError{fmt.Errorf("--rank is %d, expected 1 or more", o.Rank)}
			}
			if o.HTML == "" {
				if err := useless(c, "needs --html", "force"); err != nil {
					return err
				}
			}
			tuned := ""
			if len(args) == 2 {
				tuned = args[1]
			}
			if tuned == "" && lorakit.IsAdapter(args[0]) {
				if err := useless(c, "is for checkpoints; of an adapter all values are found", "rank"); err != nil {
					return err
				}
				a, err := parse(args)
				if err != nil {
					return err
				}
				o.Alpha, o.ExpertLayout, o.Component = a[0].Alpha, a[0].ExpertLayout, a[0].Component
			} else if err := useless(c, "is for an adapter", "alpha", "expert-layout", "component"); err != nil {
				return err
			}
			r, err := lorakit.Analyze(c.Context(), args[0], tuned, o)
			if err != nil {
				return err
			}
			w := c.OutOrStdout()
			if asJSON {
				return printJSON(w, r)
			}
			printAnalysis(w, r)
			printKinds(w, r)
			for _, t := range r.Others {
				what := fmt.Sprintf("differs by %.4g of its norm", t.RelativeNorm)
				if t.Added {
					what = "is new"
				}
				fmt.Fprintf(w, "no linear layer: %s %s\n", shorten(escape(t.Name), longestName), what)
			}
			if n := len(r.LeftOut); n > 0 {
				fmt.Fprintf(c.ErrOrStderr(), "note: %s, which the file holds in other pieces than the model, not "+
					"looked at; the first is %s\n", count(n, "tensor"), escape(r.LeftOut[0]))
			}
			for _, n := range r.Notices {
				fmt.Fprintln(c.ErrOrStderr(), "note: "+escape(n))
			}
			if o.HTML != "" {
				fmt.Fprintf(c.ErrOrStderr(), "%s: written\n", escape(o.HTML))
			}
			return nil
		},
	}
	parse = adapterFlags(c)
	f := c.Flags()
	f.IntVar(&o.Rank, "rank", 64, "how many singular values are found of a large matrix")
	f.IntVar(&o.Threads, "threads", 0, "modules that are decomposed at once (default: one a processor)")
	f.StringVar(&o.HTML, "html", "", "also write a page with pictures to this `FILE`")
	f.BoolVar(&o.Force, "force", false, "replace FILE if it exists")
	linkFlag(c, &o.FollowLinks)
	f.BoolVar(&asJSON, "json", false, "print one JSON object on stdout")
	return c
}

// compensations are the ranks of an adapter that could take back what NF4 does.
var compensations = []int{8, 16, 32, 64}

// printAnalysis prints a line a module, its singular values as a picture first: names, which are long, are the column
// that is cut.
func printAnalysis(w io.Writer, r *lorakit.Analysis) {
	head := []string{"SPECTRUM", "MODULE", "SHAPE"}
	switch r.Of {
	case "adapter":
		head = append(head, "FORM", "RANK", "NORM", "EFF. RANK", "50%", "90%", "99%")
	case "change":
		head = append(head, "NORM", "NORM/W", "EFF. RANK", "50%", "90%", "99%")
	default:
		head = append(head, "NORM", "EFF. RANK", "50%", "90%", "NF4 ERROR", "BY 8", "BY 16", "BY 32", "BY 64")
	}
	t := newTable(w, head...)
	t.names = []string{"MODULE"}
	t.spare = []string{"SHAPE", "SPECTRUM", "FORM", "50%", "RANK", "90%", "EFF. RANK", "NORM"}
	for _, m := range r.Modules {
		shape := "-"
		if m.Shape != nil {
			shape = m.Shape.String()
		}
		row := []string{"", m.Name, shape}
		s := m.SpectrumFigures
		switch r.Of {
		case "adapter":
			rank := "-"
			if m.Rank > 0 {
				rank = fmt.Sprint(m.Rank)
			}
			row = append(row, formOf(m.Form, m.DoRA, m.NeedsBase, m.Experts), rank, figure(m.Norm))
		case "change":
			row = append(row, figure(m.Norm), fmt.Sprintf("%.4g", m.RelativeNorm))
		default:
			row = append(row, figure(m.Norm))
		}
		if s != nil {
			row[0] = sparkline(s.Values, 12)
			row = append(row, effectiveRank(s.EffectiveRank, s.Complete), needed(s, 0.5), needed(s, 0.9))
		}
		if s != nil && r.Of != "weights" {
			row = append(row, needed(s, 0.99))
		}
		if m.NF4 != nil {
			row = append(row, fmt.Sprintf("%.5f", m.NF4.RelativeError))
			for _, k := range compensations {
				row = append(row, kept(m.NF4.Kept, k))
			}
		}
		for len(row) < len(head) {
			row = append(row, "")
		}
		t.row(row...)
	}
	t.flush()
}

// printKinds prints the means over the layers.
func printKinds(w io.Writer, r *lorakit.Analysis) {
	head := []string{"MODULES", "KIND", "NORM"}
	switch r.Of {
	case "change":
		head = append(head, "NORM/W", "EFF. RANK")
	case "adapter":
		head = append(head, "EFF. RANK")
	default:
		head = append(head, "EFF. RANK", "NF4 ERROR", "BY 8", "BY 16", "BY 32", "BY 64")
	}
	t := newTable(w, head...)
	t.names, t.spare = []string{"KIND"}, []string{"EFF. RANK", "MODULES", "NORM"}
	for _, k := range r.Kinds {
		row := []string{fmt.Sprint(k.Modules), k.Kind, fmt.Sprintf("%.4g", k.Norm)}
		if r.Of == "change" {
			row = append(row, fmt.Sprintf("%.4g", k.RelativeNorm))
		}
		row = append(row, effectiveRank(k.EffectiveRank, k.Complete))
		if r.Of == "weights" && len(k.NF4Kept) > 0 {
			row = append(row, fmt.Sprintf("%.5f", k.NF4Error))
			for _, n := range compensations {
				row = append(row, kept(k.NF4Kept, n))
			}
		}
		for len(row) < len(head) {
			row = append(row, "")
		}
		t.row(row...)
	}
	if len(r.Kinds) > 0 {
		fmt.Fprintln(w, "\nMean over the layers:")
		t.flush()
	}
}

// needed is the rank that a share needs; more than all that are known where they do not reach it.
func needed(s *lorakit.SpectrumFigures, share float64) string {
	for _, n := range s.Needed {
		if n.Share == share {
			return fmt.Sprint(n.Rank)
		}
	}
	if len(s.Values) == 0 {
		return "0"
	}
	return fmt.Sprintf(">%d", len(s.Values))
}

func effectiveRank(x float64, complete bool) string {
	if !complete {
		return fmt.Sprintf("≥%.1f", x)
	}
	return fmt.Sprintf("%.1f", x)
}

// kept is the share that a rank holds, or a dash where it is not known.
func kept(list []lorakit.RankShare, rank int) string {
	for _, k := range list {
		if k.Rank == rank {
			return percent(k.Share)
		}
	}
	return "-"
}

// sparkline draws numbers that are not negative as shares of the largest: one character each, or a mean of neighbours
// where they are more than most.
func sparkline(values []float64, most int) string {
	blocks := []rune("▁▂▃▄▅▆▇█")
	n := min(len(values), most)
	line := make([]rune, n)
	largest := 0.0
	for _, v := range values {
		largest = max(largest, v)
	}
	for i := range line {
		part := values[i*len(values)/n : (i+1)*len(values)/n]
		mean := 0.0
		for _, v := range part {
			mean += v / cmp.Or(largest, 1) / float64(len(part))
		}
		line[i] = blocks[min(int(math.Round(mean*float64(len(blocks)-1))), len(blocks)-1)]
	}
	return string(line)
}
