package gguf_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/tensor"
)

// TestAdaptersThereAndBack asks for the place of every matrix of every model, and for what is there: the names and the
// order of the rows come back. The names are those that Forward gives to the weights themselves.
func TestAdaptersThereAndBack(t *testing.T) {
	for _, name := range names(t) {
		t.Run(name, func(t *testing.T) {
			c := open(t, name)
			m, err := gguf.Forward(c.config, c.tensors, gguf.Options{Type: gguf.F32})
			require.NoError(t, err)
			made := map[string]bool{}
			for _, x := range m.Tensors {
				made[x.Name] = true
			}
			with, err := gguf.NewAdapters(c.config, c.tensors, nil)
			require.NoError(t, err)
			without, err := gguf.NewAdapters(c.config, nil, nil)
			require.NoError(t, err)
			require.Equal(t, m.Architecture, with.Architecture())
			asked := 0
			for _, x := range c.tensors {
				if len(x.Shape) != 2 || strings.HasSuffix(x.Name, "_bias") || slices.Contains(m.Dropped, x.Name) {
					continue
				}
				rows := x.Shape[0]
				if strings.HasPrefix(name, "gpt2") && strings.HasPrefix(x.Name, "transformer.h.") {
					rows = x.Shape[1] // a Conv1D
				}
				places, err := with.Places(x.Name, rows)
				if strings.Contains(x.Name, "kv_b_proj") {
					require.ErrorIs(t, err, formats.ErrUnsupported)
					continue
				}
				require.NoError(t, err, x.Name)
				require.Len(t, places, 1)
				asked++
				p := places[0]
				require.True(t, made[p.Tensor], "%s is %s", x.Name, p.Tensor)
				if s := with.Shape(p.Tensor); s != nil {
					require.Equal(t, rows, s[0], x.Name)
				}
				again, err := without.Places(x.Name, rows)
				require.NoError(t, err)
				require.Equal(t, places, again)

				back, err := without.Parameter(p.Tensor, p.Count, rows)
				require.NoError(t, err, p.Tensor)
				want := strings.Replace(x.Name, "language_model.model.", "model.", 1)
				require.Equal(t, want, back.Names[p.Index])
				require.Equal(t, p.Rows == nil, back.Rows == nil)
				for i, from := range p.Rows {
					require.EqualValues(t, i, back.Rows[from])
				}
			}
			require.Greater(t, asked, 5)
		})
	}
}

// TestAdaptersOfAHead has no place for a head that the base has not.
func TestAdaptersOfAHead(t *testing.T) {
	for name, has := range map[string]bool{"llama": true, "qwen2": false, "gemma2": false, "gpt2": false, "qwen3": true} {
		c := open(t, name)
		for _, tensors := range [][]tensor.Info{nil, c.tensors} {
			m, err := gguf.NewAdapters(c.config, tensors, nil)
			require.NoError(t, err)
			_, err = m.Places("lm_head.weight", 320)
			_, back := m.Parameter("output.weight", 0, 320)
			if has {
				require.NoError(t, err, name)
				require.NoError(t, back, name)
				continue
			}
			require.ErrorIs(t, err, formats.ErrUnsupported, name)
			require.ErrorIs(t, back, formats.ErrUnsupported, name)
		}
	}
}

// TestAdaptersOfATextPart gives the modules of a model with a vision tower the names that they have in it at run time,
// where its tensors tell.
func TestAdaptersOfATextPart(t *testing.T) {
	c := open(t, "gemma3vl")
	for want, tensors := range map[string][]tensor.Info{"model.language_model.layers.1.self_attn.q_proj.weight": c.tensors,
		"model.layers.1.self_attn.q_proj.weight": nil} {
		m, err := gguf.NewAdapters(c.config, tensors, nil)
		require.NoError(t, err)
		for _, name := range []string{"model.language_model.layers.1.self_attn.q_proj.weight",
			"language_model.model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"} {
			places, err := m.Places(name, 64)
			require.NoError(t, err)
			require.Equal(t, "blk.1.attn_q.weight", places[0].Tensor)
		}
		p, err := m.Parameter("blk.1.attn_q.weight", 0, 64)
		require.NoError(t, err)
		require.Equal(t, []string{want}, p.Names)
	}
}

// TestAdaptersOfACutEmbedding asks for the vocabulary where the embedding has rows past it, and nowhere else.
func TestAdaptersOfACutEmbedding(t *testing.T) {
	for name, want := range map[string]int{"gemma3": 300, "llama": 0} {
		c := open(t, name)
		m, err := gguf.NewAdapters(c.config, c.tensors, func(architecture string) (int64, error) {
			require.Equal(t, "gemma3", architecture)
			return 300, nil
		})
		require.NoError(t, err)
		places, err := m.Places("model.embed_tokens.weight", 320)
		require.NoError(t, err)
		require.Len(t, places[0].Rows, want, name)
		p, err := m.Parameter("token_embd.weight", 0, 300)
		require.NoError(t, err)
		require.Equal(t, want != 0, p.Height == 320, name)
	}
}
