package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/lorakit/lorakit"
)

func convertCommand() *cobra.Command {
	var merge []string
	c := &cobra.Command{
		Use:   "convert SRC DST",
		Short: "Write a checkpoint anew: quantised, plain, in another type, in other shards",
		Long: `convert reads the checkpoint SRC, a folder or a file, and writes it to DST. Where no
flag says otherwise every weight keeps its bytes.

What --quantize takes, with no --include, is what transformers would: every linear
layer of the architecture, and no embedding, norm, output head, router or
expert. DST then loads in transformers and bitsandbytes as their own 4-bit model. The
files beside the weights (tokenizer, licence, …) are carried along.

A DST that ends in .gguf is a model of llama.cpp: its names, layouts, types and keys, the
tokenizer among them. --quantize is a file type then, such as q4_k_m, by whose rules each
tensor gets a type as llama-quantize gives it. A SRC in GGUF becomes a folder of
transformers, with its config.json and tokenizer, where DST is a folder.

--rule GLOB=TYPE gives weights types of their own: the first whose glob matches wins. Several
with one GLOB and --budget BPW leave the choice to the error that each type makes.

SRC may be a LoRA adapter too: --to peft, kohya, diffusers, mlx, loralib or gguf writes it in
that dialect, and --experts per-expert or fused with its experts laid out in that way, with
the same delta. For llama.cpp, DST ends in .gguf. To GGUF and from it, --base names the folder
of the model that the adapter is for, whose config.json is enough; without it the folder counts
that the adapter's own config names. --dtype f32, f16 or bf16 and --quantize q8_0 are the types.

DST appears whole or not at all: all is written into DST.partial, and one rename
makes it DST. After a kill or a full disk, --resume goes on with what is there.`,
		Example: `  lorakit convert llama llama-nf4 --quantize nf4
  lorakit convert llama-nf4 llama-bf16 --quantize none --dtype bf16
  lorakit convert llama llama.gguf --quantize q4_k_m
  lorakit convert llama llama-mlx --quantize mlx4 --rule '*.down_proj.weight=mlx8'
  lorakit convert llama llama-mlx --budget 5 --rule '*=mlx4' --rule '*=mlx8'
  lorakit convert llama.gguf llama-again
  lorakit convert weights.safetensors half.safetensors --dtype f16
  lorakit convert my-lora my-lora.safetensors --to kohya
  lorakit convert my-lora my-lora.gguf --base llama
  lorakit convert my-lora.gguf my-lora --base llama`,
		Args: cobra.ExactArgs(2),
	}
	run := convertFlags(c)
	parse := adapterFlags(c)
	ggufFlags(c)
	c.Flags().StringArrayVar(&merge, "merge", nil, "add the delta of `ADAPTER[=WEIGHT]`; may be repeated")
	c.RunE = func(c *cobra.Command, args []string) error {
		adapters, err := parse(merge)
		if err != nil {
			return err
		}
		if len(adapters) == 0 {
			if convertsAdapter(c, args[0]) {
				return convertAdapter(c, args, parse)
			}
			about := "is about adapters; it needs --merge ADAPTER"
			err := cmp.Or(useless(c, aboutGGUF, "task-name", "prompt-prefix"),
				useless(c, about, "base", "min-kept", "alpha", "expert-layout", "component"))
			if err != nil { // SRC may be an adapter that is broken, or not there, which is what to say then
				_, broken := lorakit.Inspect(c.Context(), args[0], lorakit.ReadOptions{})
				return cmp.Or(broken, err)
			}
		}
		return run(args[0], args[1], adapters, lorakit.Merge)
	}
	return c
}

// merging is lorakit.Merge or lorakit.Unmerge.
type merging func(ctx context.Context, base string, adapters []lorakit.Adapter, dst string,
	o lorakit.ConvertOptions) (*lorakit.ConvertResult, error)

