package lorakit_test

import (
	"encoding/binary"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/lora"
)

// otherMethod is an adapter of another method than LoRA, or several adapters one after the other, of all methods.
type otherMethod struct {
	Base     string
	Type     string
	Modules  []string
	Adapters []string
	Merged   []string
}

// merge is PEFT's merge of it.
func (o otherMethod) merge(name string) peftMerge {
	m := peftMerge{base: o.Base, file: "others/" + name, dtypes: o.Merged, modules: o.Modules}
	if o.Adapters == nil {
		o.Adapters = []string{"others/" + name}
	}
	for _, a := range o.Adapters {
		m.adapters = append(m.adapters, lorakit.Adapter{Path: filepath.Join(adapterFixtures, a)})
	}
	return m
}

func otherMethods(t *testing.T) map[string]otherMethod {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(adapterFixtures, "others", "results.json"))
	require.NoError(t, err)
	var all map[string]otherMethod
	require.NoError(t, json.Unmarshal(b, &all))
	require.Greater(t, len(all), 75)
	return all
}

// TestMergeOtherMethods holds merges against PEFT's.
func TestMergeOtherMethods(t *testing.T) {
	t.Parallel()
	for name, o := range otherMethods(t) {
		for _, dtype := range o.Merged {
			t.Run(name+"/"+dtype, func(t *testing.T) {
				t.Parallel()
				asPEFT(t, o.merge(name), dtype, t.TempDir(), lorakit.ConvertOptions{DType: dtype})
			})
		}
	}
}

// TestVerifyOtherMethods finds PEFT's merges to hold their adapters, and a base to hold none of them.
func TestVerifyOtherMethods(t *testing.T) {
	t.Parallel()
	for name, o := range otherMethods(t) {
		if len(o.Merged) == 0 {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			m := o.merge(name)
			out := filepath.Join(dir, "out")
			r, err := lorakit.Merge(t.Context(), baseOf(o.Base), m.adapters, out, lorakit.ConvertOptions{DType: "f32"})
			require.NoError(t, err)
			v, err := lorakit.VerifyMerge(t.Context(), out, baseOf(o.Base), m.adapters, lorakit.ReadOptions{})
			require.NoError(t, err)
			for i, a := range v.Adapters {
				require.InDelta(t, 1, a.Kept, 1e-5, a.Path)
				require.InDelta(t, a.Kept, r.Adapters[i].Kept, 1e-5)
				require.NotEmpty(t, a.Modules)
			}
			if len(m.adapters) == 1 {
				adapted := map[string]bool{}
				for _, k := range v.Adapters[0].Modules {
					adapted[k.Name] = true
				}
				for _, module := range o.Modules {
					if name == "tiny-qwen3-tokens" && module == "lm_head" {
						continue // it stays tied
					}
					if name != "llama-adalora-pruned" || !strings.Contains(module, "1.mlp.down_proj") {
						require.True(t, adapted[module], module)
					}
				}
			}
			v, err = lorakit.VerifyMerge(t.Context(), baseOf(o.Base), baseOf(o.Base), m.adapters, lorakit.ReadOptions{})
			require.NoError(t, err)
			for _, a := range v.Adapters {
				require.Less(t, math.Abs(a.Kept), 0.5, a.Path) // what is replaced may lie beside it
			}
		})
	}
}

