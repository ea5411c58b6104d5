package lorakit_test

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/tensor"
)

// noPlaceInGGUF are the adapters among those that PEFT has merged that a GGUF file has no place for, and what is said
// of them. What ends in / is all of a base.
var noPlaceInGGUF = map[string]string{
	"bert/":                          `found the class "BertForSequenceClassification"`,
	"clip/":                          `found the class "CLIPTextModel"`,
	"llama-score/":                   `found the class "LlamaForSequenceClassification"`,
	"qwen2.5-vl/":                    `found the class "Qwen2_5_VLForConditionalGeneration"`,
	"resnet/":                        `found the class "ResNetForImageClassification"`,
	"wav2vec2/":                      `found the class "Wav2Vec2ForSequenceClassification"`,
	"llama/dora":                     `layers.0.self_attn.k_proj.lora_magnitude_vector": not supported: DoRA`,
	"llama/dora-b":                   `layers.0.mlp.up_proj.lora_magnitude_vector": not supported: DoRA`,
	"llama/dora-embedding":           `embed_tokens.lora_magnitude_vector": not supported: DoRA`,
	"llama/dora-rslora":              `lora_magnitude_vector": not supported: DoRA`,
	"llama/grown":                    `lm_head.weight": not supported: a replaced weight`,
	"llama/grown-kept":               `lm_head.weight": not supported: a replaced weight`,
	"llama/grown-targets":            `for a matrix of 68 x 32, and the base has 64 x 32`,
	"llama/saved-head":               `lm_head.weight": not supported: a replaced weight`,
	"llama/tokens":                   `trainable_tokens_delta": not supported: trained rows of an embedding`,
	"llama/tokens-both":              `trainable_tokens_delta": not supported: trained rows of an embedding`,
	"qwen2/bias-all":                 `self_attn.k_proj.bias": not supported: a trained bias`,
	"qwen2/bias-lora-only":           `self_attn.q_proj.base_layer.bias": not supported: a trained bias`,
	"qwen2/lora-bias":                `self_attn.q_proj.lora_B.bias": not supported: lora_bias`,
	"tiny-gemma3/everywhere":         `found a part of the model that has no place in its GGUF file`,
	"tiny-gpt2/bias-all":             `attn.c_attn.base_layer.bias": not supported: a trained bias`,
	"tiny-gpt2/dora":                 `lora_magnitude_vector": not supported: DoRA`,
	"tiny-gpt2/lora-bias":            `attn.c_attn.lora_B.bias": not supported: lora_bias`,
	"tiny-gpt2/positions":            `wpe.lora_embedding_A": not supported: an adapter of the embedding position_embd.weight`,
	"tiny-qwen3/dora":                `lora_magnitude_vector": not supported: DoRA`,
	"tiny-qwen3/tied-both":           `lm_head.lora_A.weight": found an adapter of the output head, and the base has none`,
	"tiny-qwen3/tied-both-ensured":   `lm_head.lora_A.weight": found an adapter of the output head, and the base has none`,
	"tiny-qwen3/tied-embedding-dora": `embed_tokens.lora_magnitude_vector": not supported: DoRA`,
	"tiny-qwen3/tied-embedding-ensured": `lm_head.lora_A.weight": found an adapter of the output head, and the base has ` +
		`none`,
	"tiny-qwen3/tied-head":          `lm_head.lora_A.weight": found an adapter of the output head, and the base has none`,
	"tiny-qwen3/tied-saved-ensured": `lm_head.weight": not supported: a replaced weight`,
	"tiny-qwen3/tied-saved-head":    `lm_head.weight": not supported: a replaced weight`,
	"tiny-qwen3/tied-tokens":        `trainable_tokens_delta": not supported: trained rows of an embedding`,
	"tiny-qwen3/tied-tokens-apart":  `trainable_tokens_delta": not supported: trained rows of an embedding`,
}

