package lorakit_test

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// writeMixtral writes a layer of two experts with a tensor each, by the names that Mixtral's files have.
func writeMixtral(t *testing.T, dir string) {
	t.Helper()
	r := rand.New(rand.NewPCG(3, 4))
	const layer = "model.layers.0."
	names := []string{"model.embed_tokens", "lm_head", layer + "self_attn.q_proj"}
	for _, expert := range []string{"0.", "1."} {
		for _, w := range []string{"w1", "w2", "w3"} {
			names = append(names, layer+"block_sparse_moe.experts."+expert+w)
		}
	}
	tensors := map[string]entry{}
	for _, name := range names {
		x := make([]float32, 128*128)
		for i := range x {
			x[i] = float32(r.NormFloat64())
		}
		tensors[name+".weight"] = floats(x, 128, 128)
	}
	require.NoError(t, os.Mkdir(dir, 0o777))
	writeTensors(t, filepath.Join(dir, "model.safetensors"), tensors)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"),
		[]byte(`{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}`), 0o666))
}

// TestExpertsAreForLoaders tells who loads experts beside each type of weights, as make interop has seen it.
func TestExpertsAreForLoaders(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	writeMixtral(t, src)
	said := func(o lorakit.ConvertOptions) string {
		o.DryRun = true
		r, err := lorakit.Convert(t.Context(), src, filepath.Join(dir, "dst"), o)
		require.NoError(t, err, o.Quantize)
		return strings.Join(r.Notices, "\n")
	}
	const (
		loaded  = "experts: 6 tensors not quantised, as transformers loads them; per-expert quantises them"
		refused = "experts: 6 tensors not quantised, which transformers does not load beside "
	)
	for typ, want := range map[string][2]string{
		"nf4":         {loaded, "for vLLM and unsloth, and not for transformers"},
		"fp4":         {loaded, "which no program that is known reads"},
		"fp8":         {loaded, "for vLLM and transformers"},
		"fp8-channel": {loaded, "for vLLM and transformers"},
		"fp8-tensor":  {loaded, "for vLLM and transformers"},
		"fp8-block":   {loaded, "for vLLM, and not for transformers"},
		"fp8-group":   {loaded, "for vLLM, and not for transformers"},
		"mxfp8":       {loaded, "for vLLM, and not for transformers"},
		"w4a16":       {refused + "w4a16", "for vLLM and transformers"},
		"mxfp4":       {refused + "mxfp4", "for vLLM and transformers"},
		"w8a8":        {refused + "w8a8", "for vLLM, and not for transformers"},
		"nvfp4":       {refused + "nvfp4", "for vLLM, and not for transformers"},
		"mlx4":        {"experts: 6 tensors not quantised; per-expert quantises them, for mlx-lm", "for mlx-lm"},
	} {
		assert.Contains(t, said(lorakit.ConvertOptions{Quantize: typ}), want[0])
		assert.Contains(t, said(lorakit.ConvertOptions{Quantize: typ, PerExpert: true}),
			"experts: 6 tensors in "+typ+", one tensor an expert, "+want[1])
	}
	// Of several types the one that is not loaded decides.
	for _, c := range []struct {
		typ, rule, other string
		perExpert        bool
		want             string
	}{
		{"w8a16", "*.experts.1.*", "w4a16", true, "w8a16 and w4a16, one tensor an expert, for vLLM and transformers"},
		{"fp8-channel", "*.experts.1.*", "nvfp4", true,
			"fp8-channel and nvfp4, one tensor an expert, for vLLM, and not for transformers"},
		{"w8a8", "*.experts.*", "fp8-channel", true, "fp8-channel, one tensor an expert, for vLLM and transformers"},
		{"fp8-channel", "*.q_proj.weight", "nvfp4", false, refused + "nvfp4"},
		{"nvfp4", "*.q_proj.weight", "fp8-channel", false, loaded},
	} {
		o := lorakit.ConvertOptions{Quantize: c.typ, PerExpert: c.perExpert,
			Rules: []lorakit.Rule{{Glob: c.rule, Type: c.other}}}
		assert.Contains(t, said(o), c.want)
	}

	head := lorakit.ConvertOptions{Quantize: "mlx4", Include: []string{"lm_head.weight", "*.q_proj.weight"}}
	assert.NotContains(t, said(head), "would not") // mlx-lm quantises heads and embeddings by itself
	head.Quantize = "fp8-channel"
	assert.Contains(t, said(head), `quantised, though transformers would not: "lm_head.weight"`)
}

// TestPlainExpertsAreListed names plain experts to loaders that take them for quantised otherwise, and to no others.
func TestPlainExpertsAreListed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	writeMixtral(t, src)
	for name, c := range map[string]struct {
		o      lorakit.ConvertOptions
		member string
		want   any
	}{
		"fp8": {lorakit.ConvertOptions{Quantize: "fp8"}, "modules_to_not_convert",
			[]any{"lm_head", "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts"}},
		"per expert": {lorakit.ConvertOptions{Quantize: "fp8", PerExpert: true}, "modules_to_not_convert", nil},
		"nf4":        {lorakit.ConvertOptions{Quantize: "nf4"}, "llm_int8_skip_modules", nil},
	} {
		dst := filepath.Join(dir, name)
		_, err := lorakit.Convert(t.Context(), src, dst, c.o)
		require.NoError(t, err)
		config := readConfig(t, dst)["quantization_config"].(map[string]any)
		require.Contains(t, config, c.member)
		assert.Equal(t, c.want, config[c.member], name)
		again, err := lorakit.Verify(t.Context(), dst, lorakit.ReadOptions{})
		require.NoError(t, err)
		assert.Empty(t, again.Problems)
	}
	// As transformers reads it, a folder without the list has scales of its experts.
	path := filepath.Join(dir, "fp8", "config.json")
	config := readConfig(t, filepath.Dir(path))
	config["quantization_config"].(map[string]any)["modules_to_not_convert"] = nil
	b, err := json.Marshal(config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, b, 0o666))
	v, err := lorakit.Verify(t.Context(), filepath.Dir(path), lorakit.ReadOptions{})
	require.NoError(t, err)
	require.Len(t, v.Problems, 6)
	assert.Contains(t, v.Problems[0].What, "expected quantised")
}

// TestKeptBesideRules holds config.json against weights that stay quantised, and that transformers would not have
// quantised by itself, where a rule quantises others.
func TestKeptBesideRules(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	writeMixtral(t, src)
	for typ, before := range map[string]lorakit.ConvertOptions{
		"fp8":         {PerExpert: true, Exclude: []string{"*q_proj*"}},
		"fp8-channel": {PerExpert: true, Exclude: []string{"*q_proj*"}},
		"nf4":         {Include: []string{"lm_head.weight"}},
		"mlx4":        {Include: []string{"lm_head.weight"}},
	} {
		some, all := filepath.Join(dir, typ+"-some"), filepath.Join(dir, typ+"-all")
		before.Quantize = typ
		_, err := lorakit.Convert(t.Context(), src, some, before)
		require.NoError(t, err, typ)
		r, err := lorakit.Convert(t.Context(), some, all, lorakit.ConvertOptions{
			Rules: []lorakit.Rule{{Glob: "*q_proj*", Type: typ}}})
		require.NoError(t, err, typ)
		if before.PerExpert {
			assert.Contains(t, strings.Join(r.Notices, "\n"), "experts: 6 tensors in "+typ+", ")
		}
		again, err := lorakit.Verify(t.Context(), all, lorakit.ReadOptions{})
		require.NoError(t, err, typ)
		assert.Empty(t, again.Problems, typ)
	}
}
