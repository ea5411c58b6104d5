package train

import (
	"encoding/json"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	_ "github.com/lorakit/lorakit/formats/pytorch"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	_ "github.com/lorakit/lorakit/quant/bnb"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

const adapterFixtures = "../fixtures/adapters"

// fixtureBase is the base of a group of adapters.
func fixtureBase(name string) string {
	if path := filepath.Join(adapterFixtures, "bases", name); exists(path) {
		return path
	}
	return filepath.Join("..", "fixtures", name)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// fileParams are the run-time parameters that a checkpoint's file has.
func fileParams(t testing.TB, c *checkpoint.Checkpoint) []param {
	var list []param
	for _, name := range c.Parameters() {
		p, err := c.Runtime(name)
		require.NoError(t, err)
		list = append(list, param{name: name, shape: p.Shape, kind: p.Pieces[0].Weight.Role.Kind})
	}
	return list
}

func openBase(t testing.TB, path string) (*checkpoint.Checkpoint, []param) {
	c, err := checkpoint.Open(t.Context(), path)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c, fileParams(t, c)
}

// loaded opens an adapter of the fixtures, and loads it.
func loaded(t testing.TB, name string) *adapter {
	base, _, _ := strings.Cut(name, "/")
	c, params := openBase(t, fixtureBase(base))
	a, err := openAdapter(t.Context(), filepath.Join(adapterFixtures, name), storage.Options{}, params, c.Model)
	require.NoError(t, err)
	t.Cleanup(func() { a.Close() })
	asked := map[string]int64{}
	require.NoError(t, a.load(t.Context(), func(category string, n int) []float32 {
		asked[category] += 4 * int64(n)
		return make([]float32, n)
	}))
	require.Equal(t, asked, a.bytes(), "what was known from the headers")
	return a
}

func shapeOf(t testing.TB, c *checkpoint.Checkpoint, name string) tensor.Shape {
	p, err := c.Runtime(name)
	require.NoError(t, err)
	return p.Shape
}

// read reads a parameter whole.
func read(t testing.TB, c *checkpoint.Checkpoint, name string) []float32 {
	p, err := c.Runtime(name)
	require.NoError(t, err)
	var all []float32
	for e := range max(1, p.Experts) {
		m := p.Matrix(e)
		rows, cols := m.Dims()
		values := make([]float32, rows*cols)
		require.NoError(t, m.ReadRows(values, 0, rows))
		all = append(all, values...)
	}
	return all
}

// adapted is a parameter with what the adapter does to it, by the definitions and in float64.
func (ad *adaptation) adapted(p param, base []float32) []float32 {
	w := slices.Clone(base)
	switch {
	case ad.value != nil:
		w = slices.Clone(ad.value.value)
	case ad.copied != nil:
		var err error
		if w, err = lora.Floats(ad.copied); err != nil {
			panic(err)
		}
	}
	width := int(p.shape[len(p.shape)-1])
	for i, row := range ad.indices {
		copy(w[row*width:][:width], ad.rows.value[i*width:][:width])
	}
	if ad.bias != nil {
		for i, b := range ad.bias.value {
			w[i] += ad.biasScale * b
		}
	}
	inFirst := p.kind == models.Conv1D || p.kind == models.Embedding
	each := ad.experts
	if ad.plain != nil {
		each = []*lowRank{ad.plain}
	}
	for e, l := range each {
		if l == nil {
			continue
		}
		out, in := l.b.rows, l.a.cols
		at := func(i, j int) *float32 {
			if inFirst {
				return &w[j*out+i]
			}
			return &w[e*out*in+i*in+j]
		}
		a, b := l.a.matrix(), l.b.matrix()
		for i := range out {
			norm := 0.0
			for j := range in {
				sum := 0.0
				for k := range l.rank {
					sum += float64(b.Data[i*b.RowStride+k*b.ColStride]) * float64(a.Data[k*a.RowStride+j*a.ColStride])
				}
				*at(i, j) += l.scale * float32(sum)
				norm += float64(*at(i, j)) * float64(*at(i, j))
			}
			if l.magnitude == nil {
				continue
			}
			m := l.magnitude.matrix()
			for j := range in {
				*at(i, j) *= float32(float64(m.Data[i*m.RowStride]) / math.Sqrt(norm))
			}
		}
	}
	return w
}

// TestAdapterIsWhatPEFTMerges holds the parameters with their adaptations against the merges that PEFT has made of
// real adapters. A parameter that PEFT's merge leaves alone has none.
func TestAdapterIsWhatPEFTMerges(t *testing.T) {
	var results struct {
		Adapters map[string]struct {
			Base   string
			Merged []string
			SameAs string `json:"same_as"`
		}
	}
	b, err := os.ReadFile(filepath.Join(adapterFixtures, "results.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &results))
	tested := 0
	for name, x := range results.Adapters {
		merged := name
		if x.SameAs != "" {
			merged = x.SameAs
		}
		merged = filepath.Join(adapterFixtures, merged+".merged-f32.safetensors")
		if slices.Contains([]string{"bert", "clip", "resnet", "wav2vec2"}, x.Base) || strings.Contains(name, "/grown") ||
			name == "qwen2.5-vl/everywhere" || strings.HasSuffix(name, "/per-expert") || !exists(merged) {
			continue // refused, or no language models
		}
		tested++
		t.Run(name, func(t *testing.T) {
			a := loaded(t, name)
			c, params := openBase(t, fixtureBase(x.Base))
			dir := t.TempDir() // PEFT's merge, with the names and the config of the base
			for from, to := range map[string]string{merged: "model.safetensors",
				filepath.Join(fixtureBase(x.Base), "config.json"): "config.json"} {
				b, err := os.ReadFile(from)
				require.NoError(t, err)
				require.NoError(t, os.WriteFile(filepath.Join(dir, to), b, 0o666))
			}
			want, changed := openBase(t, dir)
			for _, p := range changed {
				if a.params[p.name] == nil { // as one end of a merge that unties may stay what it was
					a.params[p.name] = &adaptation{}
				}
			}
			for name, ad := range a.params {
				p := param{name: name}
				if i := slices.IndexFunc(params, func(o param) bool { return o.name == name }); i >= 0 {
					p = params[i]
				} else {
					p.shape = shapeOf(t, c, name) // the head of a tied model
				}
				from := want
				if _, err := want.Runtime(name); err != nil {
					from = c // a copy of the base's own
				}
				expected := read(t, from, name)
				require.InDeltaSlice(t, expected, ad.adapted(p, read(t, c, name)), 2e-5*rms(expected), name)
			}
		})
	}
	require.Greater(t, tested, 60)
}

func rms(v []float32) float64 {
	sum := 0.0
	for _, x := range v {
		sum += float64(x) * float64(x)
	}
	return math.Sqrt(sum / float64(len(v)))
}

// contents are the tensors of a file, by name.
func contents(t testing.TB, path string) map[string]formats.Tensor {
	dir, name, err := storage.Resolve(path, storage.Options{})
	require.NoError(t, err)
	c, err := formats.Default.Open(t.Context(), dir, name)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	all := map[string]formats.Tensor{}
	for _, x := range c.Tensors() {
		all[x.Name] = x
	}
	return all
}

// TestSavedAdapterIsTheFile saves adapters that no step has changed: those in float32 are the same file, byte for byte.
func TestSavedAdapterIsTheFile(t *testing.T) {
	for _, name := range []string{"llama/attention", "llama/embedding-head", "llama/dora-embedding", "llama/tokens",
		"qwen2/bias-all", "qwen3-moe/experts", "tiny-gpt2/lora-bias", "tiny-qwen3/tied-both-ensured",
		"tiny-qwen3/tied-saved-ensured", "llama/half", "llama/pickle"} {
		t.Run(name, func(t *testing.T) {
			a, dir := loaded(t, name), filepath.Join(t.TempDir(), "saved")
			require.NoError(t, a.save(t.Context(), dir, false))
			require.ErrorIs(t, a.save(t.Context(), dir, false), fs.ErrExist)
			require.NoError(t, a.save(t.Context(), dir, true))
			entries, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Len(t, entries, 2)
			config, err := os.ReadFile(filepath.Join(dir, adapterConfig))
			require.NoError(t, err)
			want, err := os.ReadFile(filepath.Join(adapterFixtures, name, adapterConfig))
			require.NoError(t, err)
			require.Equal(t, string(want), string(config))
			saved := contents(t, filepath.Join(dir, adapterTensors))
			for _, s := range a.stored {
				got := saved[s.Name]
				require.Equal(t, s.Shape, got.Shape, s.Name)
				if s.trainable != nil {
					require.Equal(t, tensor.F32, got.DType, s.Name)
				}
				x, err := lora.Floats(s.Tensor)
				require.NoError(t, err)
				y, err := lora.Floats(&got)
				require.NoError(t, err)
				require.Equal(t, x, y, s.Name)
			}
			require.Len(t, saved, len(a.stored))
			original := filepath.Join(adapterFixtures, name, adapterTensors)
			if name == "llama/half" || !exists(original) {
				return
			}
			was, err := os.ReadFile(original)
			require.NoError(t, err)
			is, err := os.ReadFile(filepath.Join(dir, adapterTensors))
			require.NoError(t, err)
			require.Equal(t, was, is)
		})
	}
}

// TestSavedGradients have the names of what is trained, and each its own numbers.
func TestSavedGradients(t *testing.T) {
	a := loaded(t, "tiny-qwen3/tied-both-ensured")
	next := float32(0)
	for _, x := range a.trainables {
		for i := range x.gradient {
			next++
			x.gradient[i] = next
		}
	}
	file := filepath.Join(t.TempDir(), "gradients.safetensors")
	write := func(w io.Writer) error { return a.writeGradients(t.Context(), w) }
	require.NoError(t, storage.CreateWhole(file, false, write))
	require.ErrorIs(t, storage.CreateWhole(file, false, write), fs.ErrExist)
	saved := contents(t, file)
	require.NotContains(t, saved, "base_model.model.lm_head.base_layer.weight")
	require.Len(t, saved, len(a.trainables))
	e, h := a.params["model.embed_tokens.weight"].plain, a.params["lm_head.weight"].plain
	for _, x := range []struct {
		f    factor
		name string
	}{{h.a, "lm_head.lora_A.weight"}, {h.b, "lm_head.lora_B.weight"}, {e.a, "model.embed_tokens.lora_embedding_A"}} {
		got := saved["base_model.model."+x.name]
		v, err := lora.Floats(&got)
		require.NoError(t, err)
		slope := x.f.slope()
		for i := range slope.Rows {
			for j := range slope.Cols {
				require.Equal(t, slope.Data[i*slope.RowStride+j*slope.ColStride], v[i*slope.Cols+j], x.name)
			}
		}
	}
}

// TestTiedEnds has what PEFT makes of a tied model's two ends: one parameter, two, or two over one storage.
func TestTiedEnds(t *testing.T) {
	ends := func(name string) (a *adapter, embedding, head *adaptation) {
		a = loaded(t, name)
		return a, a.params["model.embed_tokens.weight"], a.params["lm_head.weight"]
	}
	a, embedding, head := ends("tiny-qwen3/tied-both-ensured")
	require.Same(t, &embedding.plain.b.of.value[0], &head.plain.a.of.value[0])
	require.Same(t, &embedding.plain.a.of.value[0], &head.plain.b.of.value[0])
	require.NotSame(t, &embedding.plain.a.of.gradient[0], &head.plain.b.of.gradient[0])
	require.Same(t, embedding.plain.b.of, head.plain.a.of.shares)
	require.EqualValues(t, 1824-672, a.parameters()) // what two share is counted once; torch counts it twice

	a, embedding, head = ends("tiny-qwen3/tied-saved-ensured")
	require.Same(t, embedding.value, head.value)
	require.Len(t, a.stored, len(a.trainables)+1)

	_, embedding, head = ends("tiny-qwen3/tied-tokens")
	require.Same(t, embedding.rows, head.rows)
	require.Equal(t, []int{100, 7}, head.indices)

	_, embedding, head = ends("tiny-qwen3/tied-tokens-apart")
	require.NotSame(t, embedding.rows, head.rows)
	require.Equal(t, []int{7, 2}, head.indices)

	_, embedding, head = ends("tiny-qwen3/tied-embedding")
	require.NotNil(t, embedding.plain)
	require.Nil(t, head.plain)
	require.NotNil(t, embedding.copied)
	require.Same(t, embedding.copied, head.copied) // PEFT loads its copy of the base's matrix into both

	_, embedding, head = ends("tiny-qwen3/tied-head")
	require.Nil(t, embedding.plain)
	require.NotNil(t, head.plain)

	_, embedding, head = ends("tiny-qwen3/tied-saved-head")
	require.Nil(t, embedding)
	require.NotNil(t, head.value)
}

// made is an adapter on the fixtures' bases with the config and the tensors given, of which each has the values 1, 2,
// 3, ….
func made(t testing.TB, base, config string, tensors map[string]tensor.Shape) (*adapter, error) {
	dir := t.TempDir()
	var list []stored
	for name, shape := range tensors {
		x := &trainable{name: name, shape: shape}
		for i := range x.count() {
			x.value = append(x.value, float32(i+1))
		}
		list = append(list, stored{trainable: x, Tensor: &formats.Tensor{Info: tensor.Info{Name: "base_model.model." + name,
			DType: tensor.F32, Shape: shape}}})
	}
	require.NoError(t, createSynced(filepath.Join(dir, adapterTensors), func(w io.Writer) error {
		return writeTensors(t.Context(), w, list, func(x *trainable) []float32 { return x.value })
	}))
	require.NoError(t, os.WriteFile(filepath.Join(dir, adapterConfig), []byte(config), 0o666))
	c, params := openBase(t, fixtureBase(base))
	a, err := openAdapter(t.Context(), dir, storage.Options{}, params, c.Model)
	if err == nil {
		t.Cleanup(func() { a.Close() })
	}
	return a, err
}

// TestBiasesOfASavedModule has the names that PEFT gives with the biases of all modules to those of one that is trained
// whole: once more what it is, and what it was before.
func TestBiasesOfASavedModule(t *testing.T) {
	tensors := map[string]tensor.Shape{"transformer.ln_f.bias": {40}, "transformer.ln_f.weight": {40},
		"transformer.ln_f.modules_to_save.bias": {40}, "transformer.ln_f.original_module.bias": {40}}
	const config = `{"peft_type": "LORA", "r": 1, "bias": "all", "modules_to_save": ["ln_f"], "target_modules": ["none"]}`
	a, err := made(t, "tiny-gpt2", config, tensors)
	require.NoError(t, err)
	require.Len(t, a.trainables, 2)
	require.EqualValues(t, 80, a.parameters())
	require.NoError(t, a.load(t.Context(), func(_ string, n int) []float32 { return make([]float32, n) }))
	a.params["transformer.ln_f.bias"].value.value[3] = -5
	dir := filepath.Join(t.TempDir(), "saved")
	require.NoError(t, a.save(t.Context(), dir, false))
	saved := contents(t, filepath.Join(dir, adapterTensors))
	require.Len(t, saved, 4)
	for name, want := range map[string]float32{"bias": -5, "modules_to_save.bias": -5, "original_module.bias": 4} {
		x := saved["base_model.model.transformer.ln_f."+name]
		v, err := lora.Floats(&x)
		require.NoError(t, err)
		require.Equal(t, want, v[3], name)
	}
}

// TestValuesThatPEFTLeavesFrozen are in the file, and neither modules_to_save nor bias means them.
func TestValuesThatPEFTLeavesFrozen(t *testing.T) {
	tensors := map[string]tensor.Shape{"transformer.ln_f.bias": {40}, "transformer.h.0.attn.c_attn.lora_A.weight": {1, 40},
		"transformer.h.0.attn.c_attn.lora_B.weight": {120, 1}, "transformer.h.0.attn.c_attn.base_layer.bias": {120}}
	for mode, trained := range map[string]int64{"none": 160, "lora_only": 280, "all": 320} {
		a, err := made(t, "tiny-gpt2", `{"peft_type": "LORA", "r": 1, "target_modules": ["c_attn"], "bias": "`+mode+`"}`,
			tensors)
		require.NoError(t, err, mode)
		require.Equal(t, trained, a.parameters(), mode)
		require.NoError(t, a.load(t.Context(), func(_ string, n int) []float32 { return make([]float32, n) }))
		for name, n := range map[string]int{"transformer.ln_f.bias": 40, "transformer.h.0.attn.c_attn.bias": 120} {
			ad := a.params[name]
			copied := ad.copied != nil && ad.copied.Shape[0] == int64(n)
			require.True(t, copied || ad.value != nil && len(ad.value.value) == n, "%s %s", mode, name)
		}
	}
}

// TestLoraBiasWithoutABias: PEFT adds it to a layer that has none, and the model has no such parameter.
func TestLoraBiasWithoutABias(t *testing.T) {
	tensors := map[string]tensor.Shape{"model.layers.0.self_attn.q_proj.lora_A.weight": {2, 32},
		"model.layers.0.self_attn.q_proj.lora_B.weight": {32, 2}, "model.layers.0.self_attn.q_proj.lora_B.bias": {32}}
	const config = `{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "lora_bias": true}`
	a, err := made(t, "llama", config, tensors)
	require.NoError(t, err)
	ad := a.params["model.layers.0.self_attn.q_proj.bias"]
	require.EqualValues(t, 3, ad.biasScale)
	require.EqualValues(t, 32, ad.bias.count())
	delete(tensors, "model.layers.0.self_attn.q_proj.lora_B.bias")
	tensors["model.layers.0.self_attn.q_proj.base_layer.bias"] = tensor.Shape{32}
	_, err = made(t, "llama", strings.Replace(config, `"lora_bias": true`, `"bias": "all"`, 1), tensors)
	require.ErrorIs(t, err, lora.ErrBase)
}

// TestUntrainableAdapters are refused, in one line that says what was found and what is expected.
func TestUntrainableAdapters(t *testing.T) {
	for name, want := range map[string]struct {
		kind error
		says string
	}{
		"others/llama-adalora": {lora.ErrUnsupported, "peft_type is ADALORA, expected LORA"},
		"others/llama-loha":    {lora.ErrUnsupported, "peft_type is LOHA, expected LORA"},
		"others/llama-oft":     {lora.ErrUnsupported, "peft_type is OFT, expected LORA"},
		"others/llama-ia3":     {lora.ErrUnsupported, "peft_type is IA3, expected LORA"},
		"others/llama-tokens":  {lora.ErrUnsupported, "peft_type is TRAINABLE_TOKENS, expected LORA"},
		"dialects/mlx-llama":   {lora.ErrUnsupported, "an adapter of mlx, expected one of PEFT"},
		"llama/init-pissa":     {lora.ErrUnsupported, `init_lora_weights is "pissa"`},
		"llama/init-olora":     {lora.ErrUnsupported, "the base that unmerge makes"},
		"llama/grown":          {lora.ErrBase, "a vocabulary that has grown"},
	} {
		c, params := openBase(t, fixtureBase("llama"))
		_, err := openAdapter(t.Context(), filepath.Join(adapterFixtures, name), storage.Options{}, params, c.Model)
		require.ErrorIs(t, err, want.kind, name)
		require.ErrorContains(t, err, want.says)
		require.ErrorContains(t, err, name)
		require.NotContains(t, err.Error(), "\n")
	}
	c, params := openBase(t, fixtureBase("tiny-mixtral"))
	apart := filepath.Join(adapterFixtures, "tiny-mixtral/per-expert")
	_, err := openAdapter(t.Context(), apart, storage.Options{}, params, c.Model)
	require.ErrorIs(t, err, lora.ErrUnsupported)
	require.Equal(t, "Experts", hint.Of(err)[0].Option)
}

// TestWhatPEFTRefuses is refused here too: what would be trained is not what its models train.
func TestWhatPEFTRefuses(t *testing.T) {
	embedding := map[string]tensor.Shape{"model.embed_tokens.lora_embedding_A": {2, 64},
		"model.embed_tokens.lora_embedding_B": {32, 2}}
	with := func(name string, shape tensor.Shape) map[string]tensor.Shape {
		m := map[string]tensor.Shape{name: shape}
		for k, v := range embedding {
			m[k] = v
		}
		return m
	}
	for name, x := range map[string]struct {
		config  string
		tensors map[string]tensor.Shape
		kind    error
		says    string
	}{
		"lora_bias on an embedding": {`"target_modules": ["embed_tokens"], "lora_bias": true`, embedding,
			lora.ErrUnsupported, "lora_bias on an embedding"},
		"MiCA, whose B is frozen": {`"target_modules": ["embed_tokens"], "init_lora_weights": "MiCA"`, embedding,
			lora.ErrUnsupported, "init_lora_weights is mica"},
		"lora_bias with DoRA": {`"target_modules": ["embed_tokens"], "lora_bias": true, "use_dora": true`,
			with("model.embed_tokens.lora_magnitude_vector", tensor.Shape{32}), lora.ErrUnsupported, "both true"},
		"rows and factors": {`"target_modules": ["embed_tokens"], "trainable_token_indices": [1]`,
			with("model.embed_tokens.token_adapter.trainable_tokens_delta", tensor.Shape{1, 32}), lora.ErrMalformed,
			"both belong to"},
		"rows and a value": {`"target_modules": ["none"], "trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]`,
			map[string]tensor.Shape{"model.embed_tokens.weight": {64, 32},
				"model.embed_tokens.token_adapter.trainable_tokens_delta": {1, 32}}, lora.ErrUnsupported, "new value of all"},
		"DoRA on a parameter": {`"target_parameters": ["q_proj.weight"], "use_dora": true`,
			map[string]tensor.Shape{"model.layers.0.self_attn.q_proj.lora_A.weight": {2, 32},
				"model.layers.0.self_attn.q_proj.lora_B.weight":         {32, 2},
				"model.layers.0.self_attn.q_proj.lora_magnitude_vector": {32}}, lora.ErrUnsupported, "DoRA on a parameter"},
		"a tensor of no module": {`"target_modules": ["embed_tokens"]`, with("model.nothing.weight", tensor.Shape{3}),
			lora.ErrBase, "model.nothing"},
	} {
		_, err := made(t, "llama", `{"peft_type": "LORA", "r": 2, `+x.config+`}`, x.tensors)
		require.ErrorIs(t, err, x.kind, name)
		require.ErrorContains(t, err, x.says, name)
	}
}

// TestHeadWithRowsOfTheEmbedding has both at a tied head, as PEFT does, but no magnitudes.
func TestHeadWithRowsOfTheEmbedding(t *testing.T) {
	const config = `{"peft_type": "LORA", "r": 2, "target_modules": ["lm_head"], "trainable_token_indices": [3, 4]`
	tensors := map[string]tensor.Shape{"lm_head.lora_A.weight": {2, 40}, "lm_head.lora_B.weight": {128, 2},
		"model.embed_tokens.token_adapter.trainable_tokens_delta": {2, 40}}
	a, err := made(t, "tiny-qwen3", config+"}", tensors)
	require.NoError(t, err)
	head := a.params["lm_head.weight"]
	require.NotNil(t, head.plain)
	require.Same(t, a.params["model.embed_tokens.weight"].rows, head.rows)
	tensors["lm_head.lora_magnitude_vector"] = tensor.Shape{128}
	_, err = made(t, "tiny-qwen3", config+`, "use_dora": true}`, tensors)
	require.ErrorIs(t, err, lora.ErrUnsupported)
	require.ErrorContains(t, err, "a magnitude of DoRA")
}

// TestTieThatIsNotWhole is refused: PEFT would train an end that the file does not have.
func TestTieThatIsNotWhole(t *testing.T) {
	const config = `{"peft_type": "LORA", "r": 2, "ensure_weight_tying": true, "target_modules": ["embed_tokens"]}`
	one := map[string]tensor.Shape{"model.embed_tokens.lora_embedding_A": {2, 128},
		"model.embed_tokens.lora_embedding_B": {40, 2}}
	_, err := made(t, "tiny-qwen3", config, one)
	require.ErrorIs(t, err, lora.ErrMalformed)
	require.ErrorContains(t, err, "no factors for the other end")
	one["lm_head.lora_A.weight"], one["lm_head.lora_B.weight"] = tensor.Shape{2, 40}, tensor.Shape{128, 2}
	_, err = made(t, "tiny-qwen3", config, one)
	require.ErrorIs(t, err, lora.ErrMalformed)
	require.ErrorContains(t, err, "differs")
}

// TestNotFinite refuses values that nothing could be trained from.
func TestNotFinite(t *testing.T) {
	tensors := map[string]tensor.Shape{"model.norm.weight": {32}}
	a, err := made(t, "llama", `{"peft_type": "LORA", "modules_to_save": ["norm"], "target_modules": ["none"]}`, tensors)
	require.NoError(t, err)
	file := filepath.Join(a.of.Path, adapterTensors)
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	copy(b[len(b)-4:], []byte{0, 0, 0xc0, 0x7f})
	require.NoError(t, os.WriteFile(file, b, 0o666))
	err = a.load(t.Context(), func(_ string, n int) []float32 { return make([]float32, n) })
	require.ErrorIs(t, err, lora.ErrMalformed)
	require.ErrorContains(t, err, "model.norm.weight")
}

// FuzzAdapter binds adapters with any names and shapes: there is an error, or every tensor of the file is a trainable
// or a copy.
func FuzzAdapter(f *testing.F) {
	f.Add("model.layers.0.self_attn.q_proj.lora_A.weight", int8(2), int8(32),
		"model.layers.0.self_attn.q_proj.lora_B.weight", int8(32), int8(2), `"r": 2, "target_modules": ["q_proj"]`)
	f.Add("model.embed_tokens.lora_embedding_A", int8(2), int8(64),
		"model.embed_tokens.lora_embedding_B", int8(32), int8(2),
		`"r": 2, "ensure_weight_tying": true, "target_modules": ["embed_tokens"]`)
	f.Add("model.norm.weight", int8(32), int8(0), "model.norm.original_module.weight", int8(32), int8(0),
		`"modules_to_save": ["norm"]`)
	c, params := openBase(f, fixtureBase("llama"))
	f.Fuzz(func(t *testing.T, x string, x0, x1 int8, y string, y0, y1 int8, fields string) {
		dir := t.TempDir()
		var infos []stored
		for name, d := range map[string][2]int8{x: {x0, x1}, y: {y0, y1}} {
			v := &trainable{shape: tensor.Shape{int64(max(d[0], 0))}}
			if d[1] > 0 {
				v.shape = append(v.shape, int64(d[1]))
			}
			v.value = make([]float32, v.count())
			infos = append(infos, stored{trainable: v, Tensor: &formats.Tensor{
				Info: tensor.Info{Name: "base_model.model." + name, DType: tensor.F32, Shape: v.shape}}})
		}
		err := createSynced(filepath.Join(dir, adapterTensors), func(w io.Writer) error {
			return writeTensors(t.Context(), w, infos, func(x *trainable) []float32 { return x.value })
		})
		if err != nil {
			return // a name that the format cannot hold
		}
		config := []byte(`{"peft_type": "LORA", ` + fields + `}`)
		require.NoError(t, os.WriteFile(filepath.Join(dir, adapterConfig), config, 0o666))
		a, err := openAdapter(t.Context(), dir, storage.Options{}, params, c.Model)
		if err != nil {
			require.NotContains(t, err.Error(), "\n")
			return
		}
		defer a.Close()
		require.NoError(t, a.load(t.Context(), func(_ string, n int) []float32 { return make([]float32, n) }))
		for _, s := range a.stored {
			require.True(t, s.trainable != nil || s.copied || strings.Contains(s.Name, ".original_module."), s.Name)
		}
		for _, ad := range a.params { // every view lies in its tensor
			for _, l := range append(ad.experts, ad.plain) {
				if l == nil {
					continue
				}
				for _, f := range []factor{l.a, l.b} {
					require.Less(t, f.offset+(f.rows-1)*f.rowStride+(f.cols-1)*f.colStride, len(f.of.value))
				}
			}
		}
	})
}
