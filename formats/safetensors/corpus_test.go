package safetensors_test

import (
	"bufio"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/formatstest"
	"github.com/lorakit/lorakit/formats/safetensors"
)

// lines decodes each line of a JSON file.
func lines[T any](t testing.TB, path string) []T {
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	var all []T
	s := bufio.NewScanner(f)
	s.Buffer(nil, 16<<20)
	for s.Scan() {
		var v T
		require.NoError(t, json.Unmarshal(s.Bytes(), &v), "line %d of %s", len(all)+1, path)
		all = append(all, v)
	}
	require.NoError(t, s.Err())
	return all
}

// malformed is a line of fixtures/malformed/corpus.jsonl: a file and what the reference implementation says of it.
type malformed struct {
	Name     string `json:"name"`
	Data     []byte `json:"data"`
	Accept   bool   `json:"accept"`
	Reason   string `json:"reason"`
	Stricter bool   `json:"stricter"`
}

func corpus(t testing.TB) []malformed {
	return lines[malformed](t, "../../fixtures/malformed/corpus.jsonl")
}

// TestVerdicts holds the reader against the reference: it accepts and refuses the same files, but for doubled names
// and dimensions of 2^63.
func TestVerdicts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.safetensors")
	accepted := 0
	for _, c := range corpus(t) {
		require.NoError(t, os.WriteFile(path, c.Data, 0o644))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		opened, err := formatstest.Open(safetensors.Format{}, path)
		runtime.ReadMemStats(&after)
		assert.LessOrEqual(t, after.TotalAlloc-before.TotalAlloc, uint64(128<<10+200*len(c.Data)), "%s: bytes allocated",
			c.Name)
		if c.Accept && !c.Stricter {
			if assert.NoError(t, err, c.Name) {
				accepted++
				checkInvariants(t, opened, int64(len(c.Data)))
				assert.NoError(t, opened.Close())
			}
			continue
		}
		if !assert.Error(t, err, "%s: the reference says %q", c.Name, c.Reason) {
			opened.Close()
			continue
		}
		assertKind(t, err, c.Name)
		assert.True(t, strings.HasPrefix(err.Error(), path+": "), err)
	}
	assert.Greater(t, accepted, 300)
}

// assertKind says that an error is of a kind that a bad file has, on one short line.
func assertKind(t testing.TB, err error, what string) {
	one := 0
	for _, kind := range []error{formats.ErrMalformed, formats.ErrLimit} {
		if errors.Is(err, kind) {
			one++
		}
	}
	assert.Equal(t, 1, one, "%s: kinds of %v", what, err)
	for _, r := range err.Error() {
		if r < ' ' || r == 0x7f || r == '\u2028' {
			assert.Failf(t, "control character in error", "%s: %q", what, err.Error())
			break
		}
	}
	assert.Less(t, len(err.Error()), 1500, what)
}

// checkInvariants holds what every opened container promises: each tensor's bytes lie in the file, as many as its
// dtype and shape make, one after the other to the end.
func checkInvariants(t testing.TB, c formats.Container, size int64) {
	names := map[string]bool{}
	at := size
	for i, x := range c.Tensors() {
		if i == 0 {
			at = x.Offset
			require.GreaterOrEqual(t, at, int64(8))
		}
		require.Equal(t, at, x.Offset, x.Name)
		at += x.Bytes
		require.True(t, x.DType.Valid())
		require.NotNil(t, x.Shape)
		require.False(t, names[x.Name], "%q twice", x.Name)
		names[x.Name] = true
		if want, err := x.Size(); err == nil { // else the product passes 2^63 on its way to 0
			require.Equal(t, want, x.Bytes, x.Name)
		} else {
			require.Contains(t, x.Shape, int64(0))
			require.Zero(t, x.Bytes)
		}
	}
	require.Equal(t, size, at)
}
