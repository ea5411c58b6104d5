package gguf

import (
	"fmt"
	"io"
	"slices"
)

// swapped is the data of a tensor in a file of a big-endian machine, as it is on a little-endian one.
type swapped struct {
	in           io.ReaderAt
	start, bytes int64
	width        int64 // of an element
}

// ReadAt reads whole elements around what is asked for, and turns each round.
func (s *swapped) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("negative offset %d", off)
	}
	if off >= s.bytes {
		return 0, io.EOF
	}
	end := error(nil)
	if left := s.bytes - off; int64(len(p)) > left {
		p, end = p[:left], io.EOF
	}
	first, last := off-off%s.width, off+int64(len(p))
	if rest := last % s.width; rest != 0 {
		last += s.width - rest
	}
	b := p
	if last-first != int64(len(p)) {
		b = make([]byte, last-first)
	}
	if n, err := s.in.ReadAt(b, s.start+first); n < len(b) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, err
	}
	for i := int64(0); i < int64(len(b)); i += s.width {
		slices.Reverse(b[i : i+s.width])
	}
	if last-first != int64(len(p)) {
		copy(p, b[off-first:])
	}
	return len(p), end
}
