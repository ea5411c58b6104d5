package ggml_test

import (
	"compress/gzip"
	"os"
	"strconv"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/tensor"
)

// TestTypeOf holds the choice against llama.cpp's own code, for models that bring out every rule.
func TestTypeOf(t *testing.T) {
	file, err := os.Open("../fixtures/ggml/filetypes.json.gz")
	require.NoError(t, err)
	defer file.Close()
	unzipped, err := gzip.NewReader(file)
	require.NoError(t, err)
	var models []struct {
		Architecture string
		Blocks       int
		Heads        int
		KVHeads      int `json:"kv_heads"`
		Experts      int
		Tensors      [][2]jsontext.Value
		Files        map[string]jsontext.Value
	}
	require.NoError(t, json.UnmarshalRead(unzipped, &models, json.MatchCaseInsensitiveNames(true)))
	require.Len(t, models, 19)
	chosen, refused := 0, map[error]int{}
	for _, m := range models {
		var tensors []ggml.Tensor
		for _, x := range m.Tensors {
			var tt ggml.Tensor
			require.NoError(t, json.Unmarshal(x[0], &tt.Name))
			require.NoError(t, json.Unmarshal(x[1], &tt.Shape))
			tensors = append(tensors, tt)
		}
		known := ggml.Model{Architecture: m.Architecture, Blocks: m.Blocks, Heads: m.Heads, KVHeads: m.KVHeads,
			Experts: m.Experts}
		require.Len(t, m.Files, len(ggml.FileTypes()))
		for _, f := range ggml.FileTypes() {
			want, ok := m.Files[strconv.Itoa(int(f))]
			require.True(t, ok, f)
			types, err := ggml.TypeOf(f, tensors, known)
			if want.Kind() == '"' {
				kind := ggml.ErrNoType
				if string(want) == `"needs an imatrix"` {
					kind = ggml.ErrImportance
				}
				assert.ErrorIs(t, err, kind, "%v: %s", f, want)
				refused[kind]++
				continue
			}
			require.NoError(t, err, "%v", f)
			var numbers []*ggml.Type
			require.NoError(t, json.Unmarshal(want, &numbers))
			for i, n := range numbers {
				if n == nil {
					assert.Equal(t, ggml.Keep, types[i], "%v, %s of %+v", f, tensors[i].Name, known)
				} else {
					assert.Equal(t, *n, types[i], "%v, %s of %+v", f, tensors[i].Name, known)
				}
				chosen++
			}
		}
	}
	assert.Greater(t, chosen, 50_000)
	assert.Greater(t, refused[ggml.ErrImportance], 100)
	assert.Greater(t, refused[ggml.ErrNoType], 20)
}

func TestFileTypes(t *testing.T) {
	assert.Equal(t, "q4_k_m", ggml.FileQ4KM.String())
	assert.Equal(t, ggml.FileType(15), ggml.FileQ4KM)
	assert.Equal(t, "nvfp4", ggml.FileNVFP4.String())
	names := map[string]bool{}
	for _, f := range ggml.FileTypes() {
		assert.False(t, names[f.String()], f)
		names[f.String()] = true
	}
	w := []ggml.Tensor{{Name: "blk.0.ffn_up.weight", Shape: tensor.Shape{256, 256}}}
	for _, f := range []ggml.FileType{ggml.FileNVFP4, 5, 33, 1 << 20} {
		_, err := ggml.TypeOf(f, w, ggml.Model{Architecture: "llama", Blocks: 1})
		assert.ErrorIs(t, err, ggml.ErrNoType)
	}
	_, err := ggml.TypeOf(ggml.FileQ1_0, []ggml.Tensor{{Name: "blk.0.ffn_up.weight", Shape: tensor.Shape{64, 96}}},
		ggml.Model{Architecture: "llama", Blocks: 1})
	assert.ErrorContains(t, err, `tensor "blk.0.ffn_up.weight" to q1_0: no type for a tensor: a row has 96 elements`)
}
