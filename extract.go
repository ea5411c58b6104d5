package lorakit

import (
	"context"

	"github.com/lorakit/lorakit/adapt"
)

type (
	// ExtractOptions say what adapter Extract makes.
	ExtractOptions = adapt.ExtractOptions
	// Extraction says what Extract has done.
	Extraction = adapt.Extraction
	// ExtractedModule says how much of a module's change its part of an adapter holds.
	ExtractedModule = adapt.ExtractedModule
)

// Extract writes the adapter that leads from base to tuned: the truncated singular value decomposition of the
// difference of every linear layer, router, expert and embedding. A module that does not differ is left out.
func Extract(ctx context.Context, base, tuned, out string, o ExtractOptions) (*Extraction, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := o.Check(); err != nil {
		return nil, err
	}
	a, err := openCheckpoint(ctx, base, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	b, err := openCheckpoint(ctx, tuned, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	return adapt.Extract(ctx, a, b, out, o)
}
