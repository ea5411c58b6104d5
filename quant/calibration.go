package quant

import (
	"strings"

	"github.com/lorakit/lorakit/tensor"
)

// Calibrated is a Scheme whose checkpoints may have tensors that are no part of the model: scales and zeros by which a
// program is to quantise activations and caches while it runs. They mean nothing beside weights that are not in the
// scheme.
type Calibrated interface {
	// Calibration names those of the stored tensors, where weights are what Find has found among them. A tensor that is
	// part of a weight may be among the names.
	Calibration(s Stored, weights []Decoder) []string
}

// Calibration is what a scheme calls such tensors, and what a config says of them. A name alone never decides: the
// module it is of has a quantised weight, or the config declares what the tensor is about.
type Calibration struct {
	// Modules are what the name of a module has behind it of what goes into it and comes out, such as "input_scale".
	// Caches are what there is of a cache, behind the name of a module, or of one that has such modules in it, as
	// attention has.
	Modules, Caches []string
	// Activations and OfCache say that config.json has a program quantise these, by numbers that are stored.
	Activations, OfCache bool
}

// Find names the tensors. Without a word of the config, what is said of a cache behind the name of a module that has
// no weight by itself is one number.
func (c Calibration) Find(s Stored, weights []Decoder) []string {
	quantised, around := map[string]bool{}, map[string]bool{}
	for _, d := range weights {
		module := strings.TrimSuffix(d.Info().Name, ".weight")
		quantised[module] = true
		around[module[:max(0, strings.LastIndexByte(module, '.'))]] = true
	}
	var names []string
	for _, t := range s.Tensors() {
		if c.covers(t, quantised, around) {
			names = append(names, t.Name)
		}
	}
	return names
}

func (c Calibration) covers(t tensor.Info, quantised, around map[string]bool) bool {
	if module, ok := cutAny(t.Name, ".", c.Modules); ok {
		return quantised[module] || c.Activations
	}
	if stack, ok := cutAny(t.Name, "_", c.Modules); ok { // as of experts, which is no module
		return quantised[stack]
	}
	module, ok := cutAny(t.Name, ".", c.Caches)
	return ok && (quantised[module] || c.OfCache || around[module] && t.Count() == 1)
}

// cutAny cuts the one of several endings off that a name has, and what stands before it.
func cutAny(name, before string, endings []string) (rest string, ok bool) {
	for _, e := range endings {
		if rest, ok = strings.CutSuffix(name, before+e); ok {
			return rest, true
		}
	}
	return name, false
}

// Accompanied is a Scheme whose programs write files of their own beside the weights that say what config.json says of
// them, or should.
type Accompanied interface {
	// ConfigFiles are the names of such files.
	ConfigFiles() []string
}
