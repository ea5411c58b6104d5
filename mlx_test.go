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
	"github.com/lorakit/lorakit/tensor"
)

// mlxModel is what mlx-lm has made: most in 4 bits, some modules in other bits, groups and modes, one plain.
var mlxModel = filepath.Join("fixtures", "mlx", "tiny-qwen3-moe")

func readConfig(t *testing.T, dir string) map[string]any {
	b, err := os.ReadFile(filepath.Join(dir, "config.json"))
	require.NoError(t, err)
	var config map[string]any
	require.NoError(t, json.Unmarshal(b, &config))
	return config
}

// TestMLXIsRead: the numbers of MLX, of a folder that promises no quantisation any more; as they are stored a copy, and
// no problem for verify.
func TestMLXIsRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	plain, kept := filepath.Join(dir, "plain"), filepath.Join(dir, "kept")
	_, err := lorakit.Convert(t.Context(), mlxModel, plain, lorakit.ConvertOptions{Quantize: "none"})
	require.NoError(t, err)
	want, got := load(t, filepath.Join("fixtures", "mlx", "decoded.safetensors")), load(t, plain)
	require.Len(t, got, len(want))
	for name, w := range want {
		require.Equal(t, w, got[name], name)
	}
	config := readConfig(t, plain)
	assert.NotContains(t, config, "quantization")
	assert.NotContains(t, config, "quantization_config")

	_, err = lorakit.Convert(t.Context(), mlxModel, kept, lorakit.ConvertOptions{})
	require.NoError(t, err)
	assert.Equal(t, load(t, mlxModel), load(t, kept))
	assert.Equal(t, readConfig(t, mlxModel), readConfig(t, kept))
	v, err := lorakit.Verify(t.Context(), mlxModel, lorakit.ReadOptions{})
	require.NoError(t, err)
	assert.Empty(t, v.Problems)
	d, err := lorakit.Diff(t.Context(), plain, mlxModel, lorakit.ReadOptions{})
	require.NoError(t, err)
	assert.Zero(t, d.MaxAbs)
	assert.Empty(t, append(d.Missing, d.Extra...))
}

// TestMLXIsWritten: both members of config.json, in place of what another scheme or MLX had there.
func TestMLXIsWritten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	eight, nf4, back := filepath.Join(dir, "8"), filepath.Join(dir, "nf4"), filepath.Join(dir, "back")
	only := []string{"*_proj.weight"}
	_, err := lorakit.Convert(t.Context(), mlxModel, eight, lorakit.ConvertOptions{Quantize: "mlx8", BlockSize: 32,
		Include: only})
	require.NoError(t, err)
	is := map[string]any{"group_size": 32.0, "bits": 8.0, "mode": "affine"}
	assert.Equal(t, is, readConfig(t, eight)["quantization"])
	assert.Equal(t, is, readConfig(t, eight)["quantization_config"])
	_, err = lorakit.Convert(t.Context(), eight, nf4, lorakit.ConvertOptions{Quantize: "nf4",
		Include: []string{"*.o_proj.weight"}})
	require.NoError(t, err)
	assert.NotContains(t, readConfig(t, nf4), "quantization")
	assert.Equal(t, "bitsandbytes", readConfig(t, nf4)["quantization_config"].(map[string]any)["quant_method"])
	_, err = lorakit.Convert(t.Context(), nf4, back, lorakit.ConvertOptions{Quantize: "mlx-mxfp8", Include: only})
	require.NoError(t, err)
	is = map[string]any{"group_size": 32.0, "bits": 8.0, "mode": "mxfp8"}
	assert.Equal(t, is, readConfig(t, back)["quantization"])
	assert.Equal(t, is, readConfig(t, back)["quantization_config"])

	_, err = lorakit.Convert(t.Context(), mlxModel, filepath.Join(dir, "no"), lorakit.ConvertOptions{Quantize: "mlx4",
		BlockSize: 48})
	require.ErrorContains(t, err, "block size 48, expected 32, 64 or 128 for mlx4")
	_, err = lorakit.Convert(t.Context(), mlxModel, filepath.Join(dir, "no"), lorakit.ConvertOptions{Quantize: "mlx1",
		Include: only})
	require.ErrorContains(t, err, "the type is read only")
}

