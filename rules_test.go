package lorakit_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// rules are rules as a user writes them.
func rules(t *testing.T, texts ...string) (list []lorakit.Rule) {
	for _, text := range texts {
		r, err := lorakit.ParseRule(text)
		require.NoError(t, err)
		list = append(list, r)
	}
	return list
}

// ofWeight are the stored tensors of a weight: its own and those beside it.
func ofWeight(all map[string]entry, weight string) map[string]entry {
	parts := map[string]entry{}
	for name, e := range all {
		if strings.HasPrefix(name, strings.TrimSuffix(weight, "weight")) {
			parts[name] = e
		}
	}
	return parts
}

// TestRules: every weight has the bytes that it gets where all get its type, with the first rule that matches it.
func TestRules(t *testing.T) {
	t.Parallel()
	llama, moe := filepath.Join(ggufModels, "llama"), filepath.Join(ggufModels, "qwen3moe")
	for name, c := range map[string]struct {
		src   string
		o     lorakit.ConvertOptions
		rules []string
		want  map[string]string // by a part of a weight's name; others have the type of --quantize
	}{
		"one scheme, three types": {llama, lorakit.ConvertOptions{Quantize: "nvfp4"},
			[]string{"*.0.*down_proj.weight=keep", "*down_proj*=fp8-channel", "*.o_proj.weight=mxfp8"},
			map[string]string{"0.mlp.down_proj": "", "1.mlp.down_proj": "fp8-channel", "o_proj": "mxfp8"}},
		"only what rules match": {llama, lorakit.ConvertOptions{},
			[]string{"*mlp*=mlx4", "*q_proj*=mlx8", "*=keep"}, map[string]string{"mlp": "mlx4", "q_proj": "mlx8"}},
		"the output head by its name": {llama, lorakit.ConvertOptions{Quantize: "mlx4", BlockSize: 32},
			[]string{"lm_head.weight=mlx8", "model.embed_tokens.weight=mlx6"},
			map[string]string{"lm_head": "mlx8", "embed_tokens": "mlx6"}},
		"experts by their names": {moe, lorakit.ConvertOptions{Quantize: "mxfp8"},
			[]string{"*.experts.*=mxfp4"}, map[string]string{".experts.": "mxfp4"}},
		"all but routers and experts": {moe, lorakit.ConvertOptions{Quantize: "none"},
			[]string{"*=mxfp8"}, map[string]string{"self_attn": "mxfp8"}},
		"among what is included": {llama, lorakit.ConvertOptions{Quantize: "fp8-channel",
			Include: []string{"*self_attn*_proj.weight"}}, []string{"*=nvfp4", "*mlp*=fp8-channel"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			convert := func(dst string, o lorakit.ConvertOptions) map[string]entry {
				dst = filepath.Join(dir, dst)
				_, err := lorakit.Convert(t.Context(), c.src, dst, o)
				require.NoError(t, err)
				v, err := lorakit.Verify(t.Context(), dst, lorakit.ReadOptions{})
				require.NoError(t, err)
				assert.Empty(t, v.Problems)
				return load(t, dst)
			}
			o := c.o
			o.BlockSize = 32
			o.Rules = rules(t, c.rules...)
			if c.want == nil {
				_, err := lorakit.Convert(t.Context(), c.src, filepath.Join(dir, "mixed"), o)
				require.ErrorContains(t, err, `"*mlp*=fp8-channel" decides for no tensor`)
				return
			}
			got := convert("mixed", o)
			plain := load(t, c.src)
			whole := map[string]map[string]entry{"": plain}
			typeOf := func(weight string) string {
				for part, typ := range c.want {
					if strings.Contains(weight, part) {
						return typ
					}
				}
				quantised := strings.HasSuffix(weight, "_proj.weight") && !strings.Contains(weight, "expert")
				if quantised && c.o.Quantize != "none" && c.o.Quantize != "" {
					return c.o.Quantize
				}
				return ""
			}
			count := 0
			for weight := range plain {
				typ := typeOf(weight)
				if whole[typ] == nil {
					all := lorakit.ConvertOptions{Quantize: typ, BlockSize: 32, Include: []string{"*_proj.weight"}}
					if strings.Contains(typ, "mlx") {
						all.Include = append(all.Include, "lm_head.weight", "model.embed_tokens.weight")
					}
					whole[typ] = convert("all-"+typ, all)
				}
				want := ofWeight(whole[typ], weight)
				require.NotEmpty(t, want, weight)
				for part, e := range want {
					require.Equal(t, e, got[part], "%s in %q", part, typ)
					count++
				}
			}
			assert.Len(t, got, count)
		})
	}
}

