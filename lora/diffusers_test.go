package lora

import (
	"encoding/binary"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// withMetadata puts metadata into a safetensors file.
func withMetadata(t fataler, path string, metadata map[string]string) {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	n := binary.LittleEndian.Uint64(b)
	var header map[string]any
	require.NoError(t, json.Unmarshal(b[8:8+n], &header))
	header["__metadata__"] = metadata
	h, err := json.Marshal(header)
	require.NoError(t, err)
	b = slices.Concat(binary.LittleEndian.AppendUint64(nil, uint64(len(h))), h, b[8+n:])
	require.NoError(t, os.WriteFile(path, b, 0o644))
}

// oneFile writes an adapter in one file, with configs in its metadata where they are given.
func oneFile(t fataler, dir string, shapes map[string][]int64, configs string) string {
	t.Helper()
	path := filepath.Join(dir, "adapter.safetensors")
	writeTensors(t, path, shapes)
	if configs != "" {
		withMetadata(t, path, map[string]string{"format": "pt", metadataName: configs})
	}
	return path
}

// factorsOf are the tensors of a module with two pairs of ends: (2, 3) and (4, 2).
func factorsOf(module, a, b string) map[string][]int64 {
	return map[string][]int64{module + a: {2, 3}, module + b: {4, 2}}
}

// TestDiffusersNames reads one module under each of the names that tools give it, with each of the ways to say its
// scaling.
func TestDiffusersNames(t *testing.T) {
	const attention = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1."
	for name, x := range map[string]struct {
		shapes    map[string][]int64
		module    string
		component string
		dialect   string
	}{
		"PEFT's, in a transformer": {factorsOf("transformer.transformer_blocks.0.attn.to_q", ".lora_A.weight",
			".lora_B.weight"),
			"transformer.transformer_blocks.0.attn.to_q", "transformer", Diffusers},
		"PEFT's, with an adapter's name": {factorsOf("transformer.transformer_blocks.0.attn.to_q", ".lora_A.default.weight",
			".lora_B.default.weight"), "transformer.transformer_blocks.0.attn.to_q", "transformer", Diffusers},
		"PEFT's, with another's name": {factorsOf("unet.conv_in", ".lora_A.pixel-art.weight", ".lora_B.pixel-art.weight"),
			"unet.conv_in", "unet", Diffusers},
		"PEFT's, without a component": {factorsOf("single_transformer_blocks.0.attn.to_q", ".lora_A.weight",
			".lora_B.weight"),
			"single_transformer_blocks.0.attn.to_q", "", Diffusers},
		"PEFT's, within its wrapper": {map[string][]int64{"unet.base_model.model.conv_in.lora_A.weight": {2, 3},
			"unet.base_model.model.conv_in.lora_B.weight": {4, 2}, "unet.base_model.model.conv_in.alpha": {}},
			"unet.conv_in", "unet", Diffusers},
		"parameters": {factorsOf("transformer.blocks.0.attn1.to_q", ".lora_A", ".lora_B"), "transformer.blocks.0.attn1.to_q",
			"transformer", Diffusers},
		"ComfyUI's": {factorsOf("diffusion_model.double_blocks.3.img_attn.proj", ".lora_A.weight", ".lora_B.weight"),
			"diffusion_model.double_blocks.3.img_attn.proj", "diffusion_model", Diffusers},
		"ComfyUI's, with kohya's factors": {factorsOf("diffusion_model.blocks.3.self_attn.q", ".lora_down.weight",
			".lora_up.weight"),
			"diffusion_model.blocks.3.self_attn.q", "diffusion_model", Diffusers},
		"the authors', alone": {factorsOf("blocks.0.self_attn.q", ".lora_A.weight", ".lora_B.weight"),
			"blocks.0.self_attn.q", "",
			Diffusers},
		"a text encoder of ComfyUI": {factorsOf("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
			".lora_A.weight", ".lora_B.weight"), "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
			"text_encoders.clip_l.transformer", Diffusers},
		"diffusers'": {factorsOf(attention+"to_q", ".lora.down.weight", ".lora.up.weight"), attention + "to_q", "unet",
			Diffusers},
		"an attention processor": {factorsOf(attention+"processor.to_q", oldDown, oldUp), attention + "to_q", "unet",
			Diffusers},
		"the outputs of one": {factorsOf(attention+"processor.to_out", oldDown, oldUp), attention + "to_out.0", "unet",
			Diffusers},
		"a text encoder's": {factorsOf("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", ".lora_linear_layer.down.weight",
			".lora_linear_layer.up.weight"), "text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2", Diffusers},
		"an old text encoder's": {factorsOf("text_encoder.text_model.encoder.layers.0.self_attn.to_out", oldDown, oldUp),
			"text_encoder.text_model.encoder.layers.0.self_attn.out_proj", "text_encoder", Diffusers},
		"kohya's": {factorsOf("lora_unet_down_blocks_0_resnets_0_time_emb_proj", ".lora_down.weight", ".lora_up.weight"),
			"lora_unet_down_blocks_0_resnets_0_time_emb_proj", "lora_unet", Kohya},
		"OneTrainer's": {factorsOf("lora_transformer_transformer_blocks_0_attn_to_q", ".lora_down.weight", ".lora_up.weight"),
			"lora_transformer_transformer_blocks_0_attn_to_q", "lora_transformer", Kohya},
		"SimpleTuner's": {factorsOf("lycoris_transformer_blocks_0_attn_to_q", ".lora_down.weight", ".lora_up.weight"),
			"lycoris_transformer_blocks_0_attn_to_q", "lycoris", Kohya},
	} {
		t.Run(name, func(t *testing.T) {
			open := func(shapes map[string][]int64, configs string) (*Adapter, error) {
				path := oneFile(t, t.TempDir(), shapes, configs)
				require.True(t, IsAdapter(path))
				a, err := Open(path, OpenOptions{})
				if err == nil {
					t.Cleanup(func() { a.Close() })
					checkOpened(t, a)
				} else {
					checkError(t, err, path)
				}
				return a, err
			}
			a, err := open(x.shapes, "")
			require.NoError(t, err)
			require.Equal(t, x.dialect, a.Dialect)
			require.Len(t, a.Modules, 1)
			m := a.Modules[0]
			require.Equal(t, x.module, m.Name)
			require.Equal(t, x.component, m.Component)
			require.Equal(t, 2, m.Rank)
			alpha := 1.0
			if len(x.shapes) == 3 {
				alpha = 0.25 // 0.5 by the rank
			}
			require.Equal(t, alpha, m.Scaling)
			everyWay(t, a, a.Path)

			shapes := maps.Clone(x.shapes)
			for key := range x.shapes { // the name of the module as the file has it
				if i := slices.IndexFunc([]string{".lora", "_lora"}, func(s string) bool {
					return strings.Contains(key,
						s)
				}); i >= 0 {
					at := strings.LastIndex(key, []string{".lora", "_lora"}[i])
					if i == 1 || strings.HasSuffix(key, ".alpha") || strings.Contains(key[:at], ".lora") {
						continue
					}
					shapes[key[:at]+".alpha"] = []int64{}
				}
			}
			if len(shapes) == 3 {
				a, err = open(shapes, "")
				require.NoError(t, err)
				require.Equal(t, 0.25, a.Modules[0].Scaling) // its alpha is 0.5
			}
			if x.dialect == Kohya {
				return
			}
			prefix := ""
			if x.component != "" {
				prefix = x.component + "."
			}
			configs := `{"` + prefix + `r": 2, "` + prefix + `lora_alpha": 6, "` + prefix + `use_rslora": false}`
			a, err = open(x.shapes, configs)
			if len(x.shapes) == 3 {
				require.ErrorContains(t, err, "its alpha scales it by 0.25, and lora_adapter_metadata by 3")
				return
			}
			require.NoError(t, err)
			require.Equal(t, 3.0, a.Modules[0].Scaling)
		})
	}
}

// TestDiffusersConfigs reads the configs that diffusers writes into a file's metadata.
func TestDiffusersConfigs(t *testing.T) {
	q := factorsOf("transformer.transformer_blocks.0.attn.to_q", ".lora_A.weight", ".lora_B.weight")
	with := func(more ...map[string][]int64) map[string][]int64 {
		all := maps.Clone(q)
		for _, m := range more {
			maps.Copy(all, m)
		}
		return all
	}
	text := factorsOf("text_encoder.text_model.encoder.layers.0.mlp.fc1", ".lora_A.weight", ".lora_B.weight")
	magnitude := map[string][]int64{"transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": {4}}
	bias := map[string][]int64{"transformer.transformer_blocks.0.attn.to_q.lora_B.bias": {4}}
	for name, x := range map[string]struct {
		shapes  map[string][]int64
		configs string
		scaling float64
		says    string // an error, or a notice
	}{
		"rsLoRA": {q, `{"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.use_rslora": true}`,
			2.8284271247461903, ""},
		"patterns": {q,
			`{"transformer.r": 8, "transformer.rank_pattern": {"attn.to_q": 2}, "transformer.alpha_pattern": {"to_q": 5}}`,
			2.5, ""},
		"PEFT's own": {q,
			`{"transformer.r": 8, "transformer.lora_alpha": 8, ` +
				`"transformer.rank_pattern": {"^transformer_blocks.0.attn.to_q": 2}}`, 4, ""},
		"of two components": {with(text),
			`{"transformer.r": 2, "transformer.lora_alpha": 3, "text_encoder.r": 2, "text_encoder.lora_alpha": 9}`, 4.5, ""},
		"of one that is not": {q, `{"transformer.r": 2, "transformer.lora_alpha": 2, "text_encoder.r": 2}`, 1,
			`has a config for "text_encoder", of which there are no tensors`},
		"of one of two": {with(text), `{"transformer.r": 2}`, 0, `it has no config for "text_encoder"`},
		"another rank":  {q, `{"transformer.r": 3}`, 0, "has rank 2 in its tensors and 3 by lora_adapter_metadata"},
		"DoRA": {with(magnitude),
			`{"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.use_dora": true}`, 1, ""},
		"DoRA without it": {q, `{"transformer.r": 2, "transformer.use_dora": true}`, 0,
			"use_dora of lora_adapter_metadata is true, and it has magnitudes: false"},
		"none with it": {with(magnitude), `{"transformer.r": 2}`, 0,
			"use_dora of lora_adapter_metadata is false, and it has magnitudes: true"},
		"a bias": {with(bias),
			`{"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.lora_bias": true}`, 1, ""},
		"a bias without it": {q, `{"transformer.r": 2, "transformer.lora_bias": true}`, 0,
			"lora_bias of lora_adapter_metadata is true, and it has a bias: false"},
		"another method": {q, `{"transformer.peft_type": "LOHA", "transformer.r": 2}`, 0,
			`peft_type is "LOHA", expected LORA`},
		"what is not known": {q, `{"transformer.r": 2, "transformer.use_magic": true}`, 0, "use_magic"},
		"what is not heard": {q, `{"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.mood": "blue"}`, 1,
			`"mood"`},
		"no JSON":   {q, `{"transformer.r": `, 0, "lora_adapter_metadata: malformed adapter"},
		"no object": {q, `[1]`, 0, "lora_adapter_metadata: malformed adapter"},
		"nothing":   {q, `{}`, 0, `it has no config for "transformer"`},
	} {
		path := oneFile(t, t.TempDir(), x.shapes, x.configs)
		a, err := Open(path, OpenOptions{})
		if x.scaling == 0 {
			require.ErrorContains(t, err, x.says, name)
			checkError(t, err, path)
			continue
		}
		require.NoError(t, err, name)
		require.Contains(t, strings.Join(a.Notices, "\n"), x.says, name)
		require.InDelta(t, x.scaling, a.Modules[0].Scaling, 1e-12, name)
		everyWay(t, a, path)
		require.NoError(t, a.Close())
	}
	// A start that took a part out of the base is one of these too.
	path := oneFile(t, t.TempDir(), q, `{"transformer.r": 2, "transformer.init_lora_weights": "pissa"}`)
	a, err := Open(path, OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	for _, to := range Dialects() {
		_, err = a.Encode(EncodeOptions{To: to})
		require.ErrorContains(t, err, `init_lora_weights is "pissa"`, to)
	}
}

// TestDiffusersRefused opens files that say too little, or what has no place here.
func TestDiffusersRefused(t *testing.T) {
	const q = "transformer.transformer_blocks.0.attn.to_q."
	for says, shapes := range map[string]map[string][]int64{
		"only one of its two factors":         {q + "lora_A.weight": {2, 3}},
		"expected (rank, in) and (out, rank)": {q + "lora_A.weight": {2, 3}, q + "lora_B.weight": {4, 3}},
		"another method of LyCORIS":           {q + "lora_A.weight": {2, 3}, q + "lora_B.weight": {4, 2}, q + "diff_b": {4}},
		"it belongs to another method of":     {"lora_unet_mid_block.hada_w1_a": {2, 3}, "lora_unet_mid_block.alpha": {}},
		"it belongs to another method":        {"mid_block.lokr_w1": {2, 3}},
		"none that a diffusers file gives":    {q + "lora_A.weight": {2, 3}, q + "lora_B.weight": {4, 2}, q + "gamma": {4}},
		"says the same": {q + "lora_A.weight": {2, 3}, q + "lora_B.weight": {4, 2},
			q + "lora.down.weight": {2, 3}},
		"no module is named":  {".lora.down.weight": {2, 3}, ".lora.up.weight": {4, 2}},
		"expected one number": {q + "lora_A.weight": {2, 3}, q + "lora_B.weight": {4, 2}, q + "alpha": {2}},
		"expected one for each of 4 outputs": {q + "lora_A.weight": {2, 3}, q + "lora_B.weight": {4, 2},
			q + "dora_scale": {1, 3}},
		"and the module 4 outputs": {q + "lora_A.weight": {2, 3}, q + "lora_B.weight": {4, 2},
			q + "lora_B.bias": {3}},
		"of XLabs": {"diffusion_model.double_blocks.0.processor.qkv_lora1.down.weight": {2, 3},
			"diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": {2, 3}},
		"which has its scaling in an adapter_config.json beside it, and there is none": {
			"model.layers.0.self_attn.q_proj.lora_A.weight": {2, 3}},
		"is of a peft adapter": {"transformer.h.0.attn.c_attn.lora_A.weight": {2, 3},
			"transformer.h.0.attn.c_attn.lora_B.weight": {4, 2}},
	} {
		path := oneFile(t, t.TempDir(), shapes, "")
		_, err := Open(path, OpenOptions{})
		require.ErrorContains(t, err, says)
		checkError(t, err, path)
	}
	dir := t.TempDir() // PEFT's own file, given without its folder
	path := oneFile(t, dir, factorsOf("base_model.model.q", ".lora_A.weight", ".lora_B.weight"), "")
	require.NoError(t, os.WriteFile(filepath.Join(dir, configName), []byte(plainConfig), 0o644))
	_, err := Open(path, OpenOptions{})
	require.ErrorContains(t, err, "whose adapter_config.json lies beside it: give the folder")

	square := map[string][]int64{q + "lora_A.weight": {2, 4}, q + "lora_B.weight": {4, 2}, q + "dora_scale": {1, 4}}
	_, err = Open(oneFile(t, t.TempDir(), square, ""), OpenOptions{}) // one for each input
	require.ErrorContains(t, err, "expected one for each of 4 outputs")
	square[q+"dora_scale"] = []int64{4, 1}
	a, err := Open(oneFile(t, t.TempDir(), square, ""), OpenOptions{})
	require.NoError(t, err)
	require.Equal(t, tensor.Shape{4}, a.Modules[0].Magnitude.Shape)
	require.NoError(t, a.Close())
}

// TestComponents takes the modules of one component of an adapter alone.
func TestComponents(t *testing.T) {
	shapes := factorsOf("lora_unet_down_blocks_0_resnets_0_time_emb_proj", ".lora_down.weight", ".lora_up.weight")
	maps.Copy(shapes, factorsOf("lora_te2_text_model_encoder_layers_0_mlp_fc1", ".lora_down.weight", ".lora_up.weight"))
	path := oneFile(t, t.TempDir(), shapes, "")
	for component, want := range map[string]string{"lora_unet": "down_blocks.0.resnets.0.time_emb_proj",
		"unet":           "down_blocks.0.resnets.0.time_emb_proj",
		"text_encoder_2": "text_model.encoder.layers.0.mlp.fc1"} {
		a, err := Open(path, OpenOptions{Component: component})
		require.NoError(t, err)
		require.Len(t, a.Modules, 1)
		require.Len(t, a.Notices, 1)
		require.Contains(t, a.Notices[0], "1 modules of ")
		e, err := a.Encode(EncodeOptions{To: PEFT})
		require.NoError(t, err)
		require.Equal(t, prefix+want+".lora_A.weight", e.Tensors[0].Name)
		require.NoError(t, a.Close())
	}
	_, err := Open(path, OpenOptions{Component: "text_encoder"})
	require.ErrorIs(t, err, ErrBase)
	require.ErrorContains(t, err, `it has no modules of "text_encoder"; it has some of "lora_te2", "lora_unet"`)

	// An adapter that names no component is taken to be of the one that is given, and needs it where its names tell
	// nothing.
	dir := folder(t, plainConfig, factorsOf(prefix+"layers.0.odd", ".lora_A.weight", ".lora_B.weight"))
	for component, want := range map[string]string{"": "", "text_encoder_2": "text_encoder_2.layers.0.odd.lora_A.weight"} {
		a, err := Open(dir, OpenOptions{Component: component})
		require.NoError(t, err)
		e, err := a.Encode(EncodeOptions{To: Diffusers})
		require.NoError(t, a.Close())
		if want == "" {
			require.ErrorContains(t, err, "which component of a pipeline it is of is not known")
			continue
		}
		require.NoError(t, err)
		require.Equal(t, want, e.Tensors[0].Name)
	}
}

// A folder that diffusers' save_lora_weights has written is its file.
func TestDiffusersFolder(t *testing.T) {
	dir := t.TempDir()
	require.False(t, IsAdapter(dir))
	writeTensors(t, filepath.Join(dir, "pytorch_lora_weights.safetensors"), factorsOf("unet.conv_in", ".lora_A.weight",
		".lora_B.weight"))
	require.True(t, IsAdapter(dir))
	a, err := Open(dir, OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	require.Equal(t, Diffusers, a.Dialect)
	require.Equal(t, []string{"pytorch_lora_weights.safetensors"}, a.Files)
	require.Equal(t, dir, a.Dir.Path(""))

	// A link that leads out of the folder is no file that is not there.
	farm := t.TempDir()
	name := "pytorch_lora_weights.safetensors"
	if err := os.Symlink(filepath.Join(dir, name), filepath.Join(farm, name)); err != nil {
		t.Skipf("this system makes no links: %v", err)
	}
	require.True(t, IsAdapter(farm))
	_, err = Open(farm, OpenOptions{})
	require.ErrorIs(t, err, storage.ErrLink)

	annex := t.TempDir()
	require.NoError(t, os.Symlink("nowhere", filepath.Join(annex, configName)))
	require.True(t, IsAdapter(annex))
	_, err = Open(annex, OpenOptions{})
	require.ErrorIs(t, err, storage.ErrDangling)
}

// TestThirdTextEncoder writes kohya's third text encoder, which is diffusers' second for Flux.
func TestThirdTextEncoder(t *testing.T) {
	const t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
	for image, want := range map[string]string{"": "", "lora_unet_single_blocks_0_linear2": "text_encoder_2",
		"lora_unet_joint_blocks_0_x_block_attn_proj": "text_encoder_3"} {
		shapes := factorsOf(t5, ".lora_down.weight", ".lora_up.weight")
		if image != "" {
			maps.Copy(shapes, factorsOf(image, ".lora_down.weight", ".lora_up.weight"))
		}
		a, err := Open(oneFile(t, t.TempDir(), shapes, ""), OpenOptions{})
		require.NoError(t, err)
		e, err := a.Encode(EncodeOptions{To: Diffusers})
		require.NoError(t, a.Close())
		if want == "" {
			require.ErrorContains(t, err, "diffusers' second or third is not known")
			continue
		}
		require.NoError(t, err)
		require.True(t, slices.ContainsFunc(e.Tensors, func(o Output) bool {
			return o.Name == want+".encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"
		}), want)
		back := oneFile(t, t.TempDir(),
			map[string][]int64{want + ".encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": {2, 3},
				want + ".encoder.block.0.layer.0.SelfAttention.q.lora_B.weight": {4, 2}}, "")
		b, err := Open(back, OpenOptions{})
		require.NoError(t, err)
		e, err = b.Encode(EncodeOptions{To: Kohya})
		require.NoError(t, err)
		require.Equal(t, t5+".lora_down.weight", e.Tensors[0].Name)
		require.NoError(t, b.Close())
	}
}

// TestPipelineNotices converts adapters of which something is assumed, or keeps a name that others do not read.
func TestPipelineNotices(t *testing.T) {
	const comfy = "diffusion_model."
	for name, x := range map[string]struct {
		module, to, says string
	}{
		"a scaling that nothing says": {"transformer.odd_blocks.0.to_q", Diffusers, "nothing says the scaling of 1 modules"},
		"authors that are not known":  {comfy + "layers.0.attention.qkv", Diffusers, "keep the names of its authors"},
		"authors' names for PEFT":     {comfy + "double_blocks.0.img_attn.proj", PEFT, "as a diffusers adapter they get"},
		"a transformer of any kind":   {"transformer.transformer_blocks.0.attn.to_q", Kohya, "keep diffusers' names"},
		"a component of ComfyUI": {"text_encoders.qwen25_7b.transformer.model.layers.0.mlp.up_proj", Diffusers,
			`"text_encoders.qwen25_7b.transformer" is no component that diffusers knows`},
	} {
		a, err := Open(oneFile(t, t.TempDir(), factorsOf(x.module, ".lora_A.weight", ".lora_B.weight"), ""), OpenOptions{})
		require.NoError(t, err, name)
		e, err := a.Encode(EncodeOptions{To: x.to})
		require.NoError(t, err, name)
		require.Contains(t, strings.Join(e.Notices, "\n"), x.says, name)
		require.NoError(t, a.Close())
	}
	second := factorsOf("transformer_2.blocks.0.attn1.to_q", ".lora_A.weight", ".lora_B.weight")
	a, err := Open(oneFile(t, t.TempDir(), second, ""), OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	_, err = a.Encode(EncodeOptions{To: Kohya})
	require.ErrorContains(t, err, `the component "transformer_2" has no place in a kohya adapter`)
}

// FuzzDiffusers reads adapters in one file that anyone may have written, and converts them.
func FuzzDiffusers(f *testing.F) {
	models.Unflatten(nil, nil)
	models.UnflattenDiffusers("")
	const q = "transformer.transformer_blocks.0.attn.to_q."
	const single, comfy = "transformer.single_transformer_blocks.0.attn.", "diffusion_model."
	lines := func(module string, ends ...string) string { return module + strings.Join(ends, "\n"+module) }
	for _, s := range []struct{ names, shapes, configs, component string }{
		{q + "lora_A.weight\n" + q + "lora_B.weight\n" + q + "alpha", "23|42|", "", ""},
		{q + "lora_A.default.weight\n" + q + "lora_B.default.weight\n" + q + "lora_B.default.bias", "23|42|4",
			`{"transformer.r": 2, "transformer.lora_bias": true}`, ""},
		{lines("unet.a.attn1.", "processor.to_out_lora.down.weight", "processor.to_out_lora.up.weight",
			"to_out.lora_magnitude_vector"), "23|42|4", "", "unet"},
		{lines(comfy+"double_blocks.0.img_attn.qkv.", "lora_down.weight", "lora_up.weight"), "22|62", "", ""},
		{lines(comfy+"final_layer.adaLN_modulation.1.", "lora_A.weight", "lora_B.weight"), "22|42", "", ""},
		{lines("lora_unet_input_blocks_1_1_proj_in.", "lora_down.weight", "lora_up.weight", "dora_scale"), "2311|4211|411",
			"", ""},
		{lines("text_encoder.x.lora_linear_layer.", "down.weight", "up.weight") + "\n" +
			lines("unet.y.lora.", "down.weight", "up.weight"), "23|42|23|42",
			`{"unet.r": 2, "text_encoder.r": 2, "text_encoder.alpha_pattern": {"x": 3}}`, "text_encoder"},
		{lines(single, "to_q.lora_A.weight", "to_q.lora_B.weight", "to_v.lora_A.weight", "to_v.lora_B.weight"),
			"14|41|24|42", "", ""},
		{"transformer.transformer_blocks.0.attn.norm_q.weight\n" + q + "lora_A\n" + q + "lora_B", "3|23|42", "", "lora_unet"},
		{"transformer.h.0.attn.c_attn.lora_A.weight\ntransformer.h.0.attn.c_attn.lora_B.weight\nunet.", "23|42|1", "{}", ""},
	} {
		f.Add(s.names, s.shapes, s.configs, s.component)
	}
	f.Fuzz(func(t *testing.T, names, shapes, configs, component string) {
		all := map[string][]int64{}
		list := strings.Split(shapes, "|")
		for i, name := range strings.Split(names, "\n") {
			var shape []int64
			if i < len(list) {
				for _, d := range []byte(list[i][:min(5, len(list[i]))]) {
					shape = append(shape, int64(d)%8)
				}
			}
			if name != "" && len(all) < 12 {
				all[name] = shape
			}
		}
		path := oneFile(t, t.TempDir(), all, configs)
		IsAdapter(path)
		a, err := Open(path, OpenOptions{Alpha: 4, Component: component})
		if err != nil {
			checkError(t, err, path)
			return
		}
		defer a.Close()
		if component == "" {
			checkOpened(t, a)
		}
		everyWay(t, a, path)
		var targets []Target
		var base models.Model
		for i, m := range a.Modules {
			if s := m.Contents().Shape; s != nil && i%2 == 0 {
				name := m.within() + "." + m.Param
				targets = append(targets, Target{Name: name, Shape: s, Role: base.Tensor(name, s)})
			}
		}
		if _, err := Bind([]Weighted{{a, 1}}, targets, &base); err != nil {
			checkError(t, err, path)
		}
	})
}
