package msgpack

import (
	"fmt"
	"io"
	"sort"

	"github.com/lorakit/lorakit/formats"
)

// Pieces is the data of an array that lies in several ranges of a file. It is safe for concurrent use where the file
// is.
type Pieces struct {
	file   io.ReaderAt
	ranges []Range
	ends   []int64 // where in the array each of them ends
}

// NewPieces joins ranges of a file.
func NewPieces(file io.ReaderAt, ranges []Range) *Pieces {
	p := &Pieces{file: file, ranges: ranges, ends: make([]int64, len(ranges))}
	end := int64(0)
	for i, r := range ranges {
		end += r.Bytes
		p.ends[i] = end
	}
	return p
}

// ReadAt reads from the offset off of the array on.
func (p *Pieces) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("negative offset %d", off)
	}
	done := 0
	for i := sort.Search(len(p.ends), func(i int) bool { return p.ends[i] > off }); i < len(p.ends); i++ {
		if done == len(b) {
			return done, nil
		}
		r := p.ranges[i]
		skip := off + int64(done) - (p.ends[i] - r.Bytes)
		part := b[done:min(int64(len(b)), int64(done)+r.Bytes-skip)]
		if err := formats.ReadFull(p.file, part, r.Offset+skip); err != nil {
			return done, err
		}
		done += len(part)
	}
	if done < len(b) {
		return done, io.EOF
	}
	return done, nil
}
