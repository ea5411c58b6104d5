package lora

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	_ "github.com/lorakit/lorakit/formats/pytorch"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// writeTensors writes a safetensors file of small numbers.
func writeTensors(t fataler, path string, shapes map[string][]int64) {
	t.Helper()
	header := map[string]any{}
	var data []byte
	for _, name := range slices.Sorted(maps.Keys(shapes)) {
		n := int64(1)
		for _, d := range shapes[name] {
			n *= d
		}
		from := len(data)
		for i := range n {
			data = binary.LittleEndian.AppendUint32(data, 0x3f000000+uint32(i)<<8) // 0.5 and more
		}
		header[name] = map[string]any{"dtype": "F32", "shape": append([]int64{}, shapes[name]...),
			"data_offsets": []int{from, len(data)}}
	}
	h, err := json.Marshal(header)
	require.NoError(t, err)
	b := append(binary.LittleEndian.AppendUint64(nil, uint64(len(h))), h...)
	require.NoError(t, os.WriteFile(path, append(b, data...), 0o644))
}

// everyWay converts an adapter to all that it could be, and holds what is to be written against what was promised.
func everyWay(t fataler, a *Adapter, path string) (made int) {
	t.Helper()
	for _, to := range Dialects() {
		for _, experts := range ExpertChoices() {
			e, err := a.Encode(EncodeOptions{To: to, Experts: experts})
			if err != nil {
				checkError(t, err, path)
				continue
			}
			made++
			for _, m := range a.Modules { // one without would be lost
				require.True(t, m.A.T == nil || m.Rank > 0 || to == PEFT && experts == keepExperts, m.String())
			}
			names := map[string]bool{}
			var w Writer
			for _, o := range e.Tensors {
				require.False(t, names[o.Name], o.Name)
				names[o.Name] = true
				n, err := o.Shape.Count()
				require.NoError(t, err)
				v, err := w.Values(o)
				require.NoError(t, err, o.Name)
				require.Len(t, v, int(n), o.Name)
			}
		}
	}
	return made
}