// TestUnmergeOtherMethods takes a merge apart again, where it was a sum.
func TestUnmergeOtherMethods(t *testing.T) {
	t.Parallel()
	for _, name := range []string{
		"llama-adalora", "llama-vera", "llama-loha", "llama-lokr", "resnet-lokr-effective", "tiny-gpt2-vera",
		"llama-oft", "llama-oft-cayley", "llama-oft-share", "llama-oft-coft", "phi3-oft", "resnet-oft", "qwen3-moe-oft",
		"llama-hra", "llama-hra-gs", "llama-hra-many", "resnet-hra", "llama-boft", "llama-boft-butterfly", "resnet-boft",
		"llama-miss", "llama-miss-bat", "llama-miss-mini", "phi3-miss-bat", "llama-vblora", "llama-vblora-topk",
		"tiny-gpt2-vblora", "llama-fourierft", "tiny-gpt2-fourierft", "llama-randlora", "tiny-gpt2-randlora",
		"llama-lora-then-oft", "llama-oft-then-lora",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, dir := otherMethods(t)[name], t.TempDir()
			m := o.merge(name)
			merged, back := filepath.Join(dir, "merged"), filepath.Join(dir, "back")
			_, err := lorakit.Merge(t.Context(), baseOf(o.Base), m.adapters, merged, lorakit.ConvertOptions{DType: "f32"})
			require.NoError(t, err)
			_, err = lorakit.Unmerge(t.Context(), merged, m.adapters, back, lorakit.ConvertOptions{DType: "f32"})
			require.NoError(t, err)
			got := load(t, back)
			for k, w := range cast(t, o.Base, lorakit.ConvertOptions{DType: "f32"}) {
				nearlyFloat32(t, k, w.data, got[k].data)
			}
		})
	}
	o := otherMethods(t)["llama-ia3"].merge("llama-ia3")
	_, err := lorakit.Unmerge(t.Context(), baseOf("llama"), o.adapters, filepath.Join(t.TempDir(), "back"),
		lorakit.ConvertOptions{})
	require.ErrorIs(t, err, lora.ErrUnsupported)
	require.ErrorContains(t, err, "IA3 scales weights")
}

// notPlain is what keeps an adapter from being one of plain matrices.
func notPlain(name, typ string) string {
	switch typ {
	case "IA3Config":
		return "IA3 scales weights"
	case "OFTConfig", "BOFTConfig", "HRAConfig":
		return "multiplies weights"
	case "LNTuningConfig", "TrainableTokensConfig":
		return "replaces values"
	case "VeraConfig", "RandLoraConfig", "FourierFTConfig", "MissConfig":
		if strings.HasSuffix(name, "-bat") {
			return "multiplies weights"
		}
		return "only its base tells"
	}
	return ""
}

// TestConvertOtherMethods makes plain LoRA of all that add a delta, which merges to the same, and says what keeps the
// others from it.
func TestConvertOtherMethods(t *testing.T) {
	t.Parallel()
	for name, o := range otherMethods(t) {
		if o.Adapters != nil || len(o.Merged) == 0 {
			continue
		}
		for _, to := range []string{"", "mlx"} {
			t.Run(name+" to "+to, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				m, out := o.merge(name), filepath.Join(dir, "converted")
				_, err := lorakit.ConvertAdapter(t.Context(), m.adapters[0], out, lorakit.AdapterOptions{To: to})
				if says := notPlain(name, o.Type); says != "" {
					require.ErrorIs(t, err, lora.ErrUnsupported)
					require.ErrorContains(t, err, says)
					require.NotContains(t, err.Error(), "\n")
					return
				}
				if o.Base == "resnet" || o.Base == "wav2vec2" {
					if to == "mlx" && err != nil {
						require.ErrorContains(t, err, "a convolution has no place in a mlx adapter")
						return
					}
				}
				require.NoError(t, err)
				m.adapters = []lorakit.Adapter{{Path: out}}
				if convolutions[name] {
					_, err := lorakit.Merge(t.Context(), baseOf(m.base), m.adapters, filepath.Join(dir, "out"),
						lorakit.ConvertOptions{})
					require.ErrorIs(t, err, lora.ErrBase)
					return
				}
				asPEFT(t, m, "f32", dir, lorakit.ConvertOptions{DType: "f32"})
			})
		}
	}
}

// convolutions are the adapters whose files do not tell that a module is a convolution with a kernel of more than one
// element, so that without the base a linear layer is made of it. That does not fit the base then.
var convolutions = map[string]bool{"resnet-adalora": true, "resnet-loha": true, "resnet-lokr": true,
	"wav2vec2-loha": true, "wav2vec2-loha-effective": true, "wav2vec2-lokr": true}

