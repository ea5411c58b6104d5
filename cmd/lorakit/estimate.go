package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func estimateCommand() *cobra.Command {
	var o lorakit.EstimateOptions
	var asJSON bool
	c := &cobra.Command{
		Use:   "estimate BASE|CONFIG.json|--params SIZE",
		Short: "Count the memory that fine-tuning takes, and its compute",
		Long: `estimate counts what full fine-tuning, LoRA, QLoRA and QLoRA with double quantisation
take of memory, by component, and on each of several GPUs under ZeRO's stages; and the
multiply-adds of a step. BASE is a checkpoint, of which only headers are read. A bare size
has the shape of the known model that is nearest, and the output says which.

--recipe says what a parameter takes in full fine-tuning:

  mixed        16 bytes: weights and gradients in 16 bits, a float32 copy and AdamW's
               moments in float32
  qlora-paper  12 bytes: without the copy
  fp16x4        8 bytes: everything in 16 bits

Adapters are trained in float32, 16 bytes a parameter. Without --tokens-per-batch what
grows with the batch is left out: activations, logits and compute.`,
		Example: `  lorakit estimate llama --tokens-per-batch 2048
  lorakit estimate config.json --rank 16 --target attention
  lorakit estimate --params 70B
  lorakit estimate --params 7.5B --gpus 64`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			changed := c.Flags().Changed
			switch {
			case len(args) == 0 && !changed("params"):
				return usageError{errors.New("expected BASE, CONFIG.json or --params SIZE")}
			case len(args) == 1 && changed("params"):
				return usageError{fmt.Errorf("--params is for a model that is not there, and %q is given", args[0])}
			case o.Rank <= 0 || o.GPUs <= 0:
				return usageError{fmt.Errorf("--rank is %d and --gpus %d, expected more than 0", o.Rank, o.GPUs)}
			case o.Tokens <= 0 && changed("tokens-per-batch"):
				return usageError{fmt.Errorf("--tokens-per-batch is %d, expected more than 0", o.Tokens)}
			}
			path := ""
			if len(args) == 1 {
				path = args[0]
			}
			r, err := lorakit.Estimate(c.Context(), path, o)
			if err != nil {
				return err
			}
			for _, n := range r.Notices {
				fmt.Fprintln(c.ErrOrStderr(), "note: "+escape(n))
			}
			w := c.OutOrStdout()
			if asJSON {
				return printJSON(w, r)
			}
			printEstimation(w, r, &o)
			return nil
		},
	}
	f := c.Flags()
	f.Var((*modelSize)(&o.Parameters), "params", "the size of a model that is not there: 70B, 7.5B, 500M or a number")
	f.IntVar(&o.Rank, "rank", 8, "rank of every module of the adapter")
	f.StringVar(&o.Target, "target", "all-linear", "all-linear, attention, NAME,NAME,... or a regular expression")
	f.IntVar(&o.Tokens, "tokens-per-batch", 0, "tokens of a batch on each GPU, as one row")
	f.StringVar(&o.DType, "dtype", "", "type of a base that is not trained: f32, f16 or bf16 (default its own, else bf16)")
	f.StringVar(&o.Optimizer, "optimizer", "adamw", "adamw, adamw8bit or sgd (without momentum)")
	f.StringVar(&o.Recipe, "recipe", "mixed", "of full fine-tuning: mixed, qlora-paper or fp16x4")
	f.IntVar(&o.GPUs, "gpus", 1, "how many ZeRO divides among")
	linkFlag(c, &o.FollowLinks)
	f.BoolVar(&asJSON, "json", false, "print one JSON object")
	complete(c, "target", "all-linear", "attention")
	complete(c, "dtype", "f32", "f16", "bf16")
	complete(c, "optimizer", "adamw", "adamw8bit", "sgd")
	complete(c, "recipe", "mixed", "qlora-paper", "fp16x4")
	return c
}

// modelSize is a flag of how many parameters a model has.
type modelSize int64

