package kit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// each opens the files that can be read, the kit's with a large tensor, and says how many tensors there were of which
// kind.
func each(ctx context.Context, f *format, do func(c formats.Container, w *written) error) (string, error) {
	files, err := f.readable(ctx, f.large)
	if err != nil {
		return "", err
	}
	var seen ways
	for _, w := range files {
		c, err := f.open(ctx, w)
		if err != nil {
			return "", err
		}
		seen.add(c)
		if err := errors.Join(do(c, w), c.Close()); err != nil {
			return "", w.in(err)
		}
	}
	return fmt.Sprintf("of %s: %s", count(len(files), "file"), f.told(seen)), nil
}

func rangeOdd(ctx context.Context, f *format) (string, error) {
	n := 0
	said, err := each(ctx, f, func(c formats.Container, w *written) error {
		for _, kind := range []func(formats.Tensor) bool{inFile, opaque} {
			t, data, ok, err := largest(c, w.list, kind)
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			tried, err := odd(t, data)
			if err != nil {
				return err
			}
			n += tried
		}
		return nil
	})
	return fmt.Sprintf("%s %s", count(n, "range"), said), err
}

// odd reads ranges of a tensor, and returns how many.
func odd(t formats.Tensor, data []byte) (int, error) {
	n := int64(len(data))
	ranges := [][2]int64{{0, 1}, {n - 1, n}, {1, n}, {0, n - 1}, {n / 2, n / 2}, {0, 0}, {n, n}}
	random := source(1)
	for range min(60, n) {
		lo := random.Int64N(n)
		hi := lo + 1 + random.Int64N(n-lo)
		if random.IntN(2) == 0 {
			hi = min(n, lo+1+random.Int64N(100))
		}
		ranges = append(ranges, [2]int64{lo, hi})
	}
	for at := int64(1 << 20); at+3 < n; at += 1 << 20 { // around the ends of chunks
		ranges = append(ranges, [2]int64{at - 3, at + 3}, [2]int64{at, at + 1}, [2]int64{at - 1, at})
	}
	for _, r := range ranges {
		if r[0] < 0 || r[0] > r[1] || r[1] > n {
			continue
		}
		if err := rangeIs(t, r[0], data[r[0]:r[1]]); err != nil {
			return 0, err
		}
	}
	p := make([]byte, 10)
	k, err := t.ReadAt(p, max(0, n-4))
	switch most := min(4, n); {
	case err == nil:
		return 0, fmt.Errorf("a range past the end: found %d bytes and no error, expected %d and the end of the file", k,
			most)
	case int64(k) != most || !errors.Is(err, io.EOF):
		return 0, fmt.Errorf("a range past the end: found %d bytes, expected %d and the end of the file: %w", k, most, err)
	}
	return len(ranges), nil
}

func rangeWhole(ctx context.Context, f *format) (string, error) {
	said, err := each(ctx, f, func(c formats.Container, w *written) error {
		for _, t := range c.Tensors() {
			got, err := whole(t)
			if err != nil {
				return fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), err)
			}
			for _, s := range w.list {
				if s.Name == t.Name && !bytes.Equal(s.data, got) {
					return fmt.Errorf("tensor %s: found %d bytes, expected %d, or they are others", tensor.Quote(t.Name), len(got),
						len(s.data))
				}
			}
		}
		return reads(c, w.list)
	})
	return "each tensor at once, " + said, err
}

func rangeConcurrent(ctx context.Context, f *format) (string, error) {
	const readers, times = 8, 25
	said, err := each(ctx, f, func(c formats.Container, w *written) error { return atOnce(c, w, readers, times) })
	return fmt.Sprintf("%d ranges by %d readers, %s", readers*times, readers, said), err
}

// atOnce reads ranges of all tensors, several at once.
func atOnce(c formats.Container, w *written, readers, times int) error {
	list := c.Tensors()
	if len(list) == 0 {
		return nil
	}
	errs := make([]error, readers)
	var wait sync.WaitGroup
	for i := range readers {
		wait.Go(func() {
			random := source(uint64(i))
			for range times {
				t := list[random.IntN(len(list))]
				for _, s := range w.list {
					if s.Name != t.Name || len(s.data) == 0 {
						continue
					}
					lo := random.IntN(len(s.data))
					hi := min(len(s.data), lo+1+random.IntN(200_000))
					if errs[i] = rangeIs(t, int64(lo), s.data[lo:hi]); errs[i] != nil {
						return
					}
				}
			}
		})
	}
	wait.Wait()
	for _, err := range errs {
		if err != nil {
			return err // one says it
		}
	}
	return nil
}

// soon is how long the end of a call may take that is cancelled.
const soon = 5 * time.Second

func readCancel(ctx context.Context, f *format) (string, error) {
	files, err := f.readable(ctx, f.large)
	if err != nil {
		return "", err
	}
	const times = 10
	asked := 0
	for _, w := range files {
		none, err := cancels(ctx, f, w, times)
		if err != nil {
			return "", w.in(err)
		}
		if !none {
			asked++
		}
	}
	if asked == 0 {
		return "", skip("its data lies in the file as it is, and lorakit reads it by itself")
	}
	return fmt.Sprintf("%d reads of %s were cancelled, and ended soon", times*asked, count(asked, "file")), nil
}

// cancels cancels reads of a file, and reads it. It reports true where none has to be asked for.
func cancels(ctx context.Context, f *format, w *written, times int) (none bool, err error) {
	for i := range times {
		if none, err := cancelled(ctx, f, w, i); none || err != nil {
			return none, err
		}
	}
	c, err := f.open(ctx, w)
	if err == nil {
		err = errors.Join(reads(c, w.list), c.Close())
	}
	if err != nil {
		return false, fmt.Errorf("after %d reads that were cancelled: %w", times, err)
	}
	return false, nil
}

// cancelled cancels a read. It reports true where there is none.
func cancelled(ctx context.Context, f *format, w *written, i int) (none bool, err error) {
	within, cancel := context.WithCancel(ctx)
	defer cancel()
	c, err := f.open(within, w)
	if err != nil {
		return false, err
	}
	defer c.Close()
	t, _, ok, err := largest(c, w.list, opaque)
	if err != nil || !ok {
		return true, err
	}
	var begun atomic.Bool
	end := make(chan error, 1)
	go func() {
		r, ok := t.Data.(formats.RangeReader)
		if !ok {
			begun.Store(true)
			time.AfterFunc(time.Duration(i)*time.Millisecond, cancel)
			_, err := whole(t)
			end <- err
			return
		}
		end <- r.ReadRange(t.Offset, t.Bytes, func([]byte, int64) error {
			begun.Store(true)
			cancel()
			return nil
		})
	}()
	select {
	case err := <-end:
		if err != nil && !errors.Is(err, context.Canceled) {
			return false, fmt.Errorf("a read that was cancelled ends by another error: %w", err)
		}
		return false, nil
	case <-time.After(soon):
		if !begun.Load() {
			return false, fmt.Errorf("a read sends nothing in %v, after %d reads that were cancelled", soon, i)
		}
		return false, fmt.Errorf("a read that was cancelled goes on after %v", soon)
	}
}