// TestRulesOfGGUF: rules go by the names of either side, over the choice of a file type or alone.
func TestRulesOfGGUF(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	convert := func(name string, o lorakit.ConvertOptions) map[string]entry {
		dst := filepath.Join(dir, name+".gguf")
		_, err := lorakit.Convert(t.Context(), filepath.Join(ggufModels, "llama"), dst, o)
		require.NoError(t, err)
		return load(t, dst)
	}
	eight, four, five := convert("8", lorakit.ConvertOptions{Quantize: "q8_0"}),
		convert("4", lorakit.ConvertOptions{Quantize: "q4_0"}), convert("5", lorakit.ConvertOptions{Quantize: "q5_1"})
	plain := convert("plain", lorakit.ConvertOptions{})
	for name, quantize := range map[string]string{"over": "q4_0", "alone": "keep"} {
		got := convert(name, lorakit.ConvertOptions{Quantize: quantize,
			Rules: rules(t, "blk.0.ffn_down.weight=keep", "*down_proj*=q5_1", "*attn*=q8_0")})
		for tensor, e := range got {
			want := map[bool]map[string]entry{true: four, false: plain}[quantize == "q4_0"]
			switch {
			case tensor == "blk.0.ffn_down.weight":
				want = plain
			case strings.Contains(tensor, "ffn_down"):
				want = five
			case strings.Contains(tensor, "attn") && !strings.Contains(tensor, "norm"):
				want = eight
			}
			require.Equal(t, want[tensor], e, tensor)
		}
	}
}

// weights are those of a checkpoint.
func weights(t *testing.T, path string) []*checkpoint.Weight {
	c, err := checkpoint.Open(t.Context(), path)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c.Weights
}

// measured is what a weight costs in a type.
type measured struct {
	bytes int64
	err   float64
}

// measureAll is that of all weights of a checkpoint, by what is read of it as a whole.
func measureAll(t *testing.T, src, quantised string) map[string]measured {
	values := func(w *checkpoint.Weight) []float32 {
		b, err := checkpoint.NewReader(nil).Read(w, 0, w.Count(), false)
		require.NoError(t, err)
		x := make([]float32, w.Count())
		require.NoError(t, tensor.ToFloats(x, b, w.Values))
		return x
	}
	before := map[string][]float32{}
	for _, w := range weights(t, src) {
		before[w.Name] = values(w)
	}
	all := map[string]measured{}
	for _, w := range weights(t, quantised) {
		var m measured
		for _, p := range w.Parts {
			m.bytes += p.Bytes
		}
		for i, y := range values(w) {
			d := float64(before[w.Name][i]) - float64(y)
			m.err += float64(d * d)
		}
		all[w.Name] = m
	}
	return all
}

// wideFolder has matrices of a few sizes whose rows are whole groups of 128.
func wideFolder(t *testing.T) string {
	r := rand.New(rand.NewPCG(3, 5))
	all := map[string]entry{}
	for i, shape := range []tensor.Shape{{24, 128}, {24, 256}, {96, 128}, {33, 384}, {64, 128}} {
		e := entry{Info: tensor.Info{Name: fmt.Sprintf("layers.%d.up_proj.weight", i), DType: tensor.F32, Shape: shape}}
		for range shape[0] * shape[1] {
			e.data = binary.LittleEndian.AppendUint32(e.data, math.Float32bits(float32(r.NormFloat64()*float64(1+i))))
		}
		all[e.Name] = e
	}
	return madeFolder(t, `{"architectures": ["Wide"], "dtype": "float32"}`, "model.safetensors", all)
}

