package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func mergeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "merge BASE ADAPTER[=WEIGHT]... DST",
		Short: "Add LoRA adapters to a checkpoint, and show what is kept of them",
		Long: `merge adds the deltas of adapters to BASE, in their order, in float32, rounded once, and
writes the result to DST as convert does, quantised in the same pass if asked for.

No part of an adapter is lost without a word: a tensor that nothing takes is an error, and
of each module the kept share is measured on what was written (1 is all of it). A
merge in which a module keeps less than --min-kept fails: a small delta onto 4-bit weights
can vanish in rounding.`,
		Example: `  lorakit merge llama my-lora llama-merged
  lorakit merge llama style=0.7 facts=0.4 llama-both --dtype bf16
  lorakit merge llama my-qlora llama-nf4 --quantize nf4`,
		Args: cobra.MinimumNArgs(3),
	}
	run, parse := convertFlags(c), adapterFlags(c)
	c.RunE = func(_ *cobra.Command, args []string) error {
		adapters, err := parse(args[1 : len(args)-1])
		if err != nil {
			return err
		}
		return run(args[0], args[len(args)-1], adapters, lorakit.Merge)
	}
	return c
}

func unmergeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "unmerge MERGED ADAPTER[=WEIGHT]... DST",
		Short: "Subtract LoRA adapters from a checkpoint they were merged into",
		Long: `unmerge subtracts the deltas of adapters. What the rounding of the merge has taken does not
come back: a 16-bit weight comes out within one step of what it was. Adapters with
parts that leave no trace of the base (DoRA, modules_to_save, trained tokens) are
refused.`,
		Example: `  lorakit unmerge llama-merged my-lora llama-again`,
		Args:    cobra.MinimumNArgs(3),
	}
	run, parse := convertFlags(c), adapterFlags(c)
	c.RunE = func(_ *cobra.Command, args []string) error {
		adapters, err := parse(args[1 : len(args)-1])
		if err != nil {
			return err
		}
		return run(args[0], args[len(args)-1], adapters, lorakit.Unmerge)
	}
	return c
}

// printKept shows what is kept of adapters: a line for each, and for the modules that kept least.
func printKept(w io.Writer, adapters []lorakit.KeptAdapter) {
	for _, a := range adapters {
		if len(a.Modules) == 0 {
			continue
		}
		name, least := a.Modules[0].Lowest()
		for _, m := range a.Modules {
			if n, kept := m.Lowest(); kept < least || !m.Finite() {
				name, least = n, kept
			}
		}
		fmt.Fprintf(w, "%s: kept %s of the delta of %s, least in %s: %s\n", escape(a.Path), share(a.Kept),
			count(len(a.Modules), "module"), shorten(escape(name), longestName), share(least))
	}
}

// printRounding shows what the roundings of a merge and of its subtraction may have taken.
func printRounding(w io.Writer, list []lorakit.Rounding) {
	if len(list) == 0 {
		return
	}
	worst := list[0]
	for _, r := range list {
		if r.Relative > worst.Relative {
			worst = r
		}
	}
	fmt.Fprintf(w, "rounding: the weights are to be expected within %.2g of what they were before the merge, the most in "+
		"%s\n", worst.Relative, shorten(escape(worst.Tensor), longestName))
}

// printKeptTable shows all modules.
func printKeptTable(w io.Writer, adapters []lorakit.KeptAdapter) {
	for _, a := range adapters {
		t := newTable(w, "MODULE", "KEPT", "NORM OF DELTA")
		for _, m := range a.Modules {
			t.row(m.Name, share(m.Kept), fmt.Sprintf("%.4g", m.Delta))
		}
		t.flush()
	}
	printKept(w, adapters)
}
