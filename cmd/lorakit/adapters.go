package main

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/internal/nearest"
)

// adapterFlags gives a command the flags of what adapters leave open, and returns what reads
// ADAPTER[=WEIGHT].
func adapterFlags(c *cobra.Command) func(list []string) ([]lorakit.Adapter, error) {
	var alpha float64
	var layout, component string
	c.Flags().Float64Var(&alpha, "alpha", 0, "the alpha of a loralib adapter, which does not hold it")
	c.Flags().StringVar(&layout, "expert-layout", "", "how a PEFT adapter that does not say it holds its experts: "+
		"rank_major or grouped_by_expert")
	c.Flags().StringVar(&component, "component", "",
		"of an adapter for several parts of a pipeline, take that of one: unet, text_encoder, …")
	complete(c, "expert-layout", lorakit.ExpertLayouts()...)
	return func(list []string) ([]lorakit.Adapter, error) {
		if c.Flags().Changed("alpha") && (float32(alpha) == 0 || float32(alpha)-float32(alpha) != 0) {
			return nil, usageError{fmt.Errorf("--alpha is %v, expected a number other than 0 that float32 holds", alpha)}
		}
		if layout != "" {
			if err := oneOf("expert-layout", layout, lorakit.ExpertLayouts()...); err != nil {
				return nil, err
			}
		}
		var out []lorakit.Adapter
		for _, text := range list {
			a := lorakit.Adapter{Path: text, Weight: 1, Alpha: alpha, ExpertLayout: layout, Component: component}
			// A folder may have an equals sign in its name, as lr=1e-4.
			_, err := os.Stat(text)
			if i := strings.LastIndexByte(text, '='); i >= 0 && err != nil {
				w, err := strconv.ParseFloat(text[i+1:], 64)
				if err != nil || math.IsNaN(w) || math.IsInf(w, 0) || w == 0 {
					return nil, usageError{fmt.Errorf("%q: expected ADAPTER=WEIGHT with a number other than 0, such as my-lora=0.7",
						text)}
				}
				a.Path, a.Weight = text[:i], w
			}
			out = append(out, a)
		}
		return out, nil
	}
}

// convertsAdapter reports whether convert is to make an adapter: SRC is one, or --to asks for it.
func convertsAdapter(c *cobra.Command, src string) bool {
	to, err := c.Flags().GetString("to")
	// GGUF is a format of checkpoints too.
	return err == nil && to != "gguf" && slices.Contains(lorakit.AdapterDialects(), to) || lorakit.IsAdapter(src)
}

// ofAdapters are the flags of convert that it takes for an adapter.
var ofAdapters = []string{"to", "dtype", "quantize", "experts", "alpha", "expert-layout", "component", "base",
	"task-name", "prompt-prefix", "force", "follow-links", "json", "progress"}

const aboutGGUF = "is for an adapter that is written as GGUF"

// ggufFlags gives convert the flags of adapters that are written as GGUF.
func ggufFlags(c *cobra.Command) {
	c.Flags().String("task-name", "", "of an adapter as GGUF, what llama.cpp calls its task")
	c.Flags().String("prompt-prefix", "", "of an adapter as GGUF, what llama.cpp puts before its prompts")
}

// convertAdapter writes an adapter in another dialect.
func convertAdapter(c *cobra.Command, args []string, parse func([]string) ([]lorakit.Adapter, error)) error {
	text := func(name string) string { return c.Flags().Lookup(name).Value.String() }
	asGGUF := text("to") == "gguf" || text("to") == "" && strings.HasSuffix(args[1], ".gguf")
	var other []string
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if !slices.Contains(ofAdapters, f.Name) || f.Name == "quantize" && !asGGUF {
			other = append(other, f.Name)
		}
	})
	if err := useless(c, "is for checkpoints, and "+args[0]+" is converted as an adapter", other...); err != nil {
		return err
	}
	if !asGGUF {
		if err := useless(c, aboutGGUF, "task-name", "prompt-prefix"); err != nil {
			return err
		}
	}
	o := lorakit.AdapterOptions{To: text("to"), DType: text("dtype"), Experts: text("experts"),
		Quantize: text("quantize"), TaskName: text("task-name"), PromptPrefix: text("prompt-prefix"),
		Force: text("force") == "true", FollowLinks: text("follow-links") == "true"}
	if c.Flags().Changed("base") {
		o.Base = text("base")
	}
	if known := lorakit.AdapterDialects(); o.To != "" && !slices.Contains(known, o.To) {
		return usageError{fmt.Errorf("--to %q is no dialect of adapters; known are %s%s", o.To, strings.Join(known, ", "),
			nearest.Suggestion(o.To, known))}
	}
	if err := oneOf("experts", o.Experts, lorakit.ExpertChoices()...); err != nil {
		return err
	}
	adapters, err := parse(args[:1])
	if err != nil {
		return err
	}
	r, err := lorakit.ConvertAdapter(c.Context(), adapters[0], args[1], o)
	if err != nil {
		return err
	}
	if text("json") == "true" {
		return printJSON(c.OutOrStdout(), r)
	}
	w := c.ErrOrStderr()
	for _, n := range r.Notices {
		fmt.Fprintln(w, "note: "+escape(n))
	}
	fmt.Fprintf(w, "%s: %s adapter, %s, from %s\n", escape(r.Destination), r.To, count(r.Tensors, "tensor"), r.From)
	return nil
}
