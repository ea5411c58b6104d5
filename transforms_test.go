package lorakit_test

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/lora"
)

// randomEntry is a tensor of random numbers.
func randomEntry(seed uint64, scale float64, shape ...int64) entry {
	r := rand.New(rand.NewPCG(seed, 7))
	n := int64(1)
	for _, d := range shape {
		n *= d
	}
	v := make([]float32, n)
	for i := range v {
		v[i] = float32(scale * r.NormFloat64())
	}
	return floats(v, shape...)
}

// wideTransforms are adapters of a module "m" of 3000 outputs and 100 inputs, whose rows end neither where tiles do
// nor where the blocks of a quantised weight do.
var wideTransforms = map[string]map[string]entry{
	`{"peft_type": "OFT", "oft_block_size": 10, "use_cayley_neumann": false}`: {"m.oft_R.weight": randomEntry(1, 0.1,
		10, 45)},
	`{"peft_type": "BOFT", "boft_block_size": 50}`: {"m.boft_R": randomEntry(2, 0.1, 1, 2,
		50, 50), "m.boft_s": randomEntry(3, 1, 3000, 1)},
	`{"peft_type": "HRA", "r": 3}`: {"m.hra_u": randomEntry(4, 1, 100, 3)},
	`{"peft_type": "MISS", "r": 20, "init_weights": "bat"}`: {"m.miss_block": randomEntry(5, 0.1,
		150, 20, 20)},
	`{"peft_type": "MISS", "r": 30}`: {"m.miss_block": randomEntry(6, 0.1,
		30, 3000)},
	`{"peft_type": "FOURIERFT", "n_frequency": 500}`: {"m.fourierft_spectrum": randomEntry(7,
		1, 500)},
}

// wideBase is a base for them.
func wideBase(t *testing.T) string {
	base := filepath.Join(t.TempDir(), "base")
	require.NoError(t, os.Mkdir(base, 0o755))
	writeTensors(t, filepath.Join(base, "model.safetensors"), map[string]entry{"m.weight": randomEntry(8, 0.1, 3000,
		100)})
	require.NoError(t, os.WriteFile(filepath.Join(base, "config.json"), []byte(`{}`), 0o644))
	return base
}

// TestTransformsInTiles merges onto weights of many tiles: the bytes are the same with any memory and threads, and in
// one pass with quantisation those of two. It runs alone, for its memory.
func TestTransformsInTiles(t *testing.T) {
	base := wideBase(t)
	for config, parts := range wideTransforms {
		t.Run(config, func(t *testing.T) {
			dir := t.TempDir()
			adapters := []lorakit.Adapter{{Path: madeFolder(t, config, "adapter_model.safetensors", parts)}}
			merge := func(name string, o lorakit.ConvertOptions) map[string]entry {
				out := filepath.Join(dir, name)
				_, err := lorakit.Merge(t.Context(), base, adapters, out, o)
				require.NoError(t, err)
				return load(t, out)
			}
			want := merge("plain", lorakit.ConvertOptions{})
			require.Equal(t, want, merge("one", lorakit.ConvertOptions{Threads: 1, Memory: 80 << 20}))
			require.Equal(t, want, merge("four", lorakit.ConvertOptions{Threads: 4, Memory: 1 << 30}))
			nf4 := lorakit.ConvertOptions{Quantize: "nf4", Include: []string{"*"}, MinKept: -1, Threads: 3}
			once := merge("once", nf4)
			_, err := lorakit.Convert(t.Context(), filepath.Join(dir, "plain"), filepath.Join(dir, "two"), nf4)
			require.NoError(t, err)
			require.Equal(t, load(t, filepath.Join(dir, "two")), once)
			// onto what NF4 leaves of the weight, of which its blocks of 64 know nothing of rows
			merge("dequantized", lorakit.ConvertOptions{Base: "dequantized", MinKept: -1})
			quantised := filepath.Join(dir, "quantised")
			_, err = lorakit.Convert(t.Context(), base, quantised, nf4)
			require.NoError(t, err)
			_, err = lorakit.Merge(t.Context(), quantised, adapters, filepath.Join(dir, "kept"),
				lorakit.ConvertOptions{MinKept: -1})
			require.NoError(t, err)
		})
	}
}

