package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func combineCommand() *cobra.Command {
	var o lorakit.CombineOptions
	var asJSON bool
	var parse func([]string) ([]lorakit.Adapter, error)
	c := &cobra.Command{
		Use:   "combine OUT ADAPTER=WEIGHT...",
		Short: "Make one adapter of several",
		Long: `combine makes one adapter of several by the rules of PEFT's add_weighted_adapter. The
result has alpha = rank and no rsLoRA, so that its delta is the true combination also
where PEFT scales it wrongly.

An adapter that was trained from pissa, olora or corda is for a base that PEFT makes as it
loads it. Less the adapter that it started as, by cat or svd, it is one for the plain base.`,
		Example: `  lorakit combine both style=0.7 facts=0.4 --type cat
  lorakit combine both style=0.7 facts=0.4 --type ties --density 0.5
  lorakit combine plain trained=1 start=-1 --type cat`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			adapters, err := parse(args[1:])
			if err != nil {
				return err
			}
			r, err := lorakit.Combine(c.Context(), args[0], adapters, o)
			if err != nil {
				return err
			}
			return printCombination(c, r, asJSON)
		},
	}
	parse = adapterFlags(c)
	f := c.Flags()
	types := lorakit.CombineTypes()
	f.StringVar(&o.Type, "type", "", "how: "+strings.Join(types, ", "))
	f.Float64Var(&o.Density, "density", 0, "share of the values that pruning leaves")
	f.StringVar(&o.MajoritySign, "majority-sign", "", "how ties elects signs: total or frequency")
	f.IntVar(&o.Rank, "rank", 0, "rank of what the svd types make (default: the largest of the adapters)")
	f.Uint64Var(&o.Seed, "seed", 0, "for the dare types")
	f.BoolVar(&o.Force, "force", false, "replace OUT if it exists")
	linkFlag(c, &o.FollowLinks)
	f.BoolVar(&asJSON, "json", false, "print one JSON object on stdout")
	complete(c, "type", types...)
	complete(c, "majority-sign", "total", "frequency")
	if err := c.MarkFlagRequired("type"); err != nil {
		panic(err) // it has been defined a few lines above
	}
	return c
}

func resizeCommand() *cobra.Command {
	var o lorakit.ResizeOptions
	var asJSON bool
	var parse func([]string) ([]lorakit.Adapter, error)
	c := &cobra.Command{
		Use:   "resize ADAPTER OUT",
		Short: "Give an adapter another rank",
		Long: `resize decomposes the delta of every module, from its small factors alone, and keeps the
leading singular values: --rank of them, or as many as hold the share --energy.`,
		Example: `  lorakit resize my-lora my-lora-r4 --rank 4`,
		Args:    cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			adapters, err := parse(args[:1])
			if err != nil {
				return err
			}
			r, err := lorakit.Resize(c.Context(), adapters[0], args[1], o)
			if err != nil {
				return err
			}
			return printCombination(c, r, asJSON)
		},
	}
	parse = adapterFlags(c)
	f := c.Flags()
	f.IntVar(&o.Rank, "rank", 0, "rank of every module")
	f.Float64Var(&o.Energy, "energy", 0, "the smallest rank that holds this share of each delta")
	f.BoolVar(&o.Force, "force", false, "replace OUT if it exists")
	linkFlag(c, &o.FollowLinks)
	f.BoolVar(&asJSON, "json", false, "print one JSON object on stdout")
	c.MarkFlagsMutuallyExclusive("rank", "energy")
	c.MarkFlagsOneRequired("rank", "energy")
	return c
}

func printCombination(c *cobra.Command, r *lorakit.Combination, asJSON bool) error {
	if asJSON {
		return printJSON(c.OutOrStdout(), r)
	}
	for _, n := range r.Notices {
		fmt.Fprintln(c.ErrOrStderr(), "note: "+escape(n))
	}
	held := ""
	if len(r.Resized) > 0 {
		least := r.Resized[0]
		for _, m := range r.Resized {
			if m.Explained < least.Explained {
				least = m
			}
		}
		held = fmt.Sprintf(", %s of the delta, least in %s: %s", share(r.Explained), shorten(escape(least.Name), longestName),
			share(least.Explained))
	}
	_, err := fmt.Fprintf(c.ErrOrStderr(), "%s: %s of rank up to %d%s\n", escape(r.Destination),
		count(len(r.Modules), "module"), r.Rank, held)
	return err
}
