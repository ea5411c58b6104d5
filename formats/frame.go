package formats

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync"
)

// Frame is all of a shard but its tensors' data. It is known before a byte of data is, but for checksums of the data.
type Frame struct {
	Header []byte `json:"header"` // the bytes before the data
	// Pieces are the bytes between the tensors and behind them, for a format that has some there. Where a checksum goes
	// they are zero.
	Pieces    []Piece    `json:"pieces,omitempty"`
	Checksums []Checksum `json:"checksums,omitempty"`
}

// Piece is some bytes of a file.
type Piece struct {
	Offset int64  `json:"offset"`
	Bytes  []byte `json:"bytes"`
}

// Checksum is the CRC-32 (IEEE 802.3) of a range of tensors' data in a file, and the places in the file where it
// stands as four bytes, little-endian.
type Checksum struct {
	Offset int64   `json:"offset"`
	Bytes  int64   `json:"bytes"`
	At     []int64 `json:"at"`
}

// Sealed returns the header and the pieces as they are written, the checksums filled in. file holds all data of the
// shard that a checksum is of; it is not read where there are none.
func (f *Frame) Sealed(file io.ReaderAt) ([]Piece, error) {
	var pieces []Piece
	if len(f.Header) > 0 {
		pieces = append(pieces, Piece{0, f.Header})
	}
	pieces = append(pieces, f.Pieces...)
	slices.SortStableFunc(pieces, func(a, b Piece) int { return cmp.Compare(a.Offset, b.Offset) })
	for i := range pieces {
		if len(f.Checksums) > 0 {
			pieces[i].Bytes = slices.Clone(pieces[i].Bytes)
		}
	}
	for _, c := range f.Checksums {
		sum, err := c.of(file)
		if err != nil {
			return nil, err
		}
		for _, at := range c.At {
			for k, b := range sum { // its bytes may stand in two pieces
				fillIn(pieces, at+int64(k), b)
			}
		}
	}
	return pieces, nil
}

// fillIn puts a byte in its place in pieces, which are in the order of their offsets.
func fillIn(pieces []Piece, at int64, b byte) {
	i, found := slices.BinarySearchFunc(pieces, at, func(p Piece, at int64) int { return cmp.Compare(p.Offset, at) })
	if !found {
		i--
	}
	if i < 0 {
		return
	}
	if p := pieces[i]; at-p.Offset < int64(len(p.Bytes)) {
		p.Bytes[at-p.Offset] = b
	}
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
		if err := ReadFull(file, p, off); err != nil {
			return sum, err
		}
		crc = crc32.Update(crc, crc32.IEEETable, p)
		off, left = off+int64(len(p)), left-int64(len(p))
	}
	binary.LittleEndian.PutUint32(sum[:], crc)
	return sum, nil
}

// ReadFull fills p from the offset off on. A file that ends early is an io.ErrUnexpectedEOF.
func ReadFull(file io.ReaderAt, p []byte, off int64) error {
	n, err := file.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d of %d bytes at offset %d: %w", n, len(p), off, err)
}
