package lora

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// imageParts are the first parts of module names in image models: diffusers' U-Net and transformers, and those that
// sd-scripts takes over from their authors.
var imageParts = []string{"down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding",
	"add_embedding",
	"input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out",
	"double_blocks", "single_blocks", "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer",
	"transformer_blocks", "single_transformer_blocks", "joint_blocks", "x_embedder", "context_embedder", "time_text_embed",
	"proj_out", "norm_out"}

// imageWords are the other parts with an underscore in them, and those that could be read in two ways.
var imageWords = []string{"attn1", "attn2", "attentions", "resnets", "downsamplers", "upsamplers", "transformer_blocks",
	"to_q", "to_k", "to_v", "to_out",
	"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_in", "proj_out", "proj_mlp", "proj", "ff", "ff_context",
	"net", "conv", "conv1", "conv2",
	"conv_shortcut", "time_emb_proj", "linear_1", "linear_2", "linear1", "linear2", "linear", "norm", "norm1", "norm2",
	"norm1_context", "attn", "op",
	"in_layers", "out_layers", "emb_layers", "skip_connection", "img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod",
	"txt_mod", "lin", "qkv", "modulation",
	"adaLN_modulation", "in_layer", "out_layer", "context_block", "x_block", "mlp", "fc1", "fc2", "timestep_embedder",
	"text_embedder", "guidance_embedder"}

// dotted gives modules whose names have underscores for dots their names back, and components the names that
// diffusers has for them. What is known of models tells the dots apart; a name that could be two is an error.
func dotted(modules []*Module) ([]*Module, error) {
	if !slices.ContainsFunc(modules, func(m *Module) bool { return m.Flat || m.Component != "" }) {
		return modules, nil
	}
	var flats []string // those that no image model of diffusers has
	found := map[string][]string{}
	for _, m := range modules {
		if !m.Flat {
			continue
		}
		flat := m.within()
		if slices.Contains(imageComponents, m.Component) || kohyaComponents[m.Component] == "transformer" {
			found[m.Name] = models.UnflattenDiffusers(flat)
		}
		if found[m.Name] == nil {
			flats = append(flats, flat)
		}
	}
	known := map[string][]string{}
	if flats != nil {
		known = models.Unflatten(flats, func(flat string) bool {
			_, ok := words(flat, imageParts)
			return ok
		})
	}
	list, groups := make([]*Module, len(modules)), map[string][]*Module{}
	for i, m := range modules {
		n := *m
		if m.Flat {
			flat := m.within()
			names := found[m.Name]
			if names == nil {
				names = known[flat]
			}
			name, err := onlyName(flat, names)
			if err != nil {
				return nil, fmt.Errorf("module %s: %w", tensor.Quote(m.Name), err)
			}
			n.Name, n.Flat = join(m.Component, name), false
		}
		list[i] = &n
		groups[n.Component] = append(groups[n.Component], &n)
	}
	to := renameComponents(groups)
	byName := map[string]*Module{}
	for i, m := range list {
		within := m.within()
		m.Component = to[m.Component]
		m.Name = join(m.Component, within)
		if !modules[i].Flat {
			continue
		}
		if o := byName[m.Name]; o != nil {
			return nil, fmt.Errorf("modules %s and %s: %w: both are %s", tensor.Quote(o.Name), tensor.Quote(modules[i].Name),
				ErrMalformed, tensor.Quote(m.Name))
		}
		byName[m.Name] = modules[i]
	}
	return list, nil
}

// join puts a component before the name of a module.
func join(component, within string) string {
	if component == "" {
		return within
	}
	return component + "." + within
}

// onlyName finds the dots of a name; names are those that models have.
func onlyName(flat string, names []string) (string, error) {
	if len(names) == 0 {
		if name, ok := words(flat, imageParts); ok {
			names = []string{name}
		}
	}
	switch len(names) {
	case 1:
		return names[0], nil
	case 0:
		return "", fmt.Errorf("%w: which underscores of its name are dots is not known; merge it with its base, which tells",
			ErrUnsupported)
	}
	return "", fmt.Errorf("%w: which underscores of its name are dots is not certain: it may be %s or %s; merge it with "+
		"its base, which tells", ErrUnsupported, tensor.Quote(names[0]), tensor.Quote(names[1]))
}

