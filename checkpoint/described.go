package checkpoint

import (
	"bytes"
	"sync"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Described is a checkpoint that is not there: path is what it is called in messages, config (nil where there is none)
// and tensors are what it would have. All that goes by headers works on it. It has no files, and reading a weight is an
// error.
func Described(path string, config *models.Config, tensors []tensor.Info) *Checkpoint {
	c := &Checkpoint{
		Path: path, Formats: formats.Default, Schemes: &quant.Default, Config: config, container: described{},
	}
	c.byParameter = sync.OnceValue(c.pieces)
	c.Model, c.Known = models.Load(config)
	for _, t := range tensors {
		part := formats.Tensor{Info: t, File: path, Data: bytes.NewReader(nil)}
		c.Weights = append(c.Weights, &Weight{
			Info: t, Values: t.DType, Parts: []formats.Tensor{part}, Role: c.Model.Tensor(t.Name, t.Shape),
		})
	}
	return c
}

// described is the container of such a checkpoint.
type described struct{}

func (described) Tensors() []formats.Tensor  { return nil }
func (described) Metadata() formats.Metadata { return nil }
func (described) Files() []string            { return nil }
func (described) Close() error               { return nil }
