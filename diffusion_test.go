package lorakit_test

import (
	"bytes"
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

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

var diffusionFixtures = filepath.Join(adapterFixtures, "diffusion")

// component is a component that an adapter of a pipeline is for: its base, and what diffusers makes of that.
type component struct{ Base, Golden string }

// pipelines lists the adapters of pipelines, with the components that each is for.
func pipelines(t *testing.T) map[string]map[string]component {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(diffusionFixtures, "results.json"))
	require.NoError(t, err)
	var all map[string]map[string]component
	require.NoError(t, json.Unmarshal(b, &all))
	require.Greater(t, len(all), 10)
	return all
}

func pipelineFile(name string) string { return filepath.Join(diffusionFixtures, name+".safetensors") }
func pipelineBase(name string) string { return filepath.Join(diffusionFixtures, "bases", name) }

// asDiffusers merges an adapter onto a component and holds all tensors of the result against those that diffusers has
// after fuse_lora.
func asDiffusers(t *testing.T, a lorakit.Adapter, base, golden string) {
	t.Helper()
	dir := t.TempDir()
	o := lorakit.ConvertOptions{DType: "f32"}
	_, err := lorakit.Convert(t.Context(), base, filepath.Join(dir, "plain"), o)
	require.NoError(t, err)
	_, err = lorakit.Merge(t.Context(), base, []lorakit.Adapter{a}, filepath.Join(dir, "merged"), o)
	require.NoError(t, err)
	if matches, err := filepath.Glob(filepath.Join(base, "diffusion_pytorch_model*")); err == nil && matches != nil {
		require.FileExists(t, filepath.Join(dir, "merged",
			"diffusion_pytorch_model.safetensors")) // diffusers looks for no other
	}
	plain, got, changed := load(t, filepath.Join(dir, "plain")), load(t, filepath.Join(dir, "merged")), load(t, golden)
	require.Equal(t, names(plain), names(got))
	for name, g := range got {
		w, ok := changed[name]
		if !ok {
			w, ok = changed["text_model."+name] // as transformers has it in memory
		}
		if !ok {
			require.True(t, bytes.Equal(plain[name].data, g.data), "%s is not adapted", name)
			continue
		}
		require.Equal(t, tensor.F32, g.DType)
		require.Equal(t, w.Shape, g.Shape, name)
		nearlyFloat32(t, name, w.data, g.data)
		require.False(t, bytes.Equal(plain[name].data, g.data), name)
		delete(changed, name)
	}
	require.Empty(t, names(changed))
}

// TestMergePipelines merges adapters of pipelines as diffusers, its old versions, kohya and ComfyUI have them onto each
// component that they are for, and holds the results against diffusers'.
func TestMergePipelines(t *testing.T) {
	t.Parallel()
	for name, parts := range pipelines(t) {
		for part, c := range parts {
			t.Run(name+"/"+part, func(t *testing.T) {
				t.Parallel()
				a := lorakit.Adapter{Path: pipelineFile(name)}
				if len(parts) > 1 {
					_, err := lorakit.Merge(t.Context(), pipelineBase(c.Base), []lorakit.Adapter{a}, filepath.Join(t.TempDir(), "x"),
						lorakit.ConvertOptions{})
					require.ErrorIs(t, err, lora.ErrBase)
					require.ErrorContains(t, err, "the adapter is for several models")
					a.Component = part
				}
				asDiffusers(t, a, pipelineBase(c.Base), pipelineFile(c.Golden))
			})
		}
	}
}

