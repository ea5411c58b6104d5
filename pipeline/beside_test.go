package pipeline_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/tensor"
)

// greedy is a format whose files have the names of others.
type greedy struct {
	formats.Format
	shard, extra string
}

func (g greedy) Layout(ctx context.Context, infos []tensor.Info, o formats.Options) (formats.Layout, error) {
	l, err := g.Format.Layout(ctx, infos, o)
	if g.shard != "" && len(l.Shards) > 0 {
		l.Shards[0].Name = g.shard
	}
	if g.extra != "" {
		l.Extra = append(l.Extra, formats.File{Name: g.extra, Data: []byte("{}")})
	}
	return l, err
}

// TestFilesBesideKeepTheirNames: a format puts nothing in the place of what is carried along, or of config.json.
func TestFilesBesideKeepTheirNames(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeToyModel(t, src)
	for _, g := range []greedy{{shard: "config.json"}, {shard: "Config.JSON"}, {extra: "config.json"},
		{shard: "LICENSE"}, {shard: "Tokenizer.json"}} {
		g.Format = toyFormat{}
		c := openWith(t, withToy(t, g), src)
		_, err := pipeline.NewPlan(t.Context(), pipeline.Plain(c), filepath.Join(t.TempDir(), "out"),
			pipeline.Options{To: "toy", Quantize: "keep"})
		assert.ErrorIs(t, err, pipeline.ErrRefused, "%+v", g)
		assert.ErrorContains(t, err, "in the place of its")
	}
}
