package main

import (
	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func validateCommand() *cobra.Command {
	var o lorakit.ValidateOptions
	var asJSON bool
	c := &cobra.Command{
		Use:  "validate BASE",
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			r, err := lorakit.Validate(c.Context(), args[0], o)
			if err != nil {
				return err
			}
			return printJSON(c.OutOrStdout(), r)
		},
	}
	f := c.Flags()
	f.StringVar(&o.Data, "data", "", "a `FILE` of lines {\"input_ids\": [...], \"labels\": [...]}: one batch")
	f.StringVar(&o.Adapter, "adapter", "", "the adapter in this `DIR` is trained")
	f.StringVar(&o.Against, "against", "", "compare with this checkpoint")
	f.IntVar(&o.Steps, "steps", 1, "training steps")
	f.Float64Var(&o.Rate, "lr", 1e-3, "learning rate")
	f.StringVar(&o.Save, "save", "", "write the stepped adapter to this `DIR`")
	f.StringVar(&o.SaveGradients, "save-gradients", "", "write the first step's gradients to this `FILE`")
	f.BoolVar(&o.Force, "force", false, "replace what is there")
	f.Int64Var(&o.Memory, "memory", 256<<20, "mem")
	f.IntVar(&o.Threads, "threads", 0, "threads (default: one a processor)")
	linkFlag(c, &o.FollowLinks)
	f.BoolVar(&asJSON, "json", false, "print one JSON object on stdout")
	return c
}
