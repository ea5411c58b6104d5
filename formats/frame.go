package formats

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"slices"
	"sync"
)

// Frame is all of a shard but its tensors' data. It is known before a byte of data
// is, but for checksums of the data: they are filled in by Seal.
type Frame struct {
	Header []byte `json:"header"` // the bytes before the data
	// Pieces are the bytes between the tensors and behind them, for a format that has some
	// there. Where a checksum goes they are zero.
	Pieces    []Piece    `json:"pieces,omitempty"`
	Checksums []Checksum `json:"checksums,omitempty"`
}

// Piece is some bytes of a file.
type Piece struct {
	Offset int64  `json:"offset"`
	Bytes  []byte `json:"bytes"`
}

// Checksum is the CRC-32 (IEEE 802.3) of a range of a file, and the places in the
// file where it stands as four bytes, little-endian.
type Checksum struct {
	Offset int64   `json:"offset"`
	Bytes  int64   `json:"bytes"`
	At     []int64 `json:"at"`
}

// All yields the header and the pieces, each with its offset. They may be written before,
// after or while the data is.
func (f *Frame) All() iter.Seq2[int64, []byte] {
	return func(yield func(int64, []byte) bool) {
		if len(f.Header) > 0 && !yield(0, f.Header) {
			return
		}
		for _, p := range f.Pieces {
			if !yield(p.Offset, p.Bytes) {
				return
			}
		}
	}
}

// Seal fills in the checksums. Everything else of the shard must have been written: what they
// are of is read back. A shard without checksums is left as it is; to seal one again
// changes nothing.
func (f *Frame) Seal(file interface {
	io.ReaderAt
	io.WriterAt
}) error {
	for _, c := range f.Checksums {
		sum, err := c.of(file)
		if err != nil {
			return err
		}
		for _, at := range c.At {
			if _, err := file.WriteAt(sum[:], at); err != nil {
				return err
			}
		}
	}
	return nil
}

// Holds reports whether a file has the frame's bytes, and the checksums of the
// data that it has.
func (f *Frame) Holds(file io.ReaderAt) (bool, error) {
	sums := make(map[int64][4]byte, 2*len(f.Checksums))
	for _, c := range f.Checksums {
		sum, err := c.of(file)
		if err != nil {
			return false, err
		}
		for _, at := range c.At {
			sums[at] = sum
		}
	}
	places := make([]int64, 0, len(sums))
	for at := range sums {
		places = append(places, at)
	}
	slices.Sort(places)
	for off, known := range f.All() {
		want := slices.Clone(known)
		first, _ := slices.BinarySearch(places, off)
		for _, at := range places[first:] {
			if at-off >= int64(len(want)) {
				break
			}
			sum := sums[at]
			copy(want[at-off:], sum[:])
		}
		found := make([]byte, len(want))
		if err := readFull(file, found, off); err != nil {
			return false, err
		}
		if !bytes.Equal(found, want) {
			return false, nil
		}
	}
	return true, nil
}

// pieces of data go through these buffers.
var buffers = sync.Pool{New: func() any { return new([256 << 10]byte) }}

// of reads the range and returns its checksum as it stands in the file.
func (c Checksum) of(file io.ReaderAt) (sum [4]byte, err error) {
	if c.Offset < 0 || c.Bytes < 0 || c.Offset+c.Bytes < 0 {
		return sum, fmt.Errorf("found a checksum of %d bytes at byte %d, expected a range of a file", c.Bytes, c.Offset)
	}
	b := buffers.Get().(*[256 << 10]byte)
	defer buffers.Put(b)
	crc := uint32(0)
	for off, left := c.Offset, c.Bytes; left > 0; {
		p := b[:min(left, int64(len(b)))]
		if err := readFull(file, p, off); err != nil {
			return sum, err
		}
		crc = crc32.Update(crc, crc32.IEEETable, p)
		off, left = off+int64(len(p)), left-int64(len(p))
	}
	binary.LittleEndian.PutUint32(sum[:], crc)
	return sum, nil
}

// readFull fills p. A file that ends early is an io.ErrUnexpectedEOF.
func readFull(file io.ReaderAt, p []byte, off int64) error {
	n, err := file.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d of %d bytes at offset %d: %w", n, len(p), off, err)
}
