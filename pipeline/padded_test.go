package pipeline

import (
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestPadded reads bytes and the zeros behind them in all pieces.
func TestPadded(t *testing.T) {
	p := padded{io.NewSectionReader(strings.NewReader("xabcdx"), 1, 4), 7}
	for off := int64(-1); off <= 8; off++ {
		for n := range 9 {
			b := []byte(strings.Repeat("?", n))
			got, err := p.ReadAt(b, off)
			want := ""
			if off >= 0 && off < 7 {
				want = "abcd\x00\x00\x00"[off:min(off+int64(n), 7)]
			}
			require.Equal(t, want, string(b[:got]))
			require.Equal(t, got < n || off < 0 || off >= 7, err == io.EOF)
		}
	}
}
