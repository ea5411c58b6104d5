package lorakit_test

import (
	"bytes"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// calibrated are checkpoints whose programs quantise activations and caches too, made of the tiny Llama: how it is
// quantised, what is changed in config.json so that it says so, and what then stands beside the weights.
var calibrated = map[string]struct {
	quantize string
	config   [2]string
	beside   []string
}{
	"compressed-tensors": {"fp8-channel", [2]string{`"dynamic": true`, `"dynamic": false`}, []string{
		"model.layers.0.self_attn.k_proj.input_scale", "model.layers.0.self_attn.k_proj.input_zero_point",
		"model.layers.1.mlp.down_proj.input_global_scale", "model.layers.0.self_attn.k_proj.output_scale",
		"model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale", "lm_head.input_scale"}},
	"fp8": {"fp8", [2]string{`"activation_scheme": "dynamic"`, `"activation_scheme": "static"`}, []string{
		"model.layers.0.self_attn.k_proj.activation_scale", "model.layers.0.mlp.up_proj.input_scale",
		"model.layers.0.self_attn.k_proj.k_scale", "model.layers.0.self_attn.kv_scale"}},
	"modelopt": {"", [2]string{}, []string{
		"model.layers.0.self_attn.k_proj.input_scale", "model.layers.0.self_attn.k_proj.k_scale",
		"model.layers.0.self_attn.v_proj.v_scale", "model.layers.0.self_attn.v_proj.v_bias"}},
}

// decoys have such names, and are something else.
var decoys = map[string]tensor.Shape{
	"model.layers.0.self_attn.q_scale": {4}, "model.other.k_scale": {1}, "model.layers.0.input_scale_of": {1},
	"model.norm.v_bias": {4},
}

// calibratedBase writes such a checkpoint.
func calibratedBase(t *testing.T, scheme, dir string, others map[string]tensor.Shape) {
	t.Helper()
	x := calibrated[scheme]
	plain := filepath.Join(baseOf("llama"), "model.safetensors")
	config, err := os.ReadFile(filepath.Join(baseOf("llama"), "config.json"))
	require.NoError(t, err)
	tensors := load(t, plain)
	if x.quantize != "" {
		quantised := filepath.Join(t.TempDir(), "quantised")
		_, err := lorakit.Convert(t.Context(), baseOf("llama"), quantised, lorakit.ConvertOptions{Quantize: x.quantize})
		require.NoError(t, err)
		tensors = load(t, quantised)
		config, err = os.ReadFile(filepath.Join(quantised, "config.json"))
		require.NoError(t, err)
		require.Contains(t, string(config), x.config[0])
		config = []byte(strings.Replace(string(config), x.config[0], x.config[1], 1))
	} else {
		config = []byte(strings.Replace(string(config), "{", `{"quantization_config": {"quant_method": "modelopt", `+
			`"quant_algo": "FP8", "ignore": ["lm_head"], "kv_cache_scheme": {"dynamic": false, "num_bits": 8}},`, 1))
		r := rand.New(rand.NewPCG(1, 2))
		for name, e := range maps.Clone(tensors) {
			if !strings.HasSuffix(name, "_proj.weight") {
				continue
			}
			codes := make([]byte, len(e.data)/int(e.DType.Bits()/8))
			for i := range codes {
				codes[i] = byte(r.IntN(0x7f)) | byte(r.IntN(2))<<7
			}
			tensors[name] = entry{tensor.Info{Name: name, DType: tensor.F8E4M3, Shape: e.Shape}, codes}
			tensors[name+"_scale"] = floats([]float32{0.01})
		}
	}
	for _, name := range x.beside {
		tensors[name] = floats([]float32{2}, 1)
	}
	for name, shape := range others {
		n, err := shape.Count()
		require.NoError(t, err)
		tensors[name] = floats(make([]float32, n), shape...)
	}
	require.NoError(t, os.Mkdir(dir, 0o777))
	writeTensors(t, filepath.Join(dir, "model.safetensors"), tensors)
	for name, b := range map[string][]byte{
		"config.json": config, "hf_quant_config.json": []byte("{}"), "quantize_config.json": []byte("{}"), "LICENSE": nil,
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), b, 0o666))
	}
}

