package models

import (
	"slices"
	"strconv"
	"strings"
	"sync"
)

// A Family is a kind of image or video model whose authors name its modules in one way, and diffusers in another:
// adapters of kohya and ComfyUI have the authors' names. Where the authors have one matrix for what diffusers has in
// several (the query, key and value of an attention), or with its outputs in another order, shares of its rows say
// so.
type Family struct {
	Name string
	rows map[string][]renaming // by the authors' name, with # for all numbers
	rule func(name string) (string, bool)
}

// renaming is what diffusers has for a module of the authors.
type renaming struct {
	pattern string // the authors' name, with # for the numbers of blocks
	shares  []Share
	out, in int64 // the ratio of its outputs to its inputs; 0 where any is right
}

// Share says that the Count of Of equal parts of the outputs of the authors' module that begin with First are those
// of the diffusers module that begin with At, of Own; Own is 1 for all of them.
type Share struct {
	Module           string
	First, Count, Of int64
	At, Own          int64
}

// Diffusers returns what a module is in diffusers, by the name that the family's authors have for it, with the sizes
// of its inputs and outputs, which the name alone does not always tell apart; 0 where they are not known.
func (f *Family) Diffusers(module string, out, in int64) ([]Share, bool) {
	if f.rule != nil {
		name, ok := f.rule(module)
		return []Share{{Module: name, Count: 1, Of: 1, Own: 1}}, ok
	}
	for _, r := range f.rows[numbered(module)] {
		numbers, ok := numbersOf(r.pattern, module)
		if !ok || r.out > 0 && (out == 0 || out*r.in != in*r.out) {
			continue
		}
		shares := slices.Clone(r.shares)
		for i := range shares {
			for _, n := range numbers {
				shares[i].Module = strings.Replace(shares[i].Module, "#", n, 1)
			}
		}
		return shares, true
	}
	return nil, false
}

// Original returns the authors' module that one of diffusers is or is a part of, with the shares that it has in it,
// by its name and the sizes of its inputs and outputs. The U-Net of Stable Diffusion is not looked for: which number
// its layers have there depends on what lies beside them.
func (f *Family) Original(module string, out, in int64) (original string, shares []Share, ok bool) {
	for _, list := range f.rows {
		for _, r := range list {
			var own []Share
			var numbers []string
			for _, s := range r.shares {
				if n, ok := numbersOf(s.Module, module); ok {
					numbers = n
					s.Module = module
					own = append(own, s)
				}
			}
			if own == nil {
				continue
			}
			count := own[0].Count * int64(len(own))
			if r.out > 0 && out*own[0].Of*r.in != in*r.out*count {
				continue
			}
			original = r.pattern
			for _, n := range numbers {
				original = strings.Replace(original, "#", n, 1)
			}
			return original, own, true
		}
	}
	return "", nil, false
}

// Has reports whether the family's authors have a module of that name.
func (f *Family) Has(module string) bool {
	if f.rule != nil {
		_, ok := f.rule(module)
		return ok
	}
	return slices.ContainsFunc(f.rows[numbered(module)], func(r renaming) bool {
		_, ok := numbersOf(r.pattern, module)
		return ok
	})
}

// numbersOf are those that a name has in the places of a pattern, where it has the pattern otherwise.
func numbersOf(pattern, module string) (list []string, ok bool) {
	parts, want := strings.Split(module, "."), strings.Split(pattern, ".")
	if len(parts) != len(want) {
		return nil, false
	}
	for i, p := range want {
		switch {
		case p == "#" && isNumber(parts[i]):
			list = append(list, parts[i])
		case p != parts[i]:
			return nil, false
		}
	}
	return list, true
}

// Families lists the families that are known.
func Families() []*Family { return families() }

var families = sync.OnceValue(func() []*Family {
	list := []*Family{{Name: "the U-Net of Stable Diffusion", rule: ofLatentDiffusion}}
	for _, t := range tables {
		f := &Family{Name: t.name, rows: map[string][]renaming{}}
		for line := range strings.Lines(t.rows) {
			if fields := strings.Fields(line); len(fields) > 0 {
				key := numbered(fields[0])
				f.rows[key] = append(f.rows[key], parseRenaming(fields))
			}
		}
		list = append(list, f)
	}
	return list
})