// TestTransformsWeighted refuses to merge a part of a product.
func TestTransformsWeighted(t *testing.T) {
	t.Parallel()
	base := wideBase(t)
	for config, parts := range wideTransforms {
		adapter := madeFolder(t, config, "adapter_model.safetensors", parts)
		out := filepath.Join(t.TempDir(), "out")
		_, err := lorakit.Merge(t.Context(), base, []lorakit.Adapter{{Path: adapter, Weight: 0.5}}, out,
			lorakit.ConvertOptions{})
		if strings.Contains(config, `"r": 30`) || strings.Contains(config, "FOURIERFT") {
			require.NoError(t, err)
			continue
		}
		require.ErrorIs(t, err, lora.ErrUnsupported, config)
		require.ErrorContains(t, err, "with the weight 0.5, expected 1")
		_, err = lorakit.Unmerge(t.Context(), base, []lorakit.Adapter{{Path: adapter, Weight: 0.5}}, out,
			lorakit.ConvertOptions{})
		require.ErrorIs(t, err, lora.ErrUnsupported, config)
		require.ErrorContains(t, err, "with the weight 0.5, expected 1")
	}
}

// TestBone merges Bone, as PEFT called MiSS before 0.17, like PEFT's script convert-bone-to-miss makes MiSS of it.
func TestBone(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"llama-miss", "llama-miss-bat"} {
		dir, o := t.TempDir(), otherMethods(t)[name]
		from := filepath.Join(adapterFixtures, "others", name)
		var config map[string]any
		b, err := os.ReadFile(filepath.Join(from, "adapter_config.json"))
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(b, &config))
		config["peft_type"] = "BONE"
		for _, field := range []string{"mini_r", "miss_dropout", "peft_version"} {
			delete(config, field)
		}
		b, err = json.Marshal(config)
		require.NoError(t, err)
		tensors := map[string]entry{}
		for k, e := range load(t, filepath.Join(from, "adapter_model.safetensors")) {
			tensors[strings.ReplaceAll(k, ".miss_", ".bone_")] = e
		}
		m := o.merge(name)
		m.adapters = []lorakit.Adapter{{Path: madeFolder(t, string(b), "adapter_model.safetensors", tensors)}}
		asPEFT(t, m, "f32", dir, lorakit.ConvertOptions{DType: "f32"})
	}
}

// TestUnmergeRefused refuses to take out what leaves no trace of the base, or what cannot be undone.
func TestUnmergeRefused(t *testing.T) {
	t.Parallel()
	block := make([]float32, 150*20*20) // -I in one of the blocks: I + B is 0
	for i := range 20 {
		block[7*400+21*i] = -1
	}
	scales := make([]float32, 3000)
	for i := range scales {
		scales[i] = float32(min(i, 1))
	}
	made := func(config string, parts map[string]entry) string {
		return madeFolder(t, config, "adapter_model.safetensors", parts)
	}
	base := wideBase(t)
	for path, x := range map[string]struct{ base, says string }{
		filepath.Join(adapterFixtures, "others/llama-ln"):     {baseOf("llama"), "replaced weights"},
		filepath.Join(adapterFixtures, "others/llama-tokens"): {baseOf("llama"), "replaced weights"},
		made(`{"peft_type": "MISS", "r": 20, "init_weights": "bat"}`, map[string]entry{"m.miss_block": floats(block,
			150, 20, 20)}): {base,
			"its block 7 cannot be taken out"},
		made(`{"peft_type": "BOFT", "boft_block_size": 50}`, map[string]entry{"m.boft_R": ones(1, 2, 50, 50),
			"m.boft_s": floats(scales, 3000, 1)}): {base,
			"element 0 is 0, by which it cannot be divided"},
	} {
		_, err := lorakit.Unmerge(t.Context(), x.base, []lorakit.Adapter{{Path: path}}, filepath.Join(t.TempDir(),
			"out"), lorakit.ConvertOptions{})
		require.ErrorIs(t, err, lora.ErrUnsupported, path)
		require.ErrorContains(t, err, x.says)
		require.NotContains(t, err.Error(), "\n")
	}
}