// TestCombineOtherMethods combines adapters of two methods, and gives one another rank.
func TestCombineOtherMethods(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := func(name string) lorakit.Adapter {
		return lorakit.Adapter{Path: filepath.Join(adapterFixtures, "others", name), Weight: 1}
	}
	both := filepath.Join(dir, "both")
	list := []lorakit.Adapter{path("llama-loha"), path("llama-lokr"), path("llama-adalora")}
	_, err := lorakit.Combine(t.Context(), both, list, lorakit.CombineOptions{Type: "cat"})
	require.NoError(t, err)
	merge := func(name string, adapters ...lorakit.Adapter) map[string]entry {
		out := filepath.Join(dir, name)
		_, err := lorakit.Merge(t.Context(), baseOf("llama"), adapters, out, lorakit.ConvertOptions{DType: "f32"})
		require.NoError(t, err)
		return load(t, out)
	}
	want, got := merge("want", list...), merge("got", lorakit.Adapter{Path: both})
	for k, w := range want {
		nearlyFloat32(t, k, w.data, got[k].data)
	}
	_, err = lorakit.Resize(t.Context(), path("llama-loha"), filepath.Join(dir, "smaller"), lorakit.ResizeOptions{Rank: 4})
	require.NoError(t, err)
	for name, says := range map[string]string{"llama-ia3": "IA3", "llama-vera": "only its base tells"} {
		_, err := lorakit.Combine(t.Context(), filepath.Join(dir, name), []lorakit.Adapter{path(name), path(name)},
			lorakit.CombineOptions{Type: "cat"})
		require.ErrorIs(t, err, lora.ErrUnsupported)
		require.ErrorContains(t, err, says)
		_, err = lorakit.Resize(t.Context(), path(name), filepath.Join(dir, name), lorakit.ResizeOptions{Rank: 2})
		require.ErrorIs(t, err, lora.ErrUnsupported)
		require.ErrorContains(t, err, says)
	}
}

// TestMergeOtherMethodsInNF4 merges and quantises in one pass, in which weights may be turned round.
func TestMergeOtherMethodsInNF4(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"llama-loha", "llama-lokr", "llama-vera", "llama-ia3", "tiny-gpt2-ia3", "tiny-gpt2-vera",
		"tiny-gpt2-adalora",
		"llama-oft", "llama-oft-embedding", "llama-hra", "llama-boft-butterfly", "llama-miss", "llama-miss-bat",
		"llama-vblora",
		"llama-fourierft", "tiny-gpt2-fourierft", "tiny-gpt2-randlora", "tiny-gpt2-vblora", "llama-tokens", "llama-ln",
		"llama-rotations"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, dir := otherMethods(t)[name], t.TempDir()
			m := o.merge(name)
			two, once, plain := filepath.Join(dir, "two"), filepath.Join(dir, "once"), filepath.Join(dir, "plain")
			nf4 := lorakit.ConvertOptions{Quantize: "nf4", MinKept: -1}
			_, err := lorakit.Merge(t.Context(), baseOf(o.Base), m.adapters, once, nf4)
			require.NoError(t, err)
			_, err = lorakit.Merge(t.Context(), baseOf(o.Base), m.adapters, plain, lorakit.ConvertOptions{})
			require.NoError(t, err)
			_, err = lorakit.Convert(t.Context(), plain, two, nf4)
			require.NoError(t, err)
			require.Equal(t, load(t, two), load(t, once))
			_, err = lorakit.Merge(t.Context(), baseOf(o.Base), m.adapters, filepath.Join(dir, "dequantized"),
				lorakit.ConvertOptions{Base: "dequantized", MinKept: -1})
			require.NoError(t, err)
		})
	}
}

