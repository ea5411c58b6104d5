package lorakit_test

import (
	"encoding/binary"
	"encoding/json"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// madeAdapter is an adapter of random numbers for a model of llama.cpp's.
type madeAdapter struct {
	kind   string
	target string
	config map[string]any
	dora   bool
	stacks bool     // experts of gpt-oss have parts
	saved  []string // modules that are replaced
}

// madeAdapters are the kinds that a model can have.
func madeAdapters(t *testing.T, base string) []madeAdapter {
	t.Helper()
	tensors := load(t, filepath.Join(ggufModels, base))
	norm, head, embedding := "model.norm", "lm_head", "embed_tokens"
	linears := "all-linear"
	switch base {
	case "mixtral", "qwen3moe", "deepseek3":
		linears = "attention"
	case "gpt2":
		norm, embedding = "transformer.ln_f", "wte"
	case "bert":
		norm, embedding = "encoder.layer.1.output.LayerNorm", "word_embeddings"
		linears = "query,key,value,attention.output.dense,intermediate.dense"
	case "gemma3vl":
		norm, linears = "model.language_model.norm", `model\.language_model\..*_proj`
	}
	list := []madeAdapter{
		{kind: "plain", target: linears, config: map[string]any{"alpha_pattern": map[string]any{`.*\.1\..*`: 5}}},
		{kind: "rslora", target: linears, config: map[string]any{"use_rslora": true}},
		{kind: "dora", dora: true, target: linears, config: map[string]any{"use_dora": true}},
		{kind: "norm", target: linears, saved: []string{norm}},
	}
	if base != "cohere2" && base != "gemma2" { // in which the head stays what the embedding is
		list = append(list, madeAdapter{kind: "embedding", target: embedding})
	}
	if _, ok := tensors[head+".weight"]; ok {
		list = append(list, madeAdapter{kind: "head", target: linears, saved: []string{head}})
	}
	switch base {
	case "gptoss":
		list = append(list, madeAdapter{kind: "experts", target: "attention", stacks: true, config: map[string]any{
			"target_parameters": []string{"experts.gate_up_proj", "experts.down_proj", "router.weight"},
		}})
	case "mixtral", "qwen3moe", "deepseek3":
		list = append(list, madeAdapter{kind: "experts", target: "gate_up_proj,down_proj"})
	}
	return slices.DeleteFunc(list, func(a madeAdapter) bool {
		in, some := mergedIn[a.kind]
		return some && !slices.Contains(in, base)
	})
}

// mergedIn are the models in which kinds of adapters meet what models have in different ways: turned matrices, heads
// that are cut in two, stacks, norms with 1 added, towers. The other kinds are merged into every model.
var mergedIn = map[string][]string{
	"rslora":    {"qwen2"},
	"dora":      {"llama", "gpt2", "deepseek3", "gptoss", "phi3"},
	"norm":      {"llama", "gemma2", "gemma3vl", "bert"},
	"head":      {"llama3", "gpt2", "gptoss"},
	"embedding": {"mistral", "gemma3", "gemma3vl", "bert"},
}

// random are numbers of float32, the same every time.
func random(shape tensor.Shape, seed string, middle, spread float64) entry {
	n, s := int64(1), uint64(len(seed))
	for _, d := range shape {
		n *= d
	}
	for _, c := range seed {
		s = s*31 + uint64(c)
	}
	r := rand.New(rand.NewPCG(s, 1))
	b := make([]byte, 0, 4*n)
	for range n {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(middle+spread*r.NormFloat64())))
	}
	return entry{tensor.Info{DType: tensor.F32, Shape: shape}, b}
}

// make writes the adapter for a model of the fixtures, and returns its folder.
func (a madeAdapter) make(t *testing.T, base string) string {
	t.Helper()
	return a.makeFor(t, filepath.Join(ggufModels, base))
}