// TestOFTOnKernels tells that PEFT merges another function than it computes.
func TestOFTOnKernels(t *testing.T) {
	t.Parallel()
	r, err := lorakit.Merge(t.Context(), baseOf("resnet"), otherMethods(t)["resnet-oft"].merge("resnet-oft").adapters,
		filepath.Join(t.TempDir(), "out"), lorakit.ConvertOptions{})
	require.NoError(t, err)
	require.Contains(t, strings.Join(r.Notices, "\n"),
		"on a convolution with a kernel of 3 x 3, what PEFT computes beside the base is not what it merges")
}

func init() {
	const q, d = "base_model.model.model.layers.0.self_attn.q_proj.", "base_model.model.model.layers.0.mlp.down_proj."
	scaled := func(key string, by float32) func(map[string]entry) {
		return func(m map[string]entry) {
			e := m[key]
			v := make([]float32, len(e.data)/4)
			for i := range v {
				v[i] = by
			}
			m[key] = floats(v, e.Shape...)
		}
	}
	for _, name := range []string{"oft", "boft", "hra", "miss", "miss-bat", "vblora", "fourierft", "randlora"} {
		module := map[string]string{"fourierft": "model.layers.0.self_attn.v_proj",
			"randlora": "model.layers.0.self_attn.k_proj"}[name]
		if module == "" {
			module = "model.layers.0.self_attn.q_proj"
		}
		adapter := "others/llama-" + name
		badAdapters = append(badAdapters, []badAdapter{
			{name: name + " that the config leaves out", adapter: adapter, base: "llama", config: map[string]any{
				"exclude_modules": []string{module}}, says: []string{module, "by adapter_config.json's",
				"not adapted"}, kind: lora.ErrMalformed},
			{name: name + " of no module", adapter: adapter, base: "llama", change: rename(module,
				"model.layers.0.mlp.nothing"), says: []string{"nothing"}},
			{name: name + " on an embedding", adapter: adapter, base: "llama", config: map[string]any{
				"target_modules": []string{"q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens"}},
				change: rename(module, "model.embed_tokens"), says: []string{"embed_tokens"}, kind: lora.ErrBase},
		}...)
	}
	badAdapters = append(badAdapters, []badAdapter{
		{name: "OFT of another size", adapter: "others/llama-oft", base: "llama-64", says: []string{"4 blocks of 8",
			"64 inputs", "does not fit"}, kind: lora.ErrBase},
		{name: "OFT of other blocks than the config's", adapter: "others/llama-oft", base: "llama",
			config: map[string]any{"oft_block_size": 16}, says: []string{"blocks of 8", "blocks of 16"},
			kind: lora.ErrBase},
		{name: "OFT of NaN", adapter: "others/llama-oft", base: "llama", change: badValue(q+"oft_R.weight",
			0x7fc00000), says: []string{q + "oft_R.weight", "finite"}, kind: lora.ErrMalformed},
		{name: "OFT that overflows", adapter: "others/llama-oft", base: "llama", change: scaled(q+"oft_R.weight",
			1e20), says: []string{q + "oft_R.weight", "block 0 has no finite values"}, kind: lora.ErrMalformed},
		{name: "OFT of a head for an embedding", adapter: "others/llama-oft-embedding", base: "llama",
			change: func(m map[string]entry) {
				rename("lm_head.oft_R.", "lm_head.oft_embedding_R.")(m)
			}, says: []string{"lm_head", "none for a parameter of kind"}, kind: lora.ErrBase},
		{name: "OFT on a Conv1D", adapter: "others/llama-oft", base: "tiny-gpt2",
			config: map[string]any{"target_modules": []string{"c_attn", "v_proj"}}, change: func(m map[string]entry) {
				for k := range m {
					if k != q+"oft_R.weight" {
						delete(m, k)
					}
				}
				rename("model.layers.0.self_attn.q_proj", "transformer.h.0.attn.c_attn")(m)
			}, says: []string{"c_attn", "Conv1D"}, kind: lora.ErrUnsupported},
		{name: "BOFT of another size", adapter: "others/llama-boft", base: "llama-64", says: []string{"does not fit"},
			kind: lora.ErrBase},
		{name: "BOFT with too few scales", adapter: "others/llama-boft", base: "llama", change: put(q+"boft_s",
			ones(31, 1)), says: []string{"q_proj", "31 scales"}, kind: lora.ErrBase},
		{name: "HRA of another size", adapter: "others/llama-hra", base: "llama-64", says: []string{
			"52 elements, one for each input"}, kind: lora.ErrBase},
		{name: "HRA at a vector of zeros", adapter: "others/llama-hra", base: "llama", change: scaled(q+"hra_u", 0),
			says: []string{q + "hra_u", "vector 0 is 0"}, kind: lora.ErrMalformed},
		{name: "HRA at vectors that are not apart", adapter: "others/llama-hra-gs", base: "llama",
			change: scaled(strings.Replace(q, "q_proj", "k_proj", 1)+"hra_u", 1), says: []string{"hra_u", "vector 1",
				"not apart"}, kind: lora.ErrMalformed},
		{name: "MiSS of another size", adapter: "others/llama-miss", base: "llama-64", says: []string{"does not fit"},
			kind: lora.ErrBase},
		{name: "bat of another size", adapter: "others/llama-miss-bat", base: "llama-64", says: []string{
			"8 blocks of 4 x 4", "does not fit"}, kind: lora.ErrBase},
		{name: "a vector past the bank", adapter: "others/llama-vblora-topk", base: "llama",
			change: func(m map[string]entry) {
				k := "base_model.model.model.layers.1.self_attn.v_proj.vblora_logits_A_topk_indices"
				e := m[k]
				e.data = append([]byte{200}, e.data[1:]...)
				m[k] = e
			}, says: []string{"vblora_logits_A_topk_indices", "element 0 is 200", "20 vectors"}, kind: lora.ErrMalformed},
		{name: "weights of more than 1", adapter: "others/llama-vblora-topk", base: "llama",
			change: scaled("base_model.model.model.layers.1.self_attn.v_proj.vblora_logits_A_topk_weights", 2),
			says:   []string{"vblora_logits_A_topk_weights", "more than 1"}, kind: lora.ErrMalformed},
		{name: "a logit of infinity", adapter: "others/llama-vblora", base: "llama",
			change: badValue(d+"vblora_logits_A", 0x7f800000), says: []string{"vblora_logits_A", "finite"},
			kind: lora.ErrMalformed},
		{name: "more frequencies than elements", adapter: "others/llama-fourierft-seed", base: "llama",
			config: map[string]any{"n_frequency": 1025}, change: put(q+"fourierft_spectrum", ones(1025)),
			says: []string{"1025 frequencies"}, kind: lora.ErrBase},
		{name: "FourierFT on a convolution", adapter: "others/llama-fourierft-seed", base: "resnet",
			config: map[string]any{"target_modules": ".*"}, change: rename("model.layers.0.self_attn.q_proj",
				"resnet.encoder.stages.1.layers.0.shortcut.convolution"), says: []string{"is for linear layers"},
			kind: lora.ErrBase},
		{name: "RandLoRA of another size", adapter: "others/llama-randlora", base: "llama-64", says: []string{
			"narrow side of 32"}, kind: lora.ErrBase},
		{name: "RandLoRA from a seed", adapter: "others/llama-randlora-seeded", base: "llama", says: []string{
			"save_projection", "projection_prng_key"}, kind: lora.ErrUnsupported},
		{name: "bases that differ", adapter: "others/llama-randlora", base: "llama", change: badValue(d+"randlora_B",
			0x3f800000), says: []string{"randlora_B", "differs from"}, kind: lora.ErrMalformed},
		{name: "LN tuning that the config leaves out", adapter: "others/llama-ln", base: "llama",
			config: map[string]any{"target_modules": []string{"input_layernorm"}}, says: []string{"model.norm",
				"not adapted"}, kind: lora.ErrMalformed},
		{name: "LN tuning of another size", adapter: "others/llama-ln", base: "llama-64", says: []string{"[32]",
			"[64]"}, kind: lora.ErrBase},
		{name: "tokens that the config leaves out", adapter: "others/llama-tokens-both", base: "llama",
			config: map[string]any{"target_modules": []string{"embed_tokens"}}, says: []string{"lm_head",
				"not adapted"}, kind: lora.ErrMalformed},
		{name: "tokens of an adapter of their own past the vocabulary", adapter: "others/llama-tokens", base: "llama",
			config: map[string]any{"token_indices": []int{1, 2, 64}}, says: []string{"row 64"}, kind: lora.ErrBase},
	}...)
}

