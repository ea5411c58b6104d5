package formats_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

func TestTensorReadAt(t *testing.T) {
	file := bytes.NewReader([]byte("0123456789"))
	x := formats.Tensor{Info: tensor.Info{Name: "x"}, File: "f", Data: file, Offset: 3, Bytes: 5}

	got, err := io.ReadAll(io.NewSectionReader(x, 0, x.Bytes))
	require.NoError(t, err)
	assert.Equal(t, "34567", string(got))

	b := make([]byte, 4)
	n, err := x.ReadAt(b, 1)
	assert.Equal(t, 4, n)
	assert.NoError(t, err)
	assert.Equal(t, "4567", string(b))

	n, err = x.ReadAt(b, 2) // one more than there is
	assert.Equal(t, 3, n)
	assert.Equal(t, io.EOF, err)
	n, err = x.ReadAt(b, 5)
	assert.Zero(t, n)
	assert.Equal(t, io.EOF, err)
	_, err = x.ReadAt(nil, 5)
	assert.NoError(t, err)
	_, err = x.ReadAt(b, -1)
	assert.Error(t, err)

	x.Bytes = 9 // the file has become shorter
	n, err = x.ReadAt(make([]byte, 9), 0)
	assert.Equal(t, 7, n)
	assert.ErrorIs(t, err, io.ErrUnexpectedEOF)
	assert.NotErrorIs(t, err, io.EOF)
	assert.ErrorContains(t, err, `f: tensor "x"`)
	x.Offset = 20
	_, err = x.ReadAt(b, 0)
	assert.ErrorIs(t, err, io.ErrUnexpectedEOF)

	broken := errors.New("broken disk")
	x.Data = failing{broken}
	_, err = x.ReadAt(b, 0)
	assert.ErrorIs(t, err, broken)
}

type failing struct{ error }

func (f failing) ReadAt([]byte, int64) (int, error) { return 0, f.error }
