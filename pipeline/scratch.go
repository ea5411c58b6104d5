package pipeline

import (
	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/quant"
)

// scratch is the memory that one worker works in. Its slices grow to what the largest tile needs and are used again for
// every other.
type scratch struct {
	checkpoint.Reader
	cast, out, kept []byte
	gathered        []byte // of a weight that is put together
	deferred        []float32
	merge           mergeBuffers
	ranges          []quant.Range
	views           [][]byte
}

// newScratch makes the memory of a worker that holds a token in compute while it computes.
func newScratch(compute chan struct{}) *scratch {
	return &scratch{Reader: *checkpoint.NewReader(compute)}
}

// sized returns (*b)[:n], with new memory only where b is too small.
func sized(b *[]byte, n int64) []byte {
	if int64(cap(*b)) < n {
		*b = make([]byte, n)
	}
	return (*b)[:n]
}
