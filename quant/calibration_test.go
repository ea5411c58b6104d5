package quant_test

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

// weightNamed is a decoder of which only the name is asked for.
type weightNamed struct {
	quant.Decoder
	name string
}

func (w weightNamed) Info() tensor.Info { return tensor.Info{Name: w.name} }

// TestCalibration: a name decides only beside a weight that is quantised, or with the word of a config.
func TestCalibration(t *testing.T) {
	s := &quanttest.Stored{}
	for _, x := range []struct {
		name  string
		shape tensor.Shape
	}{
		{"a.b.in", nil}, {"a.b.k", tensor.Shape{4}}, {"a.vk", nil}, {"a.k", tensor.Shape{1}}, {"a.in", nil},
		{"a.b.c.in", nil}, {"c.k", nil}, {"a.s_in", tensor.Shape{3}}, {"a.t_in", nil}, {"in", nil}, {"a.b.begin", nil},
		{"a.b", nil}, {"e.k", tensor.Shape{2}},
	} {
		s.Infos = append(s.Infos, tensor.Info{Name: x.name, DType: tensor.F32, Shape: x.shape})
	}
	weights := []quant.Decoder{weightNamed{name: "a.b.weight"}, weightNamed{name: "a.s"}, weightNamed{name: "e.f.weight"}}
	for _, c := range []struct {
		quant.Calibration
		want []string
	}{
		{quant.Calibration{}, []string{"a.b.in", "a.b.k", "a.vk", "a.k", "a.s_in"}},
		{quant.Calibration{Activations: true}, []string{"a.b.in", "a.b.k", "a.vk", "a.k", "a.in", "a.b.c.in", "a.s_in"}},
		{quant.Calibration{OfCache: true}, []string{"a.b.in", "a.b.k", "a.vk", "a.k", "c.k", "a.s_in", "e.k"}},
	} {
		c.Modules, c.Caches = []string{"in"}, []string{"k", "vk"}
		assert.Equal(t, c.want, c.Find(s, weights))
		assert.Equal(t, c.Activations, len(c.Find(s, nil)) == 3)
	}
}
