package gguf_test

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/tensor"
)

// odd are values that a key or a member may be spoiled with.
var odd = []any{nil, true, "", "x", 0.0, 1.0, -1.0, 1.5, 3.0, 1e300, 9007199254740993.0, []any{}, []any{1.0, 2.0},
	map[string]any{}, map[string]any{"rope_type": "yarn", "factor": 2.0}, map[string]any{"rope_type": "llama3"},
	map[string]any{"full_attention": 7.0}, map[string]any{"long_factor": []any{1.0}, "rope_type": "longrope"}}

// shapes are drawn of a few dimensions.
var shapes = rapid.Custom(func(t *rapid.T) tensor.Shape {
	sizes := rapid.SampledFrom([]int64{0, 1, 2, 3, 4, 8, 32, 64, 1 << 20, 1 << 40, 1 << 62, -1})
	return rapid.SliceOfN(sizes, 0, 5).Draw(t, "shape")
})

// odder are names that are nearly those of tensors.
var odder = rapid.StringMatching(
	`(model\.layers|blk|a)\.(0|1|01|99999999999)\.(ffn_up_exps|mlp\.experts\.7\.up_proj|b)(\.weight)?`)

// spoil changes the names and shapes of some tensors.
func spoil(t *rapid.T, tensors []tensor.Info) []tensor.Info {
	tensors = slices.Clone(tensors)
	for range rapid.IntRange(0, 3).Draw(t, "tensors") {
		i := rapid.IntRange(0, len(tensors)-1).Draw(t, "which")
		switch rapid.IntRange(0, 2).Draw(t, "how") {
		case 0:
			tensors[i].Shape = shapes.Draw(t, "shape")
		case 1:
			tensors[i].Name = rapid.SampledFrom(tensors).Draw(t, "other").Name
		default:
			tensors[i].Name = odder.Draw(t, "name")
		}
	}
	return tensors
}

// isRefusal holds an error against those that Forward and Backward have.
func isRefusal(t require.TestingT, err error) {
	if !errors.Is(err, formats.ErrMalformed) && !errors.Is(err, formats.ErrUnsupported) {
		require.NoError(t, err)
	}
}

// TestSpoiledConfigs: whatever a config and a list of tensors say, the answer is a model or a refusal.
func TestSpoiledConfigs(t *testing.T) {
	for _, name := range names(t) {
		c := open(t, name)
		b, err := os.ReadFile(filepath.Join(fixtures, name, "config.json"))
		require.NoError(t, err)
		t.Run(name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				config := map[string]any{}
				require.NoError(t, json.Unmarshal(b, &config))
				inner := config
				if text, ok := config["text_config"].(map[string]any); ok {
					inner = text
				}
				members := make([]string, 0, len(inner))
				for k := range inner {
					if k != "architectures" && k != "model_type" {
						members = append(members, k)
					}
				}
				slices.Sort(members)
				for range rapid.IntRange(0, 3).Draw(t, "members") {
					inner[rapid.SampledFrom(members).Draw(t, "member")] = rapid.SampledFrom(odd).Draw(t, "value")
				}
				text, err := json.Marshal(config)
				require.NoError(t, err)
				parsed, err := models.ParseConfig(text)
				require.NoError(t, err)
				o := gguf.Options{Type: gguf.Q8_0, Vocabulary: rapid.Int64Range(0, 400).Draw(t, "vocabulary")}
				m, err := gguf.Forward(parsed, spoil(t, c.tensors), o)
				isRefusal(t, err)
				if err == nil {
					require.NoError(t, m.Keys.Check())
				}
			})
		})
	}
}

// TestSpoiledFiles: so it is for keys and tensors of a GGUF file.
func TestSpoiledFiles(t *testing.T) {
	values := []any{nil, true, "", "yarn", "longrope", uint32(0), uint32(1), uint32(3), uint32(1 << 31), int64(-1),
		uint64(1 << 63), float32(0), float32(math.NaN()), math.Inf(1), float32(1.5), float64(1e300),
		[]uint32{1, 2}, []string{"x"}, int8(2)}
	for _, name := range names(t) {
		_, w := write(t, name, gguf.F32)
		t.Run(name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				s := w
				for range rapid.IntRange(0, 3).Draw(t, "keys") {
					s.set(rapid.SampledFrom(w.keys).Draw(t, "key").Name, rapid.SampledFrom(values).Draw(t, "value"))
				}
				s.tensors = spoil(t, w.tensors)
				back, err := s.back(tensor.BF16)
				isRefusal(t, err)
				if err == nil {
					_, err := models.ParseConfig(back.Config)
					require.NoError(t, err)
				}
			})
		})
	}
}
