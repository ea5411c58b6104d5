package msgpack

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
)

// FuzzRead reads any bytes. What is read lies in the file, and is read again from the file that is laid out for it.
func FuzzRead(f *testing.F) {
	found := 0
	for _, pattern := range []string{"*.msgpack", "*/*.msgpack"} {
		paths, err := filepath.Glob(fixtures + pattern)
		require.NoError(f, err)
		for _, path := range paths {
			b, err := os.ReadFile(path)
			require.NoError(f, err)
			if found++; len(b) < 10_000 {
				f.Add(b)
			}
		}
	}
	require.Equal(f, 14, found)
	f.Fuzz(func(t *testing.T, file []byte) {
		c, err := Read(bytes.NewReader(file), int64(len(file)))
		if err != nil {
			one := 0
			for _, kind := range []error{formats.ErrMalformed, formats.ErrLimit, formats.ErrUnsupported} {
				if errors.Is(err, kind) {
					one++
				}
			}
			require.Equal(t, 1, one, "kinds of %v", err)
			require.NotContains(t, err.Error(), "\n")
			require.Less(t, len(err.Error()), 2500)
			return
		}
		require.NoError(t, c.Metadata.Check())
		at := int64(0)
		for _, x := range c.Tensors {
			size, err := x.Size()
			require.NoError(t, err)
			for _, r := range x.Ranges {
				require.GreaterOrEqual(t, r.Offset, at)
				require.GreaterOrEqual(t, r.Bytes, int64(0))
				at = r.Offset + r.Bytes
				size -= r.Bytes
			}
			require.Zero(t, size, "bytes that no range has")
		}
		require.LessOrEqual(t, at, int64(len(file)))

		l, err := LayOut(infos(c.Tensors))
		require.NoError(t, err)
		whole := assemble(t, l, func(place int) []byte { return data(file, c.Tensors[place]) })
		again, err := Read(bytes.NewReader(whole), int64(len(whole)))
		require.NoError(t, err)
		require.Equal(t, infos(c.Tensors), infos(again.Tensors))
		for i, x := range again.Tensors {
			require.True(t, bytes.Equal(data(file, c.Tensors[i]), data(whole, x)))
		}
	})
}