// spent chooses by the rule as it is written down: the smallest type for all, then the best step that fits.
func spent(budget float64, groups [][]string, elements map[string]int64, costs []map[string]measured) []int {
	at := make([]int, len(groups))
	of := func(names []string, typ int) (m measured) {
		for _, name := range names {
			m.bytes += costs[typ][name].bytes
			m.err += costs[typ][name].err
		}
		return m
	}
	for g, names := range groups {
		for typ := range costs {
			if of(names, typ).bytes < of(names, at[g]).bytes {
				at[g] = typ
			}
		}
	}
	bytes := func(at []int) (n int64) {
		for g, names := range groups {
			n += of(names, at[g]).bytes
		}
		return n
	}
	total := int64(0)
	for _, names := range groups {
		for _, name := range names {
			total += elements[name]
		}
	}
	for {
		best, bestTo, most := -1, 0, 0.0
		for g, names := range groups {
			for to := range costs {
				was, is := of(names, at[g]), of(names, to)
				drop, added := was.err-is.err, is.bytes-was.bytes
				next := slices.Clone(at)
				next[g] = to
				if added > 0 && drop/float64(added) > most && 8*float64(bytes(next))/float64(total) <= budget {
					best, bestTo, most = g, to, drop/float64(added)
				}
			}
		}
		if best < 0 {
			return at
		}
		at[best] = bestTo
	}
}

// TestBudget: the choice is that of the rule, and the same for any threads and memory. It has the process for itself:
// what other tests hold counts as memory that the plan takes.
func TestBudget(t *testing.T) {
	const all = "*_proj.weight"
	for name, c := range map[string]struct {
		model  string
		types  []string
		budget float64
		double bool
	}{
		"mlx":                 {"llama", []string{"mlx3", "mlx4", "mlx8"}, 6, false},
		"compressed-tensors":  {"llama", []string{"nvfp4", "fp8-channel"}, 7.5, false},
		"a weight_shape":      {"wide", []string{"w4a16", "w8a16"}, 6, false},
		"plain as a choice":   {"llama", []string{"mlx4", "keep"}, 9, false},
		"double quantisation": {"llama", []string{"nf4", "keep"}, 13, true},
		"turned round":        {"gpt2", []string{"mxfp8", "keep"}, 12, false},
		"GGUF":                {"llama", []string{"q4_0", "q5_1", "q8_0"}, 6.5, false},
	} {
		t.Run(name, func(t *testing.T) {
			src, dir := filepath.Join(ggufModels, c.model), t.TempDir()
			if c.model == "wide" {
				src = wideFolder(t)
			}
			end := map[bool]string{true: ".gguf"}[name == "GGUF"]
			convert := func(name string, o lorakit.ConvertOptions) string {
				dst := filepath.Join(dir, name+end)
				o.BlockSize, o.DoubleQuant = 32, c.double
				_, err := lorakit.Convert(t.Context(), src, dst, o)
				require.NoError(t, err)
				return dst
			}
			glob := all
			if c.model == "gpt2" {
				glob = "*"
			}
			o := lorakit.ConvertOptions{Budget: c.budget}
			var costs []map[string]measured
			plain := convert("keep", lorakit.ConvertOptions{})
			for _, typ := range c.types {
				o.Rules = append(o.Rules, rules(t, glob+"="+typ)...)
				whole := plain
				if typ != "keep" {
					whole = convert(typ, lorakit.ConvertOptions{Rules: rules(t, glob+"="+typ)})
				}
				costs = append(costs, measureAll(t, plain, whole))
			}
			one, two := o, o
			one.Threads, one.Memory = 1, 64<<20
			two.Threads = 4
			mixed := convert("mixed", one)
			require.Equal(t, content(t, mixed), content(t, convert("again", two)))

			// What the types changed is what was chosen.
			typeOf, elements := map[string]int{}, map[string]int64{}
			var names []string
			first := convert("first", lorakit.ConvertOptions{Rules: rules(t, glob+"="+c.types[0])})
			chosen := map[string]bool{}
			for _, w := range weights(t, first) {
				chosen[w.Name] = w.Decoder != nil
			}
			for _, w := range weights(t, mixed) {
				if !chosen[w.Name] {
					continue
				}
				typ := "keep"
				if w.Decoder != nil {
					typ = w.Decoder.Spec().Type
				}
				names, elements[w.Name] = append(names, w.Name), w.Count()
				typeOf[w.Name] = slices.Index(c.types, typ)
			}
			groups := map[string][]string{}
			for _, n := range names {
				key := n
				if c.types[0] == "nvfp4" {
					for _, fused := range []string{"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} {
						if module, end, ok := strings.Cut(n, fused); ok {
							key = module + "*" + end
						}
					}
				}
				groups[key] = append(groups[key], n)
			}
			var list [][]string
			for _, g := range groups {
				list = append(list, g)
			}
			slices.SortFunc(list, func(a, b []string) int { return strings.Compare(slices.Min(a), slices.Min(b)) })
			kinds := map[int]bool{}
			for i, at := range spent(c.budget, list, elements, costs) {
				for _, n := range list[i] {
					assert.Equal(t, c.types[at], c.types[typeOf[n]], n)
				}
				kinds[at] = true
			}
			assert.Greater(t, len(kinds), 1, "the budget leaves nothing to choose")
		})
	}
}

