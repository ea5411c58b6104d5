package formats_test

import (
	"os"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// TestLayOutGoldens holds LayOut against fixtures/layouts.json, as the Python package is held against it.
func TestLayOutGoldens(t *testing.T) {
	data, err := os.ReadFile("../fixtures/layouts.json")
	require.NoError(t, err)
	var cases []struct {
		Tensors [][3]any `json:"tensors"`
		Options struct {
			MaxShardSize int64  `json:"max_shard_size"`
			SingleFile   string `json:"single_file"`
			Stem         string `json:"stem"`
			Parameters   int64  `json:"parameters"`
			Groups       []int  `json:"groups"`
		} `json:"options"`
		Files  [][2]any          `json:"files"`
		Extras map[string]string `json:"extras"`
	}
	require.NoError(t, json.Unmarshal(data, &cases))
	require.NotEmpty(t, cases)
	for i, c := range cases {
		tensors := make([]tensor.Info, len(c.Tensors))
		for i, one := range c.Tensors {
			dtype, err := tensor.ParseDType(one[1].(string))
			require.NoError(t, err)
			tensors[i] = tensor.Info{Name: one[0].(string), DType: dtype}
			for _, n := range one[2].([]any) {
				tensors[i].Shape = append(tensors[i].Shape, int64(n.(float64)))
			}
		}
		l, err := formats.LayOut(tensors, formats.Options{MaxShardSize: c.Options.MaxShardSize,
			SingleFile: c.Options.SingleFile, Stem: c.Options.Stem, Parameters: c.Options.Parameters,
			Groups: c.Options.Groups}, formats.Naming{Stem: "model", Extension: ".toy"},
			func(name string, members []int, _ []int64) (formats.Shard, error) {
				return formats.Shard{Name: name, Tensors: members}, nil
			})
		require.NoError(t, err)
		got := [][2]any{}
		for _, s := range l.Shards {
			members := []any{}
			for _, m := range s.Tensors {
				members = append(members, float64(m))
			}
			got = append(got, [2]any{s.Name, members})
		}
		assert.Equal(t, c.Files, got, "case %d", i)
		extras := map[string]string{}
		for _, f := range l.Extra {
			extras[f.Name] = string(f.Data)
		}
		assert.Equal(t, c.Extras, extras, "case %d", i)
	}
}
