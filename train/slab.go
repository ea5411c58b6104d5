package train

import "github.com/lorakit/lorakit/internal/kernels"

// slab is memory for the activations of one block at a time. Without data it counts how much a block takes.
type slab struct {
	data       []float32
	used, most int
}

// reset gives all of it back.
func (s *slab) reset() { s.used = 0 }

// floats takes n floats, of any content.
func (s *slab) floats(n int) []float32 {
	first := s.used
	s.used += n
	s.most = max(s.most, s.used)
	if s.data == nil {
		return nil
	}
	return s.data[first:s.used:s.used]
}

// mat takes a matrix, of any content.
func (s *slab) mat(rows, cols int) kernels.Mat {
	return kernels.Mat{Data: s.floats(rows * cols), Rows: rows, Cols: cols, RowStride: cols, ColStride: 1}
}
