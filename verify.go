package lorakit

import (
	"context"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/pipeline"
)

// Verify reads a checkpoint whole and looks for what would keep it from being used. A checkpoint that cannot be opened
// at all is an error.
func Verify(ctx context.Context, path string, o ReadOptions) (*Verification, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	c, err := open(ctx, path, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return checkpoint.Verify(ctx, c)
}

// VerifyMerge holds a merge, whoever made it, against its base and the adapters: what share of each module's delta is
// in it.
func VerifyMerge(
	ctx context.Context, merged, base string, adapters []Adapter, o ReadOptions,
) (*MergeVerification, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	out, err := openModel(ctx, merged, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	c, err := openModel(ctx, base, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	m, list, err := merge(ctx, c, adapters, false, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer list.Close()
	return pipeline.VerifyMerge(ctx, m, out)
}
