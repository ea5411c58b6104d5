package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func verifyCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "verify PATH",
		Short: "Read a checkpoint whole and look for what would keep it from being used",
		Long: `verify reads every weight through its scheme. It finds values that are NaN or infinite,
weights that are damaged, and weights that config.json promises in another form than
they have. It exits with 3 if it finds any.`,
		Example: `  lorakit verify llama-nf4`,
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			r, err := lorakit.Verify(c.Context(), args[0])
			if err != nil {
				return err
			}
			w := c.OutOrStdout()
			if asJSON {
				if err := printJSON(w, r); err != nil {
					return err
				}
			} else {
				for _, p := range r.Problems {
					fmt.Fprintf(w, "%s: %s\n", shorten(escape(p.Tensor), longestName), escape(p.What))
				}
				fmt.Fprintf(w, "%s read, %s\n", count(r.Tensors, "tensor"), count(len(r.Problems), "problem"))
			}
			if len(r.Problems) > 0 {
				return errFound
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}