// FuzzDialects reads adapters of other tools that anyone may have written, and converts them.
func FuzzDialects(f *testing.F) {
	models.Unflatten(nil, nil) // reads its data, which would count as the time of the first input
	mlx := `{"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20}}`
	for _, s := range []struct{ config, names, shapes string }{
		{"",
			"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight\nlora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight\nlora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha", "23|42|"},
		{"",
			"lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight\nlora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight",
			"2333|4211"},
		{"",
			"model.layers.0.self_attn.q_proj.lora_A\nmodel.layers.0.self_attn.q_proj.lora_B\nmodel.layers.0.self_attn.q_proj.bias", "23|42|4"},
		{"", "h.0.attn.c_attn.lora_A\nh.0.attn.c_attn.lora_B", "43|42"},
		{"", "x.hada_w1_a\nx.lora_down.weight", "23|42"},
		{mlx, "model.layers.0.self_attn.q_proj.lora_a\nmodel.layers.0.self_attn.q_proj.lora_b", "32|24"},
		{mlx,
			"model.layers.0.mlp.switch_mlp.gate_proj.lora_a\nmodel.layers.0.mlp.switch_mlp.gate_proj.lora_b\nmodel.layers.0.mlp.switch_mlp.up_proj.lora_a\nmodel.layers.0.mlp.switch_mlp.up_proj.lora_b", "323|342|323|342"},
		{`{"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "alpha": 20}}`, "q.lora_a\nq.lora_b\nq.m", "32|24|4"},
		{`{"peft_type": "LORA", "r": 2, "target_modules": ["q"], "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"]}`,
			"l.0.mlp.experts.base_layer.lora_A.weight\nl.0.mlp.experts.base_layer.lora_B.weight\nl.0.mlp.experts.lora_A.weight\nl.0.mlp.experts.lora_B.weight\nl.0.mlp.gate.lora_A.weight\nl.0.mlp.gate.lora_B.weight", "43|44|42|34|23|42"},
		{`{"peft_type": "LORA", "r": 2}`,
			"l.0.mlp.experts.0.gate_proj.lora_A.weight\nl.0.mlp.experts.0.gate_proj.lora_B.weight\nl.0.mlp.experts.0.up_proj.lora_A.weight\nl.0.mlp.experts.0.up_proj.lora_B.weight", "23|42|23|42"},
		{`{"peft_type": "LORA", "r": 2, "target_parameters": [ ]}`, "l.0.q.lora_A.weight\nl.0.q.lora_B.weight", "23|42"},
		{`{"peft_type": "LORA", "r": 2, "target_parameters": ["gate.weight"], "trainable_token_indices": {"embed": [1], "m.embed": [1]}}`,
			"m.embed.lora_embedding_A\nm.embed.lora_embedding_B\nm.embed.base_layer.weight\nm.embed.token_adapter.trainable_tokens_delta", "25|42|54|14"},
		{`{"peft_type": "LORA", "r": 1, "rank_pattern": {"^l\\.0\\.q": 2, "(k|v)": 3}, "alpha_pattern": {"q": 4}, "target_modules": "(?!k)."}`,
			"l.0.q.lora_A.weight\nl.0.q.lora_B.weight\nl.0.k.lora_A.weight\nl.0.k.lora_B.weight", "23|42|33|43"},
		{`{"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": null}}`,
			"q.lora_a\nq.lora_b\nq.weight\nq.linear.weight\nembed_tokens.lora_a\nembed_tokens.lora_b", "32|24|43|43|52|23"},
		{`{"lora_parameters": {"scale": 0}}`, "l.0.mlp.switch_mlp.gate_proj.lora_a\nl.0.mlp.switch_mlp.gate_proj.lora_b",
			"|111"},
	} {
		f.Add([]byte(s.config), s.names, s.shapes)
	}
	f.Fuzz(func(t *testing.T, config []byte, names, shapes string) {
		dir := t.TempDir()
		all := map[string][]int64{}
		list := strings.Split(shapes, "|")
		for i, name := range strings.Split(names, "\n") {
			var shape []int64
			if i < len(list) {
				for _, d := range []byte(list[i][:min(5, len(list[i]))]) {
					shape = append(shape, int64(d)%6)
				}
			}
			if name != "" && len(all) < 12 {
				all[name] = shape
			}
		}
		path := dir
		switch {
		case len(config) == 0:
			path = filepath.Join(dir, "adapter.safetensors")
			writeTensors(t, path, all)
		case strings.Contains(string(config), "peft_type"):
			require.NoError(t, os.WriteFile(filepath.Join(dir, configName), config, 0o644))
			writeTensors(t, filepath.Join(dir, adapterFiles[0]), all)
		default:
			require.NoError(t, os.WriteFile(filepath.Join(dir, configName), config, 0o644))
			writeTensors(t, filepath.Join(dir, mlxFile), all)
		}
		IsAdapter(path)
		a, err := Open(path, OpenOptions{Alpha: 4})
		if err != nil {
			checkError(t, err, path)
			return
		}
		defer a.Close()
		checkOpened(t, a)
		everyWay(t, a, path)
	})
}

// Every adapter of the fixtures can be converted to what has a place for it, and the bytes that are
// promised are made.
func TestEncode(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join(fixtures, "*", "*", configName))
	require.NoError(t, err)
	for _, path := range paths {
		dir := filepath.Dir(path)
		if strings.Contains(dir, "/others/") {
			continue // no LoRA
		}
		a, err := Open(dir, OpenOptions{})
		require.NoError(t, err)
		if made := everyWay(t, a, dir); a.Config.Residual() == "" {
			require.GreaterOrEqual(t, made, 1, dir)
		}
		require.NoError(t, a.Close())
	}
	require.Greater(t, len(paths), 90)
}

func TestUnderscores(t *testing.T) {
	for flat, want := range map[string]string{
		"down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
		"up_blocks_1_resnets_2_conv_shortcut":                        "up_blocks.1.resnets.2.conv_shortcut",
		"mid_block_attentions_0_transformer_blocks_3_ff_net_0_proj":  "mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj",
		"input_blocks_4_1_transformer_blocks_0_attn2_to_out_0":       "input_blocks.4.1.transformer_blocks.0.attn2.to_out.0",
		"time_embedding_linear_1":                                    "time_embedding.linear_1",
		"double_blocks_18_img_attn_qkv":                              "double_blocks.18.img_attn.qkv",
	} {
		got, err := onlyName(flat, nil)
		require.NoError(t, err, flat)
		require.Equal(t, want, got)
	}
	for _, flat := range []string{"model_layers_0_q_proj", "down_blocks_0_nobody_knows", "down_blocks", "", "_",
		"down_blocks__0"} {
		_, err := onlyName(flat, nil)
		require.ErrorIs(t, err, ErrUnsupported, flat)
	}
	_, err := onlyName("a_b", []string{"a.b", "a_b"})
	require.ErrorContains(t, err, "it may be")
}

