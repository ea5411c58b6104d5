package train

import (
	"context"
	"fmt"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// Subject is a model that Estimate counts: a checkpoint, which may be known by its config alone, or a mere size.
type Subject struct {
	*checkpoint.Checkpoint
	spec    *spec
	noSpec  error  // why there is none
	assumed *Shape // where a size is all that is known
	size    int64
}

// SubjectOf takes a checkpoint, by its headers. Closing it closes c.
func SubjectOf(c *checkpoint.Checkpoint) (*Subject, error) {
	if err := c.CheckReadable(); err != nil {
		return nil, err
	}
	s := &Subject{Checkpoint: c, noSpec: fmt.Errorf("%w: there is no config.json", checkpoint.ErrRefused)}
	if c.Config != nil {
		s.spec, s.noSpec = readSpec(c.Config)
	}
	return s, nil
}

// SubjectOfConfig takes the model that a config.json describes.
func SubjectOfConfig(ctx context.Context, path string, followLinks bool) (*Subject, error) {
	dir, name, err := storage.Resolve(path, storage.Options{FollowLinks: followLinks})
	if err != nil {
		return nil, err
	}
	b, err := checkpoint.ReadSmall(ctx, dir, name, models.MaxConfigSize)
	if err != nil {
		return nil, err
	}
	config, err := models.ParseConfig(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	spec, err := readSpec(config)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if strings.HasSuffix(config.Architecture, "ForConditionalGeneration") { // of images and text
		return nil, fmt.Errorf("%s: %w: of %s the text's part alone is known here, expected a checkpoint, whose files tell "+
			"the rest", path, checkpoint.ErrRefused, config.Architecture)
	}
	return &Subject{Checkpoint: checkpoint.Described(path, config, spec.infos()), spec: spec}, nil
}

// SubjectOfSize takes a model of which only the number of parameters is known, with the shape of the known one of
// nearest size.
func SubjectOfSize(parameters int64) *Subject {
	shape := assume(parameters)
	spec := shape.spec()
	described := checkpoint.Described("the shape of "+shape.Name, nil, spec.infos())
	return &Subject{Checkpoint: described, spec: spec, assumed: shape, size: parameters}
}

// infos lists the parameters as tensors of a checkpoint.
func (s *spec) infos() []tensor.Info {
	var list []tensor.Info
	for _, p := range s.parameters() {
		list = append(list, tensor.Info{Name: p.name, DType: tensor.BF16, Shape: p.shape})
	}
	return list
}

// counted is a tensor of the base.
type counted struct {
	elements  int64
	quantised bool // in the qlora rows
}

// tensors lists what the base is made of. What transformers would quantise is quantised, and what is so already.
func (s *Subject) tensors() []counted {
	if s.assumed != nil {
		return []counted{{s.size, true}}
	}
	var list []counted
	for _, w := range s.Weights {
		ignored := s.Known && !w.Role.Known // by transformers, such as the tables of old rotary embeddings
		if w.DType.Integer() || ignored {
			continue
		}
		list = append(list, counted{w.Count(), w.Role.Quantized || w.Decodes()})
	}
	return list
}

// baseDType is the type that the base's config names, or bfloat16.
func (s *Subject) baseDType() tensor.DType {
	switch d := s.DType(); d {
	case tensor.F32, tensor.F16:
		return d
	}
	return tensor.BF16
}
