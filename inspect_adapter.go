package lorakit

import (
	"context"

	"github.com/lorakit/lorakit/adapt"
)

type (
	// AdapterInspection describes an adapter.
	AdapterInspection = adapt.AdapterInspection
	// InspectedModule is one part of an adapter.
	InspectedModule = adapt.InspectedModule
	// PatternedModule is a module with a rank or an alpha of its own.
	PatternedModule = adapt.PatternedModule
)

// InspectAdapter opens an adapter, whose Weight plays no part, and says what is in it. Its values are read, for
// the norms.
func InspectAdapter(ctx context.Context, adapter Adapter, o ReadOptions) (*AdapterInspection, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	list, err := openWithoutBase(ctx, []Adapter{adapter}, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer list.Close()
	return adapt.Inspect(ctx, list[0].Adapter)
}
