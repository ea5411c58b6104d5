package models

import (
	"bufio"
	"compress/gzip"
	"os"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/tensor"
)

// expected is one line of generate/expect.py: what transformers' own functions do with a model of other sizes than the
// data was made from. Of a tensor: its shape; q quantised, f and s float32 (s strictly), c converted and not just
// renamed; the run-time name where it is another; what that is tied to.
type expected struct {
	Class   string                       `json:"class"`
	Config  jsontext.Value               `json:"config"`
	Tensors map[string][4]jsontext.Value `json:"tensors"`
}

// TestAgainstTransformers holds the data against testdata/expected.json.gz, or the file in LORAKIT_EXPECTED: expect.py
// makes one for all classes in a few minutes.
func TestAgainstTransformers(t *testing.T) {
	path := os.Getenv("LORAKIT_EXPECTED")
	if path == "" {
		path = "testdata/expected.json.gz"
	}
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	lines := bufio.NewScanner(z)
	lines.Buffer(nil, 64<<20)
	classes, tensors := 0, 0
	for lines.Scan() {
		var e expected
		require.NoError(t, json.Unmarshal(lines.Bytes(), &e))
		classes++
		t.Run(e.Class, func(t *testing.T) {
			c, err := ParseConfig(e.Config)
			require.NoError(t, err)
			m, known := Load(c)
			if !known {
				t.Fatal("no data")
			}
			wrong := 0
			for name, v := range e.Tensors {
				tensors++
				var shape tensor.Shape
				var flags, runtime, tied string
				for i, p := range []any{&shape, &flags, &runtime, &tied} {
					require.NoError(t, json.Unmarshal(v[i], p))
				}
				if runtime == "" {
					runtime = name
				}
				got := m.Tensor(name, shape)
				q := got.Quantized || got.Stay == Raw || got.Stay == Pieces
				strict, f32 := strings.Contains(flags, "s"), strings.ContainsAny(flags, "fs")
				if q != strings.Contains(flags, "q") || got.KeepFloat32Strict != strict || got.KeepFloat32 != f32 ||
					got.Tied != tied || !got.Known || got.Runtime[0].Param != runtime ||
					!strings.Contains(flags, "c") != got.Runtime[0].Whole() {
					if wrong++; wrong <= 3 {
						t.Errorf("%s %v: %+v, want %q, %s, tied to %q", name, shape, got, flags, runtime, tied)
					}
				}
			}
			if wrong > 3 {
				t.Errorf("and %d more", wrong-3)
			}
		})
	}
	require.NoError(t, lines.Err())
	require.NotZero(t, classes)
	t.Logf("%d tensors of %d classes", tensors, classes)
}
