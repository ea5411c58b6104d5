package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func validateCommand() *cobra.Command {
	var o lorakit.ValidateOptions
	var progress string
	var asJSON bool
	memory := size{defaultMemory, "256MiB"}
	c := &cobra.Command{
		Use:   "validate BASE",
		Short: "Take training steps, to show that a checkpoint still computes and learns",
		Long: `validate puts a batch of token ids through BASE and prints the loss, computed in float32
from weights as they are stored: plain, or in a type that lorakit formats lists.

With --adapter it takes training steps as transformers and PEFT would: BASE is frozen, the
adapter is trained by AdamW. It shows that the loss falls, that no frozen weight
changes, and what the step takes of memory and compute. With --against it compares two
checkpoints, a quantised one and its source, by what both make of the batch.

FILE has a line {"input_ids": [...]} for each row of the batch, all of the same length,
with "labels": [...] where they are not the ids; -100 is ignored. There is no tokenizer here:
transformers' own makes the ids.

It exits with 3 if a weight, an activation, the loss or a gradient is not finite, or if a
frozen weight has changed.`,
		Example: `  lorakit validate llama-nf4 --data batch.jsonl
  lorakit validate llama-nf4 --data batch.jsonl --adapter my-lora --steps 3 --lr 1e-4
  lorakit validate llama --data batch.jsonl --against llama-nf4`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkValidation(c, &o); err != nil {
				return err
			}
			o.Memory = memory.bytes
			limitMemory(o.Memory)
			p, err := newProgress(progress, c.ErrOrStderr(), args[0])
			if err != nil {
				return err
			}
			o.Progress = p.validate
			r, err := lorakit.Validate(c.Context(), args[0], o)
			p.end(err == nil)
			if err != nil {
				return err
			}
			w := c.OutOrStdout()
			if asJSON {
				if err := printJSON(w, r); err != nil {
					return err
				}
			} else {
				for _, n := range r.Notices {
					fmt.Fprintln(c.ErrOrStderr(), "note: "+escape(n))
				}
				printValidation(w, r, &o)
			}
			if r.FrozenUnchanged != nil && !*r.FrozenUnchanged {
				fmt.Fprintf(c.ErrOrStderr(), "lorakit: %s: frozen weights are not what they were before the steps; nothing "+
					"was saved\n", escape(args[0]))
				return errFound
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&o.Data, "data", "", "`FILE` of lines {\"input_ids\": [...], \"labels\": [...]}: one batch")
	f.StringVar(&o.Adapter, "adapter", "", "train the adapter in this `DIR`, which stays as it is")
	f.IntVar(&o.Steps, "steps", 1, "steps that are taken, all on the same batch")
	f.Float64Var(&o.Rate, "lr", 1e-3, "learning rate")
	f.StringVar(&o.Against, "against", "", "compare with the checkpoint `OTHER`")
	f.StringVar(&o.Save, "save", "", "write the adapter after the last step to `DIR`")
	f.StringVar(&o.SaveGradients, "save-gradients", "", "write the gradients of the first step to `FILE`, a safetensors")
	f.Var(&memory, "memory", "most memory the whole process uses")
	f.IntVar(&o.Threads, "threads", 0, "threads that compute (default: one a processor)")
	f.BoolVar(&o.Force, "force", false, "replace what --save and --save-gradients name if it exists")
	linkFlag(c, &o.FollowLinks)
	f.StringVar(&progress, "progress", "auto", "auto, bar, plain, json or none")
	f.BoolVar(&asJSON, "json", false, "print one JSON object on stdout")
	complete(c, "progress", "auto", "bar", "plain", "json", "none")
	if err := c.MarkFlagRequired("data"); err != nil {
		panic(err) // the flag has been defined a few lines above
	}
	return c
}

// checkValidation finds wrong usage.
func checkValidation(c *cobra.Command, o *lorakit.ValidateOptions) error {
	of, why := []string{"steps", "lr", "save", "save-gradients"}, "is about training; it needs --adapter"
	if o.Against != "" {
		of, why = append(of, "adapter"), "is about training; --against compares two checkpoints as they are"
	}
	if o.Against != "" || o.Adapter == "" {
		if err := useless(c, why, of...); err != nil {
			return err
		}
	}
	if o.Save == "" && o.SaveGradients == "" {
		if err := useless(c, "needs --save or --save-gradients", "force"); err != nil {
			return err
		}
	}
	// What is given and empty, as an unset variable of a shell leaves it, would be as if it were not given.
	for _, name := range []string{"data", "adapter", "against", "save", "save-gradients"} {
		if f := c.Flags().Lookup(name); f.Changed && f.Value.String() == "" {
			return usageError{fmt.Errorf("--%s is empty, expected a path", name)}
		}
	}
	switch {
	case o.Steps < 1:
		return usageError{fmt.Errorf("--steps is %d, expected 1 or more", o.Steps)}
	case !(o.Rate > 0) || math.IsInf(o.Rate, 0):
		return usageError{fmt.Errorf("--lr is %v, expected a number above 0", o.Rate)}
	case o.Threads < 0 || c.Flags().Changed("threads") && o.Threads == 0:
		return usageError{fmt.Errorf("--threads is %d, expected 1 or more", o.Threads)}
	}
	return nil
}

// printValidation prints what was found, in the order in which it is asked about.
func printValidation(w io.Writer, r *lorakit.Validation, o *lorakit.ValidateOptions) {
	switch {
	case r.Against != nil:
		printAgainst(w, r.Against)
	case r.LossAfter == nil:
		fmt.Fprintf(w, "loss %.6g, %s parameters\n", r.LossBefore, humanize.Comma(r.TotalParameters))
	default:
		printSteps(w, r, o)
	}
	seconds := float64(r.Tokens) / r.TokensPerSecond
	pass := "a pass"
	switch {
	case r.Against != nil:
		pass = "a pass through both"
	case r.LossAfter != nil:
		pass = "a step"
	}
	fmt.Fprintf(w, "%s tokens, %v %s, %.4g tokens/s\n", humanize.Comma(int64(r.Tokens)), duration(seconds), pass,
		r.TokensPerSecond)

	b := &r.Bytes
	fmt.Fprintln(w)
	t := newTable(w, "MEMORY", "BYTES", "WHAT")
	t.names, t.spare = []string{"MEMORY"}, []string{"WHAT"}
	for _, part := range []struct {
		name  string
		bytes int64
		what  string
	}{
		{"weights", b.Weights, "as stored; the base's are never all in memory"},
		{"gradients", b.Gradients, "of the adapter"},
		{"moments", b.Moments, "of AdamW"},
		{"activations", b.Activations, "inputs of the blocks, and the inside of one"},
		{"logits", b.Logits, "of the tokens whose loss is computed at once"},
		{"tiles", b.Tiles, "of weights in float32, and what threads work with"},
		{"peak", b.MeasuredPeak, "of the whole process, measured"},
	} {
		if part.bytes > 0 {
			t.row(part.name, humanize.IBytes(uint64(part.bytes)), part.what)
		}
	}
	t.flush()

	m := &r.MultiplyAdds
	if r.LossAfter == nil {
		fmt.Fprintf(w, "\n%s multiply-adds\n", compute(m.Forward))
		return
	}
	fmt.Fprintln(w)
	t = newTable(w, "PASS", "MULTIPLY-ADDS", "OF FULL FINE-TUNING")
	t.spare = []string{"OF FULL FINE-TUNING"}
	for _, part := range []struct {
		name  string
		count int64
	}{
		{"forward", m.Forward}, {"backward", m.Backward}, {"recomputation", m.Recomputation},
		{"the step", m.Forward + m.Backward + m.Recomputation}, {"without recomputation", m.Forward + m.Backward},
		{"full fine-tuning", m.FullFineTuning},
	} {
		t.row(part.name, compute(part.count), fmt.Sprintf("%.2f", float64(part.count)/float64(m.FullFineTuning)))
	}
	t.flush()
}

// printSteps prints the losses, and what has been trained and what has not.
func printSteps(w io.Writer, r *lorakit.Validation, o *lorakit.ValidateOptions) {
	fmt.Fprintf(w, "loss %.6g -> %.6g after %s at a learning rate of %g\n", r.LossBefore, *r.LossAfter,
		count(len(r.Losses), "step"), o.Rate)
	if len(r.Losses) > 1 {
		t := newTable(w, "STEP", "LOSS BEFORE IT")
		for i, l := range r.Losses {
			t.row(fmt.Sprint(i+1), fmt.Sprintf("%.6g", l))
		}
		t.flush()
	}
	fmt.Fprintf(w, "norm of the gradient %.6g\n", *r.GradNorm)
	fmt.Fprintf(w, "%s of %s parameters trained (%.3g%%)\n", humanize.Comma(r.TrainableParameters),
		humanize.Comma(r.TotalParameters), 100*float64(r.TrainableParameters)/float64(r.TotalParameters))
	if *r.FrozenUnchanged {
		fmt.Fprintln(w, "no frozen weight has changed")
	} else {
		fmt.Fprintln(w, "frozen weights HAVE CHANGED")
	}
	if *r.FrozenUnchanged && o.Save != "" {
		fmt.Fprintf(w, "the adapter after the last step is in %s\n", escape(o.Save))
	}
	if *r.FrozenUnchanged && o.SaveGradients != "" {
		fmt.Fprintf(w, "the gradients of the first step are in %s\n", escape(o.SaveGradients))
	}
}

// printAgainst prints how far two checkpoints are apart.
func printAgainst(w io.Writer, c *lorakit.BatchComparison) {
	fmt.Fprintf(w, "loss %.6g, of the other %.6g (%+.3g)\n", c.Loss, c.OtherLoss, c.OtherLoss-c.Loss)
	fmt.Fprintf(w, "KL divergence %.4g nats a token\n", c.KL)
	fmt.Fprintf(w, "the same most probable token at %s of positions\n", percent(c.Top1))
	if len(c.Layers) == 0 {
		return
	}
	most := len(c.Layers)
	if columns, ok := terminalWidth(w); ok {
		most = max(1, min(most, columns-len("error by layer  ")))
	}
	values := make([]float64, len(c.Layers))
	for i, l := range c.Layers {
		values[i] = l.RelativeError
	}
	fmt.Fprintf(w, "error by layer  %s\n", sparkline(values, most))
	first := slices.IndexFunc(values, func(v float64) bool { return v != 0 })
	if first < 0 {
		fmt.Fprintln(w, "no layer differs")
		return
	}
	last := len(values) - 1
	fmt.Fprintf(w, "relative error of layer %d, the first that differs, %.4g; of layer %d, the last, %.4g\n", first,
		values[first], last, values[last])
}

// duration is a time to three digits or so.
func duration(seconds float64) time.Duration {
	d := time.Duration(seconds * 1e9)
	return d.Round(max(time.Microsecond, d/1000).Truncate(time.Microsecond))
}
