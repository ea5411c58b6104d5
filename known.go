package lorakit

import (
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
)

// Known lists what lorakit reads and writes.
type Known struct {
	Formats []KnownFormat `json:"formats"`
	Schemes []KnownScheme `json:"schemes"`
	// Architectures are the model classes of transformers whose tensors are known.
	Architectures []string `json:"architectures"`
}

// KnownFormat is a container; ConvertOptions.To takes those that are not read only.
type KnownFormat struct {
	Name       string   `json:"name"`
	Extensions []string `json:"extensions"`
	ReadOnly   bool     `json:"read_only"`
}

// KnownScheme is a way to store quantised weights, with its types for ConvertOptions.Quantize.
type KnownScheme struct {
	Name  string   `json:"name"`
	Types []string `json:"types"`
}

// HasParameter reports whether a type of ConvertOptions.Quantize has a parameter, "block_size" or "double_quant". A
// type that is not known has all: it is refused by name.
func HasParameter(typ, parameter string) (bool, error) {
	end, err := usePlugins(0)
	if err != nil {
		return false, err
	}
	defer end()
	s, err := quant.ForType(typ)
	if err != nil {
		return true, nil
	}
	spec, err := s.Spec(typ, quant.Params{{Name: "block_size", Value: int64(64)}, {Name: "double_quant", Value: true}})
	return err != nil || spec.Params.Get(parameter) != nil, nil
}

// Formats lists the formats, quantisation schemes and architectures that are known, those of plugins among them.
func Formats() (Known, error) {
	var k Known
	end, err := usePlugins(0)
	if err != nil {
		return k, err
	}
	defer end()
	for _, f := range formats.Default.All() {
		k.Formats = append(k.Formats, KnownFormat{f.Name(), f.Extensions(), f.ReadOnly()})
	}
	for _, s := range quant.All() {
		known := KnownScheme{Name: s.Name()}
		for _, t := range s.Types() {
			known.Types = append(known.Types, t.Name)
		}
		k.Schemes = append(k.Schemes, known)
	}
	k.Architectures = models.All()
	return k, nil
}