func (p *modelSize) String() string { return "" }
func (p *modelSize) Type() string   { return "SIZE" }
func (p *modelSize) Set(text string) error {
	m := parameterCount.FindStringSubmatch(strings.ToUpper(text))
	wrong := errors.New("expected a number of parameters such as 70B, 7.5B, 500M or 124439808")
	if m == nil {
		return wrong
	}
	n, err := strconv.ParseFloat(m[1], 64)
	n = math.Round(n * map[string]float64{"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[m[2]])
	if err != nil || n < 1 || n > 1e15 || m[2] == "" && strings.Contains(m[1], ".") {
		return wrong
	}
	*p = modelSize(n)
	return nil
}

// parameterCount is the form of such a number: the suffix is decimal.
var parameterCount = regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?)([KMBT]?)$`)

func printEstimation(w io.Writer, r *lorakit.Estimation, o *lorakit.EstimateOptions) {
	fmt.Fprintf(w, "%s parameters\n", humanize.Comma(r.Parameters))
	if s := r.AssumedShape; s != nil {
		fmt.Fprintf(w, "the shape is assumed, that of %s: %d layers, %d wide, %d in the MLP, %d heads, %d for keys, "+
			"vocabulary %d\n", s.Name, s.Layers, s.Hidden, s.Intermediate, s.Heads, s.KeyHeads, s.Vocabulary)
	}
	fmt.Fprintf(w, "adapter: rank %d on %s, %s parameters\n\n", o.Rank, escape(o.Target), humanize.Comma(r.Trainable))

	head := []string{"METHOD", "WEIGHTS", "GRADIENTS", "MOMENTS", "MASTER"}
	if o.Tokens > 0 {
		head = append(head, "ACTIVATIONS", "LOGITS")
	}
	t := newTable(w, append(head, "TOTAL")...)
	t.spare = []string{"LOGITS", "ACTIVATIONS", "MASTER", "MOMENTS", "GRADIENTS"}
	for _, m := range r.Rows {
		row := []string{methodName(m), decimal(m.Weights), decimal(m.Gradients), decimal(m.Moments), decimal(m.Master)}
		if o.Tokens > 0 {
			row = append(row, decimal(m.Activations), decimal(m.Logits))
		}
		t.row(append(row, decimal(m.Total))...)
	}
	t.flush()

	if r.GPUs > 1 {
		fmt.Fprintf(w, "\nOn each of %d GPUs:\n", r.GPUs)
		t := newTable(w, "METHOD", "ZERO 0", "ZERO 1", "ZERO 2", "ZERO 3")
		t.names = []string{"METHOD"}
		for _, m := range r.Rows {
			row := []string{methodName(m)}
			for _, z := range m.Zero {
				row = append(row, decimal(z))
			}
			t.row(row...)
		}
		t.flush()
	}
	if o.Tokens == 0 {
		fmt.Fprintln(w, "\nactivations and logits are left out: --tokens-per-batch N adds them")
		return
	}
	m := r.MultiplyAdds
	step := m.Forward + m.Backward
	fmt.Fprintf(w, "\nmultiply-adds of a step of %s:\n", count(o.Tokens, "token"))
	t = newTable(w, "full fine-tuning", compute(m.FullFineTuning), "")
	t.row("with the adapter", compute(step), fmt.Sprintf("%.2f of it", float64(step)/float64(m.FullFineTuning)))
	t.row("  forward", compute(m.Forward), "")
	t.row("  backward", compute(m.Backward), "")
	t.row("recomputation", compute(m.Recomputation), "once more, where only the input of each block is kept")
	t.flush()
}

// methodName is a method with its recipe, where there are several.
func methodName(m lorakit.EstimatedMethod) string {
	if m.Method == "full" {
		return m.Method + " (" + m.Recipe + ")"
	}
	return m.Method
}

// decimal is a size in decimal units, GB = 10^9 bytes.
func decimal(bytes int64) string {
	if bytes == 0 {
		return "0"
	}
	return magnitude(bytes, "kB", "MB", "GB")
}

// compute is a number of multiply-adds.
func compute(n int64) string { return magnitude(n, "k", "M", "G", "T", "P", "E") }

// magnitude writes a number to three digits, with units for thousands, millions and so on; past the last unit it has
// more.
func magnitude(n int64, units ...string) string {
	x, unit := float64(n), ""
	for _, u := range units {
		if x < 999.5 {
			break
		}
		x, unit = x/1e3, " "+u
	}
	if unit == "" {
		return strconv.FormatInt(n, 10)
	}
	switch {
	case x < 9.995:
		return strconv.FormatFloat(x, 'f', 2, 64) + unit
	case x < 99.95:
		return strconv.FormatFloat(x, 'f', 1, 64) + unit
	}
	return humanize.Comma(int64(math.Round(x))) + unit
}
