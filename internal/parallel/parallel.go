// Package parallel runs numbered jobs, several at once.
package parallel

import (
	"context"
	"runtime"

	"golang.org/x/sync/errgroup"
)

// Each calls do for the numbers below n, for at most threads of them at once; 0 threads are one a processor. The first
// error ends the context of the others and is returned. A context that is done before all jobs have begun is an error
// too.
func Each(ctx context.Context, n, threads int, do func(ctx context.Context, i int) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce(threads))
	for i := range n {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			return do(ctx, i)
		})
	}
	return g.Wait()
}

// InOrder calls produce for the numbers below n as Each does, and hands what it returns to take, one after the other
// and in the order of the numbers. A result that waits for its turn holds its job's place, so that no more than threads
// of them are in memory.
func InOrder[T any](
	ctx context.Context, n, threads int,
	produce func(ctx context.Context, i int) (T, error), take func(i int, result T) error,
) error {
	g, ctx := errgroup.WithContext(ctx)
	slots := make(chan struct{}, atOnce(threads))
	results := make([]chan T, n)
	for i := range results {
		results[i] = make(chan T, 1)
	}
	g.Go(func() error {
		for i := range n {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return ctx.Err()
			}
			g.Go(func() error {
				x, err := produce(ctx, i)
				if err != nil {
					return err
				}
				results[i] <- x
				return nil
			})
		}
		return nil
	})
	g.Go(func() error {
		for i := range n {
			select {
			case x := <-results[i]:
				<-slots
				if err := take(i, x); err != nil {
					return err
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	return g.Wait()
}

func atOnce(threads int) int {
	if threads <= 0 {
		return runtime.GOMAXPROCS(0)
	}
	return threads
}
