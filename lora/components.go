package lora

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// A pipeline of diffusers consists of components, each a model of its own: unet or transformer, text_encoder,
// text_encoder_2. An adapter in one file may be for several of them, and then says before the name of each module
// which it is of: diffusers writes "unet.", kohya "lora_unet_", ComfyUI "diffusion_model.".

// componentName matches what files of diffusers and ComfyUI have before the names of modules.
var componentName = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^(?:unet|transformer(?:_\d|_ref)?|text_encoder(?:_\d)?|(?:model\.)?diffusion_model|` +
		`text_encoders\.[^.]+\.transformer|prior|controlnet|connectors|text_conditioner)\.`)
})

// cutComponent takes the name of a module apart, as files with dots have it.
func cutComponent(name string) (component, within string) {
	at := len(componentName().FindString(name))
	if at == 0 {
		return "", name
	}
	component, within = name[:at-1], name[at:]
	if component == "transformer" && ofTransformers(name, within) {
		return "", name
	}
	return component, within
}

// ofTransformers reports whether "transformer." is no component but the first part of a name in a model of
// transformers: "transformer.h.0.attn.c_attn" of GPT-2.
func ofTransformers(name, within string) bool {
	if _, known := models.DiffusersComponent(within); known || isOriginal(within) {
		return false
	}
	flat := flatten(name)
	exact := func(string) bool { return true } // no guesses
	return slices.Contains(models.Unflatten([]string{flat}, exact)[flat], name)
}

// isOriginal reports whether a module of an image or video model has the name that the model's authors gave it.
func isOriginal(within string) bool {
	return slices.ContainsFunc(models.Families(), func(f *models.Family) bool { return f.Has(within) })
}

// kohyaComponents are diffusers' components by what kohya's files, and those of OneTrainer and SimpleTuner, have
// before the names of modules. Image models of all kinds are "lora_unet".
var kohyaComponents = map[string]string{
	"lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2", "lora_te3": t5Encoder,
	"lora_transformer": "transformer", "text_encoders.clip_l.transformer": "text_encoder",
	"text_encoders.clip_g.transformer": "text_encoder_2", "text_encoders.t5xxl.transformer": t5Encoder,
}

// t5Encoder is a T5 encoder that a file does not count: for diffusers it is the second text encoder of Flux, and the
// third of Stable Diffusion 3.
const t5Encoder = "t5xxl"

// imageModel is the component of modules that have the names of an image model's authors: ComfyUI's name for it.
const imageModel = "diffusion_model"

// imageComponents are what files call an image model, whatever its kind is.
var imageComponents = []string{"lora_unet", "lycoris", "model." + imageModel, imageModel}

// rename gives components diffusers' names: modules are those of one adapter, with dots, by what the adapter calls
// their component. An image model whose modules have other names than diffusers' stays imageModel.
func renameComponents(byComponent map[string][]*Module) map[string]string {
	to := map[string]string{}
	for component, modules := range byComponent {
		to[component] = component
		if c, ok := kohyaComponents[component]; ok {
			to[component] = c
		}
		if !slices.Contains(imageComponents, component) {
			continue
		}
		kinds, all := map[string]bool{}, true
		for _, m := range modules {
			c, known := models.DiffusersComponent(m.within())
			if all = all && known; c != "" {
				kinds[c] = true
			}
		}
		to[component] = imageModel
		if all && len(kinds) == 1 {
			for c := range kinds {
				to[component] = c
			}
		}
	}
	return to
}

// within is the name of a module in its component.
func (m *Module) within() string {
	if m.Component == "" {
		return m.Name
	}
	if m.Flat {
		return strings.TrimPrefix(m.Name, m.Component+"_")
	}
	return strings.TrimPrefix(m.Name, m.Component+".")
}

// components lists those of modules, in order; "" is among them where a module names none.
func components(modules []*Module) []string {
	found := map[string]bool{}
	for _, m := range modules {
		found[m.Component] = true
	}
	return slices.Sorted(maps.Keys(found))
}

// alone gives modules names with dots, and without their component, since the dialects that are written with those
// are for one model.
func alone(modules []*Module) ([]*Module, error) {
	list, err := dotted(modules)
	if err != nil {
		return nil, err
	}
	list = slices.Clone(list)
	first := -1
	for i, m := range list {
		if m.Component == "" {
			continue
		}
		if first < 0 {
			first = i
		}
		if m.Component != list[first].Component {
			return nil, fmt.Errorf(
				"modules %s and %s: %w: they are of two models, and an adapter of this kind is for one: take "+
					"those of one of them", tensor.Quote(modules[first].Name), tensor.Quote(modules[i].Name), ErrUnsupported)
		}
		n := *m
		n.Name = m.within()
		list[i] = &n
	}
	if first < 0 {
		return list, nil
	}
	byKey := map[string]int{}
	for i, m := range list { // one may name its component, another not
		key := fmt.Sprint(m.Form, m.WrapDepth, m)
		if o, ok := byKey[key]; ok {
			return nil, fmt.Errorf("modules %s and %s: %w: both are %s", tensor.Quote(modules[o].Name),
				tensor.Quote(modules[i].Name), ErrMalformed, tensor.Quote(m.String()))
		}
		byKey[key] = i
	}
	return list, nil
}

// naming gives the modules of an adapter the names by which those of several adapters are the same.
type naming func(a *Adapter, modules []*Module) ([]*Module, error)

// namingOf is the naming of adapters that are used together: without components where all are for one.
func namingOf(adapters []Weighted) (naming, error) {
	found := map[string]bool{}
	for _, a := range adapters {
		list, err := dotted(a.Modules)
		if err != nil {
			return nil, a.named(err)
		}
		for _, c := range components(list) {
			if c != "" {
				found[c] = true
			}
		}
	}
	if len(found) > 1 {
		return func(a *Adapter, modules []*Module) ([]*Module, error) {
			list, err := dotted(modules)
			if err != nil {
				return nil, err
			}
			return a.withComponents(list)
		}, nil
	}
	return func(_ *Adapter, modules []*Module) ([]*Module, error) { return alone(modules) }, nil
}

// only keeps the modules of one component of a pipeline. Where an adapter names no components all of its modules are
// taken for those of the given one.
func (a *Adapter) only(component string) error {
	found := components(a.Modules)
	if len(found) == 1 && found[0] == "" {
		a.component = component
		return nil
	}
	list, err := dotted(a.Modules)
	if err != nil {
		list = a.Modules // the names of the file are all there is
	}
	var kept []*Module
	others := map[string]int{}
	for i, m := range a.Modules {
		if m.Component == component || list[i].Component == component {
			kept = append(kept, m)
		} else {
			others[m.Component]++
		}
	}
	if kept == nil {
		return fmt.Errorf("%s: %w: it has no modules of %s; it has some of %s", a.Path, ErrBase, tensor.Quote(component),
			names(found))
	}
	for _, c := range slices.Sorted(maps.Keys(others)) {
		a.Notices = append(a.Notices, fmt.Sprintf("%s: %d modules of %s are left out", a.Path, others[c], tensor.Quote(c)))
	}
	a.Modules = kept
	return nil
}
