package lora

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// copied puts a file of the fixtures into a folder.
func copied(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "fixtures", filepath.FromSlash(from)))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(to, b, 0o644))
}

// TestBeside opens adapters in whose folders other files lie, and binds them to a base. Whatever was trained is
// bound, told of, or refused with the name of its file.
func TestBeside(t *testing.T) {
	t.Parallel()
	const q, head = prefix + "model.layers.0.self_attn.q_proj.", "lm_head.weight"
	write := func(name string, shapes map[string][]int64) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
			writeTensors(t, filepath.Join(dir, name), shapes)
		}
	}
	raw := func(name, content string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644))
		}
	}
	pickle := func(name, from string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) { copied(t, from, filepath.Join(dir, name)) }
	}
	for name, x := range map[string]struct {
		make   func(t *testing.T, dir string)
		opens  string   // the error of Open
		binds  string   // the error of Bind
		note   string   // part of a notice
		values []string // the parameters that get a new value
	}{
		"values by PEFT's names": {write("x.safetensors", map[string][]int64{prefix + "model.norm.weight": {4}}), "", "",
			"x.safetensors was trained with the adapter: what it holds, \"model.norm\"", []string{"model.norm.weight"}},
		"values by the model's names": {write("mm.safetensors", map[string][]int64{"model.norm.weight": {4}, head: {6, 4}}),
			"", "", "mm.safetensors", []string{head, "model.norm.weight"}},
		"a file whose ending is in capitals": {write("X.SAFETENSORS", map[string][]int64{"model.norm.weight": {4}}), "", "",
			"X.SAFETENSORS was trained with the adapter", []string{"model.norm.weight"}},
		"values within PEFT's layers": {write("x.safetensors", map[string][]int64{
			prefix + "lm_head.modules_to_save.default.weight": {6, 4}, prefix + "model.norm.base_layer.weight": {4}}),
			"", "", "x.safetensors", []string{head, "model.norm.weight"}},
		"a value within another wrapper": {write("x.safetensors", map[string][]int64{"vlm.model.norm.weight": {4}}),
			"", "", "x.safetensors", []string{"model.norm.weight"}},
		"a file of the other kind": {write("x.ckpt", map[string][]int64{"model.norm.weight": {4}}),
			"", "", "x.ckpt", []string{"model.norm.weight"}},
		"a pickle without tensors": {pickle("non_lora_trainables.bin", "pytorch/empty.pt"), "", "", "", nil},
		"a pickle that runs code": {pickle("head.bin", "pytorch/eval.pt"),
			"head.bin: not supported: weights beside the adapter", "", "", nil},
		"a value head": {write("value_head.safetensors", map[string][]int64{"v_head.summary.weight": {1, 4}}), "",
			`value_head.safetensors: tensor "v_head.summary.weight": module "v_head.summary": another base: the base has no ` +
				`such module`, "", nil},
		"a projector that the base has not": {write("mm_projector.safetensors", map[string][]int64{
			prefix + "model.mm_projector.0.weight": {4, 4}}), "", "the base has no such module", "", nil},
		"an end that is only alike": {write("x.safetensors", map[string][]int64{"tower.final.norm.weight": {4}}), "",
			"the base has no such module", "", nil},
		"added rows": {write("new_embeddings.safetensors", map[string][]int64{"embed_tokens.weight": {2, 4}}), "",
			"new_embeddings.safetensors", "", nil},
		"a tensor of no module": {write("new_embeddings.safetensors", map[string][]int64{"input_embeddings": {2, 4}}),
			"names no module", "", "", nil},
		"another shape": {write("x.safetensors", map[string][]int64{"model.norm.weight": {5}}), "",
			"has the shape [5], expected [4]", "", nil},
		"another adapter": {write("lora.safetensors", map[string][]int64{q + "lora_A.weight": {2, 4}}),
			"holds an adapter too", "", "", nil},
		"another adapter, of kohya": {write("lora.safetensors", map[string][]int64{"lora_te_x.lora_up.weight": {2, 4}}),
			"holds an adapter too", "", "", nil},
		"a model": {write("model.safetensors", map[string][]int64{"model.layers.0.self_attn.q_proj.weight": {4, 4}}),
			"", "", "no part of the adapter", nil},
		"half a file": {raw("value_head.safetensors", "{"), "value_head.safetensors", "", "", nil},
		"a file that was not fetched": {raw("value_head.bin", "version https://git-lfs.github.com/spec/v1\nsize 1\n"),
			"value_head.bin", "", "", nil},
		"no weights":         {raw("tokenizer.bin", "words"), "", "", "tokenizer.bin is no file of weights", nil},
		"for other programs": {raw("model-q4.gguf", "GGUF"), "", "", "for other programs", nil},
		"both of PEFT's": {pickle("adapter_model.bin", "pytorch/eval.pt"), "", "",
			"adapter_model.bin is not looked at: PEFT takes adapter_model.safetensors", nil},
		"the states of a trainer": {func(t *testing.T, dir string) {
			for _, name := range []string{"optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "rng_state.pth",
				"rng_state_0.pth", "training_args.bin", "scaler.pt", "sampler.bin", "pytorch_model_fsdp.bin",
				"random_states_0.pkl", "trainer_state.json"} {
				raw(name, "no pickle")(t, dir)
			}
			raw("global_step7/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "PK")(t, dir)
			raw("global_step7/mp_rank_00_model_states.pt", "PK")(t, dir)
			raw("._model.safetensors", "left by a Mac")(t, dir)
		}, "", "", "", nil},
		"adapters of other names": {func(t *testing.T, dir string) {
			for _, name := range []string{"reference", "checkpoint-10"} {
				raw(name+"/"+configName, plainConfig)(t, dir)
				raw(name+"/"+adapterFiles[0], "")(t, dir)
			}
		}, "", "", `beside the adapter is "checkpoint-10", "reference": other adapters`, nil},
		"weights in a folder": {raw("2_Dense/model.safetensors", ""), "", "",
			`"2_Dense": weights, which PEFT does not load`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := models.ParseConfig([]byte(`{"architectures": ["LlamaForCausalLM"]}`))
			require.NoError(t, err)
			m, _ := models.Load(c)
			var targets []Target
			for name, shape := range map[string]tensor.Shape{"model.embed_tokens.weight": {6, 4}, head: {6, 4},
				"model.layers.0.self_attn.q_proj.weight": {4, 4}, "model.layers.0.input_layernorm.weight": {4},
				"model.norm.weight": {4}} {
				targets = append(targets, Target{Name: name, Shape: shape, Role: m.Tensor(name, shape)})
			}
			dir := folder(t, plainConfig, map[string][]int64{q + "lora_A.weight": {2, 4}, q + "lora_B.weight": {4, 2}})
			x.make(t, dir)
			a, err := Open(dir, OpenOptions{})
			if x.opens != "" {
				require.ErrorContains(t, err, x.opens)
				require.ErrorIs(t, err, ErrUnsupported)
				checkError(t, err, dir)
				return
			}
			require.NoError(t, err)
			defer a.Close()
			if x.note == "" && x.binds == "" {
				require.Empty(t, a.Notices)
			}
			require.Contains(t, strings.Join(a.Notices, "\n"), x.note)
			b, err := Bind([]Weighted{{a, 1}}, targets, m)
			if x.binds != "" {
				require.ErrorContains(t, err, x.binds)
				checkError(t, err, dir)
				require.Contains(t, err.Error(), "take the file out of the folder")
				return
			}
			require.NoError(t, err)
			var values []string
			for i, c := range b.Changes {
				if c != nil && c.Value != nil {
					values = append(values, targets[i].Name)
				}
			}
			slices.Sort(values)
			require.Equal(t, x.values, values)
		})
	}
}