// TestGGUFMergesAsPEFT writes adapters as GGUF and merges those, and folders that are made of them: the result is what
// PEFT has merged of the adapters themselves. Names, heads in pairs, experts in stacks, ranks and scalings by patterns,
// and rsLoRA all show in it.
func TestGGUFMergesAsPEFT(t *testing.T) {
	t.Parallel()
	merged := 0
	all := peftMerges(t)
	for name, m := range all {
		dir := t.TempDir()
		refused := 0
		back := m // what is made of the GGUF files
		back.adapters = slices.Clone(m.adapters)
		for i, a := range m.adapters {
			weight := a.Weight
			a.Weight = 1
			out := filepath.Join(dir, fmt.Sprintf("%d.gguf", i))
			_, err := lorakit.ConvertAdapter(t.Context(), a, out, lorakit.AdapterOptions{Base: baseOf(m.base)})
			of, _ := strings.CutPrefix(a.Path, adapterFixtures+"/")
			base, _, _ := strings.Cut(of, "/")
			says := noPlaceInGGUF[of] + noPlaceInGGUF[base+"/"]
			if says != "" {
				require.ErrorContains(t, err, says, of)
				refused++
				continue
			}
			require.NoError(t, err, of)
			folder := strings.TrimSuffix(out, ".gguf")
			r, err := lorakit.ConvertAdapter(t.Context(), lorakit.Adapter{Path: out}, folder,
				lorakit.AdapterOptions{Base: baseOf(m.base)})
			require.NoError(t, err, of)
			require.Equal(t, "peft", r.To)
			m.adapters[i], back.adapters[i] = lorakit.Adapter{Path: out, Weight: weight},
				lorakit.Adapter{Path: folder, Weight: weight}
		}
		if refused > 0 {
			continue
		}
		merged++
		for _, dtype := range m.dtypes {
			t.Run(name+"/"+dtype, func(t *testing.T) {
				t.Parallel()
				o := lorakit.ConvertOptions{DType: dtype}
				if strings.HasSuffix(m.base, "-nf4") {
					o.Quantize = "none"
				}
				asPEFT(t, m, dtype, t.TempDir(), o)
				asPEFT(t, back, dtype, t.TempDir(), o)
			})
		}
	}
	require.Greater(t, merged, 50)
}

const ggufAdapters = "fixtures/gguf-adapters"

// convertedAdapter is what llama.cpp's converter makes of an adapter in one type.
type convertedAdapter struct {
	Keys    map[string][2]any `json:"keys"`
	Tensors map[string][3]any `json:"tensors"`
}

// convertedAdapters are those of all fixtures, by type, with the base under "base".
func convertedAdapters(t *testing.T) map[string]map[string]json.RawMessage {
	t.Helper()
	f, err := os.Open(filepath.Join(ggufAdapters, "expected.json.gz"))
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	var all map[string]map[string]json.RawMessage
	require.NoError(t, json.NewDecoder(z).Decode(&all))
	require.Len(t, all, 19)
	return all
}

// TestGGUFAdaptersAsConverted holds files against those of llama.cpp's converter: the keys with their types, names,
// types, shapes and bytes of tensors. The base's config.json alone gives the same file as the base, and the way back
// gives the adapter again, to the bit.
func TestGGUFAdaptersAsConverted(t *testing.T) {
	t.Parallel()
	for name, kinds := range convertedAdapters(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var model string
			require.NoError(t, json.Unmarshal(kinds["base"], &model))
			base := filepath.Join("fixtures/gguf-models", model)
			src := lorakit.Adapter{Path: filepath.Join(ggufAdapters, name)}
			dir := t.TempDir()
			for _, kind := range []string{"f32", "f16", "bf16", "q8_0"} {
				o := lorakit.AdapterOptions{Base: base, DType: kind}
				if kind == "q8_0" {
					o.DType, o.Quantize = "", kind
				}
				out := filepath.Join(dir, kind+".gguf")
				_, err := lorakit.ConvertAdapter(t.Context(), src, out, o)
				require.NoError(t, err, kind)
				var want convertedAdapter
				require.NoError(t, json.Unmarshal(kinds[kind], &want))
				asConverted(t, want, out)
			}
			first := read(t, filepath.Join(dir, "f32.gguf"))

			config := filepath.Join(dir, "config")
			require.NoError(t, os.Mkdir(config, 0o755))
			require.NoError(t, os.Link(filepath.Join(base, "config.json"), filepath.Join(config, "config.json")))
			out := filepath.Join(dir, "again.gguf")
			_, err := lorakit.ConvertAdapter(t.Context(), src, out, lorakit.AdapterOptions{Base: config})
			require.NoError(t, err)
			require.Equal(t, first, read(t, out), "with the config alone")

			for _, b := range []string{base, config} {
				back := filepath.Join(dir, "back-"+filepath.Base(b))
				_, err = lorakit.ConvertAdapter(t.Context(), lorakit.Adapter{Path: filepath.Join(dir, "f32.gguf")}, back,
					lorakit.AdapterOptions{Base: b})
				require.NoError(t, err)
				backAgain(t, src.Path, back, b)
			}
		})
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

