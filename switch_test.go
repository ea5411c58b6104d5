package lorakit_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// switched writes a folder of a model with single experts as mlx-lm has it: each projection of a block in one stack.
func switched(t *testing.T, src, dir string) {
	t.Helper()
	tensors := load(t, src)
	singles := len(tensors)
	for name := range tensors {
		block, rest, ok := strings.Cut(name, ".experts.0.")
		if !ok {
			continue
		}
		stack := entry{Info: tensor.Info{DType: tensors[name].DType}}
		for e := int64(0); ; e++ {
			single := fmt.Sprintf("%s.experts.%d.%s", block, e, rest)
			x, ok := tensors[single]
			if !ok {
				break
			}
			stack.Shape = slices.Concat(tensor.Shape{e + 1}, x.Shape)
			stack.data = append(stack.data, x.data...)
			delete(tensors, single)
		}
		tensors[block+".switch_mlp."+rest] = stack
	}
	require.Less(t, len(tensors), singles)
	require.NoError(t, os.Mkdir(dir, 0o777))
	writeTensors(t, filepath.Join(dir, "model.safetensors"), tensors)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), read(t, filepath.Join(src, "config.json")), 0o666))
}

// TestSwitched: what merges onto single experts merges onto mlx-lm's stacks of them.
func TestSwitched(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	switched(t, baseOf("qwen3-moe"), base)
	for _, w := range openedCheckpoint(t, base).Weights {
		if strings.Contains(w.Name, ".switch_mlp.") {
			assert.Equal(t, "expert", w.Role.Kind.String(), w.Name)
			assert.Equal(t, "mlx-lm", w.Role.Program)
		}
	}
	for i, adapter := range []string{
		"qwen3-moe/experts", "qwen3-moe/all-linear", "qwen3-moe/down-only", "qwen3-moe/gate-up-only", "qwen3-moe/per-expert",
		"qwen3-moe/per-expert-fused", "dialects/mlx-qwen3-moe",
	} {
		adapters := []lorakit.Adapter{{Path: filepath.Join(adapterFixtures, adapter)}}
		single, stacked, want := filepath.Join(dir, fmt.Sprint("single", i)), filepath.Join(dir, fmt.Sprint("stacked", i)),
			filepath.Join(dir, fmt.Sprint("want", i))
		o := lorakit.ConvertOptions{MinKept: -1}
		r, err := lorakit.Merge(t.Context(), baseOf("qwen3-moe"), adapters, single, o)
		require.NoError(t, err, adapter)
		s, err := lorakit.Merge(t.Context(), base, adapters, stacked, o)
		require.NoError(t, err, adapter)
		switched(t, single, want)
		require.Equal(t, load(t, want), load(t, stacked), adapter)
		assert.Equal(t, r.Notices, s.Notices)
	}
	experts := "model.layers.0.mlp.experts."
	_, err := lorakit.Attach(t.Context(), base, filepath.Join(dir, "attached"),
		lorakit.AttachOptions{Rank: 2, Target: experts + "gate_up_proj," + experts + "down_proj"})
	require.NoError(t, err)
	x, err := lorakit.Extract(t.Context(), base, filepath.Join(dir, "stacked0"), filepath.Join(dir, "x"),
		lorakit.ExtractOptions{Rank: 4})
	require.NoError(t, err)
	y, err := lorakit.Extract(t.Context(), baseOf("qwen3-moe"), filepath.Join(dir, "single0"), filepath.Join(dir, "y"),
		lorakit.ExtractOptions{Rank: 4})
	require.NoError(t, err)
	assert.InDelta(t, y.Explained, x.Explained, 1e-12)
	assert.Equal(t, numbers(t, filepath.Join(dir, "y")), numbers(t, filepath.Join(dir, "x")))
}

// TestSwitchedIsValidated: a step through stacks of mlx-lm is one through single experts.
func TestSwitchedIsValidated(t *testing.T) {
	t.Parallel()
	steps := filepath.Join("fixtures", "steps", "bases", "qwen3-moe")
	base := filepath.Join(t.TempDir(), "base")
	switched(t, steps, base)
	o := lorakit.ValidateOptions{Data: batchFile(t)}
	want, err := lorakit.Validate(t.Context(), steps, o)
	require.NoError(t, err)
	got, err := lorakit.Validate(t.Context(), base, o)
	require.NoError(t, err)
	assert.Equal(t, want.LossBefore, got.LossBefore)
}

// TestSwitchedNames: transformers does not load stacks of mlx-lm, so that a folder that is to be for it is said to have
// them; mlx-lm does, in its own types too.
func TestSwitchedNames(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const said = "stacks of experts keep the names of mlx-lm"
	for name, c := range map[string]struct {
		from      string
		o         lorakit.ConvertOptions
		says, not []string
		experts   int // in the type that is asked for
	}{
		"kept":  {mlxModel, lorakit.ConvertOptions{}, nil, []string{said}, 0},
		"plain": {mlxModel, lorakit.ConvertOptions{Quantize: "none"}, []string{said}, nil, 0},
		"nf4": {mlxModel, lorakit.ConvertOptions{Quantize: "nf4"},
			[]string{said, "experts: 3 tensors not quantised"}, nil, 0},
		"single": {baseOf("qwen3-moe"), lorakit.ConvertOptions{Quantize: "none"}, nil, []string{said}, 0},
		"some": {mlxModel, lorakit.ConvertOptions{Quantize: "mlx6"},
			[]string{"experts: 3 tensors not quantised; per-expert quantises them"}, []string{said, "transformers", "joins"}, 0},
		"all": {mlxModel, lorakit.ConvertOptions{Quantize: "mlx6", PerExpert: true}, nil,
			[]string{said, "transformers", "experts:"}, 3},
	} {
		c.o.BlockSize = 64
		out := filepath.Join(dir, name)
		r, err := lorakit.Convert(t.Context(), c.from, out, c.o)
		require.NoError(t, err)
		notices := strings.Join(r.Notices, "\n")
		for _, s := range c.says {
			assert.Contains(t, notices, s, name)
		}
		for _, s := range c.not {
			assert.NotContains(t, notices, s, name)
		}
		experts := 0
		for _, w := range openedCheckpoint(t, out).Weights {
			if w.Role.Kind == models.Expert && w.Decoder != nil && w.Decoder.Spec().Type == c.o.Quantize {
				experts++
			}
		}
		assert.Equal(t, c.experts, experts, name)
	}
}
