package parallel

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// watched counts how many jobs run at once.
type watched struct{ now, most atomic.Int32 }

func (w *watched) run() {
	n := w.now.Add(1)
	for most := w.most.Load(); n > most && !w.most.CompareAndSwap(most, n); most = w.most.Load() {
	}
	time.Sleep(time.Millisecond)
	w.now.Add(-1)
}

func TestEach(t *testing.T) {
	var w watched
	done := make([]int32, 40)
	require.NoError(t, Each(t.Context(), len(done), 3, func(_ context.Context, i int) error {
		w.run()
		atomic.AddInt32(&done[i], 1)
		return nil
	}))
	for i, n := range done {
		require.EqualValues(t, 1, n, i)
	}
	require.LessOrEqual(t, w.most.Load(), int32(3))
}

func TestInOrder(t *testing.T) {
	var w watched
	var order []int
	require.NoError(t, InOrder(t.Context(), 40, 4, func(_ context.Context, i int) (int, error) {
		if i%5 == 0 {
			time.Sleep(3 * time.Millisecond) // later ones are ready first
		}
		w.run()
		return i * i, nil
	}, func(i, result int) error {
		require.Equal(t, i*i, result)
		order = append(order, i)
		return nil
	}))
	require.Len(t, order, 40)
	require.IsIncreasing(t, order)
	require.LessOrEqual(t, w.most.Load(), int32(4))
}

// TestFailures: the first error is returned and ends the others, and so does the end of the context.
func TestFailures(t *testing.T) {
	broken := errors.New("broken")
	fail := func(ctx context.Context, i int) error {
		if i == 2 {
			return broken
		}
		<-ctx.Done()
		return ctx.Err()
	}
	require.ErrorIs(t, Each(t.Context(), 9, 4, fail), broken)
	produce := func(ctx context.Context, i int) (int, error) { return i, fail(ctx, i) }
	require.ErrorIs(t, InOrder(t.Context(), 9, 4, produce, func(int, int) error { return nil }), broken)
	made := func(_ context.Context, i int) (int, error) { return i, nil }
	require.ErrorIs(t, InOrder(t.Context(), 9, 4, made, func(i, _ int) error {
		if i == 3 {
			return broken
		}
		return nil
	}), broken)

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, Each(ended, 9, 4, func(context.Context, int) error { return nil }), context.Canceled)
	require.ErrorIs(t, InOrder(ended, 9, 4, made, func(int, int) error { return nil }), context.Canceled)
}