// originalNames are the authors' names of all tables by flatKey.
var originalNames = sync.OnceValue(func() map[string][]string {
	byKey := map[string][]string{}
	for _, f := range families() {
		for _, list := range f.rows {
			for _, r := range list {
				if key := flatKey(r.pattern); !slices.Contains(byKey[key], r.pattern) {
					byKey[key] = append(byKey[key], r.pattern)
				}
			}
		}
	}
	return byKey
})

// parseRenaming reads the columns of a table: the authors' name; what diffusers has, with those that share the
// outputs in braces, in their order, and *N behind one that has N parts where others have one; ~ before one whose
// halves are exchanged. The third column, where it is there, is the ratio of outputs to inputs.
func parseRenaming(fields []string) (r renaming) {
	r.pattern, fields = fields[0], fields[1:]
	if len(fields) > 1 {
		out, in, _ := strings.Cut(fields[1], ":")
		r.out, r.in = number(out), number(in)
	}
	if name, ok := strings.CutPrefix(fields[0], "~"); ok {
		r.shares = []Share{{name, 1, 1, 2, 0, 2}, {name, 0, 1, 2, 1, 2}}
		return r
	}
	before, list, ok := strings.Cut(strings.TrimSuffix(fields[0], "}"), "{")
	if !ok {
		before, list = "", before
	}
	var of int64
	for last := range strings.SplitSeq(list, ",") {
		last, times, ok := strings.Cut(last, "*")
		n := int64(1)
		if ok {
			n = number(times)
		}
		r.shares = append(r.shares, Share{Module: before + last, First: of, Count: n, Own: 1})
		of += n
	}
	for i := range r.shares {
		r.shares[i].Of = of
	}
	return r
}

// number reads a number of a table, which is part of the program.
func number(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		panic(err)
	}
	return n
}