// TestBudgetOfMerge: what is measured is what is written, adapters included.
func TestBudgetOfMerge(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	src := filepath.Join("fixtures", "tiny-qwen3")
	merge := []lorakit.Adapter{{Path: filepath.Join("fixtures", "adapters", "tiny-qwen3", "dora")}}
	o := lorakit.ConvertOptions{Budget: 6.5, Rules: rules(t, "*_proj.weight=nf4", "*_proj.weight=keep"), MinKept: -1}
	two := filepath.Join(dir, "two")
	_, err := lorakit.Merge(t.Context(), src, merge, filepath.Join(dir, "merged"), lorakit.ConvertOptions{})
	require.NoError(t, err)
	_, err = lorakit.Convert(t.Context(), filepath.Join(dir, "merged"), two, o)
	require.NoError(t, err)
	one := filepath.Join(dir, "one")
	_, err = lorakit.Merge(t.Context(), src, merge, one, o)
	require.NoError(t, err)
	assert.Equal(t, load(t, two), load(t, one))
}

// TestBudgetOfInfinity: a weight with infinity has no error that a better type could lessen.
func TestBudgetOfInfinity(t *testing.T) {
	t.Parallel()
	for _, x := range []float64{math.Inf(1), math.Inf(-1), math.NaN()} {
		e := entry{Info: tensor.Info{Name: "layers.0.up_proj.weight", DType: tensor.F32, Shape: tensor.Shape{4, 128}},
			data: make([]byte, 4*4*128)}
		binary.LittleEndian.PutUint32(e.data[4*130:], math.Float32bits(float32(x)))
		src := madeFolder(t, `{"architectures": ["Wide"], "dtype": "float32"}`, "model.safetensors",
			map[string]entry{e.Name: e})
		for _, types := range [][2]string{{"nvfp4", "fp8-channel"}, {"fp8-channel", "keep"}, {"nvfp4", "w8a8"}} {
			dst := filepath.Join(t.TempDir(), "a")
			_, err := lorakit.Convert(t.Context(), src, dst, lorakit.ConvertOptions{Budget: 40, AllowNonFinite: true,
				Rules: rules(t, "*="+types[0], "*="+types[1])})
			require.ErrorContains(t, err, "cannot be measured", "%v in %v", x, types)
			assert.NoDirExists(t, dst)
		}
	}
}

