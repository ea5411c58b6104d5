package models

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestFamilies holds the names that diffusers has for other authors' modules, and the rows that they take, against
// what its converters of whole checkpoints make of them.
func TestFamilies(t *testing.T) {
	b, err := os.ReadFile("testdata/originals.json")
	require.NoError(t, err)
	type share struct {
		Module               string
		First, Rows, At, Own int64
	}
	var golden struct {
		Families []struct {
			Family  string
			Modules []struct {
				Module  string
				Out, In int64
				Shares  []share
			}
		}
	}
	require.NoError(t, json.Unmarshal(b, &golden))
	families := map[string]*Family{}
	for _, f := range Families() {
		families[f.Name] = f
	}
	require.Len(t, golden.Families, len(families))
	for _, g := range golden.Families {
		f := families[g.Family]
		require.NotNil(t, f, g.Family)
		covered := map[string]bool{}
		for _, m := range g.Modules {
			shares, ok := f.Diffusers(m.Module, m.Out, m.In)
			require.True(t, ok, "%s: %s", f.Name, m.Module)
			var got []share
			for _, s := range shares {
				rows := m.Out / s.Of * s.Count
				got = append(got, share{s.Module, m.Out / s.Of * s.First, rows, rows * s.At, rows * s.Own})
			}
			require.ElementsMatch(t, m.Shares, got, "%s: %s", f.Name, m.Module)
			for _, r := range f.rows[numbered(m.Module)] {
				if _, ok := numbersOf(r.pattern, m.Module); ok {
					covered[r.pattern] = true
				}
			}
			for _, s := range shares {
				if f.rule == nil {
					original, back, ok := f.Original(s.Module, m.Out/s.Of*s.Count*s.Own, m.In)
					require.True(t, ok, s.Module)
					require.Equal(t, m.Module, original)
					require.Contains(t, back, s)
				}
				component, known := DiffusersComponent(s.Module)
				require.True(t, known, s.Module)
				if want := map[bool]string{true: "unet", false: "transformer"}[f.rule != nil]; component != "" {
					require.Equal(t, want, component, s.Module)
				}
			}
		}
		for _, list := range f.rows {
			for _, r := range list {
				require.True(t, covered[r.pattern], "%s: no golden has %s", f.Name, r.pattern)
			}
		}
	}
}

// Names that are not of the blocks that Stable Diffusion has are not taken for them.
func TestNotOfTheFamilies(t *testing.T) {
	for _, name := range []string{"input_blocks.3.0.in_layers.2", "input_blocks.3.1.proj_in", "input_blocks.1.0.op",
		"input_blocks.0.0.op", "input_blocks.-1.0.op",
		"input_blocks.1.0", "input_blocks.1", "input_blocks", "input_blocks.x.0.op", "middle_block.3.in_layers.2",
		"middle_block.1.in_layers.2", "output_blocks.0.1.conv",
		"output_blocks.2.1.other", "output_blocks.1.2.conv", "out", "out.1", "time_embed", "", "double_blocks.0.img_attn",
		"double_blocks.x.img_attn.qkv",
		"double_blocks.0.0.img_attn.qkv", strings.Repeat("1.", 10_000)} {
		for _, f := range Families() {
			_, ok := f.Diffusers(name, 0, 0)
			require.False(t, ok, "%s: %s", f.Name, name)
		}
	}
	for _, x := range []struct {
		name    string
		out, in int64
	}{{"single_blocks.0.linear1", 8, 1}, {"double_blocks.0.img_mlp.0", 5, 1}, {"double_blocks.0.img_attn.qkv", 0, 0}} {
		for _, f := range Families() {
			_, ok := f.Diffusers(x.name, x.out, x.in)
			require.False(t, ok, "%s: %s", f.Name, x.name)
		}
	}
}

func TestUnflattenDiffusers(t *testing.T) {
	for _, want := range []string{
		"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
		"mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj",
		"transformer_blocks.18.attn.add_q_proj", "single_transformer_blocks.7.proj_mlp", "blocks.3.self_attn.q",
		"double_blocks.18.img_attn.qkv", "joint_blocks.0.context_block.adaLN_modulation.1",
		"transformer_blocks.0.img_mlp.net.0.proj",
		"time_text_embed.timestep_embedder.linear_1",
	} {
		require.Equal(t, []string{want}, UnflattenDiffusers(strings.ReplaceAll(want, ".", "_")))
	}
	for _, flat := range []string{
		"down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q_and_more", "text_model_encoder_layers_0_self_attn_q_proj",
		"down_blocks_x_attentions_0_transformer_blocks_0_attn1_to_q", "",
	} {
		require.Empty(t, UnflattenDiffusers(flat), flat)
	}
	for name, want := range map[string]string{"time_embedding.linear_1": "",
		"transformer_blocks.3.attn.to_q": "transformer", "blocks.0.attn1.to_out.0": "transformer",
		"up_blocks.1.resnets.2.conv_shortcut": "unet", "mid_block.attentions.0.proj_in": "unet"} {
		component, known := DiffusersComponent(name)
		require.True(t, known, name)
		require.Equal(t, want, component, name)
	}
	for _, name := range []string{"", "model.layers.0.self_attn.q_proj", "transformer_blocks.x.attn.to_q",
		"transformer_blocks_0_attn_to_q"} {
		_, known := DiffusersComponent(name)
		require.False(t, known, name)
	}
}

// No two names of diffusers' and of the authors' are the same when their dots are underscores.
func TestNamesWithoutDots(t *testing.T) {
	seen := map[string]string{}
	note := func(pattern string) {
		flat := strings.ReplaceAll(pattern, ".", "_")
		if other, ok := seen[flat]; ok {
			require.Equal(t, other, pattern)
		}
		seen[flat] = pattern
	}
	for _, patterns := range diffusersModules() {
		for pattern := range patterns {
			note(pattern)
		}
	}
	for _, patterns := range originalNames() {
		for _, pattern := range patterns {
			note(pattern)
		}
	}
	require.Greater(t, len(seen), 1000)
}
