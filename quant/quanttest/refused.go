package quanttest

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Replaced is a change of config.json: the first old in it becomes now.
func Replaced(old, now string) func(*Stored) {
	return func(s *Stored) { s.JSON = []byte(strings.Replace(string(s.JSON), old, now, 1)) }
}

// Removed is a change: a tensor is not there.
func Removed(name string) func(*Stored) { return func(s *Stored) { s.Remove(name) } }

// Shaped is a change: a tensor is one of zeros, of another type and shape.
func Shaped(name string, d tensor.DType, shape ...int64) func(*Stored) {
	return func(s *Stored) {
		info := tensor.Info{Name: name, DType: d, Shape: shape}
		s.Add(info, make([]byte, info.Count()*d.Bits()/8))
	}
}

// Refused holds a scheme to what it says of a golden file that a change has made contradict itself: one line with all
// of want.
func Refused(t *testing.T, scheme quant.Scheme, path string, change func(*Stored), want ...string) {
	s := Open(t, path).Clone()
	change(s)
	found, err := scheme.Find(context.Background(), s)
	require.ErrorIs(t, err, quant.ErrMalformed, "%d are found", len(found))
	require.NotContains(t, err.Error(), "\n")
	for _, w := range want {
		require.ErrorContains(t, err, w)
	}
}