// TestTransformsKept finds a merge that has lost what its adapter does.
func TestTransformsKept(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"llama-oft", "llama-boft", "llama-hra", "llama-miss-bat", "llama-fourierft"} {
		o := otherMethods(t)[name]
		v, err := lorakit.VerifyMerge(t.Context(), baseOf(o.Base), baseOf(o.Base), o.merge(name).adapters,
			lorakit.ReadOptions{})
		require.NoError(t, err)
		require.Len(t, v.Short(0.5), len(v.Adapters[0].Modules), name)
		for _, m := range v.Adapters[0].Modules {
			require.Zero(t, m.Kept, fmt.Sprint(name, m.Name))
			require.Greater(t, m.Delta, 0.05)
			require.False(t, math.IsInf(m.Delta, 0))
		}
	}
}

// TestTransformsOfExperts transforms one expert of a stack as it does a weight of its own.
func TestTransformsOfExperts(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		base, module, tensor string
		rows                 int64
	}{
		{"qwen3-moe", "model.layers.0.mlp.experts.2.gate_proj", "model.layers.0.mlp.experts.2.gate_proj.weight", 24},
		{"qwen3-moe", "model.layers.0.mlp.experts.0.down_proj", "model.layers.0.mlp.experts.0.down_proj.weight", 32},
	} {
		whole := cast(t, x.base, lorakit.ConvertOptions{DType: "f32"})[x.tensor]
		width := whole.Shape[1]
		require.Equal(t, x.rows, whole.Shape[0])
		base := filepath.Join(t.TempDir(), "base")
		require.NoError(t, os.Mkdir(base, 0o755))
		writeTensors(t, filepath.Join(base, "model.safetensors"), map[string]entry{"m.weight": whole})
		require.NoError(t, os.WriteFile(filepath.Join(base, "config.json"), []byte(`{}`), 0o644))
		for config, parts := range map[string]map[string]entry{
			`{"peft_type": "BOFT", "boft_block_size": 8}`: {
				"M.boft_R": randomEntry(1, 0.1, 1, width/8, 8, 8), "M.boft_s": randomEntry(2, 1, x.rows, 1)},
			`{"peft_type": "MISS", "r": 4, "init_weights": "bat"}`: {"M.miss_block": randomEntry(3, 0.1, x.rows/4, 4, 4)},
			`{"peft_type": "FOURIERFT", "n_frequency": 40}`:        {"M.fourierft_spectrum": randomEntry(4, 1, 40)},
		} {
			merge := func(base, module string) map[string]entry {
				named := map[string]entry{}
				for k, e := range parts {
					named[strings.Replace(k, "M", module, 1)] = e
				}
				out := filepath.Join(t.TempDir(), "out")
				adapters := []lorakit.Adapter{{Path: madeFolder(t, config, "adapter_model.safetensors", named)}}
				_, err := lorakit.Merge(t.Context(), base, adapters, out, lorakit.ConvertOptions{DType: "f32"})
				require.NoError(t, err, x.module)
				return load(t, out)
			}
			want, got := merge(base, "m")["m.weight"].data, merge(baseOf(x.base), x.module)[x.tensor].data
			require.Equal(t, want, got, x.module+config)
			require.NotEqual(t, whole.data, want)
		}
	}
}
