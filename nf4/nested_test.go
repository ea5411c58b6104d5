package nf4

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// TestBuckets checks what search relies on.
func TestBuckets(t *testing.T) {
	held := map[int]int{}
	for _, k := range dynamic().threshold[:255] {
		held[bucket(k)]++
	}
	for b, n := range held {
		require.Equal(t, 1, n, "bucket %d", b)
	}
	require.Equal(t, 0, bucket(-1<<31))
	require.Equal(t, len(dynamic().below)-1, bucket(1<<31-1))
}