func init() {
	const loHa = "base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a"
	badAdapters = append(badAdapters, []badAdapter{
		{name: "IA3 of another size", adapter: "others/llama-ia3", base: "llama-64",
			says: []string{"its vector of 52 elements does not fit", "down_proj"}, kind: lora.ErrBase},
		{name: "IA3 of the other side", adapter: "others/llama-ia3", base: "llama",
			config: map[string]any{"feedforward_modules": []string{"v_proj"}},
			says:   []string{"feedforward_modules", "down_proj"}, kind: lora.ErrMalformed},
		{name: "IA3 of an embedding", adapter: "others/llama-ia3-head", base: "llama",
			change: rename("model.layers.1.self_attn.k_proj", "model.embed_tokens"),
			says:   []string{"embed_tokens", "does not fit"}, kind: lora.ErrBase},
		{name: "IA3 of no module", adapter: "others/llama-ia3", base: "llama", change: rename("v_proj", "w_proj"),
			says: []string{"w_proj", "nearest"}, kind: lora.ErrBase},
		{name: "IA3 of infinity", adapter: "others/llama-ia3", base: "llama",
			change: badValue("base_model.model.model.layers.0.mlp.down_proj.ia3_l", 0x7f800000),
			says:   []string{"down_proj.ia3_l", "finite"}, kind: lora.ErrMalformed},
		{name: "LoHa of another size", adapter: "others/llama-loha", base: "llama-64",
			says: []string{"its delta of 16 x 32 does not fit", "self_attn."}, kind: lora.ErrBase},
		{name: "LoHa of NaN", adapter: "others/llama-loha", base: "llama", change: badValue(loHa, 0x7fc00000),
			says: []string{loHa, "NaN"}, kind: lora.ErrMalformed},
		{name: "LoHa with a tensor that nothing takes", adapter: "others/llama-loha", base: "llama",
			change: put("base_model.model.model.layers.0.self_attn.spare.weight", ones(3)), says: []string{"spare"},
			kind: lora.ErrBase},
		{name: "LoKr of another size", adapter: "others/llama-lokr", base: "llama-64", says: []string{"does not fit"},
			kind: lora.ErrBase},
		{name: "LoKr of a huge weight", adapter: "others/llama-lokr", base: "llama",
			change: put(strings.TrimSuffix(loHa, "hada_w1_a")+"lokr_w1", ones(128, 16)),
			says:   []string{"its delta of 1024 x 128 does not fit"}, kind: lora.ErrBase},
		{name: "VeRA of another size", adapter: "others/llama-vera", base: "llama-64", says: []string{"does not fit"},
			kind: lora.ErrBase},
		{name: "VeRA from a seed", adapter: "others/llama-vera-seeded", base: "llama",
			says: []string{"save_projection", "projection_prng_key"}, kind: lora.ErrUnsupported},
		{name: "VeRA whose shared matrix is too narrow", adapter: "others/llama-vera", base: "llama",
			change: put("base_model.vera_A", ones(6, 30)), says: []string{"x 30 does not fit"}, kind: lora.ErrBase},
		{name: "AdaLoRA of another rank", adapter: "others/llama-adalora", base: "llama", config: map[string]any{"init_r": 5},
			says: []string{"rank 6 in its tensors and 5"}, kind: lora.ErrMalformed},
	}...)
}

// TestIA3OnTiedHead scales the head of a tied model and leaves the embedding as it is.
func TestIA3OnTiedHead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	adapter, out := filepath.Join(dir, "adapter"), filepath.Join(dir, "out")
	require.NoError(t, os.Mkdir(adapter, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(adapter, "adapter_config.json"),
		[]byte(`{"peft_type": "IA3", "target_modules": ["lm_head"], "feedforward_modules": []}`), 0o644))
	base := cast(t, "tiny-qwen3", lorakit.ConvertOptions{DType: "f32"})
	embedding := base["model.embed_tokens.weight"]
	l := ones(embedding.Shape[0], 1)
	for i := range embedding.Shape[0] {
		binary.LittleEndian.PutUint32(l.data[4*i:], math.Float32bits(float32(i%7)-3))
	}
	writeTensors(t, filepath.Join(adapter, "adapter_model.safetensors"),
		map[string]entry{"base_model.model.lm_head.ia3_l": l})
	_, err := lorakit.Merge(t.Context(), baseOf("tiny-qwen3"), []lorakit.Adapter{{Path: adapter}}, out,
		lorakit.ConvertOptions{DType: "f32"})
	require.NoError(t, err)
	got := load(t, out)
	require.Equal(t, embedding.data, got["model.embed_tokens.weight"].data)
	width := int(embedding.Shape[1])
	for i := 0; i < len(embedding.data); i += 4 {
		x, y := math.Float32frombits(binary.LittleEndian.Uint32(embedding.data[i:])),
			math.Float32frombits(binary.LittleEndian.Uint32(got["lm_head.weight"].data[i:]))
		require.Equal(t, x*(float32(i/4/width%7)-3), y)
	}
	config, err := os.ReadFile(filepath.Join(out, "config.json"))
	require.NoError(t, err)
	require.Contains(t, string(config), `"tie_word_embeddings": false`)

	_, err = lorakit.Merge(t.Context(), baseOf("tiny-qwen3"), []lorakit.Adapter{{Path: adapter, Weight: 0.5}},
		filepath.Join(dir, "half"), lorakit.ConvertOptions{})
	require.ErrorIs(t, err, lora.ErrUnsupported)
	require.ErrorContains(t, err, "IA3 with the weight 0.5, expected 1")
}