// asConverted holds a GGUF file against what the converter has written.
func asConverted(t *testing.T, want convertedAdapter, path string) {
	t.Helper()
	c := opened(t, path)
	keys := map[string]any{}
	for _, p := range c.Metadata() {
		keys[p.Name] = p.Value
	}
	for name, k := range want.Keys {
		require.Contains(t, keys, name)
		types := fmt.Sprint(k[0])
		require.Equal(t, map[string]string{"[string]": "string", "[float32]": "float32", "[uint32]": "uint32",
			"[array uint32]": "[]uint32"}[types], fmt.Sprintf("%T", keys[name]), name)
		require.Equal(t, fmt.Sprint(k[1]), fmt.Sprint(keys[name]), name)
		delete(keys, name)
	}
	require.Empty(t, keys)
	got := load(t, path)
	require.Len(t, got, len(want.Tensors))
	for name, w := range want.Tensors {
		g, ok := got[name]
		require.True(t, ok, name)
		var shape []any
		for _, d := range slices.Backward(g.Shape) {
			shape = append(shape, float64(d))
		}
		require.Equal(t, strings.ToLower(w[0].(string)), strings.ToLower(g.Type()), name)
		require.Equal(t, w[1], any(shape), name)
		require.Equal(t, w[2], fmt.Sprintf("%x", sha256.Sum256(g.data)), name)
	}
}

// backAgain holds a PEFT folder that was made of a GGUF file against the one that this was made of.
func backAgain(t *testing.T, want, got, base string) {
	t.Helper()
	x, y := load(t, filepath.Join(want, adapterFile)), load(t, filepath.Join(got, adapterFile))
	for name := range x {
		if strings.HasSuffix(name, ".base_layer.weight") {
			delete(x, name)
		}
	}
	require.Equal(t, x, y)
	var before, after map[string]any
	require.NoError(t, json.Unmarshal(read(t, filepath.Join(want, "adapter_config.json")), &before))
	require.NoError(t, json.Unmarshal(read(t, filepath.Join(got, "adapter_config.json")), &after))
	require.Equal(t, base, after["base_model_name_or_path"])
	require.Equal(t, before["lora_alpha"], after["lora_alpha"])
	require.Equal(t, before["alora_invocation_tokens"], after["alora_invocation_tokens"])
	require.Equal(t, map[string]any{}, after["alpha_pattern"])
	if before["rank_pattern"] == nil {
		require.Equal(t, before["r"], after["r"])
		require.Equal(t, map[string]any{}, after["rank_pattern"])
	}
}

// adapterFile is the file of a PEFT folder's tensors.
const adapterFile = "adapter_model.safetensors"

// TestGGUFExpertsByTurns writes an adapter of gpt-oss, whose experts lie the other way round and have gate and up by
// turns: the products of the file's factors are what PEFT adds.
func TestGGUFExpertsByTurns(t *testing.T) {
	t.Parallel()
	src, out := filepath.Join(ggufAdapters, "gptoss-experts"), filepath.Join(t.TempDir(), "a.gguf")
	base := "fixtures/gguf-models/gptoss"
	_, err := lorakit.ConvertAdapter(t.Context(), lorakit.Adapter{Path: src}, out, lorakit.AdapterOptions{Base: base})
	require.NoError(t, err)
	got, want := load(t, out), load(t, src+".delta.safetensors")
	floats := func(e entry) []float32 {
		v := make([]float32, e.Count())
		require.NoError(t, tensor.ToFloats(v, e.data, e.DType))
		return v
	}
	for name, place := range map[string]struct {
		parameter   string
		first, step int64 // of the columns of the parameter
	}{"gate": {"gate_up_proj", 0, 2}, "up": {"gate_up_proj", 1, 2}, "down": {"down_proj", 0, 1}} {
		a, b := got["blk.1.ffn_"+name+"_exps.weight.lora_a"], got["blk.1.ffn_"+name+"_exps.weight.lora_b"]
		x, y := floats(a), floats(b)
		d := want["model.layers.1.mlp.experts."+place.parameter]
		delta, width := floats(d), d.Shape[2]
		experts, r, in, rows := a.Shape[0], a.Shape[1], a.Shape[2], b.Shape[1]
		require.Equal(t, []int64{experts, in, rows * place.step}, []int64(d.Shape), name)
		for e := range experts {
			for i := range rows {
				for j := range in {
					sum := 0.0
					for k := range r {
						sum += float64(y[(e*rows+i)*r+k]) * float64(x[(e*r+k)*in+j]) * 8 / float64(r)
					}
					require.InDelta(t, delta[(e*in+j)*width+place.first+i*place.step], sum, 1e-6, name)
				}
			}
		}
	}
	_, err = lorakit.ConvertAdapter(t.Context(), lorakit.Adapter{Path: out}, filepath.Join(t.TempDir(), "back"),
		lorakit.AdapterOptions{Base: base})
	require.ErrorContains(t, err, "gate and up in turns")
}