// TestMLXIsMerged: each weight goes through the plain one and back into what it was stored in, and all others keep
// their bytes; whatever the threads.
func TestMLXIsMerged(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	adapter := filepath.Join(dir, "adapter")
	require.NoError(t, os.Mkdir(adapter, 0o777))
	require.NoError(t, os.WriteFile(filepath.Join(adapter, "adapter_config.json"),
		[]byte(`{"peft_type": "LORA", "r": 4, "lora_alpha": 8}`), 0o666))
	modules := map[string]string{ // of the fixture, and what each is stored in
		"model.layers.0.self_attn.q_proj": "mlx4", "model.layers.0.self_attn.v_proj": "mlx3",
		"model.layers.0.mlp.down_proj": "mlx6", "model.layers.1.self_attn.o_proj": "mlx-mxfp8",
		"model.layers.0.self_attn.o_proj": "mlx-nvfp4",
	}
	r := rand.New(rand.NewPCG(5, 6))
	random := func(rows, cols int64) entry {
		x := make([]float32, rows*cols)
		for i := range x {
			x[i] = float32(r.NormFloat64()) / 4
		}
		return floats(x, rows, cols)
	}
	base := load(t, filepath.Join("fixtures", "mlx", "decoded.safetensors"))
	tensors := map[string]entry{}
	for module := range modules {
		shape := base[module+".weight"].Shape
		tensors["base_model.model."+module+".lora_A.weight"] = random(4, shape[1])
		tensors["base_model.model."+module+".lora_B.weight"] = random(shape[0], 4)
	}
	writeTensors(t, filepath.Join(adapter, "adapter_model.safetensors"), tensors)
	merge := func(base, name string, o lorakit.ConvertOptions) string {
		out := filepath.Join(dir, name)
		o.Merge = []lorakit.Adapter{{Path: adapter}}
		_, err := lorakit.Convert(t.Context(), base, out, o)
		require.NoError(t, err)
		return out
	}
	merged := merge(mlxModel, "merged", lorakit.ConvertOptions{})
	sameFolder(t, merged, merge(mlxModel, "one", lorakit.ConvertOptions{Threads: 1}))
	assert.Equal(t, readConfig(t, mlxModel), readConfig(t, merged))

	plain := merge(mlxModel, "plain", lorakit.ConvertOptions{Quantize: "none"})
	was, got := load(t, mlxModel), load(t, merged)
	for module, typ := range modules {
		o := lorakit.ConvertOptions{Quantize: typ, Include: []string{module + ".weight"}}
		if typ == "mlx6" {
			o.BlockSize = 32
		}
		out := filepath.Join(dir, module)
		_, err := lorakit.Convert(t.Context(), plain, out, o)
		require.NoError(t, err)
		want := load(t, out)
		for _, part := range []string{".weight", ".scales", ".biases"} {
			require.Equal(t, want[module+part], got[module+part], "%s in %s", module+part, typ)
			if part == ".weight" {
				require.NotEqual(t, was[module+part], got[module+part])
			}
		}
	}
	for name, w := range was {
		if module := name[:strings.LastIndexByte(name, '.')]; modules[module] == "" {
			require.Equal(t, w, got[name], name)
		}
	}
	require.Equal(t, tensor.U32, got["model.layers.0.self_attn.v_proj.weight"].DType)
}

// TestForeignMLX: a mode that is not known is named, and what stands in the file is kept.
func TestForeignMLX(t *testing.T) {
	t.Parallel()
	words := entry{tensor.Info{DType: tensor.U32, Shape: tensor.Shape{4, 4}}, make([]byte, 64)}
	src := madeFolder(t, `{"architectures": ["LlamaForCausalLM"], "model_type": "llama", `+
		`"quantization": {"group_size": 32, "bits": 4, "mode": "fp3"}}`, "model.safetensors",
		map[string]entry{"model.layers.0.self_attn.q_proj.weight": words})
	out := filepath.Join(t.TempDir(), "out")
	_, err := lorakit.Convert(t.Context(), src, out, lorakit.ConvertOptions{Quantize: "none"})
	require.ErrorContains(t, err, `stored as MLX's "fp3" quantisation of 4 bits, expected plain ones or a scheme that can be `+
		`read: `)
	_, err = lorakit.Convert(t.Context(), src, out, lorakit.ConvertOptions{})
	require.NoError(t, err)
}