// A file that says too little, or what has no place here, is refused, and says what is wrong.
func TestOpenBadDialects(t *testing.T) {
	kohya := func(change func(map[string][]int64)) (string, map[string][]int64) {
		all := map[string][]int64{"lora_te_x.lora_down.weight": {2, 3}, "lora_te_x.lora_up.weight": {4, 2},
			"lora_te_x.alpha": {}}
		change(all)
		return "", all
	}
	mlx := func(config string, change func(map[string][]int64)) (string, map[string][]int64) {
		all := map[string][]int64{"q.lora_a": {3, 2}, "q.lora_b": {2, 4}}
		change(all)
		return config, all
	}
	same := func(map[string][]int64) {}
	const plain = `{"fine_tune_type": "lora", "lora_parameters": {"scale": 2}}`
	for says, make := range map[string]func() (string, map[string][]int64){
		"only one of its two factors": func() (string, map[string][]int64) {
			return kohya(func(m map[string][]int64) { delete(m, "lora_te_x.lora_up.weight") })
		},
		"expected (rank, in) and (out, rank)": func() (string, map[string][]int64) {
			return kohya(func(m map[string][]int64) { m["lora_te_x.lora_up.weight"] = []int64{4, 3} })
		},
		"kernels of one element": func() (string, map[string][]int64) {
			return kohya(func(m map[string][]int64) { m["lora_te_x.lora_up.weight"] = []int64{4, 2, 3, 3} })
		},
		"expected one number": func() (string, map[string][]int64) {
			return kohya(func(m map[string][]int64) { m["lora_te_x.alpha"] = []int64{2} })
		},
		"another method of LyCORIS": func() (string, map[string][]int64) {
			return kohya(func(m map[string][]int64) { m["lora_te_x.hada_w1_a"] = []int64{4, 1} })
		},
		"none that a kohya file gives": func() (string, map[string][]int64) {
			return kohya(func(m map[string][]int64) { m["lora_te_x.gamma"] = []int64{4} })
		},
		"lora_parameters has no scale": func() (string, map[string][]int64) {
			return mlx(`{"fine_tune_type": "lora", "lora_parameters": {}}`, same)
		},
		"fine_tune_type is \"full\"": func() (string, map[string][]int64) {
			return mlx(`{"fine_tune_type": "full", "lora_parameters": {"scale": 2}}`, same)
		},
		"whether it has a magnitude": func() (string, map[string][]int64) {
			return mlx(`{"fine_tune_type": "dora", "lora_parameters": {"scale": 2}}`, same)
		},
		"a quantised adapter": func() (string, map[string][]int64) {
			return mlx(plain, func(m map[string][]int64) { m["q.lora_a_scales"] = []int64{3} })
		},
		"no lora_a is beside it": func() (string, map[string][]int64) {
			return mlx(plain, func(m map[string][]int64) { m["k.lora_b"] = []int64{2, 4} })
		},
		"expected (in, rank) and (rank, out)": func() (string, map[string][]int64) {
			return mlx(plain, func(m map[string][]int64) { m["q.lora_b"] = []int64{3, 4} })
		},
		"which has its scaling in an adapter_config.json beside it, and there is none": func() (string, map[string][]int64) {
			return "", map[string][]int64{"base_model.model.q.lora_A.weight": {2, 3}}
		},
		"no tensor of it belongs to an adapter": func() (string, map[string][]int64) {
			return "", map[string][]int64{"model.norm.weight": {3}}
		},
	} {
		config, shapes := make()
		dir := t.TempDir()
		path := dir
		if config == "" {
			path = filepath.Join(dir, "a.safetensors")
			writeTensors(t, path, shapes)
		} else {
			require.NoError(t, os.WriteFile(filepath.Join(dir, configName), []byte(config), 0o644))
			writeTensors(t, filepath.Join(dir, mlxFile), shapes)
		}
		_, err := Open(path, OpenOptions{})
		require.ErrorContains(t, err, says)
		checkError(t, err, path)
	}
	path := filepath.Join(t.TempDir(), "a.safetensors")
	writeTensors(t, path, map[string][]int64{"q.lora_A": {2, 3}, "q.lora_B": {4, 2}})
	_, err := Open(path, OpenOptions{})
	require.ErrorContains(t, err, "does not hold its alpha")
	a, err := Open(path, OpenOptions{Alpha: 8})
	require.NoError(t, err)
	require.Equal(t, 4.0, a.Modules[0].Scaling)
	require.Equal(t, tensor.F32, a.Modules[0].A.T.DType)
}