// convertFlags gives a command the flags of convert, and returns what runs it.
func convertFlags(c *cobra.Command) func(src, dst string, adapters []lorakit.Adapter, merge merging) error {
	var o lorakit.ConvertOptions
	var experts, progress string
	var rules []string
	var budget *pflag.Flag
	var asJSON bool
	var minKept float64
	shard, memory := size{5_000_000_000, "5GB"}, size{defaultMemory, "256MiB"}
	run := func(src, dst string, adapters []lorakit.Adapter, merge merging) error {
		if err := oneOf("experts", experts, "keep", "per-expert"); err != nil {
			return err
		}
		o.PerExpert = experts == "per-expert"
		o.Rules = nil
		for _, text := range rules {
			rule, err := lorakit.ParseRule(text)
			if err != nil {
				return err
			}
			o.Rules = append(o.Rules, rule)
		}
		if budget.Changed && o.Budget == 0 {
			return usageError{errors.New("--budget is 0, expected bits a weight, such as 4.5")}
		}
		var types []string
		for _, r := range o.Rules {
			if r.Type != "keep" && !slices.Contains(types, r.Type) {
				types = append(types, r.Type)
			}
		}
		if len(types) == 0 || o.Base == "dequantized" || o.Quantize != "keep" && o.Quantize != "none" {
			types = append(types, o.Quantize)
		}
		if len(o.Rules) == 0 && (o.Quantize == "keep" || o.Quantize == "none") {
			names := []string{"include", "exclude", "experts"}
			if o.Base != "dequantized" {
				names = append(names, "block-size", "double-quant", "allow-non-finite")
			}
			if err := useless(c, "says how to quantise; it needs --quantize nf4, int8, q4_k_m, …", names...); err != nil {
				return err
			}
		}
		if o.Quantize == "int8" {
			if err := useless(c, "is for nf4 and fp4; int8 has one scale a row", "block-size", "double-quant"); err != nil {
				return err
			}
		}
		for flag, parameter := range map[string]string{"block-size": "block_size", "double-quant": "double_quant"} {
			found := false
			for _, typ := range types {
				has, err := lorakit.HasParameter(typ, parameter)
				if err != nil {
					return err
				}
				found = found || has
			}
			if !found {
				if err := useless(c, "is nothing that "+strings.Join(types, ", ")+" has", flag); err != nil {
					return err
				}
			}
		}
		if o.BlockSize == 0 {
			return usageError{errors.New("--block-size is 0, expected 32, 64, … 4096")}
		}
		if o.Threads < 0 || c.Flags().Changed("threads") && o.Threads == 0 {
			return usageError{fmt.Errorf("--threads is %d, expected 1 or more", o.Threads)}
		}
		if o.Memory = memory.bytes; c.Flags().Changed("max-shard-size") {
			o.MaxShardSize = shard.bytes
		}
		limitMemory(o.Memory)
		p, err := newProgress(progress, c.ErrOrStderr(), dst)
		if err != nil {
			return err
		}
		o.Progress = p.update
		if !(minKept >= 0 && minKept <= 1) {
			return usageError{fmt.Errorf("--min-kept is %v, expected 0 to 1", minKept)}
		}
		if o.MinKept = minKept; minKept == 0 {
			o.MinKept = -1
		}
		var r *lorakit.ConvertResult
		if len(adapters) > 0 {
			r, err = merge(c.Context(), src, adapters, dst, o)
		} else {
			r, err = lorakit.Convert(c.Context(), src, dst, o)
		}
		p.end(err == nil)
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(c.OutOrStdout(), r)
		}
		if o.DryRun {
			return printPlan(c.OutOrStdout(), r)
		}
		if progress != "none" && progress != "json" {
			printResult(c.ErrOrStderr(), r)
		}
		return nil
	}
	f := c.Flags()
	f.StringVar(&o.To, "to", "", "format to write; lorakit formats lists them (default: that of SRC, or of DST's "+
		"extension)")
	f.StringVar(&o.DType, "dtype", "keep", "cast plain weights: keep, f32, f16 or bf16")
	f.StringVar(&o.Quantize, "quantize", "keep", "keep, none (plain weights), nf4, fp4, int8, for GGUF q8_0, q4_k_m, …, "+
		"for MLX mlx4, …, or a type of a plugin; lorakit formats lists them")
	f.IntVar(&o.BlockSize, "block-size", 64, "elements that share one scale: 32, 64, … 4096 in nf4 and fp4, 32, 64 or "+
		"128 in mlx2 to mlx8")
	f.BoolVar(&o.DoubleQuant, "double-quant", true, "quantise the scales of nf4 and fp4 as well")
	f.StringVar(&experts, "experts", "keep", "keep (16 bit, as transformers loads them) or per-expert (quantised, for "+
		"vLLM and unsloth); of an adapter also fused")
	f.StringArrayVar(&rules, "rule", nil, "give the tensors whose whole name matches GLOB another type than --quantize: "+
		"`GLOB=TYPE`, with keep for none; may be repeated, and the first that matches wins")
	f.Float64Var(&o.Budget, "budget", 0, "most bits a weight that is quantised, such as 4.5: chooses among the types "+
		"of rules with one GLOB by the error of each")
	budget = f.Lookup("budget")
	f.StringArrayVar(&o.Include, "include", nil, "quantise exactly the tensors whose whole name matches `GLOB`; may be "+
		"repeated")
	f.StringArrayVar(&o.Exclude, "exclude", nil, "do not quantise the tensors whose whole name matches `GLOB`; may be "+
		"repeated")
	f.StringVar(&o.Base, "base", "as-is", "what adapters are added to: as-is, or dequantized (NF4 and back, as QLoRA has "+
		"seen it); of an adapter to or from GGUF, the folder of its model")
	f.Float64Var(&minKept, "min-kept", 0.5, "fail where a module keeps less than this share of an adapter; 0 never fails")
	f.Var(&shard, "max-shard-size", "most bytes of tensors in a file, such as 5GB or 500MiB; of GGUF there is no limit "+
		"where it is not given")
	f.StringVar(&o.PreTokenizer, "pre-tokenizer", "", "GGUF's `NAME` for how a tokenizer cuts text, such as llama-bpe, "+
		"in place of what its files say")
	f.StringVar(&o.RopeScaling, "rope-scaling", "", "rope_parameters, as `JSON`, of a model made of a GGUF file whose "+
		"keys do not say them")
	f.IntVar(&o.MaxTensors, "max-tensors", 0, "most tensors in a file of a folder (default: no limit)")
	f.Var(&memory, "memory", "most memory the whole process uses")
	f.IntVar(&o.Threads, "threads", 0, "threads that compute (default: one a processor)")
	f.BoolVar(&o.Resume, "resume", false, "go on with what an interrupted run has left")
	f.BoolVar(&o.Force, "force", false, "replace DST if it exists; the old one is removed last")
	f.BoolVar(&o.DryRun, "dry-run", false, "print what would be done, and do nothing")
	linkFlag(c, &o.FollowLinks)
	f.BoolVar(&o.AllowNonFinite, "allow-non-finite", false, "encode NaN and infinity as the scheme does, instead of "+
		"refusing them")
	f.StringVar(&progress, "progress", "auto", "auto, bar, plain, json or none")
	f.BoolVar(&asJSON, "json", false, "print one JSON object on stdout")
	complete(c, "dtype", "keep", "f32", "f16", "bf16")
	complete(c, "quantize", lorakit.QuantizeChoices()...)
	complete(c, "experts", lorakit.ExpertChoices()...)
	completeOrFile(c, "base", "as-is", "dequantized")
	complete(c, "progress", "auto", "bar", "plain", "json", "none")
	return run
}