// tables are what diffusers' converters of whole checkpoints do (loaders/single_file_utils.py): convert_flux_,
// convert_flux2_, convert_sd3_transformer_checkpoint_to_diffusers and convert_wan_transformer_to_diffusers.
var tables = []struct{ name, rows string }{
	{"Flux.1", `
double_blocks.#.img_attn.qkv     transformer_blocks.#.attn.{to_q,to_k,to_v}  3:1
double_blocks.#.img_attn.proj    transformer_blocks.#.attn.to_out.0            1:1
double_blocks.#.img_mlp.0        transformer_blocks.#.ff.net.0.proj            4:1
double_blocks.#.img_mlp.2        transformer_blocks.#.ff.net.2                 1:4
double_blocks.#.img_mod.lin      transformer_blocks.#.norm1.linear             6:1
double_blocks.#.txt_attn.qkv     transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}  3:1
double_blocks.#.txt_attn.proj    transformer_blocks.#.attn.to_add_out          1:1
double_blocks.#.txt_mlp.0        transformer_blocks.#.ff_context.net.0.proj    4:1
double_blocks.#.txt_mlp.2        transformer_blocks.#.ff_context.net.2         1:4
double_blocks.#.txt_mod.lin      transformer_blocks.#.norm1_context.linear     6:1
single_blocks.#.linear1          single_transformer_blocks.#.{attn.to_q,attn.to_k,attn.to_v,proj_mlp*4}  7:1
single_blocks.#.linear2          single_transformer_blocks.#.proj_out          1:5
single_blocks.#.modulation.lin   single_transformer_blocks.#.norm.linear       3:1
img_in                           x_embedder
txt_in                           context_embedder
time_in.in_layer                 time_text_embed.timestep_embedder.linear_1
time_in.out_layer                time_text_embed.timestep_embedder.linear_2
vector_in.in_layer               time_text_embed.text_embedder.linear_1
vector_in.out_layer              time_text_embed.text_embedder.linear_2
guidance_in.in_layer             time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer            time_text_embed.guidance_embedder.linear_2
final_layer.adaLN_modulation.1   ~norm_out.linear                              2:1
final_layer.linear               proj_out
`},
	{"Flux.2", `
double_blocks.#.img_attn.qkv     transformer_blocks.#.attn.{to_q,to_k,to_v}  3:1
double_blocks.#.img_attn.proj    transformer_blocks.#.attn.to_out.0            1:1
double_blocks.#.img_mlp.0        transformer_blocks.#.ff.linear_in             6:1
double_blocks.#.img_mlp.2        transformer_blocks.#.ff.linear_out            1:3
double_blocks.#.txt_attn.qkv     transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}  3:1
double_blocks.#.txt_attn.proj    transformer_blocks.#.attn.to_add_out          1:1
double_blocks.#.txt_mlp.0        transformer_blocks.#.ff_context.linear_in     6:1
double_blocks.#.txt_mlp.2        transformer_blocks.#.ff_context.linear_out    1:3
single_blocks.#.linear1          single_transformer_blocks.#.attn.to_qkv_mlp_proj  9:1
single_blocks.#.linear2          single_transformer_blocks.#.attn.to_out       1:4
img_in                           x_embedder
txt_in                           context_embedder
time_in.in_layer                 time_guidance_embed.timestep_embedder.linear_1
time_in.out_layer                time_guidance_embed.timestep_embedder.linear_2
guidance_in.in_layer             time_guidance_embed.guidance_embedder.linear_1
guidance_in.out_layer            time_guidance_embed.guidance_embedder.linear_2
single_stream_modulation.lin     single_stream_modulation.linear
double_stream_modulation_img.lin double_stream_modulation_img.linear
double_stream_modulation_txt.lin double_stream_modulation_txt.linear
final_layer.adaLN_modulation.1   ~norm_out.linear                              2:1
final_layer.linear               proj_out
`},
	{"Stable Diffusion 3", `
joint_blocks.#.x_block.attn.qkv              transformer_blocks.#.attn.{to_q,to_k,to_v}  3:1
joint_blocks.#.x_block.attn.proj             transformer_blocks.#.attn.to_out.0              1:1
joint_blocks.#.x_block.attn2.qkv             transformer_blocks.#.attn2.{to_q,to_k,to_v}  3:1
joint_blocks.#.x_block.attn2.proj            transformer_blocks.#.attn2.to_out.0             1:1
joint_blocks.#.x_block.mlp.fc1               transformer_blocks.#.ff.net.0.proj              4:1
joint_blocks.#.x_block.mlp.fc2               transformer_blocks.#.ff.net.2                   1:4
joint_blocks.#.x_block.adaLN_modulation.1    transformer_blocks.#.norm1.linear
joint_blocks.#.context_block.attn.qkv        transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}  3:1
joint_blocks.#.context_block.attn.proj       transformer_blocks.#.attn.to_add_out            1:1
joint_blocks.#.context_block.mlp.fc1         transformer_blocks.#.ff_context.net.0.proj      4:1
joint_blocks.#.context_block.mlp.fc2         transformer_blocks.#.ff_context.net.2           1:4
joint_blocks.#.context_block.adaLN_modulation.1  transformer_blocks.#.norm1_context.linear   6:1
joint_blocks.#.context_block.adaLN_modulation.1  ~transformer_blocks.#.norm1_context.linear  2:1
x_embedder.proj                              pos_embed.proj
t_embedder.mlp.0                             time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2                             time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0                             time_text_embed.text_embedder.linear_1
y_embedder.mlp.2                             time_text_embed.text_embedder.linear_2
context_embedder                             context_embedder
final_layer.adaLN_modulation.1               ~norm_out.linear                                2:1
final_layer.linear                           proj_out
`},
	{"Wan", `
blocks.#.self_attn.q       blocks.#.attn1.to_q
blocks.#.self_attn.k       blocks.#.attn1.to_k
blocks.#.self_attn.v       blocks.#.attn1.to_v
blocks.#.self_attn.o       blocks.#.attn1.to_out.0
blocks.#.cross_attn.q      blocks.#.attn2.to_q
blocks.#.cross_attn.k      blocks.#.attn2.to_k
blocks.#.cross_attn.v      blocks.#.attn2.to_v
blocks.#.cross_attn.o      blocks.#.attn2.to_out.0
blocks.#.cross_attn.k_img  blocks.#.attn2.add_k_proj
blocks.#.cross_attn.v_img  blocks.#.attn2.add_v_proj
blocks.#.ffn.0             blocks.#.ffn.net.0.proj
blocks.#.ffn.2             blocks.#.ffn.net.2
patch_embedding            patch_embedding
text_embedding.0           condition_embedder.text_embedder.linear_1
text_embedding.2           condition_embedder.text_embedder.linear_2
time_embedding.0           condition_embedder.time_embedder.linear_1
time_embedding.2           condition_embedder.time_embedder.linear_2
time_projection.1          condition_embedder.time_proj
img_emb.proj.1             condition_embedder.image_embedder.ff.net.0.proj
img_emb.proj.3             condition_embedder.image_embedder.ff.net.2
head.head                  proj_out
`},
}

