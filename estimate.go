package lorakit

import (
	"context"
	"path/filepath"
	"strings"

	"github.com/lorakit/lorakit/adapt"
	"github.com/lorakit/lorakit/train"
)

type (
	// EstimateOptions say what Estimate counts.
	EstimateOptions = train.EstimateOptions
	// Estimation is what Estimate finds.
	Estimation = train.Estimation
	// EstimatedMethod is what one way to fine-tune takes.
	EstimatedMethod = train.EstimatedMethod
	// AssumedShape is the shape of the model whose size is nearest.
	AssumedShape = train.Shape
	// MultiplyAdds counts the multiply-adds of a step.
	MultiplyAdds = train.MultiplyAdds
)

// Estimate counts the memory that full fine-tuning, LoRA, QLoRA and QLoRA with double quantisation take of a model, and
// the multiply-adds of a step. path is a checkpoint or a config.json; with Parameters, the size of a model of which
// nothing else is known, it is empty. No tensor is read.
func Estimate(ctx context.Context, path string, o EstimateOptions) (*Estimation, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := o.Check(); err != nil {
		return nil, err
	}
	s, err := openSubject(ctx, path, o)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	modules, notices, err := adapt.Modules(s.Checkpoint, adapt.AttachOptions{Rank: o.Rank, Target: o.Target})
	if err != nil {
		return nil, err
	}
	var adapter []train.Adapted
	for _, m := range modules {
		adapter = append(adapter, train.Adapted{Name: m.Name, In: m.In, Out: m.Out, Rank: m.Rank, Experts: m.Experts})
	}
	r, err := train.Estimate(s, adapter, o)
	if err != nil {
		return nil, err
	}
	r.Notices = notices
	return r, nil
}

// openSubject finds out what is estimated.
func openSubject(ctx context.Context, path string, o EstimateOptions) (*train.Subject, error) {
	if o.Parameters > 0 {
		return train.SubjectOfSize(o.Parameters), nil
	}
	// An index of shards stands for them.
	if filepath.Ext(path) == ".json" && !strings.HasSuffix(path, ".index.json") {
		return train.SubjectOfConfig(ctx, path, o.FollowLinks)
	}
	c, err := openCheckpoint(ctx, path, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	s, err := train.SubjectOf(c)
	if err != nil {
		c.Close()
	}
	return s, err
}
