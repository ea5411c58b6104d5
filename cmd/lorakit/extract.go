package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func extractCommand() *cobra.Command {
	var o lorakit.ExtractOptions
	var asJSON bool
	c := &cobra.Command{
		Use:   "extract BASE TUNED OUT",
		Short: "Make an adapter of the difference of two checkpoints",
		Long: `extract decomposes TUNED - BASE of every linear layer, expert, router and embedding into
singular values and keeps the leading ones: --rank of them, or as many as hold the share
--energy of the change. It says what share of each change the adapter holds, and which
tensors differ that have no part in it (norms, biases, convolutions).`,
		Example: `  lorakit extract llama llama-tuned my-lora --rank 16
  lorakit extract llama llama-tuned my-lora --energy 0.95`,
		Args: cobra.ExactArgs(3),
		RunE: func(c *cobra.Command, args []string) error {
			r, err := lorakit.Extract(c.Context(), args[0], args[1], args[2], o)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), r)
			}
			t := newTable(c.OutOrStdout(), "MODULE", "RANK", "EXPLAINED", "NORM OF CHANGE")
			t.names, t.spare = []string{"MODULE"}, []string{"NORM OF CHANGE"}
			for _, m := range r.Modules {
				t.row(m.Name, fmt.Sprint(m.Rank), share(m.Explained), fmt.Sprintf("%.4g", m.DeltaNorm))
			}
			t.flush()
			w := c.ErrOrStderr()
			if len(r.Whole) > 0 {
				fmt.Fprintf(w, "note: %s of positions in the adapter whole: %s\n",
					count(len(r.Whole), "embedding"), escape(strings.Join(r.Whole, ", ")))
			}
			if n := len(r.LeftOutMatrices); n > 0 {
				matrices, more := fmt.Sprintf("%d matrices", n), ""
				if n == 1 {
					matrices = "1 matrix"
				}
				if n > 8 {
					more = ", ..."
				}
				fmt.Fprintf(w, "note: %s of the change left out, which no LoRA module is made for: %s%s\n",
					matrices, escape(strings.Join(r.LeftOutMatrices[:min(n, 8)], ", ")), more)
			}
			if n := len(r.LeftOut); n > 0 {
				fmt.Fprintf(w, "note: %s differ that have no part in the adapter, the first is %s\n",
					count(n, "tensor"), escape(r.LeftOut[0]))
			}
			fmt.Fprintf(w, "%s: %s, %s of the change\n",
				escape(r.Destination), count(len(r.Modules), "module"), share(r.Explained))
			return nil
		},
	}
	f := c.Flags()
	f.IntVar(&o.Rank, "rank", 0, "rank of every module")
	f.Float64Var(&o.Energy, "energy", 0, "the smallest rank that holds this share of each change")
	f.IntVar(&o.Threads, "threads", 0, "modules that are decomposed at once (default: one a processor)")
	f.BoolVar(&o.Force, "force", false, "replace OUT if it exists")
	linkFlag(c, &o.FollowLinks)
	f.BoolVar(&asJSON, "json", false, "print one JSON object on stdout")
	c.MarkFlagsMutuallyExclusive("rank", "energy")
	c.MarkFlagsOneRequired("rank", "energy")
	return c
}
