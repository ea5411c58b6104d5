package tensor_test

import (
	"math"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/tensor"
)

// A tensor may be stored in blocks of a container's own: GGUF's q4_K has 256 elements in 144 bytes.
func TestEncodedSize(t *testing.T) {
	q4k := tensor.Encoding{Name: "q4_K", Elements: 256, Bytes: 144}
	for _, c := range []struct {
		tensor.Info
		size int64
		says string
	}{
		{tensor.Info{Shape: tensor.Shape{2, 512}, Encoding: q4k}, 576, ""},
		{tensor.Info{Shape: tensor.Shape{0, 5}, Encoding: q4k}, 0, ""},
		{tensor.Info{Shape: tensor.Shape{1 << 50, 256}, Encoding: q4k}, 144 << 50, ""},
		{tensor.Info{Shape: tensor.Shape{2, 100}, Encoding: q4k}, 0,
			`shape [2, 100] of "q4_K" is 200 elements, no whole number of blocks of 256`},
		{tensor.Info{Shape: tensor.Shape{1 << 62}, Encoding: tensor.Encoding{Name: "x", Elements: 1, Bytes: 16}}, 0,
			tensor.ErrOverflow.Error()},
		{tensor.Info{Shape: tensor.Shape{math.MaxInt64, 4}, Encoding: q4k}, 0, tensor.ErrOverflow.Error()},
		{tensor.Info{Shape: tensor.Shape{256}, DType: tensor.F32, Encoding: q4k}, 0, "both a dtype, F32, and an encoding"},
		{tensor.Info{Shape: tensor.Shape{256}, Encoding: tensor.Encoding{Name: "x"}}, 0, "invalid encoding"},
		{tensor.Info{Shape: tensor.Shape{256}, Encoding: tensor.Encoding{Elements: 1, Bytes: 1}}, 0, "invalid encoding"},
		{tensor.Info{Shape: tensor.Shape{256}, Encoding: tensor.Encoding{Name: "x", Elements: -1, Bytes: 1}}, 0,
			"invalid encoding"},
		{tensor.Info{Shape: tensor.Shape{256}}, 0, "invalid dtype"},
	} {
		size, err := c.Size()
		if c.says != "" {
			assert.ErrorContains(t, err, c.says)
			continue
		}
		require.NoError(t, err)
		assert.Equal(t, c.size, size)
	}
	assert.Equal(t, "q4_K", tensor.Info{Encoding: q4k}.Type())
	assert.Equal(t, "BF16", tensor.Info{DType: tensor.BF16}.Type())

	for want, x := range map[string]tensor.Info{
		`{"name":"w","dtype":"BF16","shape":[2]}`: {Name: "w", DType: tensor.BF16,
			Shape: tensor.Shape{2}},
		`{"name":"w","shape":[256],"encoding":{"name":"q4_K","elements":256,"bytes":144}}`: {Name: "w",
			Shape: tensor.Shape{256}, Encoding: q4k},
	} {
		b, err := json.Marshal(x)
		require.NoError(t, err)
		assert.Equal(t, want, string(b))
		var back tensor.Info
		require.NoError(t, json.Unmarshal(b, &back))
		assert.Equal(t, x, back)
	}
}
