package ggml_test

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/lorakit/lorakit/ggml"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// golden reads what ggml's own library makes: rows x, their bytes q.TYPE, random blocks b.TYPE and their values d.TYPE.
func golden(t testing.TB) map[string][]byte {
	file, err := os.ReadFile("../fixtures/ggml/vectors.safetensors")
	require.NoError(t, err)
	size := binary.LittleEndian.Uint64(file)
	var header map[string]struct {
		Offsets [2]int `json:"data_offsets"`
	}
	require.NoError(t, json.Unmarshal(file[8:8+size], &header))
	tensors := map[string][]byte{}
	for name, entry := range header {
		tensors[name] = file[8+size:][entry.Offsets[0]:entry.Offsets[1]]
	}
	return tensors
}

func floats(b []byte) []float32 {
	f := make([]float32, len(b)/4)
	if _, err := binary.Decode(b, binary.LittleEndian, f); err != nil {
		panic(err)
	}
	return f
}

// same compares bits, so that zeros have signs.
func same(t *testing.T, want, got []float32) {
	t.Helper()
	w, err := binary.Append(nil, binary.LittleEndian, want)
	require.NoError(t, err)
	g, err := binary.Append(nil, binary.LittleEndian, got)
	require.NoError(t, err)
	if !assert.Equal(t, len(w), len(g)) {
		return
	}
	for i := range w {
		if w[i] != g[i] {
			t.Fatalf("element %d: found %v, expected %v", i/4, got[i/4], want[i/4])
		}
	}
}

// overflow are the types in which the rows have scales that no float16 holds.
var overflow = []ggml.Type{ggml.Q4_1, ggml.Q5_1, ggml.TQ1_0, ggml.TQ2_0, ggml.Q2_0}

func TestGoldenQuantize(t *testing.T) {
	tensors := golden(t)
	x := floats(tensors["x"])
	seen := 0
	for _, typ := range ggml.Types() {
		want, ok := tensors["q."+strings.ToUpper(typ.String())]
		require.Equal(t, typ.ReadOnly(), !ok, typ)
		if !ok {
			continue
		}
		seen++
		t.Run(typ.String(), func(t *testing.T) {
			got := make([]byte, len(x)/typ.Elements()*typ.Bytes())
			bad := -1
			if slices.Contains(overflow, typ) {
				bad = 71 * 256
			}
			assert.Equal(t, bad, typ.Quantize(got, x))
			require.Len(t, got, len(want))
			differ := 0
			for i := 0; i < len(want); i += typ.Bytes() {
				if string(want[i:i+typ.Bytes()]) != string(got[i:i+typ.Bytes()]) {
					if differ == 0 {
						t.Errorf("block %d:\nfound    %x\nexpected %x", i/typ.Bytes(), got[i:i+typ.Bytes()], want[i:i+typ.Bytes()])
					}
					differ++
				}
			}
			assert.Zero(t, differ, "blocks of %d", len(want)/typ.Bytes())
		})
	}
	assert.Equal(t, 19, seen)
}

func TestGoldenDequantize(t *testing.T) {
	tensors := golden(t)
	for _, typ := range ggml.Types() {
		t.Run(typ.String(), func(t *testing.T) {
			name := strings.ToUpper(typ.String())
			src, want := tensors["b."+name], floats(tensors["d."+name])
			require.NotEmpty(t, src)
			got := make([]float32, len(want))
			require.Equal(t, -1, typ.Dequantize(got, src))
			same(t, want, got)
		})
	}
}