// words splits a name of an image model into the longest known words and numbers, the first of them one of start.
func words(flat string, start []string) (string, bool) {
	var out []string
	for known := start; flat != ""; known = imageWords {
		best := ""
		for _, w := range known {
			if (flat == w || strings.HasPrefix(flat, w+"_")) && len(w) > len(best) {
				best = w
			}
		}
		if n := len(flat) - len(strings.TrimLeft(flat, "0123456789")); best == "" && len(out) > 0 && n > 0 &&
			(n == len(flat) || flat[n] == '_') {
			best = flat[:n]
		}
		if best == "" {
			return "", false
		}
		out = append(out, best)
		flat = strings.TrimPrefix(flat[len(best):], "_")
	}
	return strings.Join(out, "."), len(out) > 1
}

// resolveFlat finds the parameter of a name in which underscores stand for dots.
func (b *binder) resolveFlat(m *Module) (spot, error) {
	if b.flat == nil {
		b.flat = map[string][]*parameter{}
		add := func(name string, p *parameter) {
			key := flatten(strings.TrimSuffix(name, ".weight"))
			if !slices.Contains(b.flat[key], p) {
				b.flat[key] = append(b.flat[key], p)
			}
		}
		for _, name := range b.names {
			if strings.HasSuffix(name, ".weight") {
				add(name, b.params[name])
			}
		}
		for i, t := range b.targets {
			if strings.HasSuffix(t.Name, ".weight") && b.params[t.Name] == nil {
				add(t.Name, b.fileParameter(i))
			}
		}
	}
	name := m.within()
	if list := b.flat[name]; len(list) > 0 {
		return b.only(m, name, list)
	}
	if b.head != "" && flatten(strings.TrimSuffix(b.head, ".weight")) == name { // which is tied, and has no tensor
		return whole(b.headParam), nil
	}
	if s, ok := b.flatExpert(name); ok {
		return s, nil
	}
	var list []*parameter // another wrapper class puts another prefix before it
	for _, full := range b.names {
		if strings.HasSuffix(full, ".weight") && strings.HasSuffix(flatten(strings.TrimSuffix(full, ".weight")), "_"+name) &&
			strings.ContainsAny(name, "0123456789") {
			list = append(list, b.params[full])
		}
	}
	for rest := name; list == nil && strings.ContainsAny(rest, "0123456789"); { // or another one before the adapter's
		var more bool
		if _, rest, more = strings.Cut(rest, "_"); !more {
			break
		}
		list = slices.DeleteFunc(slices.Clone(b.flat[rest]), func(p *parameter) bool {
			return otherTower(name, flatten(strings.TrimSuffix(p.name, ".weight")), rest)
		})
	}
	return b.only(m, name, list)
}

// flatExpert finds one expert of a stack by a name in which underscores stand for dots.
func (b *binder) flatExpert(name string) (spot, bool) {
	before, after, ok := strings.Cut(name, "_experts_")
	number, proj, ok2 := strings.Cut(after, "_")
	e, err := strconv.ParseInt(number, 10, 32)
	if at, known := projections[proj]; ok && ok2 && known && err == nil {
		for _, full := range b.names {
			stack, last := cutLast(full)
			block, ok := strings.CutSuffix(stack, ".experts")
			if ok && last == at.param && (flatten(block) == before ||
				flatten(block) == strings.TrimSuffix(before, "_block_sparse_moe")+"_mlp") {
				return b.stackSpot(stack, e, proj)
			}
		}
	}
	return spot{}, false
}

// flatten writes underscores for dots.
func flatten(name string) string { return strings.ReplaceAll(name, ".", "_") }