// TestKohyaWithoutCopies leaves out what PEFT stores of the base beside a head's factors, and nothing else.
func TestKohyaWithoutCopies(t *testing.T) {
	const head = "base_model.model.lm_head."
	for name, x := range map[string]struct {
		more map[string][]int64
		says string
	}{
		"its copy":     {map[string][]int64{head + "base_layer.weight": {6, 4}}, ""},
		"its bias too": {map[string][]int64{head + "base_layer.weight": {6, 4}, head + "base_layer.bias": {6}}, ""},
		"a bias without it": {map[string][]int64{head + "base_layer.bias": {6}},
			"a replaced weight has no place in a kohya adapter"},
		"a copy of other rows": {map[string][]int64{head + "base_layer.weight": {8, 4}},
			"has the shape [8, 4], and its factors are for [6, 4]"},
		"a trained value": {map[string][]int64{"base_model.model.score.weight": {6, 4}},
			"a replaced weight has no place in a kohya adapter"},
		"a copy of another one": {map[string][]int64{"base_model.model.embed.base_layer.weight": {6, 4}},
			"a replaced weight has no place in a kohya adapter"},
	} {
		dir := t.TempDir()
		x.more[head+"lora_A.weight"], x.more[head+"lora_B.weight"] = []int64{2, 4}, []int64{6, 2}
		writeFolder(t, dir, `{"peft_type": "LORA", "r": 2, "lora_alpha": 4}`, x.more)
		a, err := Open(dir, OpenOptions{})
		require.NoError(t, err)
		defer a.Close()
		e, err := a.Encode(EncodeOptions{To: Kohya})
		if x.says != "" {
			require.ErrorContains(t, err, x.says, name)
			continue
		}
		require.NoError(t, err, name)
		require.Len(t, e.Tensors, 3)
		require.Len(t, e.Notices, len(x.more)-2)
		require.Contains(t, strings.Join(e.Notices, "\n"), "lm_head: the copy of its base's matrix of shape [6, 4] is left "+
			"out")
	}
}

// TestLoRALibAlpha writes alphas that are no positive numbers, and reads the files with what the note says.
func TestLoRALibAlpha(t *testing.T) {
	for alpha, want := range map[string]float64{"-6": -6, "0": 2, "5": 5} {
		dir := t.TempDir()
		writeFolder(t, dir, `{"peft_type": "LORA", "r": 2, "lora_alpha": `+alpha+`}`,
			map[string][]int64{"base_model.model.q.lora_A.weight": {2, 4}, "base_model.model.q.lora_B.weight": {6, 2}})
		a, err := Open(dir, OpenOptions{})
		require.NoError(t, err)
		defer a.Close()
		e, err := a.Encode(EncodeOptions{To: LoRALib})
		require.NoError(t, err)
		require.Equal(t, []string{fmt.Sprintf("a loralib state dict does not hold its alpha: it is %g", want)}, e.Notices)
		require.Equal(t, map[bool]float64{true: 0, false: 1}[alpha == "0"], e.Tensors[1].Scale)

		path := filepath.Join(t.TempDir(), "a.safetensors")
		writeTensors(t, path, map[string][]int64{"q.lora_A": {2, 4}, "q.lora_B": {6, 2}})
		back, err := Open(path, OpenOptions{Alpha: want})
		require.NoError(t, err)
		defer back.Close()
		require.Equal(t, want/2, back.Modules[0].Scaling)
	}
	_, err := Open(filepath.Join("..", "fixtures", "adapters", "llama", "attention"), OpenOptions{Alpha: 1e39})
	require.ErrorContains(t, err, "expected a number that float32 holds")
}

// TestKohyaConvolutions holds the deltas of a file for an image model and its text encoder against those
// that its own rule gives. It is for two models, so no dialect with dots can hold it.
func TestKohyaConvolutions(t *testing.T) {
	a, err := Open(filepath.Join(fixtures, "dialects", "kohya-unet.safetensors"), OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	want := stored(t, filepath.Join(fixtures, "dialects", "kohya-unet.delta.safetensors"))
	require.Len(t, a.Modules, len(want))
	for _, m := range a.Modules {
		fa, fb, err := new(Writer).factors(a, m)
		require.NoError(t, err)
		require.NotNil(t, want[m.Name], m.Name)
		w, err := Floats(want[m.Name])
		require.NoError(t, err)
		got := product(Trained{A: fa, B: fb})
		for i := range got {
			got[i] *= m.Scaling
		}
		near(t, widen(w), got, 1e-6, m.Name)
	}
	_, err = a.Encode(EncodeOptions{To: PEFT})
	require.ErrorIs(t, err, ErrUnsupported)
	require.ErrorContains(t, err, "they are of two models")
}