// TestCalibration: the scales of activations and caches go where the weights leave their scheme, with the files that
// say the same as quantization_config, and stay where these stay.
func TestCalibration(t *testing.T) {
	t.Parallel()
	for scheme, x := range calibrated {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := func(name string) string { return filepath.Join(dir, name) }
			decoys := maps.Clone(decoys)
			if scheme == "modelopt" { // whose config declares the cache, so that names decide
				delete(decoys, "model.layers.0.self_attn.q_scale")
				delete(decoys, "model.other.k_scale")
			}
			calibratedBase(t, scheme, path("base"), decoys)
			want := slices.Concat(names(load(t, baseOf("llama"))), slices.Sorted(maps.Keys(decoys)))
			slices.Sort(want)

			_, err := lorakit.Convert(t.Context(), path("base"), path("kept"), lorakit.ConvertOptions{})
			require.NoError(t, err)
			require.Equal(t, load(t, path("base")), load(t, path("kept")))
			for _, name := range []string{"config.json", "hf_quant_config.json", "quantize_config.json", "LICENSE"} {
				require.Equal(t, read(t, filepath.Join(path("base"), name)), read(t, filepath.Join(path("kept"), name)))
			}
			_, err = lorakit.Convert(t.Context(), path("base"), path("cast"), lorakit.ConvertOptions{DType: "f16"})
			require.NoError(t, err)
			was, is := load(t, path("base")), load(t, path("cast"))
			for _, name := range x.beside {
				require.Equal(t, was[name], is[name])
			}

			adapters := []lorakit.Adapter{{Path: filepath.Join(adapterFixtures, "llama", "attention")}}
			for what, o := range map[string]lorakit.ConvertOptions{
				"none": {Quantize: "none", DType: "f32"}, "nf4": {Quantize: "nf4"},
				"w8a8": {Quantize: "w8a8", Include: []string{"*"},
					Exclude: append(slices.Collect(maps.Keys(decoys)), "*norm.weight")},
			} {
				r, err := lorakit.Convert(t.Context(), path("base"), path(what), o)
				require.NoError(t, err)
				said := strings.Join(r.Notices, "\n")
				assert.Contains(t, said, "not written, since it is no part of the model but of the scheme that its weights were in")
				assert.Contains(t, said, `how the weights were quantised: "hf_quant_config.json", "quantize_config.json"`)
				assert.FileExists(t, filepath.Join(path(what), "LICENSE"))
				assert.NoFileExists(t, filepath.Join(path(what), "hf_quant_config.json"))
				assert.NoFileExists(t, filepath.Join(path(what), "quantize_config.json"))
				var got []string
				for _, w := range openedCheckpoint(t, path(what)).Weights {
					got = append(got, w.Name)
				}
				slices.Sort(got)
				require.Equal(t, want, got)
			}
			d, err := lorakit.Diff(t.Context(), path("base"), path("none"), lorakit.ReadOptions{})
			require.NoError(t, err)
			assert.Empty(t, d.Missing)
			assert.Zero(t, d.MaxAbs)

			r, err := lorakit.Merge(t.Context(), path("base"), adapters, path("merged"), lorakit.ConvertOptions{MinKept: -1})
			require.NoError(t, err)
			merged, said := load(t, path("merged")), strings.Join(r.Notices, "\n")
			if scheme == "modelopt" { // which is read only
				require.Equal(t, want, names(merged))
				assert.Contains(t, said, "hf_quant_config.json")
				return
			}
			assert.NotContains(t, said, "hf_quant_config.json")
			for _, name := range x.beside {
				require.Equal(t, was[name], merged[name])
			}
		})
	}
}