// TestRulesAreRefused: rules that contradict each other, the checkpoint or the budget.
func TestRulesAreRefused(t *testing.T) {
	t.Parallel()
	llama := filepath.Join(ggufModels, "llama")
	dir := t.TempDir()
	mlx := filepath.Join(dir, "mlx4")
	_, err := lorakit.Convert(t.Context(), llama, mlx, lorakit.ConvertOptions{Quantize: "mlx4", BlockSize: 32})
	require.NoError(t, err)
	for name, c := range map[string]struct {
		src, dst string
		o        lorakit.ConvertOptions
		rules    []string
		want     string
	}{
		"unknown":     {llama, "a", lorakit.ConvertOptions{}, []string{"*=nf5"}, `unknown quantisation "nf5"`},
		"none":        {llama, "a", lorakit.ConvertOptions{}, []string{"*=none"}, `unknown quantisation "none"`},
		"two schemes": {llama, "a", lorakit.ConvertOptions{}, []string{"*q*=nf4", "*=mlx4"}, "mlx4 one of mlx"},
		"two types":   {llama, "a", lorakit.ConvertOptions{}, []string{"*q*=nf4", "*=fp4"}, "one type a checkpoint"},
		"beside MLX":  {mlx, "a", lorakit.ConvertOptions{}, []string{"*q_proj*=w8a16"}, "it is in mlx4 of mlx"},
		"no match":    {llama, "a", lorakit.ConvertOptions{}, []string{"*q_prj*=nf4"}, "matches none of the"},
		"shadowed":    {llama, "a", lorakit.ConvertOptions{}, []string{"*=nf4", "*q_proj*=keep"}, "decides for no tensor"},
		"excluded": {llama, "a", lorakit.ConvertOptions{Exclude: []string{"*q_proj*"}}, []string{"*q_proj*=nf4"},
			"decides for no tensor"},
		"second":       {llama, "a", lorakit.ConvertOptions{}, []string{"*=nf4", "*=keep"}, "which wins"},
		"twice":        {llama, "a", lorakit.ConvertOptions{Budget: 5}, []string{"*=nf4", "*=nf4"}, "twice"},
		"read only":    {llama, "a", lorakit.ConvertOptions{}, []string{"*=gptq4"}, "gptq4"},
		"norms":        {llama, "a", lorakit.ConvertOptions{}, []string{"*layernorm*=mlx4"}, "cannot be quantised to mlx4"},
		"file type":    {llama, "a.gguf", lorakit.ConvertOptions{}, []string{"*attn_q*=q4_k_m"}, "q4_k_m"},
		"not GGUF's":   {llama, "a.gguf", lorakit.ConvertOptions{}, []string{"*attn_q*=mlx4"}, "types of its own"},
		"budget alone": {llama, "a", lorakit.ConvertOptions{Budget: 5, Quantize: "nf4"}, nil, "no two have one"},
		"no choice":    {llama, "a", lorakit.ConvertOptions{Budget: 5}, []string{"*q*=nf4", "*=keep"}, "no two have one"},
		"negative":     {llama, "a", lorakit.ConvertOptions{Budget: -1}, []string{"*=nf4", "*=keep"}, "budget is -1"},
		"too much": {llama, "a", lorakit.ConvertOptions{Budget: 99}, []string{"*=nf4", "*=keep"},
			"bits as they are, budget is 99, and nothing is left to be quantised to nf4"},
		"too little": {llama, "a", lorakit.ConvertOptions{Budget: 4.2, BlockSize: 32}, []string{"*=mlx4", "*=mlx8"},
			"have 5.0000 bits, and budget is 4.2"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c.o.Rules = rules(t, c.rules...)
			dst := filepath.Join(dir, name, c.dst)
			_, err := lorakit.Convert(context.Background(), c.src, dst, c.o)
			require.ErrorContains(t, err, c.want)
			assert.NotContains(t, err.Error(), "\n")
			assert.NoFileExists(t, dst)
			assert.NoDirExists(t, dst)
		})
	}
	for _, text := range []string{"", "=nf4", "a=", "nf4"} {
		_, err := lorakit.ParseRule(text)
		assert.ErrorIs(t, err, lorakit.ErrOption, text)
	}
}

