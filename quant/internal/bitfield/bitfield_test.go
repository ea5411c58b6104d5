package bitfield

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// TestFields holds words to a stream of bits, lowest first, and reads them back.
func TestFields(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bits := rapid.Int64Range(1, 8).Draw(t, "bits")
		fields := rapid.SliceOfN(rapid.ByteMax(1<<bits-1), 0, 100).Draw(t, "fields")
		n := int64(len(fields))
		words := Words(n, bits)
		require.Equal(t, (n*bits+31)/32, words)
		want := make([]byte, 4*words)
		for i, f := range fields {
			for b := range int(bits) {
				at := i*int(bits) + b
				want[at/8] |= f >> b & 1 << (at % 8)
			}
		}
		got := bytes.Repeat([]byte{0xee}, len(want))
		Pack(got, fields, bits)
		require.Equal(t, want, got)
		behind := rapid.IntRange(0, 40).Draw(t, "behind")
		back := bytes.Repeat([]byte{0xee}, len(fields)+behind)
		Unpack(back, got, bits)
		require.Equal(t, append(fields, make([]byte, behind)...), back)
	})
	require.Equal(t, int64(1)<<60, Words(1<<62, 8)) // whose bits are too many to be counted
}
