package pipeline_test

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/pipeline"
	_ "github.com/lorakit/lorakit/quant/compressedtensors"
	_ "github.com/lorakit/lorakit/quant/fp8"
	_ "github.com/lorakit/lorakit/quant/mlx"
	"github.com/lorakit/lorakit/tensor"
)

// writeMixtral writes a layer of two experts with a tensor each, by the names that Mixtral's files have.
func writeMixtral(t *testing.T, dir string) {
	t.Helper()
	r := rand.New(rand.NewPCG(3, 4))
	var all []stored
	for _, name := range []string{"model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj",
		"model.layers.0.block_sparse_moe.experts.0.w1", "model.layers.0.block_sparse_moe.experts.0.w2",
		"model.layers.0.block_sparse_moe.experts.0.w3", "model.layers.0.block_sparse_moe.experts.1.w1",
		"model.layers.0.block_sparse_moe.experts.1.w2", "model.layers.0.block_sparse_moe.experts.1.w3"} {
		all = append(all, stored{name + ".weight", tensor.BF16, tensor.Shape{128, 128}, bf16(r)})
	}
	require.NoError(t, os.Mkdir(dir, 0o777))
	writeFile(t, filepath.Join(dir, "model.safetensors"), all...)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"),
		[]byte(`{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}`), 0o666))
}

// TestExpertsAreForLoaders tells who loads experts beside each kind of weights, as make interop has seen it.
func TestExpertsAreForLoaders(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeMixtral(t, src)
	said := func(o pipeline.Options) string {
		c, err := checkpoint.Open(context.Background(), src)
		require.NoError(t, err)
		defer c.Close()
		p, err := pipeline.NewPlan(context.Background(), pipeline.Plain(c), "dst", o)
		require.NoError(t, err)
		return strings.Join(p.Notices, "\n")
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
		o := pipeline.Options{Quantize: typ}
		if strings.HasSuffix(typ, "f4") || typ == "fp4" {
			o.Params = block64
		}
		assert.Contains(t, said(o), want[0], typ)
		o.PerExpert = true
		assert.Contains(t, said(o), "experts: 6 tensors in "+typ+", one tensor an expert, "+want[1], typ)
	}
	head := pipeline.Options{Include: []string{"lm_head.weight", "*.q_proj.weight"}}
	head.Quantize = "mlx4" // of which mlx-lm quantises all that it can
	assert.NotContains(t, said(head), "would not")
	head.Quantize = "fp8-channel"
	assert.Contains(t, said(head), `quantised, though transformers would not: "lm_head.weight"`)
}

// TestPlainExpertsAreListed names plain experts to loaders that take them for quantised otherwise, and only to those.
func TestPlainExpertsAreListed(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeMixtral(t, src)
	for _, c := range []struct {
		typ    string
		o      pipeline.Options
		member string
		want   []string
	}{
		{"fp8", pipeline.Options{}, "modules_to_not_convert",
			[]string{"lm_head", "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts"}},
		{"fp8", pipeline.Options{PerExpert: true}, "modules_to_not_convert", nil},
		{"nf4", pipeline.Options{Params: block64}, "llm_int8_skip_modules", nil},
	} {
		dst := filepath.Join(t.TempDir(), "dst")
		c.o.Quantize = c.typ
		_, err := convert(context.Background(), src, dst, c.o, pipeline.RunOptions{})
		require.NoError(t, err)
		b, err := os.ReadFile(filepath.Join(dst, "config.json"))
		require.NoError(t, err)
		var config struct {
			Quantization map[string]any `json:"quantization_config"`
		}
		require.NoError(t, json.Unmarshal(b, &config))
		var got []string
		if list, ok := config.Quantization[c.member].([]any); ok {
			for _, name := range list {
				got = append(got, name.(string))
			}
		}
		assert.Equal(t, c.want, got, "%s, per expert %v", c.typ, c.o.PerExpert)
	}
}
