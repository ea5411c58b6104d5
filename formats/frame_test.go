package formats_test

import (
	"bytes"
	"errors"
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
		Pieces: []formats.Piece{{Offset: 300_004, Bytes: []byte("between\x00\x00\x00\x00")}, {Offset: 300_020, Bytes: []byte("end\x00\x00\x00\x00\x00\x00\x00\x00!")}},
		Checksums: []formats.Checksum{
			{Offset: 4, Bytes: 300_000, At: []int64{300_011, 300_023}},
			{Offset: 300_015, Bytes: 5, At: []int64{300_027}},
		},
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "x"))
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	for off, p := range frame.All() {
		_, err := f.WriteAt(p, off)
		require.NoError(t, err)
	}
	_, err = f.WriteAt(bytes.Repeat([]byte("abc"), 100_000), 4)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("12345"), 300_015)
	require.NoError(t, err)
	return frame, f, 300_032
}

func TestSeal(t *testing.T) {
	frame, f, size := sealed(t)
	holds, err := frame.Holds(f)
	require.NoError(t, err)
	assert.False(t, holds, "before it is sealed")
	require.NoError(t, frame.Seal(f))
	once, err := os.ReadFile(f.Name())
	require.NoError(t, err)
	require.Len(t, once, int(size))
	large := crc32.ChecksumIEEE(bytes.Repeat([]byte("abc"), 100_000))
	for _, at := range []int{300_011, 300_023} {
		assert.Equal(t, []byte{byte(large), byte(large >> 8), byte(large >> 16), byte(large >> 24)}, once[at:at+4])
	}
	assert.Equal(t, []byte{0x1c, 0x3a, 0xf5, 0xcb}, once[300_027:300_031], "CRC-32 of 12345 is cbf53a1c")
	assert.Equal(t, byte('!'), once[300_031])

	holds, err = frame.Holds(f)
	require.NoError(t, err)
	assert.True(t, holds)
	require.NoError(t, frame.Seal(f))
	twice, err := os.ReadFile(f.Name())
	require.NoError(t, err)
	assert.Equal(t, once, twice)

	// Whatever changes is seen: the frame's bytes, a checksum, the data.
	for _, at := range []int64{0, 3, 4, 150_000, 300_003, 300_004, 300_010, 300_011, 300_014, 300_015, 300_022, 300_023, 300_027, 300_030, 300_031} {
		_, err := f.WriteAt([]byte{once[at] ^ 1}, at)
		require.NoError(t, err)
		holds, err := frame.Holds(f)
		require.NoError(t, err)
		assert.False(t, holds, "byte %d", at)
		_, err = f.WriteAt(once[at:at+1], at)
		require.NoError(t, err)
	}
}

func TestSealWithoutChecksums(t *testing.T) {
	frame := formats.Frame{Header: []byte("head")}
	require.NoError(t, frame.Seal(nil))
	for _, c := range []struct {
		file string
		want bool
	}{{"head and more", true}, {"heap", false}} {
		holds, err := frame.Holds(bytes.NewReader([]byte(c.file)))
		require.NoError(t, err)
		assert.Equal(t, c.want, holds)
	}
	_, err := frame.Holds(bytes.NewReader([]byte("hea")))
	assert.ErrorIs(t, err, io.ErrUnexpectedEOF)
}

func TestSealFails(t *testing.T) {
	frame, f, _ := sealed(t)
	require.NoError(t, f.Truncate(1000))
	assert.ErrorIs(t, frame.Seal(f), io.ErrUnexpectedEOF)
	_, err := frame.Holds(f)
	assert.ErrorIs(t, err, io.ErrUnexpectedEOF)
	for _, c := range []formats.Checksum{{Offset: -1, Bytes: 1}, {Offset: 1, Bytes: -1}, {Offset: 1 << 62, Bytes: 1 << 62}} {
		bad := formats.Frame{Checksums: []formats.Checksum{c}}
		assert.ErrorContains(t, bad.Seal(f), "expected a range of a file")
	}
	disk := errors.New("no space")
	assert.ErrorIs(t, frame.Seal(broken{f, disk}), io.ErrUnexpectedEOF)
	frame.Checksums = []formats.Checksum{{Offset: 0, Bytes: 4, At: []int64{4}}}
	assert.ErrorIs(t, frame.Seal(broken{f, disk}), disk)
}

// broken is a file that nothing can be written to.
type broken struct {
	io.ReaderAt
	err error
}

func (b broken) WriteAt([]byte, int64) (int, error) { return 0, b.err }
