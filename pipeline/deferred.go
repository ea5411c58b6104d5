package pipeline

import (
	"context"
	"encoding/binary"
	"math"
	"os"
	"sync"

	"golang.org/x/sync/semaphore"
)

// scratchPattern is how the files are called that hold what did not fit in memory.
const scratchPattern = "scratch-*.lorakit"

// deferred holds the numbers of a weight that outlive its tiles: in memory where its share allows it, else in a file
// in the stage. A nil deferred holds none.
type deferred struct {
	floats  []float32
	file    *os.File
	release func()
}

// newDeferred takes room for n numbers. It waits for memory that other weights hold, but for no more than half of the
// share: a larger weight goes to a file.
func newDeferred(ctx context.Context, n int64, memory *semaphore.Weighted, share int64, dir string) (*deferred, error) {
	if n == 0 {
		return nil, nil
	}
	if bytes := 4 * n; bytes <= share/2 {
		if err := memory.Acquire(ctx, bytes); err != nil {
			return nil, context.Cause(ctx)
		}
		return &deferred{floats: make([]float32, n), release: sync.OnceFunc(func() { memory.Release(bytes) })}, nil
	}
	f, remove, err := createScratch(dir)
	if err != nil {
		return nil, err
	}
	return &deferred{file: f, release: sync.OnceFunc(remove)}, nil
}

// createScratch makes a file in dir that remove closes. It has no name, where the system can, so that nothing is left
// of it after a kill.
func createScratch(dir string) (f *os.File, remove func(), err error) {
	if f, err = os.CreateTemp(dir, scratchPattern); err != nil {
		return nil, nil, err
	}
	gone := os.Remove(f.Name()) == nil // Windows cannot
	return f, func() {
		f.Close()
		if !gone {
			os.Remove(f.Name())
		}
	}, nil
}

// tile is where the numbers of a tile go, n from index first on.
func (c *deferred) tile(s *scratch, first, n int64) []float32 {
	switch {
	case c == nil:
		return nil
	case c.floats != nil:
		return c.floats[first : first+n]
	}
	if int64(cap(s.deferred)) < n {
		s.deferred = make([]float32, n)
	}
	return s.deferred[:n]
}

// keep stores the numbers of a tile, where they are not in place already.
func (c *deferred) keep(s *scratch, tile []float32, first int64) error {
	if c == nil || c.floats != nil {
		return nil
	}
	b := sized(&s.kept, int64(4*len(tile)))
	for i, x := range tile {
		binary.LittleEndian.PutUint32(b[4*i:], math.Float32bits(x))
	}
	_, err := c.file.WriteAt(b, 4*first)
	return err
}

// ReadFloats fills dst with the numbers from index i on.
func (c *deferred) ReadFloats(dst []float32, i int64) error {
	if c.floats != nil {
		copy(dst, c.floats[i:])
		return nil
	}
	b := make([]byte, 4*len(dst))
	if _, err := c.file.ReadAt(b, 4*i); err != nil {
		return err
	}
	for k := range dst {
		dst[k] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*k:]))
	}
	return nil
}

// close gives the room back. It may be called more than once.
func (c *deferred) close() {
	if c != nil && c.release != nil {
		c.floats = nil
		c.release()
	}
}
