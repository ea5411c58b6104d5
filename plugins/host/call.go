package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/lorakit/lorakit/plugins/wire"
)

// call is a call of a plugin, which ends when there is no progress for some time.
type call struct {
	p      *process
	parent context.Context
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
}

var errNoAnswer = errors.New("no answer")

// begin begins a call.
func (p *process) begin(ctx context.Context) *call {
	c := &call{p: p, parent: ctx}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	c.timer = time.AfterFunc(p.timeout, func() { c.cancel(errNoAnswer) })
	return c
}

// progress says that something has come, or gone.
func (c *call) progress() { c.timer.Reset(c.p.timeout) }

// end ends the call, and says what its error means.
func (c *call) end(err error) error {
	c.timer.Stop()
	cause := context.Cause(c.ctx)
	c.cancel(nil)
	if err == nil {
		return nil
	}
	p := c.p
	if c.parent.Err() != nil {
		return context.Cause(c.parent)
	}
	if errors.Is(cause, errNoAnswer) {
		return p.fault("gave no answer in %v", p.timeout)
	}
	if f := (*fault)(nil); errors.As(err, &f) {
		return err
	}
	if wire.TooLarge(err) {
		return p.fault("sent a message of more than 4 MiB")
	}
	if refused, ok := wire.Refusal(err); ok {
		return fmt.Errorf("plugin %s: %w", p.name, refused)
	}
	s, ok := status.FromError(err)
	if !ok {
		return err // of the host itself: a disk, a destination that differs
	}
	var exited <-chan struct{}
	if p.runner != nil {
		exited = p.runner.exited
	}
	select {
	case <-exited:
		return p.exited()
	case <-c.parent.Done(): // the plugin's clock was first: it is told the deadline
		return context.Cause(c.parent)
	case <-time.After(patience(s.Code())):
	}
	if p.runner == nil && s.Code() == codes.Unavailable {
		return p.unreachable(s.Message())
	}
	return p.fault("has failed: %s", wire.OneLine(s.Message(), 500))
}

// patience is how long to wait for the news that the process is gone: the connection may break first.
func patience(code codes.Code) time.Duration {
	switch code {
	case codes.Unavailable: // the connection has broken
		return killAfter
	case codes.Internal, codes.Canceled, codes.DeadlineExceeded: // it may have, or this is an answer
		return killAfter / 10
	}
	return 0
}