// TestLeftPlain: what mlx-lm leaves plain is left so, with a note, where nobody has named it.
func TestLeftPlain(t *testing.T) {
	t.Parallel()
	src, dir := filepath.Join("fixtures", "tiny-llama"), t.TempDir()
	const want = `as mlx-lm leaves such weights: "model.layers.0.mlp.down_proj.weight", ` +
		`"model.layers.1.mlp.down_proj.weight", of which the first cannot be quantised to mlx-nvfp4: its shape is [48, 346]`
	for name, o := range map[string]lorakit.ConvertOptions{
		"type":   {Quantize: "mlx-nvfp4"},
		"rule":   {Rules: rules(t, "*=mlx-nvfp4")},
		"budget": {Rules: rules(t, "*=mlx-nvfp4", "*=mlx2"), Budget: 5, BlockSize: 32},
	} {
		r, err := lorakit.Convert(t.Context(), src, filepath.Join(dir, name), o)
		require.NoError(t, err)
		require.Contains(t, strings.Join(r.Notices, "\n"), want)
		got := load(t, filepath.Join(dir, name))
		for name, e := range load(t, src) {
			switch {
			case strings.Contains(name, "down_proj"):
				require.Equal(t, e, got[name])
			case strings.Contains(name, "_proj"):
				require.NotEqual(t, e, got[name])
			}
		}
	}
	for name, c := range map[string]struct {
		o    lorakit.ConvertOptions
		want string
	}{
		"named":    {lorakit.ConvertOptions{Quantize: "mlx-nvfp4", Include: []string{"*_proj*"}}, "its shape is [48, 346]"},
		"none fit": {lorakit.ConvertOptions{Quantize: "mlx4"}, "its shape is [346, 48], expected rows of a multiple of 64"},
		"refused":  {lorakit.ConvertOptions{Quantize: "nvfp4"}, "its rows have 346 elements"},
	} {
		_, err := lorakit.Convert(t.Context(), src, filepath.Join(dir, name), c.o)
		require.ErrorContains(t, err, c.want, name)
		require.NoDirExists(t, filepath.Join(dir, name))
	}
}

// TestBudgetOfIntegers: a budget whose rules match nothing that can be quantised is an error.
func TestBudgetOfIntegers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ints := tensor.Info{Name: "ints.weight", DType: tensor.I32, Shape: tensor.Shape{4, 256}}
	m := ggufModel{keys: formats.Metadata{{Name: "general.architecture", Value: "llama"}}, tensors: []tensor.Info{ints},
		data: [][]byte{make([]byte, 4096)}}
	file, folder, dst := filepath.Join(dir, "m.gguf"), filepath.Join(dir, "m.safetensors"), filepath.Join(dir, "out")
	require.NoError(t, os.WriteFile(file, m.bytes(t), 0o666))
	writeTensors(t, folder, map[string]entry{ints.Name: {ints, m.data[0]}})
	for _, c := range []struct{ src, dst, small, large string }{
		{file, dst + ".gguf", "q4_0", "q8_0"}, {folder, dst, "mlx4", "mlx8"},
	} {
		_, err := lorakit.Convert(t.Context(), c.src, c.dst, lorakit.ConvertOptions{Budget: 5,
			Rules: rules(t, "ints*="+c.small, "ints*="+c.large)})
		isRefused(t, err, c.src, dst, "budget has no weight to choose a type for")
	}
}

// TestRulesBeside: what is quantised and matched by no rule stays, and config.json tells of both.
func TestRulesBeside(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	llama, four, mixed, whole := filepath.Join(ggufModels, "llama"), filepath.Join(dir, "4"), filepath.Join(dir, "mixed"),
		filepath.Join(dir, "whole")
	for _, c := range []struct {
		src, dst string
		o        lorakit.ConvertOptions
	}{
		{llama, four, lorakit.ConvertOptions{Quantize: "mlx4", BlockSize: 32, Exclude: []string{"*down_proj*"}}},
		{four, mixed, lorakit.ConvertOptions{Rules: rules(t, "*down_proj*=mlx8"), BlockSize: 32}},
		{llama, whole, lorakit.ConvertOptions{Quantize: "mlx4", Rules: rules(t, "*down_proj*=mlx8"), BlockSize: 32}},
	} {
		_, err := lorakit.Convert(t.Context(), c.src, c.dst, c.o)
		require.NoError(t, err)
	}
	assert.Equal(t, load(t, whole), load(t, mixed))
	assert.Equal(t, readConfig(t, whole), readConfig(t, mixed))
}
