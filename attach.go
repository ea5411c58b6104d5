package lorakit

import (
	"context"

	"github.com/lorakit/lorakit/adapt"
)

type (
	// AttachOptions say what adapter Attach makes.
	AttachOptions = adapt.AttachOptions
	// Attachment says what Attach has done.
	Attachment = adapt.Attachment
	// AttachedModule is a module of a new adapter.
	AttachedModule = adapt.AttachedModule
)

// Attach writes a new adapter for base. With the inits kaiming and gaussian B is zero, so that the model's output is
// what it was; with pissa and olora it is so in PEFT, which takes the adapter's part out of the base as it loads the
// adapter.
func Attach(ctx context.Context, base, out string, o AttachOptions) (*Attachment, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := o.Check(); err != nil {
		return nil, err
	}
	c, err := openCheckpoint(ctx, base, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return adapt.Attach(ctx, c, out, o)
}
