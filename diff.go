package lorakit

import (
	"context"

	"github.com/lorakit/lorakit/checkpoint"
)

// Diff compares two checkpoints weight by weight, each read through its format and scheme, so that a quantised one can
// be held against its source. Of a GGUF file and a checkpoint of transformers, the former is compared as it is there.
func Diff(ctx context.Context, a, b string, o ReadOptions) (*Comparison, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	ca, err := open(ctx, a, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer ca.Close()
	cb, err := open(ctx, b, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer cb.Close()
	for _, x := range []struct{ c, other **checkpoint.Checkpoint }{{&ca, &cb}, {&cb, &ca}} {
		if (*x.c).NamedByGGUF() && !(*x.other).NamedByGGUF() {
			if *x.c, err = (*x.c).Restored(ctx, checkpoint.RestoreOptions{}); err != nil {
				return nil, err
			}
			break
		}
	}
	return checkpoint.Compare(ctx, ca, cb)
}