// TestConvertPipelines writes each adapter of a pipeline for diffusers, for kohya and, component by component, for
// PEFT, and merges what comes out.
func TestConvertPipelines(t *testing.T) {
	t.Parallel()
	refused := map[string]string{ // what has no place in a file of kohya
		"flux-dora": "DoRA has no place in a kohya adapter", "flux-metadata": "DoRA has no place in a kohya adapter",
		"flux-bias": "lora_bias has no place in a kohya adapter",
	}
	for name, parts := range pipelines(t) {
		for _, to := range []string{"diffusers", "kohya", "peft"} {
			t.Run(name+"/"+to, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				if to != "peft" {
					out := filepath.Join(dir, "out.safetensors")
					_, err := lorakit.ConvertAdapter(t.Context(), lorakit.Adapter{Path: pipelineFile(name)}, out,
						lorakit.AdapterOptions{To: to})
					if says := refused[name]; to == "kohya" && says != "" {
						require.ErrorContains(t, err, says)
						return
					}
					require.NoError(t, err)
					for part, c := range parts {
						a := lorakit.Adapter{Path: out}
						if len(parts) > 1 {
							a.Component = part
						}
						asDiffusers(t, a, pipelineBase(c.Base), pipelineFile(c.Golden))
					}
					return
				}
				for part, c := range parts {
					a, out := lorakit.Adapter{Path: pipelineFile(name)}, filepath.Join(dir, part)
					if len(parts) > 1 {
						_, err := lorakit.ConvertAdapter(t.Context(), a, out, lorakit.AdapterOptions{To: to})
						require.ErrorContains(t, err, "they are of two models")
						a.Component = part
					}
					_, err := lorakit.ConvertAdapter(t.Context(), a, out, lorakit.AdapterOptions{To: to})
					require.NoError(t, err)
					asDiffusers(t, lorakit.Adapter{Path: out}, pipelineBase(c.Base), pipelineFile(c.Golden))

					again := filepath.Join(dir, part+".safetensors") // which component it is of, the names of its modules tell
					back := lorakit.Adapter{Path: out}
					if part == "text_encoder" {
						back.Component = part
					}
					_, err = lorakit.ConvertAdapter(t.Context(), back, again, lorakit.AdapterOptions{To: "diffusers"})
					require.NoError(t, err)
					asDiffusers(t, lorakit.Adapter{Path: again}, pipelineBase(c.Base), pipelineFile(c.Golden))
				}
			})
		}
	}
}

// authors writes a base of diffusers' names as the model's authors have it, in one file: their names behind prefix,
// their matrices in the place of several of diffusers'.
func authors(t *testing.T, tensors map[string]entry, prefix, out string) {
	t.Helper()
	originals := map[string]entry{}
	for name, x := range tensors {
		module, weight := strings.CutSuffix(name, ".weight")
		if len(x.Shape) < 2 || !weight {
			continue
		}
		found := false
		for _, f := range models.Families() {
			if f.Name != "Flux.1" && f.Name != "the U-Net of Stable Diffusion" {
				continue
			}
			for _, original := range authored(f, module, x.Shape) {
				shares, ok := f.Diffusers(original, 0, 0)
				if !ok { // by its ratio
					_, own, _ := f.Original(module, x.Shape[0], x.Shape[1])
					shares = own
				}
				for _, s := range shares {
					if s.Module != module {
						continue
					}
					found = true
					row := len(x.data) / int(x.Shape[0])
					unit := int(x.Shape[0]) / int(s.Count*s.Own) * row
					o := originals[original]
					if o.data == nil {
						o.Info = x.Info
						o.Name = prefix + original + ".weight"
						o.Shape = slices.Clone(x.Shape)
						o.Shape[0] = int64(unit/row) * s.Of
						o.data = make([]byte, unit*int(s.Of))
					}
					copy(o.data[unit*int(s.First):], x.data[unit*int(s.At)*int(s.Count):][:unit*int(s.Count)])
					originals[original] = o
				}
			}
		}
		require.True(t, found, "%s has no other name", name)
	}
	var list []entry
	for _, name := range slices.Sorted(maps.Keys(originals)) {
		list = append(list, originals[name])
	}
	writeFile(t, out, list)
}

// authored lists the names that a family's authors may have for a module of diffusers.
func authored(f *models.Family, module string, shape tensor.Shape) (list []string) {
	if original, _, ok := f.Original(module, shape[0], shape[1]); ok {
		return []string{original}
	}
	parts := strings.Split(module, ".")
	tails := []string{"in_layers.2", "out_layers.3", "emb_layers.1", "skip_connection", "op", "conv"}
	for i := range parts {
		tails = append(tails, strings.Join(parts[i:], "."))
	}
	try := func(name string) {
		if shares, ok := f.Diffusers(name, 0, 0); ok && shares[0].Module == module && !slices.Contains(list, name) {
			list = append(list, name)
		}
	}
	for _, name := range []string{"time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0",
		"out.2"} {
		try(name)
	}
	for n := range 12 {
		for _, tail := range tails {
			try(fmt.Sprintf("middle_block.%d.%s", n, tail))
			for j := range 2 {
				try(fmt.Sprintf("input_blocks.%d.%d.%s", n, j, tail))
				try(fmt.Sprintf("output_blocks.%d.%d.%s", n, j, tail))
			}
		}
	}
	return list
}

