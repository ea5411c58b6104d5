package lorakit

import (
	"context"

	"github.com/lorakit/lorakit/pipeline"
)

// Verify reads a checkpoint whole and looks for what would keep it from being
// used. A checkpoint that cannot be opened at all is an error.
func Verify(ctx context.Context, path string) (*Verification, error) {
	c, err := pipeline.Open(path)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return pipeline.Verify(ctx, c)
}