// makeFor is make for a model in a folder.
func (a madeAdapter) makeFor(t *testing.T, base string) string {
	t.Helper()
	target := a.target
	if target == "" {
		target = "all-linear"
	}
	out := filepath.Join(t.TempDir(), a.kind)
	_, err := lorakit.Attach(t.Context(), base, out,
		lorakit.AttachOptions{Rank: 4, Alpha: 12, Init: "gaussian", Target: target})
	require.NoError(t, err)
	tensors := load(t, out)
	for _, name := range names(tensors) {
		e := tensors[name]
		if module, ok := strings.CutSuffix(name, "lora_B.weight"); ok {
			tensors[name] = random(e.Shape, name, 0, 0.3)
			if a.dora {
				magnitude := module + "lora_magnitude_vector"
				tensors[magnitude] = random(tensor.Shape{e.Shape[0]}, magnitude, 1, 0.1)
			}
		}
		if strings.HasSuffix(name, "lora_embedding_B") {
			tensors[name] = random(e.Shape, name, 0, 0.3)
		}
	}
	file := filepath.Join(out, "adapter_config.json")
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	config := map[string]any{}
	require.NoError(t, json.Unmarshal(b, &config))
	maps.Copy(config, a.config)
	if a.stacks {
		for _, layer := range []string{"0", "1"} {
			for name, shape := range map[string]tensor.Shape{
				"experts.base_layer.lora_A": {16, 32}, "experts.base_layer.lora_B": {64, 16},
				"experts.lora_A": {16, 32}, "experts.lora_B": {32, 16},
				"router.lora_A": {4, 32}, "router.lora_B": {4, 4},
			} {
				name = "base_model.model.model.layers." + layer + ".mlp." + name + ".weight"
				tensors[name] = random(shape, name, 0, 0.3)
			}
		}
	}
	if len(a.saved) > 0 {
		config["modules_to_save"] = a.saved
		stored := load(t, base)
		for _, module := range a.saved {
			for _, part := range []string{".weight", ".bias"} {
				name := module + part
				e, ok := stored[strings.Replace(name, "model.language_model.", "language_model.model.", 1)]
				if !ok {
					continue
				}
				tensors["base_model.model."+name] = random(e.Shape, name, 1, 0.1)
			}
		}
	}
	b, err = json.Marshal(config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(file, b, 0o666))
	writeTensors(t, filepath.Join(out, "adapter_model.safetensors"), tensors)
	return out
}

// TestEveryModelMergedToGGUF: for every model, and every kind of adapter, a merge into a GGUF file is a merge into a
// folder and a conversion, and so is one whose base is a GGUF file.
func TestEveryModelMergedToGGUF(t *testing.T) {
	t.Parallel()
	for _, base := range ggufNames(t) {
		for _, a := range madeAdapters(t, base) {
			t.Run(base+"/"+a.kind, func(t *testing.T) {
				t.Parallel()
				dir, src := t.TempDir(), filepath.Join(ggufModels, base)
				adapter := []lorakit.Adapter{{Path: a.make(t, base)}}
				plain := filepath.Join(dir, "plain")
				whole, err := lorakit.Merge(t.Context(), src, adapter, plain, lorakit.ConvertOptions{DType: "f32"})
				require.NoError(t, err)
				file := filepath.Join(dir, "base.gguf")
				_, err = lorakit.Convert(t.Context(), src, file, lorakit.ConvertOptions{})
				require.NoError(t, err)
				types := []lorakit.ConvertOptions{{DType: "f32"}, {Quantize: "q4_0"}}
				if a.kind == "plain" && slices.Contains(mergedIn["dora"], base) {
					types = append(types, lorakit.ConvertOptions{DType: "f16"}, lorakit.ConvertOptions{Quantize: "q8_0"},
						lorakit.ConvertOptions{Quantize: "q4_k_m"})
				}
				for _, o := range types {
					as := o.DType + o.Quantize
					once, twice := filepath.Join(dir, "once-"+as+".gguf"), filepath.Join(dir, "twice-"+as+".gguf")
					again := filepath.Join(dir, "again-"+as+".gguf")
					o.MinKept = -1
					r, err := lorakit.Merge(t.Context(), src, adapter, once, o)
					require.NoError(t, err, as)
					_, err = lorakit.Convert(t.Context(), plain, twice, o)
					require.NoError(t, err, as)
					sameTensors(t, load(t, twice), load(t, once))
					sameKeys(t, twice, once)
					v, err := lorakit.VerifyMerge(t.Context(), once, src, adapter, lorakit.ReadOptions{})
					require.NoError(t, err, as)
					sameShares(t, v.Adapters, r.Adapters)
					if o.DType == "f32" {
						sameShares(t, whole.Adapters, r.Adapters)
					}
					if o.Quantize == "q8_0" {
						continue // llama.cpp has two sets of rules for it, for models of transformers and for files
					}
					_, err = lorakit.Merge(t.Context(), file, adapter, again, o)
					require.NoError(t, err, as)
					sameTensors(t, load(t, once), load(t, again))
				}
			})
		}
	}
}

