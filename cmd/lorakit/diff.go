package main

import (
	"fmt"
	"math"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func diffCommand() *cobra.Command {
	var asJSON bool
	var o lorakit.ReadOptions
	var tolerance float64
	c := &cobra.Command{
		Use:   "diff A B",
		Short: "Compare two checkpoints weight by weight",
		Long: `diff reads both checkpoints through their formats and schemes, so that an NF4 folder can
be held against its bf16 source. For each weight it gives the largest difference and the
relative one: the root of sum (a-b)² / sum a².

It exits with 3 if a weight differs by more than --tolerance (relative), is missing on a
side, or has another shape.`,
		Example: `  lorakit diff llama llama-nf4 --tolerance 0.1`,
		Args:    cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			if tolerance < 0 || math.IsNaN(tolerance) {
				return usageError{fmt.Errorf("--tolerance is %v, expected 0 or more", tolerance)}
			}
			r, err := lorakit.Diff(c.Context(), args[0], args[1], o)
			if err != nil {
				return err
			}
			found := len(r.Missing)+len(r.Extra)+len(r.Reshaped) > 0
			for _, t := range r.Tensors {
				found = found || t.RelRMS > tolerance || tolerance == 0 && t.MaxAbs > 0
			}
			w := c.OutOrStdout()
			if asJSON {
				if err := printJSON(w, finite(r)); err != nil {
					return err
				}
			} else {
				t := newTable(w, "REL RMS", "TENSOR", "SHAPE", "MAX ABS")
				t.names, t.spare = []string{"TENSOR"}, []string{"SHAPE"}
				for _, d := range r.Tensors {
					if d.RelRMS > tolerance || tolerance == 0 && d.MaxAbs > 0 {
						t.row(fmt.Sprintf("%.3g", d.RelRMS), d.Name, d.Shape.String(), fmt.Sprintf("%.3g", d.MaxAbs))
					}
				}
				if len(t.rows) > 1 {
					t.flush()
				}
				for _, n := range r.Missing {
					fmt.Fprintf(w, "only in %s: %s\n", args[0], shorten(escape(n), longestName))
				}
				for _, n := range r.Extra {
					fmt.Fprintf(w, "only in %s: %s\n", args[1], shorten(escape(n), longestName))
				}
				for _, n := range r.Reshaped {
					fmt.Fprintf(w, "another shape: %s\n", shorten(escape(n), longestName))
				}
				fmt.Fprintf(w, "%s compared: largest difference %.3g, relative %.3g\n", count(len(r.Tensors), "tensor"), r.MaxAbs,
					r.RelRMS)
			}
			if found {
				return errFound
			}
			return nil
		},
	}
	c.Flags().Float64Var(&tolerance, "tolerance", 0, "relative difference that is allowed for each weight")
	linkFlag(c, &o.FollowLinks)
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}

// finite makes numbers of the infinities, which JSON does not have.
func finite(r *lorakit.Comparison) *lorakit.Comparison {
	clamp := func(x *float64) { *x = min(*x, math.MaxFloat64) }
	clamp(&r.MaxAbs)
	clamp(&r.RelRMS)
	for i := range r.Tensors {
		clamp(&r.Tensors[i].MaxAbs)
		clamp(&r.Tensors[i].RelRMS)
	}
	return r
}
