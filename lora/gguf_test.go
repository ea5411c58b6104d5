package lora

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	formatgguf "github.com/lorakit/lorakit/formats/gguf"
	"github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// ggufBase is a base of a class, of two layers with four heads, two of them for keys, and four experts.
func ggufBase(t fataler, class string) *Base {
	t.Helper()
	c, err := models.ParseConfig(fmt.Appendf(nil, `{"architectures": [%q], "num_hidden_layers": 2, "hidden_size": 8,
		"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 6, "num_local_experts": 4,
		"num_experts": 4, "tie_word_embeddings": false, "n_layer": 2, "n_embd": 8, "n_head": 4}`, class))
	require.NoError(t, err)
	return &Base{Path: "base", Config: c}
}

// ggufKeys are the keys of an adapter for llama, with some in place of others; nil leaves one out.
func ggufKeys(other map[string]any) formats.Metadata {
	var m formats.Metadata
	for _, p := range []formats.Pair{{Name: keyArchitecture, Value: "llama"}, {Name: keyType, Value: "adapter"},
		{Name: keyAdapterType, Value: "lora"}, {Name: keyAlpha, Value: float32(8)}} {
		if v, ok := other[p.Name]; ok {
			p.Value = v
		}
		if p.Value != nil {
			m = append(m, p)
		}
	}
	for name, v := range other {
		if m.Get(name) == nil && v != nil {
			m = append(m, formats.Pair{Name: name, Value: v})
		}
	}
	return m
}

// ggufFile writes a file of tensors whose elements count up.
func ggufFile(t fataler, dir string, m formats.Metadata, tensors ...tensor.Info) string {
	t.Helper()
	l, err := formatgguf.Format{}.Layout(context.Background(), tensors, formats.Options{SingleFile: "a.gguf", Metadata: m})
	require.NoError(t, err)
	s := l.Shards[0]
	b := make([]byte, s.Size)
	copy(b, s.Header)
	for i, at := range s.Offsets {
		info := tensors[s.Tensors[i]]
		if !info.DType.Float() {
			continue
		}
		v := make([]float32, info.Count())
		for k := range v {
			v[k] = float32(k + 1)
		}
		n, err := info.Size()
		require.NoError(t, err)
		require.NoError(t, tensor.FromFloats(b[at:at+n], info.DType, v))
	}
	path := filepath.Join(dir, "a.gguf")
	require.NoError(t, os.WriteFile(path, b, 0o644))
	return path
}

func f32(name string, shape ...int64) tensor.Info {
	return tensor.Info{Name: name, DType: tensor.F32, Shape: shape}
}

// ggufPair are the factors of a tensor of the base.
func ggufPair(name string, in, rank, out int64) []tensor.Info {
	return []tensor.Info{f32(name+".lora_a", rank, in), f32(name+".lora_b", out, rank)}
}

func ggufFactors(of string, a, b tensor.Shape) []tensor.Info {
	return []tensor.Info{f32("blk.0."+of+".weight.lora_a", a...), f32("blk.0."+of+".weight.lora_b", b...)}
}

