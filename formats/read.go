package formats

import (
	"errors"
	"fmt"
	"io"

	"github.com/lorakit/lorakit/tensor"
)

// RangeReader is the Data of a Tensor that is best read in long ranges: that of a file of another process. What copies
// a range of it asks once for all of it; all else reads it as an io.ReaderAt.
type RangeReader interface {
	io.ReaderAt
	// ReadRange hands the n bytes from off on to use, piece by piece, in order and without a gap, each with its distance
	// from the first. An error of use ends it and is returned. p is valid until use returns.
	ReadRange(off, n int64, use func(p []byte, at int64) error) error
}

// ReadAt reads len(p) bytes of the tensor, beginning off bytes into it, as an io.ReaderAt does. The end of the tensor
// is io.EOF; a file that has become shorter since it was opened is io.ErrUnexpectedEOF.
func (t Tensor) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%s: tensor %s: negative offset %d", t.File, tensor.Quote(t.Name), off)
	}
	if off >= t.Bytes {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	end := error(nil)
	if left := t.Bytes - off; int64(len(p)) > left {
		p, end = p[:left], io.EOF
	}
	n, err := t.Data.ReadAt(p, t.Offset+off)
	switch {
	case n == len(p):
		return n, end
	case err == nil || errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return n, fmt.Errorf("%s: tensor %s: read %d of %d bytes at offset %d: %w", t.File, tensor.Quote(t.Name), n, len(p),
		t.Offset+off, err)
}
