package main

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func attachCommand() *cobra.Command {
	var o lorakit.AttachOptions
	var asJSON bool
	c := &cobra.Command{
		Use:   "attach BASE OUT",
		Short: "Make a new adapter for a checkpoint",
		Long: `attach writes a new adapter for BASE, which PEFT loads. --init says what it starts from:

  kaiming     A random, B zero: PEFT's default. The output is what it was.
  gaussian    A normal with deviation 1/rank, B zero. The output is what it was.
  pissa       The leading singular values of each weight. PEFT takes them out of BASE
              as it loads OUT, so that the output is what it was; for other trainers
              lorakit unmerge BASE OUT RESIDUAL makes that base. Of what is trained,
              lorakit combine PLAIN TRAINED=1 OUT=-1 --type cat makes a plain adapter.
  olora       The same with the first columns of a QR decomposition.
  loftq       What NF4 takes of each weight, alternating: the base in NF4 that the
              adapter is for is written too, as OUT/base.
  compensate  As much of the error that NF4 makes as the rank allows: put beside BASE
              in NF4, the pair is closer to BASE than NF4 alone.

For the last four the errors of NF4 without and with the adapter are printed.

--target is all-linear (every linear layer but the output head, and experts as PEFT takes
them), attention, names joined by commas, or a regular expression that matches whole names.`,
		Example: `  lorakit attach llama my-lora --rank 8 --target attention
  lorakit attach llama my-lora --target q_proj,v_proj --init gaussian --seed 1
  lorakit attach llama qlora --init loftq --rank 16`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			if o.Rank <= 0 || o.Alpha <= 0 {
				return usageError{fmt.Errorf("--rank is %d and --alpha %v, expected more than 0", o.Rank, o.Alpha)}
			}
			r, err := lorakit.Attach(c.Context(), args[0], args[1], o)
			if err != nil {
				return err
			}
			r.Notices = append(r.Notices, whatToType(r, args[0])...)
			if asJSON {
				return printJSON(c.OutOrStdout(), r)
			}
			measured := func(m lorakit.AttachedModule) bool { return m.Before != nil }
			if slices.ContainsFunc(r.Modules, measured) {
				t := newTable(c.OutOrStdout(), "MODULE", "ERROR OF NF4", "WITH ADAPTER")
				for _, m := range r.Modules {
					if measured(m) {
						t.row(m.Name, fmt.Sprintf("%.5f", *m.Before), fmt.Sprintf("%.5f", *m.After))
					}
				}
				t.flush()
			}
			for _, n := range r.Notices {
				if _, err := fmt.Fprintln(c.ErrOrStderr(), escape(n)); err != nil {
					return err
				}
			}
			_, err = fmt.Fprintf(c.ErrOrStderr(), "%s: rank %d, alpha %g, %s, %d parameters\n",
				escape(r.Destination), r.Rank, r.Alpha, count(len(r.Modules), "module"), r.Parameters)
			return err
		},
	}
	f := c.Flags()
	f.IntVar(&o.Rank, "rank", 8, "rank of every module")
	f.Float64Var(&o.Alpha, "alpha", 16, "the delta is scaled by alpha / rank")
	f.StringVar(&o.Target, "target", "all-linear", "all-linear, attention, NAME,NAME,... or a regular expression")
	f.StringVar(&o.Init, "init", "kaiming", "kaiming, gaussian, pissa, olora, loftq or compensate")
	f.Uint64Var(&o.Seed, "seed", 0, "for what is random")
	f.BoolVar(&o.Force, "force", false, "replace OUT if it exists")
	linkFlag(c, &o.FollowLinks)
	f.BoolVar(&asJSON, "json", false, "print one JSON object on stdout")
	complete(c, "init", "kaiming", "gaussian", "pissa", "olora", "loftq", "compensate")
	complete(c, "target", "all-linear", "attention")
	return c
}

// whatToType lists the commands that an adapter needs beside it, which depend on what it starts from.
func whatToType(r *lorakit.Attachment, base string) []string {
	switch r.Init {
	case "pissa", "olora":
		return []string{
			fmt.Sprintf("the base without the adapter's part: lorakit unmerge %s %s RESIDUAL", base, r.Destination),
			fmt.Sprintf("once trained, an adapter for %s: lorakit combine PLAIN TRAINED=1 %s=-1 --type cat",
				base, r.Destination),
		}
	case "compensate":
		return []string{fmt.Sprintf("its base: lorakit convert %s DST --quantize nf4", base)}
	}
	return nil
}