// TestGGUFRefused opens files that are no adapters, or broken ones.
func TestGGUFRefused(t *testing.T) {
	q := ggufPair("blk.0.attn_q.weight", 8, 2, 16)
	for name, x := range map[string]struct {
		keys    map[string]any
		tensors []tensor.Info
		class   string
		kind    error
		says    string
	}{
		"no type": {map[string]any{keyType: nil}, q,
			"", ErrMalformed, `key "general.type": malformed adapter: found none, expected adapter`},
		"a model": {map[string]any{keyType: "model"}, q,
			"", ErrUnsupported, `key "general.type": not supported: found "model", expected adapter`},
		"no adapter.type": {map[string]any{keyAdapterType: nil}, q,
			"", ErrMalformed, `key "adapter.type": malformed adapter: found none, expected lora`},
		"another type": {map[string]any{keyAdapterType: "ia3"}, q,
			"", ErrUnsupported, `key "adapter.type": not supported: found "ia3", expected lora`},
		"a number for it": {map[string]any{keyAdapterType: uint32(3)}, q,
			"", ErrUnsupported, `key "adapter.type": not supported: found "3"`},
		"a control vector": {map[string]any{keyArchitecture: "controlvector", keyType: nil, keyAdapterType: nil},
			[]tensor.Info{f32("direction.1", 8)},
			"", ErrUnsupported, "it is a control vector"},
		"a control vector 2": {map[string]any{keyAdapterType: "control_vector"}, q,
			"", ErrUnsupported, "it is a control vector"},
		"no architecture": {map[string]any{keyArchitecture: uint32(1)}, q,
			"", ErrMalformed, `key "general.architecture"`},
		"another's": {map[string]any{keyArchitecture: "qwen2"}, q,
			"", ErrBase, `key "general.architecture": another base: found "qwen2", expected llama`},
		"alpha no number": {map[string]any{keyAlpha: "8"}, q,
			"", ErrMalformed, `key "adapter.lora.alpha": malformed adapter: found a string`},
		"alpha a double": {map[string]any{keyAlpha: 8.0}, q,
			"", ErrMalformed, `found a float64, expected a float32`},
		"alpha no finite": {map[string]any{keyAlpha: float32(math.Inf(1))}, q,
			"", ErrMalformed, `found +Inf, expected a finite number`},
		"alpha NaN": {map[string]any{keyAlpha: float32(math.NaN())}, q,
			"", ErrMalformed, `found NaN, expected a finite number`},
		"tokens of text": {map[string]any{keyInvocation: "x"}, q,
			"", ErrMalformed, `key "adapter.alora.invocation_tokens"`},
		"a number of a task": {map[string]any{keyTaskName: uint32(1)}, q,
			"", ErrMalformed, `key "adapter.lora.task_name": malformed adapter: found a uint32`},
		"one side": {nil, q[:1],
			"", ErrMalformed, `tensor "blk.0.attn_q.weight.lora_a": malformed adapter: found no "blk.0.attn_q.weight.lora_b" beside it`},
		"the other": {nil, q[1:],
			"", ErrMalformed, `tensor "blk.0.attn_q.weight.lora_b": malformed adapter: found no "blk.0.attn_q.weight.lora_a"`},
		"ranks apart": {nil, []tensor.Info{q[0], f32("blk.0.attn_q.weight.lora_b", 16, 3)},
			"", ErrMalformed, `lora_a with the shape [2, 8] and lora_b [16, 3]`},
		"vectors": {nil, ggufFactors("attn_q", tensor.Shape{8}, tensor.Shape{16}),
			"", ErrMalformed, "expected (rank, in) and (out, rank)"},
		"four dimensions": {nil, ggufFactors("attn_q", tensor.Shape{1, 1, 2, 8}, tensor.Shape{1, 1, 16, 2}),
			"", ErrMalformed, "expected (rank, in) and (out, rank)"},
		"stacks apart": {nil, ggufFactors("ffn_up_exps", tensor.Shape{4, 2, 8}, tensor.Shape{3, 16, 2}),
			"MixtralForCausalLM", ErrMalformed, "expected (rank, in) and (out, rank)"},
		"too few experts": {nil, ggufFactors("ffn_up_exps", tensor.Shape{3, 2, 8}, tensor.Shape{3, 16, 2}),
			"MixtralForCausalLM", formats.ErrMalformed, "found a stack of 3, expected a stack of 4"},
		"a stack of one": {nil, ggufPair("blk.0.ffn_up_exps.weight", 8, 2, 16),
			"MixtralForCausalLM", formats.ErrMalformed, "found one matrix, expected a stack of 4"},
		"no stack": {nil, ggufFactors("attn_q", tensor.Shape{4, 2, 8}, tensor.Shape{4, 16, 2}),
			"", formats.ErrMalformed, "found a stack of 4, expected one matrix"},
		"half an embedding": {nil, []tensor.Info{f32("token_embd.weight.lora_a", 2, 6),
			f32("token_embd.weight.lora_b", 8, 2)},
			"", ErrMalformed, "expected (rows, rank) and (width, rank) of an embedding"},
		"a layer too many": {nil, ggufPair("blk.2.attn_q.weight", 8, 2, 16),
			"", formats.ErrMalformed, "found layer 2, expected layers below 2"},
		"no tensor of it": {nil, ggufPair("blk.0.attn_qkv.weight", 8, 2, 16),
			"", formats.ErrUnsupported, "found a tensor that LlamaForCausalLM has no place for"},
		"heads that do not": {nil, ggufPair("blk.0.attn_q.weight", 8, 2, 12),
			"", formats.ErrMalformed, "found the shape [12, 1], expected 4 heads of an even number of rows"},
		"a bias": {nil, append(slices.Clone(q), f32("blk.0.attn_q.bias", 16)),
			"", ErrUnsupported, `tensor "blk.0.attn_q.bias": not supported: found it with the shape [16]`},
		"a matrix": {nil, append(slices.Clone(q), f32("blk.0.attn_k.weight", 8, 8)),
			"", ErrUnsupported, `tensor "blk.0.attn_k.weight": not supported`},
		"a norm of none": {nil, append(slices.Clone(q), f32("blk.0.attn_q_norm.weight", 8)),
			"", formats.ErrUnsupported, "has no place for"},
		"a norm with 1": {map[string]any{keyArchitecture: "gemma2"}, []tensor.Info{f32("blk.0.attn_norm.weight", 8)},
			"Gemma2ForCausalLM", formats.ErrUnsupported, "a norm that has 1 added in GGUF"},
		"a part turned": {map[string]any{keyArchitecture: "deepseek2"}, ggufPair("blk.0.attn_v_b.weight", 8, 2, 16),
			"DeepseekV3ForCausalLM", formats.ErrUnsupported, "two parts"},
		"integers": {nil, []tensor.Info{q[0], {Name: q[1].Name, DType: tensor.I32, Shape: q[1].Shape}},
			"", ErrMalformed, "its type is I32"},
		"no tensors": {nil, nil, "", ErrMalformed, "it has no tensors"},
	} {
		t.Run(name, func(t *testing.T) {
			path := ggufFile(t, t.TempDir(), ggufKeys(x.keys), x.tensors...)
			if x.class == "" {
				x.class = "LlamaForCausalLM"
			}
			_, err := Open(path, OpenOptions{Base: ggufBase(t, x.class)})
			require.ErrorContains(t, err, x.says)
			require.ErrorIs(t, err, x.kind)
			checkError(t, err, filepath.Dir(path))
		})
	}
}

