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

// Formats lists the formats, quantisation schemes and architectures that are known.
func Formats() Known {
	var k Known
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
	return k
}