// TestDequantizedBaseToGGUF: what QLoRA has seen of a base is what adapters are added to, also of weights that stand
// otherwise in GGUF.
func TestDequantizedBaseToGGUF(t *testing.T) {
	t.Parallel()
	for _, base := range []string{"llama", "gpt2", "phi3", "deepseek3", "qwen3moe"} {
		t.Run(base, func(t *testing.T) {
			t.Parallel()
			dir, src := t.TempDir(), filepath.Join(ggufModels, base)
			adapter := []lorakit.Adapter{{Path: madeAdapters(t, base)[0].make(t, base)}}
			o := lorakit.ConvertOptions{DType: "f32", Base: "dequantized", MinKept: -1}
			plain, once, twice := filepath.Join(dir, "plain"), filepath.Join(dir, "once.gguf"), filepath.Join(dir, "twice.gguf")
			whole, err := lorakit.Merge(t.Context(), src, adapter, plain, o)
			require.NoError(t, err)
			r, err := lorakit.Merge(t.Context(), src, adapter, once, o)
			require.NoError(t, err)
			_, err = lorakit.Convert(t.Context(), plain, twice, lorakit.ConvertOptions{})
			require.NoError(t, err)
			sameTensors(t, load(t, twice), load(t, once))
			sameShares(t, whole.Adapters, r.Adapters)
		})
	}
}

// sameKeys holds the keys of a GGUF file against those of another, but for the name.
func sameKeys(t *testing.T, want, got string) {
	t.Helper()
	keys := func(path string) formats.Metadata {
		return slices.DeleteFunc(slices.Clone(opened(t, path).Metadata()), func(p formats.Pair) bool {
			return p.Name == "general.name"
		})
	}
	require.Equal(t, keys(want), keys(got))
}

// TestMergeOntoGGUF: what an adapter does not change is kept byte for byte, and so are the keys.
func TestMergeOntoGGUF(t *testing.T) {
	t.Parallel()
	for _, base := range ggufNames(t) {
		t.Run(base, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			adapters := madeAdapters(t, base)
			adapter := []lorakit.Adapter{{Path: adapters[0].make(t, base)}}
			for _, o := range []lorakit.ConvertOptions{{}, {Quantize: "q8_0"}, {Quantize: "q5_1"}} {
				file, out := filepath.Join(dir, "base"+o.Quantize+".gguf"), filepath.Join(dir, "out"+o.Quantize+".gguf")
				_, err := lorakit.Convert(t.Context(), filepath.Join(ggufModels, base), file, o)
				require.NoError(t, err)
				_, err = lorakit.Merge(t.Context(), file, adapter, out, lorakit.ConvertOptions{MinKept: -1})
				require.NoError(t, err)
				require.Equal(t, opened(t, file).Metadata(), opened(t, out).Metadata())
				want, got := load(t, file), load(t, out)
				require.Equal(t, names(want), names(got))
				changed := 0
				for k, w := range want {
					require.Equal(t, w.Info, got[k].Info)
					if !slices.Equal(w.data, got[k].data) {
						changed++
						require.True(t, strings.Contains(k, "attn_") || strings.Contains(k, "ffn_"), k)
						require.Greater(t, len(w.Shape), 1, k)
					}
				}
				require.Positive(t, changed)
			}
		})
	}
}