// ofLatentDiffusion is what diffusers calls a module of the U-Net of Stable Diffusion 1, 2 and XL, which the files of
// their authors number through: blocks of two residual layers each, an attention beside each of them or none, and a
// change of the resolution behind (convert_ldm_unet_checkpoint). A name that does not fit such blocks is none of
// theirs.
func ofLatentDiffusion(name string) (string, bool) {
	const layers = 2
	parts := strings.Split(name, ".")
	at := func(i int) string {
		if i < len(parts) {
			return parts[i]
		}
		return ""
	}
	rest := func(i int) string { return strings.Join(parts[min(i, len(parts)):], ".") }
	fixed := map[string]string{
		"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
		"label_emb.0.0": "add_embedding.linear_1",
		"label_emb.0.2": "add_embedding.linear_2", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out",
		"out.2": "conv_out",
	}
	if to, ok := fixed[name]; ok {
		return to, true
	}
	n, err := strconv.Atoi(at(1))
	if err != nil || n < 0 {
		return "", false
	}
	inner := func(block, of string, behind int) (string, bool) {
		last := rest(behind)
		if of == "resnets" {
			var ok bool
			if last, ok = residual[last]; !ok {
				return "", false
			}
		} else if first := at(behind); first != "transformer_blocks" && first != "proj_in" && first != "proj_out" &&
			first != "norm" {
			return "", false
		}
		return block + "." + last, true
	}
	switch at(0) {
	case "input_blocks":
		if n == 0 {
			return "", false
		}
		block, layer := strconv.Itoa((n-1)/(layers+1)), (n-1)%(layers+1)
		down := "down_blocks." + block
		switch {
		case layer == layers && rest(2) == "0.op":
			return down + ".downsamplers.0.conv", true
		case layer == layers:
		case at(2) == "0":
			return inner(down+".resnets."+strconv.Itoa(layer), "resnets", 3)
		case at(2) == "1":
			return inner(down+".attentions."+strconv.Itoa(layer), "attentions", 3)
		}
	case "middle_block":
		switch n {
		case 0, 2:
			return inner("mid_block.resnets."+strconv.Itoa(n/2), "resnets", 2)
		case 1:
			return inner("mid_block.attentions.0", "attentions", 2)
		}
	case "output_blocks":
		block, layer := strconv.Itoa(n/(layers+1)), n%(layers+1)
		up := "up_blocks." + block
		switch {
		case layer == layers && (rest(2) == "1.conv" || rest(2) == "2.conv"): // behind an attention, where there is one
			return up + ".upsamplers.0.conv", true
		case at(2) == "0":
			return inner(up+".resnets."+strconv.Itoa(layer), "resnets", 3)
		case at(2) == "1":
			return inner(up+".attentions."+strconv.Itoa(layer), "attentions", 3)
		}
	}
	return "", false
}

// residual are the modules of a residual layer of the U-Net, by the authors' names.
var residual = map[string]string{
	"in_layers.0": "norm1", "in_layers.2": "conv1", "out_layers.0": "norm2", "out_layers.3": "conv2",
	"emb_layers.1":    "time_emb_proj",
	"skip_connection": "conv_shortcut",
}
