package lorakit

import (
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
)

// Known lists what lorakit reads and writes.
type Known struct {
	Formats []KnownFormat `json:"formats"`
	Schemes []KnownScheme `json:"schemes"`
	// Architectures are the model classes of transformers whose tensors are known.
	Architectures []string `json:"architectures"`
	// GGUF says which of them are known to GGUF, and the file types that quantise a whole model, for
	// ConvertOptions.Quantize.
	GGUF struct {
		Architectures []string `json:"architectures"`
		FileTypes     []string `json:"file_types"`
	} `json:"gguf"`
}

// KnownFormat is a container; ConvertOptions.To takes those that are not read only.
type KnownFormat struct {
	Name       string   `json:"name"`
	Extensions []string `json:"extensions"`
	ReadOnly   bool     `json:"read_only"`
}

// KnownScheme is a way to store quantised weights, with its types for ConvertOptions.Quantize.
type KnownScheme struct {
	Name     string   `json:"name"`
	Types    []string `json:"types"`
	ReadOnly []string `json:"read_only,omitempty"` // types that are read and not written
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
		return !slices.Contains(pipeline.FileTypes(), typ), nil
	}
	spec, err := s.Spec(typ, quant.Params{{Name: "block_size", Value: int64(64)}, {Name: "double_quant", Value: true}})
	return err != nil || spec.Params.Get(parameter) != nil, nil
}

// QuantizeChoices lists what ConvertOptions.Quantize may be, without the types of plugins.
func QuantizeChoices() []string {
	list := []string{"keep", "none"}
	for _, s := range quant.All() {
		for _, t := range s.Types() {
			if !t.ReadOnly {
				list = append(list, t.Name)
			}
		}
	}
	for _, f := range pipeline.FileTypes() {
		if !slices.Contains(list, f) {
			list = append(list, f)
		}
	}
	return list
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
			if t.ReadOnly {
				known.ReadOnly = append(known.ReadOnly, t.Name)
			} else {
				known.Types = append(known.Types, t.Name)
			}
		}
		k.Schemes = append(k.Schemes, known)
	}
	k.Architectures, k.GGUF.Architectures, k.GGUF.FileTypes = models.All(), gguf.Classes(), pipeline.FileTypes()
	return k, nil
}
