package msgpack

import (
	"bytes"
	"io"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPieces(t *testing.T) {
	p := NewPieces(bytes.NewReader([]byte("-abc--de-f")), []Range{{1, 3}, {6, 2}, {0, 0}, {9, 1}})
	want := "abcdef"
	require.NoError(t, iotest.TestReader(io.NewSectionReader(p, 0, int64(len(want))), []byte(want)))
	for lo := range len(want) + 2 {
		for n := range len(want) + 3 {
			b := make([]byte, n)
			got, err := p.ReadAt(b, int64(lo))
			wanted := want[min(lo, len(want)):min(lo+n, len(want))]
			assert.Equal(t, wanted, string(b[:got]))
			if len(wanted) < n {
				assert.Equal(t, io.EOF, err)
			} else {
				assert.NoError(t, err)
			}
		}
	}
	_, err := p.ReadAt(nil, -1)
	assert.ErrorContains(t, err, "negative offset -1")
	short := NewPieces(bytes.NewReader([]byte("abc")), []Range{{0, 2}, {2, 2}})
	n, err := short.ReadAt(make([]byte, 4), 0)
	assert.Equal(t, 2, n)
	assert.ErrorIs(t, err, io.ErrUnexpectedEOF)
}