// useless refuses flags that would be ignored.
func useless(c *cobra.Command, why string, names ...string) error {
	for _, n := range names {
		if c.Flags().Changed(n) {
			return usageError{fmt.Errorf("--%s %s", n, why)}
		}
	}
	return nil
}

func complete(c *cobra.Command, flag string, values ...string) {
	if err := c.RegisterFlagCompletionFunc(flag,
		cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the flag has been defined a few lines above
	}
}

// completeOrFile is complete for a flag that may be the name of a file too.
func completeOrFile(c *cobra.Command, flag string, values ...string) {
	if err := c.RegisterFlagCompletionFunc(flag,
		cobra.FixedCompletions(values, cobra.ShellCompDirectiveDefault)); err != nil {
		panic(err) // the flag has been defined a few lines above
	}
}

// size is a flag of bytes, and how it was written.
type size struct {
	bytes int64
	text  string
}

func (s *size) String() string { return s.text }
func (s *size) Type() string   { return "SIZE" }
func (s *size) Set(text string) error {
	n, err := humanize.ParseBytes(text)
	if err != nil || n == 0 || n > math.MaxInt64 {
		return errors.New("expected a size such as 5GB or 256MiB")
	}
	*s = size{int64(n), text}
	return nil
}

func printResult(w io.Writer, r *lorakit.ConvertResult) {
	for _, n := range r.Notices {
		fmt.Fprintln(w, "note: "+escape(n))
	}
	if r.Complete {
		fmt.Fprintf(w, "%s is complete already\n", escape(r.Destination))
		return
	}
	printKept(w, r.Adapters)
	printRounding(w, r.Rounding)
	resumed := ""
	if r.Resumed > 0 {
		resumed = fmt.Sprintf(", %d of them from an earlier run", r.Resumed)
	}
	fmt.Fprintf(w, "%s: %s in %s%s, %s, %d quantised; read %s, wrote %s in %v\n", escape(r.Destination),
		count(r.Shards, "shard"), r.Format, resumed, count(r.Tensors, "tensor"), r.Quantized,
		humanize.IBytes(uint64(r.Read)), humanize.IBytes(uint64(r.Written)),
		(time.Duration(r.Seconds*1e3) * time.Millisecond).Round(time.Millisecond))
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// printPlan shows what a dry run has found.
func printPlan(w io.Writer, r *lorakit.ConvertResult) error {
	t := newTable(w, "FILE", "TENSOR", "DTYPE", "SHAPE", "FROM")
	t.names, t.spare = []string{"FILE", "TENSOR"}, []string{"DTYPE", "SHAPE"}
	for _, s := range r.Plan.Shards {
		for _, j := range s.Jobs {
			how := "copied"
			switch {
			case j.Encode != nil:
				how = j.Encode.String() + " of " + j.DType.String()
			case !j.Copy:
				how = "cast or dequantised"
			}
			for _, out := range j.Outputs {
				t.row(s.Name, out.Name, out.Type(), out.Shape.String(), how)
			}
		}
	}
	for _, f := range r.Plan.Files {
		t.row(f.Name, "", "", humanize.IBytes(uint64(len(f.Data))), "written")
	}
	for _, f := range r.Plan.Copied {
		t.row(f.Name, "", "", humanize.IBytes(uint64(f.Size)), "carried along")
	}
	t.flush()
	for _, n := range r.Notices {
		fmt.Fprintln(w, "note: "+escape(n))
	}
	fmt.Fprintf(w, "%s, %s; nothing was written\n", count(len(r.Plan.Shards), "shard"), planSize(r.Plan))
	return nil
}

// planSize says how large the shards of a plan are, and what space they take besides while they are written.
func planSize(p *lorakit.Plan) string {
	size := humanize.IBytes(uint64(p.OutputBytes()))
	if p.StreamedShards() == 0 {
		return size
	}
	return fmt.Sprintf("%s of tensors, in files whose size is known when %s has written them; until then at most %s "+
		"of scratch space beside them", size, p.Format, humanize.IBytes(uint64(p.ScratchBytes())))
}