// TestGGUFModules reads factors as those of the model's modules.
func TestGGUFModules(t *testing.T) {
	tensors := append(ggufPair("blk.1.attn_q.weight", 8, 2, 16), ggufPair("output.weight", 8, 3, 6)...)
	tensors = append(tensors, f32("token_embd.weight.lora_a", 6, 2), f32("token_embd.weight.lora_b", 8, 2),
		f32("blk.0.attn_norm.weight", 8))
	a, err := Open(ggufFile(t, t.TempDir(), ggufKeys(nil), tensors...), OpenOptions{Base: ggufBase(t, "LlamaForCausalLM")})
	require.NoError(t, err)
	defer a.Close()
	require.Equal(t, GGUF, a.Dialect)
	require.Equal(t, "base", a.Config.Base)
	var names []string
	for _, m := range a.Modules {
		names = append(names, m.String())
	}
	require.Equal(t, []string{"lm_head", "model.embed_tokens", "model.layers.0.input_layernorm",
		"model.layers.1.self_attn.q_proj"}, names)
	require.Equal(t, Embedding, a.Modules[1].Form)
	require.Equal(t, Replace, a.Modules[2].Form)
	require.Equal(t, 3, a.Modules[0].Rank)
	require.Equal(t, 8.0, a.Modules[0].Alpha)
	require.Equal(t, 8.0/3, a.Modules[0].Scaling)

	// Row 2i + s of a head in GGUF is row 2s + i of it in the model.
	b, err := a.Modules[3].B.Read()
	require.NoError(t, err)
	for head := range 4 {
		for i := range 2 {
			for s := range 2 {
				require.Equal(t, float32(2*(4*head+2*i+s)+1), b.Data[(4*head+2*s+i)*b.RowStride])
			}
		}
	}
	// Turned as PEFT has it: column v is the row of a token.
	e, err := a.Modules[1].A.Read()
	require.NoError(t, err)
	require.Equal(t, []float32{1, 3, 5, 7, 9, 11}, []float32{e.Data[0], e.Data[e.ColStride], e.Data[2*e.ColStride],
		e.Data[3*e.ColStride], e.Data[4*e.ColStride], e.Data[5*e.ColStride]})
}

