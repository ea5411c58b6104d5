package formats_test

import (
	"bytes"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
)

// sealed is a file with a frame around 300,000 and 5 bytes of data.
func sealed(t *testing.T) (formats.Frame, *os.File, int64) {
	frame := formats.Frame{
		Header: []byte("head"),
		Pieces: []formats.Piece{{Offset: 300_004, Bytes: []byte("between\x00\x00\x00\x00")},
			{Offset: 300_020, Bytes: []byte("end\x00\x00\x00\x00\x00\x00\x00\x00!")}},
		Checksums: []formats.Checksum{
			{Offset: 4, Bytes: 300_000, At: []int64{300_011, 300_023}},
			{Offset: 300_015, Bytes: 5, At: []int64{300_027}},
		},
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "x"))
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	_, err = f.WriteAt(bytes.Repeat([]byte("abc"), 100_000), 4)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("12345"), 300_015)
	require.NoError(t, err)
	return frame, f, 300_032
}

func TestSealed(t *testing.T) {
	frame, f, size := sealed(t)
	pieces, err := frame.Sealed(f)
	require.NoError(t, err)
	for _, p := range pieces {
		_, err := f.WriteAt(p.Bytes, p.Offset)
		require.NoError(t, err)
	}
	got, err := os.ReadFile(f.Name())
	require.NoError(t, err)
	require.Len(t, got, int(size))
	large := crc32.ChecksumIEEE(bytes.Repeat([]byte("abc"), 100_000))
	for _, at := range []int{300_011, 300_023} {
		assert.Equal(t, []byte{byte(large), byte(large >> 8), byte(large >> 16), byte(large >> 24)}, got[at:at+4])
	}
	assert.Equal(t, []byte{0x1c, 0x3a, 0xf5, 0xcb}, got[300_027:300_031], "CRC-32 of 12345 is cbf53a1c")
	assert.Equal(t, byte('!'), got[300_031])
	assert.Equal(t, "between", string(got[300_004:300_011]))

	again, err := frame.Sealed(f)
	require.NoError(t, err)
	assert.Equal(t, pieces, again)
	assert.Equal(t, []byte("end\x00\x00\x00\x00\x00\x00\x00\x00!"), frame.Pieces[1].Bytes,
		"the frame itself does not change")
}

func TestSealedWithoutChecksums(t *testing.T) {
	frame := formats.Frame{Header: []byte("head")}
	pieces, err := frame.Sealed(nil)
	require.NoError(t, err)
	assert.Equal(t, []formats.Piece{{Offset: 0, Bytes: []byte("head")}}, pieces)
}

func TestSealedFails(t *testing.T) {
	frame, f, _ := sealed(t)
	require.NoError(t, f.Truncate(1000))
	_, err := frame.Sealed(f)
	assert.ErrorIs(t, err, io.ErrUnexpectedEOF)
	for _, c := range []formats.Checksum{{Offset: -1, Bytes: 1}, {Offset: 1, Bytes: -1},
		{Offset: 1 << 62, Bytes: 1 << 62}} {
		bad := formats.Frame{Checksums: []formats.Checksum{c}}
		_, err := bad.Sealed(f)
		assert.ErrorContains(t, err, "expected a range of a file")
	}
}