// A model beside an adapter is its base, or nobody knows what it is.
func TestModelBeside(t *testing.T) {
	const q = prefix + "model.layers.0.self_attn.q_proj."
	dir := folder(t, plainConfig, map[string][]int64{q + "lora_A.weight": {2, 4}, q + "lora_B.weight": {4, 2}})
	base := filepath.Join(dir, "model.safetensors")
	writeTensors(t, base, map[string][]int64{"model.layers.0.self_attn.q_proj.weight": {4, 4}})
	a, err := Open(dir, OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	require.NoError(t, a.CheckBeside("elsewhere", base))
	err = a.CheckBeside("elsewhere")
	require.ErrorIs(t, err, ErrUnsupported)
	require.ErrorContains(t, err, "whether the adapter is in it already is not known")
	checkError(t, err, base)
	require.NoError(t, os.Remove(base))
	require.ErrorIs(t, a.CheckBeside(), fs.ErrNotExist)
}

// A model is known by the parameters that its tensors are for, under whatever names; the base itself brings no new
// values.
func TestModelBesideUnderOtherNames(t *testing.T) {
	const q = prefix + "model.layers.0.self_attn.q_proj."
	dir := folder(t, plainConfig, map[string][]int64{q + "lora_A.weight": {2, 4}, q + "lora_B.weight": {4, 2}})
	base := filepath.Join(dir, "model.safetensors")
	writeTensors(t, base, map[string][]int64{"vlm.model.layers.0.self_attn.q_proj.weight": {4, 4}})
	c, err := models.ParseConfig([]byte(`{"architectures": ["LlamaForCausalLM"]}`))
	require.NoError(t, err)
	m, _ := models.Load(c)
	name, shape := "model.layers.0.self_attn.q_proj.weight", tensor.Shape{4, 4}
	targets := []Target{{Name: name, Shape: shape, Role: m.Tensor(name, shape)}}
	a, err := Open(dir, OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	_, err = Bind([]Weighted{{a, 1}}, targets, m)
	require.ErrorContains(t, err, "whether the adapter is in it already is not known")
	checkError(t, err, base)
	require.NoError(t, a.CheckBeside(base))
	require.Empty(t, a.Notices)
	require.Equal(t, []string{configName, adapterFiles[0]}, a.Files)
	_, err = Bind([]Weighted{{a, 1}}, targets, m)
	require.NoError(t, err)
}

// Two files may bring the same value, and must not bring two.
func TestBesideTwice(t *testing.T) {
	shapes := map[string][]int64{prefix + "model.q.lora_A.weight": {2, 4}, prefix + "model.q.lora_B.weight": {4, 2},
		prefix + "score.weight": {3, 4}}
	dir := folder(t, `{"peft_type": "LORA", "r": 2, "modules_to_save": ["score"]}`, shapes)
	writeTensors(t, filepath.Join(dir, "head.safetensors"), map[string][]int64{"score.weight": {3, 4}})
	a, err := Open(dir, OpenOptions{})
	require.NoError(t, err)
	require.Len(t, a.Modules, 2)
	require.Empty(t, a.Notices)
	require.NoError(t, a.Close())
	writeTensors(t, filepath.Join(dir, "head.safetensors"), map[string][]int64{"score.weight": {3, 5}})
	_, err = Open(dir, OpenOptions{})
	require.ErrorContains(t, err, `head.safetensors: not supported: tensor "score.weight": it differs from `+
		`"base_model.model.score.weight"`)
}