// TestCalibrationToGGUF: GGUF has no place for them either.
func TestCalibrationToGGUF(t *testing.T) {
	t.Parallel()
	for scheme := range calibrated {
		dir := t.TempDir()
		base, plain := filepath.Join(dir, "a", "base"), filepath.Join(dir, "b", "base")
		require.NoError(t, os.Mkdir(filepath.Dir(base), 0o777))
		calibratedBase(t, scheme, base, nil)
		_, err := lorakit.Convert(t.Context(), base, plain, lorakit.ConvertOptions{Quantize: "none"})
		require.NoError(t, err)
		r, err := lorakit.Convert(t.Context(), base, filepath.Join(dir, "once"), lorakit.ConvertOptions{To: "gguf"})
		require.NoError(t, err)
		assert.Contains(t, strings.Join(r.Notices, "\n"), "hf_quant_config.json")
		_, err = lorakit.Convert(t.Context(), plain, filepath.Join(dir, "twice"), lorakit.ConvertOptions{To: "gguf"})
		require.NoError(t, err)
		sameFolder(t, filepath.Join(dir, "twice"), filepath.Join(dir, "once"))
	}
}

// TestElsewhereInConfig: compressed-tensors had its config under another name before, and models of several parts whose
// text is quantised have it in text_config.
func TestElsewhereInConfig(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	_, err := lorakit.Convert(t.Context(), baseOf("llama"), path("new"), lorakit.ConvertOptions{Quantize: "w8a8"})
	require.NoError(t, err)
	config := read(t, path("new/config.json"))
	var members map[string]jsontext.Value
	require.NoError(t, json.Unmarshal(config, &members))
	nested, err := models.EditConfig(config, models.Remove("quantization_config"),
		models.SetAt("text_config.model_type", []byte(`"llama"`)),
		models.SetAt("text_config.quantization_config", members["quantization_config"]))
	require.NoError(t, err)
	for name, config := range map[string][]byte{
		"older":  bytes.Replace(config, []byte("quantization_config"), []byte("compression_config"), 1),
		"nested": nested,
	} {
		require.NoError(t, os.CopyFS(path(name), os.DirFS(path("new"))))
		require.NoError(t, os.WriteFile(path(name+"/config.json"), config, 0o666))
	}
	for _, quantize := range []string{"none", "nf4", "keep"} {
		for _, src := range []string{"new", "older", "nested"} {
			out := path(src + "-" + quantize)
			_, err := lorakit.Convert(t.Context(), path(src), out, lorakit.ConvertOptions{Quantize: quantize})
			require.NoError(t, err)
			require.Equal(t, load(t, path("new-"+quantize)), load(t, out))
			switch got := string(read(t, filepath.Join(out, "config.json"))); quantize {
			case "none":
				require.NotContains(t, got, "quant")
				require.NotContains(t, got, "compress")
			case "nf4":
				require.NotContains(t, got, "compress")
				require.Equal(t, 1, strings.Count(got, "quantization_config"))
			default:
				require.Equal(t, string(read(t, path(src+"/config.json"))), got)
			}
		}
	}
}

// TestPlainInNoScheme: what no scheme gives a meaning does not become plain, and the output says so.
func TestPlainInNoScheme(t *testing.T) {
	t.Parallel()
	dir := madeFolder(t, `{}`, "model.safetensors", map[string]entry{
		"a": floats([]float32{1}, 1), "b": {tensor.Info{DType: tensor.F8E4M3, Shape: tensor.Shape{2}}, []byte{1, 2}}})
	out := filepath.Join(t.TempDir(), "out")
	r, err := lorakit.Convert(t.Context(), dir, out, lorakit.ConvertOptions{Quantize: "none"})
	require.NoError(t, err)
	require.Equal(t, []string{
		`left in the types that they have, since only a scheme gives these a meaning: "b"`}, r.Notices)
}
