package lorakit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
)

// ConvertResult says what Convert has done.
type ConvertResult struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	Format      string `json:"format"`
	Shards      int    `json:"shards"`
	Tensors     int    `json:"tensors"`   // logical weights in the result
	Quantized   int    `json:"quantized"` // how many of them are in the scheme asked for
	// BitsPerWeight is what the quantised weights have, companions included, where there is a budget.
	BitsPerWeight float64 `json:"bits_per_weight,omitempty"`
	pipeline.Result
	// Rounding is, for Unmerge, how far each plain weight is to be expected from what it was before the adapters were
	// merged.
	Rounding []pipeline.Rounding `json:"rounding,omitempty"`
	Seconds  float64             `json:"seconds"`
	Notices  []string            `json:"notices"`
	// Plugins are those that were started, with what they have used.
	Plugins []PluginUse `json:"plugins,omitempty"`
	// Plan is, with DryRun, what would be carried out.
	Plan *Plan `json:"plan,omitempty"`
}

// Convert reads the checkpoint src, a folder or a file, and writes it to dst as o says. An option that is wrong
// whatever the checkpoint is an ErrOption.
func Convert(ctx context.Context, src, dst string, o ConvertOptions) (*ConvertResult, error) {
	end, err := usePlugins(cmp.Or(o.Memory, pipeline.DefaultMemory))
	if err != nil {
		return nil, err
	}
	defer end()
	r, err := convert(ctx, src, dst, o)
	switch {
	case err == nil:
		r.Plugins = end()
	case ctx.Err() != nil && !errors.Is(err, ErrInterrupted): // wherever it was met
		err = ErrInterrupted
	}
	return r, err
}

func convert(ctx context.Context, src, dst string, o ConvertOptions) (*ConvertResult, error) {
	po, err := o.plan()
	if err != nil {
		return nil, err
	}
	ro, err := o.run()
	if err != nil {
		return nil, err
	}
	po.Measuring = ro
	if err := pipeline.CheckDestination(src, dst, ro); err != nil {
		return nil, err
	}
	if err := pipeline.CheckSpared(dst, lora.Paths(o.Merge)...); err != nil {
		return nil, err
	}
	c, err := open(ctx, src, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	m := pipeline.Plain(c)
	toGGUF, err := pipeline.WritesGGUF(m, dst, po)
	if err != nil {
		return nil, err
	}
	if err := o.checkGGUF(c.NamedByGGUF(), toGGUF); err != nil {
		return nil, fmt.Errorf("%s: %w", src, err)
	}
	if c.NamedByGGUF() && (!toGGUF || len(o.Merge) > 0) {
		restore := checkpoint.RestoreOptions{DType: po.DType, Tokenizer: !toGGUF, PreTokenizer: o.PreTokenizer}
		if o.RopeScaling != "" {
			restore.RopeScaling = jsontext.Value(o.RopeScaling)
		}
		if c, err = c.Restored(ctx, restore); err != nil {
			return nil, err
		}
		m = pipeline.Plain(c)
	}
	if len(o.Merge) > 0 {
		merged, list, err := merge(ctx, c, o.Merge, o.subtract, o.FollowLinks)
		if err != nil {
			return nil, err
		}
		defer list.Close()
		m = merged
	}
	if toGGUF {
		po.MaxShardSize = o.MaxShardSize
		if m, err = m.ToGGUF(ctx, po); err != nil {
			return nil, err
		}
	}
	if err := pipeline.CheckMemory(m, po, ro.Memory); err != nil {
		return nil, err
	}
	p, err := pipeline.NewPlan(ctx, m, dst, po)
	if err != nil {
		return nil, err
	}
	r := &ConvertResult{
		Source: src, Destination: filepath.Clean(dst), Format: p.Format, Shards: len(p.Shards), Quantized: p.Quantized,
		BitsPerWeight: p.Bits, Notices: append([]string{}, p.Notices...),
	}
	for _, s := range p.Shards {
		r.Tensors += len(s.Jobs)
	}
	if o.DryRun {
		r.Plan = p
		return r, nil
	}
	start := time.Now()
	r.Result, err = pipeline.Run(ctx, p, m, dst, ro)
	r.Seconds = time.Since(start).Seconds()
	if err != nil {
		return nil, err
	}
	r.Notices = append(r.Notices, r.Result.Notices()...)
	return r, nil
}