// TestGGUFWithoutBase opens an adapter without its base: it can be looked at, and nothing else.
func TestGGUFWithoutBase(t *testing.T) {
	tensors := append(ggufPair("blk.0.attn_q.weight", 8, 2, 16), f32("blk.0.ffn_up_exps.weight.lora_a", 4, 2, 8),
		f32("blk.0.ffn_up_exps.weight.lora_b", 4, 16, 2))
	path := ggufFile(t, t.TempDir(), ggufKeys(nil), tensors...)
	require.True(t, IsAdapter(path))
	a, err := Open(path, OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	require.Equal(t, []string{"blk.0.attn_q", "blk.0.ffn_up_exps"}, a.Names())
	parts, err := a.Parts()
	require.NoError(t, err)
	require.Len(t, parts, 2)
	const says = "only the config.json of its base tells what they are"
	for _, to := range Dialects() {
		_, err = a.Encode(EncodeOptions{To: to, Base: ggufBase(t, "LlamaForCausalLM")})
		require.ErrorContains(t, err, says)
	}
	_, err = Resize(t.Context(), a, 1, 0, func(Trained) error { return nil })
	require.ErrorContains(t, err, says)
	err = Combine(t.Context(), []Weighted{{Adapter: a, Weight: 1}}, CombineOptions{Type: "linear"},
		func(Trained) error { return nil })
	require.ErrorContains(t, err, says)
	_, err = Bind([]Weighted{{Adapter: a, Weight: 1}}, nil, &models.Model{})
	require.ErrorContains(t, err, says)
}

// TestGGUFAlpha reads an alpha of 0, or none, as llama.cpp does: it does not scale.
func TestGGUFAlpha(t *testing.T) {
	for name, keys := range map[string]map[string]any{"none": {keyAlpha: nil}, "zero": {keyAlpha: float32(0)}} {
		path := ggufFile(t, t.TempDir(), ggufKeys(keys), ggufPair("blk.0.attn_q.weight", 8, 2, 16)...)
		a, err := Open(path, OpenOptions{Base: ggufBase(t, "LlamaForCausalLM")})
		require.NoError(t, err, name)
		defer a.Close()
		require.Equal(t, 1.0, a.Modules[0].Scaling, name)
		require.Equal(t, 2.0, a.Modules[0].Alpha, name)
		require.Equal(t, name == "none", len(a.Notices) == 1 && strings.Contains(a.Notices[0], "found no adapter.lora.alpha"))
	}
	// The shortest number that is the same in float32.
	path := ggufFile(t, t.TempDir(), ggufKeys(map[string]any{keyAlpha: float32(0.1)}),
		ggufPair("blk.0.attn_q.weight", 8, 2, 16)...)
	a, err := Open(path, OpenOptions{Base: ggufBase(t, "LlamaForCausalLM")})
	require.NoError(t, err)
	defer a.Close()
	require.Equal(t, 0.1, a.Modules[0].Alpha)
}

// TestGGUFBlocks reads factors in blocks, and refuses scales that are no numbers.
func TestGGUFBlocks(t *testing.T) {
	blocks := tensor.Info{Name: "blk.0.ffn_up.weight.lora_a", Shape: tensor.Shape{2, 32}, Encoding: ggml.Q8_0.Encoding()}
	path := ggufFile(t, t.TempDir(), ggufKeys(nil), blocks, f32("blk.0.ffn_up.weight.lora_b", 4, 2))
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	values := make([]float32, 64)
	for i := range values {
		values[i] = float32(i%32 - 16)
	}
	open := func(spoil bool) ([]float32, error) {
		data := b[len(b)-32-96:] // blocks of 68 bytes, padded, before 32 of the other factor
		require.Equal(t, -1, ggml.Q8_0.Quantize(data[:68], values))
		if spoil {
			data[34], data[35] = 0, 0x7c
		}
		require.NoError(t, os.WriteFile(path, b, 0o644))
		a, err := Open(path, OpenOptions{Base: ggufBase(t, "LlamaForCausalLM")})
		require.NoError(t, err)
		defer a.Close()
		return Floats(a.Modules[0].A.T)
	}
	got, err := open(false)
	require.NoError(t, err)
	for i, v := range got {
		require.InDelta(t, values[i], v, 0.1)
	}
	_, err = open(true)
	require.ErrorIs(t, err, ErrMalformed)
	require.ErrorContains(t, err, `lora_a": malformed adapter: found a scale that is a NaN or an infinity in block 1 of q8_0`)
}

// FuzzOpenGGUF opens adapters of any names and shapes, with a base and without.
func FuzzOpenGGUF(f *testing.F) {
	for _, class := range []string{"LlamaForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel", "GptOssForCausalLM",
		"DeepseekV3ForCausalLM", "Gemma3ForCausalLM"} {
		for _, name := range []string{"blk.0.attn_q.weight", "blk.1.ffn_gate_exps.weight", "token_embd.weight",
			"output.weight", "blk.0.attn_norm.weight", "blk.0.attn_k_b.weight", "blk..weight", ".weight", "blk.0.attn_q"} {
			f.Add(class, name, byte(2), byte(8), byte(16), byte(0), byte(0), float32(8))
			f.Add(class, name, byte(2), byte(4), byte(6), byte(4), byte(1), float32(0))
			f.Add(class, name, byte(2), byte(4), byte(6), byte(4), byte(0), float32(1))
		}
	}
	f.Fuzz(func(t *testing.T, class, name string, r, in, out, experts, form byte, alpha float32) {
		if name == "" || len(name) > 56 || strings.ContainsRune(name, 0) || !utf8.ValidString(name) {
			return
		}
		c, err := models.ParseConfig(fmt.Appendf(nil, `{"architectures": [%q], "num_hidden_layers": 2, "hidden_size": 8,
			"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 6, "num_local_experts": 4,
			"n_layer": 2, "n_embd": 8, "n_head": 4}`, class))
		if err != nil {
			return
		}
		shape := func(dims ...byte) (s tensor.Shape) {
			if experts > 0 {
				s = append(s, int64(experts%8))
			}
			for _, d := range dims {
				s = append(s, int64(d%32))
			}
			if form%4 == 3 {
				s = s[1:]
			}
			return s
		}
		tensors := []tensor.Info{{Name: name + ".lora_a", DType: tensor.F32, Shape: shape(r, in)},
			{Name: name + ".lora_b", DType: tensor.F16, Shape: shape(out, r+form%2)}}
		if form%4 == 2 {
			tensors[1].Name = name
		}
		for _, x := range tensors {
			if (formatgguf.Format{}).Holds(x) != nil {
				return
			}
		}
		arch := "llama"
		path := ggufFile(t, t.TempDir(), ggufKeys(map[string]any{keyAlpha: alpha, keyArchitecture: arch}), tensors...)
		for _, base := range []*Base{nil, {Path: "base", Config: c}} {
			a, err := Open(path, OpenOptions{Base: base})
			if err != nil {
				checkError(t, err, "")
				continue
			}
			checkOpened(t, a)
			if base != nil {
				_, err = a.Encode(EncodeOptions{To: PEFT})
				if err != nil {
					checkError(t, err, path)
				}
			}
			require.NoError(t, a.Close())
		}
	})
}

// TestGGUFWriteRefused writes what a GGUF adapter has no place for.
func TestGGUFWriteRefused(t *testing.T) {
	q := map[string][]int64{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": {2, 8},
		"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": {16, 2}}
	pair := func(module string, a, b []int64) map[string][]int64 {
		return map[string][]int64{"base_model.model." + module + ".lora_A.weight": a,
			"base_model.model." + module + ".lora_B.weight": b}
	}
	const lora = `{"peft_type": "LORA", "r": 2, "lora_alpha": 4`
	for name, x := range map[string]struct {
		config, class string
		tensors       map[string][]int64
		says          string
	}{
		"an expert alone": {lora + `}`, "MixtralForCausalLM",
			pair("model.layers.0.block_sparse_moe.experts.2.w1", []int64{2, 8}, []int64{16, 2}),
			`tensor "blk.0.ffn_gate_exps.weight": not supported: found 1 of 4 experts, and not number 0`},
		"an expert too many": {lora + `}`, "MixtralForCausalLM",
			pair("model.layers.0.block_sparse_moe.experts.4.w1", []int64{2, 8}, []int64{16, 2}), "expected numbers below 4"},
		"no layer": {lora + `}`, "", pair("model.layers.7.self_attn.q_proj", []int64{2, 8}, []int64{16, 2}),
			"found layer 7, expected layers below 2"},
		"no module": {lora + `}`, "", pair("model.layers.0.self_attn.qkv", []int64{2, 8}, []int64{16, 2}),
			"found a parameter that LlamaForCausalLM has no place for"},
		"a vision tower": {lora + `}`, "", pair("vision_tower.layers.0.self_attn.q_proj", []int64{2, 8}, []int64{16, 2}),
			"found a part of the model that has no place"},
		"heads that do not": {lora + `}`, "", pair("model.layers.0.self_attn.q_proj", []int64{2, 8}, []int64{12, 2}),
			"expected 4 heads"},
		"a class": {lora + `}`, "T5Model", q, `found the class "T5Model"`},
		"a string": {lora + `, "invocation_string": "x"}`, "", q,
			"only a tokenizer makes tokens of, and no alora_invocation_tokens"},
		"no token":     {lora + `, "alora_invocation_tokens": [-1]}`, "", q, "has -1, expected a token"},
		"PiSSA":        {lora + `, "init_lora_weights": "pissa"}`, "", q, "init_lora_weights"},
		"a huge alpha": {`{"peft_type": "LORA", "r": 2, "lora_alpha": 1e300}`, "", q, "which float32 cannot hold"},
		"LoHa": {`{"peft_type": "LOHA", "r": 2, "alpha": 4}`, "", map[string][]int64{
			"base_model.model.q.hada_w1_a": {8, 2}, "base_model.model.q.hada_w1_b": {2, 8},
			"base_model.model.q.hada_w2_a": {8, 2}, "base_model.model.q.hada_w2_b": {2, 8},
		}, `tensor "base_model.model.q.hada_w1_a": not supported: LOHA has no place`},
		"IA3": {`{"peft_type": "IA3", "feedforward_modules": [], "target_modules": ["q"]}`, "",
			map[string][]int64{"base_model.model.q.ia3_l": {8, 1}}, `tensor "base_model.model.q.ia3_l": not supported: IA3`},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := Open(folder(t, x.config, x.tensors), OpenOptions{Conditional: true})
			require.NoError(t, err)
			defer a.Close()
			if x.class == "" {
				x.class = "LlamaForCausalLM"
			}
			_, err = a.Encode(EncodeOptions{To: GGUF, Base: ggufBase(t, x.class)})
			require.ErrorContains(t, err, x.says)
		})
	}
	a, err := Open(folder(t, lora+"}", q), OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	_, err = a.Encode(EncodeOptions{To: GGUF})
	require.ErrorContains(t, err, "no base is given")
	_, err = a.Encode(EncodeOptions{To: GGUF, Base: &Base{}})
	require.ErrorContains(t, err, "found no config.json")
	_, err = a.Encode(EncodeOptions{To: GGUF, Base: ggufBase(t, "LlamaForCausalLM"), Type: "q4_k"})
	require.ErrorContains(t, err, `type "q4_k"; known are f32, f16, bf16, q8_0`)
}

