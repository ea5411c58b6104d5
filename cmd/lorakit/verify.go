package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func verifyCommand() *cobra.Command {
	var asJSON bool
	var o lorakit.ReadOptions
	var base string
	var adapters []string
	var minKept float64
	var parse func([]string) ([]lorakit.Adapter, error)
	c := &cobra.Command{
		Use:   "verify PATH",
		Short: "Read a checkpoint whole and look for what would keep it from being used",
		Long: `verify reads every weight through its scheme. It finds values that are NaN or infinite,
weights that are damaged, and weights that config.json promises in another form than
they have. It exits with 3 if it finds any.

With --base and --adapter it holds a merge, whoever made it, against what it was made from, and
shows the share of the adapter that each module has kept. It exits with 3 and names
the modules that fell short of --min-kept.`,
		Example: `  lorakit verify llama-nf4
  lorakit verify llama-merged --base llama --adapter my-lora`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			w := c.OutOrStdout()
			if (base == "") != (len(adapters) == 0) {
				return usageError{fmt.Errorf("--base and --adapter go together")}
			}
			if base == "" {
				if err := useless(c, "needs --base and --adapter", "min-kept", "alpha", "expert-layout", "component"); err != nil {
					return err
				}
			} else {
				if !(minKept >= 0 && minKept <= 1) {
					return usageError{fmt.Errorf("--min-kept is %v, expected 0 to 1", minKept)}
				}
				list, err := parse(adapters)
				if err != nil {
					return err
				}
				r, err := lorakit.VerifyMerge(c.Context(), args[0], base, list, o)
				if err != nil {
					return err
				}
				if asJSON {
					if err := printJSON(w, r); err != nil {
						return err
					}
				} else {
					printKeptTable(w, r.Adapters)
				}
				var names []string
				for _, m := range r.Short(minKept) {
					if minKept == 0 { // as of merge, 0 asks for nothing
						break
					}
					name, kept := m.Lowest()
					names = append(names, fmt.Sprintf("%s (%s)", name, share(kept)))
				}
				if len(names) > 0 {
					fmt.Fprintf(c.ErrOrStderr(), "%s: kept less than %g of the adapter: %s\n", escape(args[0]), minKept,
						escape(strings.Join(names, ", ")))
					return errFound
				}
				return nil
			}
			r, err := lorakit.Verify(c.Context(), args[0], o)
			if err != nil {
				return err
			}
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
	parse = adapterFlags(c)
	f := c.Flags()
	f.StringVar(&base, "base", "", "what the adapter was merged into")
	f.StringArrayVar(&adapters, "adapter", nil, "what was merged, `ADAPTER[=WEIGHT]`; may be repeated")
	f.Float64Var(&minKept, "min-kept", 0.5, "the least share that each module is to have kept")
	linkFlag(c, &o.FollowLinks)
	f.BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}