// writeFile writes tensors to a safetensors file.
func writeFile(t *testing.T, path string, list []entry) {
	t.Helper()
	header, data := map[string]any{}, []byte{}
	for _, x := range list {
		header[x.Name] = map[string]any{"dtype": x.DType.String(), "shape": x.Shape, "data_offsets": []int{len(data),
			len(data) + len(x.data)}}
		data = append(data, x.data...)
	}
	h, err := json.Marshal(header)
	require.NoError(t, err)
	b := append(binary.LittleEndian.AppendUint64(nil, uint64(len(h))), h...)
	require.NoError(t, os.WriteFile(path, append(b, data...), 0o644))
}

// TestMergeOntoAuthors merges adapters with diffusers' names onto bases as the models' authors have them, in one file.
func TestMergeOntoAuthors(t *testing.T) {
	t.Parallel()
	o := lorakit.ConvertOptions{DType: "f32"}
	for name, prefix := range map[string]string{"flux": "", "flux-ranks": "model.diffusion_model.", "flux-dora": "",
		"kohya-flux": "",
		"comfy-flux": "model.diffusion_model.", "sd": "model.diffusion_model.", "kohya-sd": "model.diffusion_model.",
		"kohya-xl": "model.diffusion_model.", "sd-convolutions": "diffusion_model."} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, parts := t.TempDir(), pipelines(t)[name]
			part, c := "transformer", parts["transformer"]
			if _, ok := parts["unet"]; ok {
				part, c = "unet", parts["unet"]
			}
			plain := filepath.Join(dir, "plain")
			_, err := lorakit.Convert(t.Context(), pipelineBase(c.Base), plain, o)
			require.NoError(t, err)
			base := load(t, plain)
			file := filepath.Join(dir, "base.safetensors")
			authors(t, base, prefix, file)
			a := lorakit.Adapter{Path: pipelineFile(name)}
			if len(parts) > 1 {
				a.Component = part
			}
			out := filepath.Join(dir, "out.safetensors")
			_, err = lorakit.Merge(t.Context(), file, []lorakit.Adapter{a}, out, o)
			require.NoError(t, err)

			changed := load(t, pipelineFile(c.Golden))
			maps.Copy(base, changed)
			want := filepath.Join(dir, "want.safetensors")
			authors(t, base, prefix, want)
			got, expected := load(t, out), load(t, want)
			require.Equal(t, names(expected), names(got))
			for name, w := range expected {
				nearlyFloat32(t, name, w.data, got[name].data)
			}
		})
	}
}

// TestCombinePipelines combines and resizes adapters for several components into one file again.
func TestCombinePipelines(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a := []lorakit.Adapter{{Path: pipelineFile("sd"), Weight: 1}, {Path: pipelineFile("sd-metadata"), Weight: 1}}
	folder := filepath.Join(dir, "folder")
	_, err := lorakit.Combine(t.Context(), folder, a[:1], lorakit.CombineOptions{Type: "linear"})
	require.ErrorContains(t, err, "they are of two models")
	require.NoDirExists(t, folder)

	for name, make := range map[string]func(out string) error{
		"combined": func(out string) error {
			_, err := lorakit.Combine(t.Context(), out, a[:1], lorakit.CombineOptions{Type: "linear"})
			return err
		},
		"resized": func(out string) error {
			_, err := lorakit.Resize(t.Context(), a[0], out, lorakit.ResizeOptions{Energy: 1})
			return err
		},
	} {
		out := filepath.Join(dir, name+".safetensors")
		require.NoError(t, make(out))
		for part, c := range pipelines(t)["sd"] {
			asDiffusers(t, lorakit.Adapter{Path: out, Component: part}, pipelineBase(c.Base), pipelineFile(c.Golden))
		}
	}
	// Adapters of kohya and of diffusers go together: their modules have the same names.
	out := filepath.Join(dir, "both.safetensors")
	kohya := lorakit.Adapter{Path: pipelineFile("kohya-sd"), Weight: -1}
	r, err := lorakit.Combine(t.Context(), out, []lorakit.Adapter{a[0], kohya}, lorakit.CombineOptions{Type: "cat"})
	require.NoError(t, err)
	require.Contains(t, r.Modules, "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q")
	i, err := lorakit.InspectAdapter(t.Context(), lorakit.Adapter{Path: out}, lorakit.ReadOptions{})
	require.NoError(t, err)
	ranks := map[string]int{}
	for _, m := range i.Modules {
		ranks[m.Name] = m.Rank
	}
	require.Equal(t, 7, ranks["unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"])
	require.Equal(t, 4, ranks["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"])
}