// TestGGUFScalings writes the alpha that a config has, times the root of its rank with rsLoRA, and has lora_b take what
// differs.
func TestGGUFScalings(t *testing.T) {
	tensors := map[string][]int64{}
	for layer, rank := range []int64{4, 2} {
		at := fmt.Sprintf("base_model.model.model.layers.%d.self_attn.v_proj.", layer)
		tensors[at+"lora_A.weight"], tensors[at+"lora_B.weight"] = []int64{rank, 8}, []int64{8, rank}
	}
	const ranks = `{"peft_type": "LORA", "r": 4, "lora_alpha": 6, "rank_pattern": {"layers.1.self_attn.v_proj": 2}`
	for config, want := range map[string][3]float64{
		ranks + `}`:                     {6, 1, 1},
		ranks + `, "use_rslora": true}`: {12, 1, math.Sqrt(2) / 2},
		ranks + `, "alpha_pattern": {"layers.0.self_attn.v_proj": 3}}`: {6, 0.5, 1},
	} {
		a, err := Open(folder(t, config, tensors), OpenOptions{})
		require.NoError(t, err)
		defer a.Close()
		e, err := a.Encode(EncodeOptions{To: GGUF, Base: ggufBase(t, "LlamaForCausalLM")})
		require.NoError(t, err)
		require.Equal(t, float32(want[0]), e.Metadata.Get(keyAlpha), config)
		factors := map[string]float64{}
		for _, o := range e.Tensors {
			factors[o.Name] = o.Scale
		}
		require.InDelta(t, want[1], factors["blk.0.attn_v.weight.lora_b"], 1e-15, config)
		require.InDelta(t, want[2], factors["blk.1.attn_v.weight.lora_b"], 1e-15, config)
		require.Equal(t, 1.0, factors["blk.1.attn_v.weight.lora_a"], config)
	}

	// llama.cpp takes an alpha of 0 for the rank, so that B has to be 0.
	a, err := Open(folder(t, strings.Replace(ranks, "6", "0", 1)+"}", tensors), OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	e, err := a.Encode(EncodeOptions{To: GGUF, Base: ggufBase(t, "LlamaForCausalLM")})
	require.NoError(t, err)
	require.NotZero(t, e.Metadata.Get(keyAlpha))
	for _, o := range e.Tensors {
		require.Equal(t, strings.HasSuffix(o.Name, "lora_a"), o.Scale == 1, o.Name)
		require.Equal(t, strings.HasSuffix(o.Name, "lora_b"), o.Scale == 0, o.Name)
	}
}

// TestGGUFCutEmbedding writes the factors of those rows of an embedding alone that have tokens, and puts zeros in the
// place of the others on the way back.
func TestGGUFCutEmbedding(t *testing.T) {
	base := ggufBase(t, "Gemma3ForCausalLM")
	base.Vocabulary = func(string) (int64, error) { return 4, nil }
	a, err := Open(folder(t, `{"peft_type": "LORA", "r": 2}`, map[string][]int64{
		"base_model.model.model.embed_tokens.lora_embedding_A": {2, 6},
		"base_model.model.model.embed_tokens.lora_embedding_B": {8, 2}}), OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	e, err := a.Encode(EncodeOptions{To: GGUF, Base: base})
	require.NoError(t, err)
	require.Equal(t, tensor.Shape{4, 2}, e.Tensors[0].Shape)
	require.Equal(t, tensor.Shape{8, 2}, e.Tensors[1].Shape)

	path := ggufFile(t, t.TempDir(), ggufKeys(map[string]any{keyArchitecture: "gemma3"}),
		f32("token_embd.weight.lora_a", 4, 2), f32("token_embd.weight.lora_b", 8, 2))
	b, err := Open(path, OpenOptions{Base: base})
	require.NoError(t, err)
	defer b.Close()
	m, err := b.Modules[0].A.Read()
	require.NoError(t, err)
	require.Equal(t, []int{2, 6}, []int{m.Rows, m.Cols})
	for j, want := range []float32{1, 3, 5, 7, 0, 0} {
		require.Equal(t, want, m.Data[j*m.ColStride])
	}
}
