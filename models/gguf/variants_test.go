package gguf_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/tensor"
)

// variant is a model in another shape, or with another config, and what llama.cpp's converter makes of it.
type variant struct {
	Config  json.RawMessage             `json:"config"`
	Sources map[string][2]any           `json:"sources"`
	Keys    map[string][2]any           `json:"keys"`
	Tensors map[string]map[string][]any `json:"tensors"` // type, dimensions, of MXFP4 a digest too
}

func variants(t *testing.T) map[string]variant {
	f, err := os.Open(filepath.Join(fixtures, "variants.json.gz"))
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	all := map[string]variant{}
	require.NoError(t, json.NewDecoder(z).Decode(&all))
	require.Len(t, all, 30)
	return all
}

// checkpoint is the config and the tensors, without their data.
func (v variant) checkpoint(t *testing.T) checkpoint {
	config, err := models.ParseConfig(v.Config)
	require.NoError(t, err)
	c := checkpoint{config: config}
	for name, s := range v.Sources {
		d, err := tensor.ParseDType(s[0].(string))
		require.NoError(t, err)
		c.tensors = append(c.tensors, tensor.Info{Name: name, DType: d, Shape: shapeOf(s[1])})
	}
	return c
}

func shapeOf(v any) tensor.Shape {
	var shape tensor.Shape
	for _, d := range v.([]any) {
		shape = append(shape, int64(d.(float64)))
	}
	return shape
}

// pattern is the bytes that the tensors of blocks have.
func (v variant) pattern(name string) []byte {
	n, _ := shapeOf(v.Sources[name][1]).Count()
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 37 % 251)
	}
	return b
}

// packed computes the bytes of a tensor in blocks of MXFP4.
func (v variant) packed(t *testing.T, g gguf.Tensor) []byte {
	in := func(name string) formats.Tensor {
		b := v.pattern(name)
		return formats.Tensor{Data: bytes.NewReader(b), Bytes: int64(len(b))}
	}
	size, err := g.Size()
	require.NoError(t, err)
	out := make([]byte, size)
	blocks := g.Packed(in(g.Sources[0]), in(g.Scales))
	_, err = blocks.ReadAt(out, 0)
	require.NoError(t, err)
	piece := make([]byte, min(50, size-7)) // of blocks that it has no whole one of at either end
	_, err = blocks.ReadAt(piece, 7)
	require.NoError(t, err)
	require.Equal(t, out[7:7+len(piece)], piece)
	return out
}

// variantNotices are those of the variants.
var variantNotices = map[string][]string{
	"gptoss": notices["gptoss"], "gptoss-mxfp4": notices["gptoss"],
	"phi3-old": {"sliding_window is 64; llama.cpp does not heed the key for it, and computes with 512"},
	"qwen2-yarn-no-length": {"rope_parameters.attention_factor is 1.5; llama.cpp reads no key for it, and computes with " +
		"1.1386294"},
}

// TestVariants: configs of all ages, of defaults that are not written down and of scalings, and shapes in which no two
// dimensions are the same, become what the converter makes of them; and the keys and shapes come back.
func TestVariants(t *testing.T) {
	for name, v := range variants(t) {
		t.Run(name, func(t *testing.T) {
			c := v.checkpoint(t)
			var m *gguf.Model
			for typ, want := range v.Tensors {
				var err error
				m, err = gguf.Forward(c.config, c.tensors, gguf.Options{Type: types[typ], Vocabulary: 320})
				require.NoError(t, err)
				require.Equal(t, variantNotices[name], m.Notices)
				for _, g := range m.Tensors {
					w, ok := want[g.Name]
					require.True(t, ok, g.Name)
					require.Equal(t, w[0], strings.ToUpper(g.Type()), g.Name)
					shape := shapeOf(w[1])
					for i, d := range g.Shape {
						require.Equal(t, shape[len(shape)-1-i], d, g.Name)
					}
					if g.Scales != "" {
						require.Equal(t, w[2], digest(v.packed(t, g)), g.Name)
					}
					delete(want, g.Name)
				}
				require.Empty(t, want)
				if typ == "f32" {
					require.Equal(t, v.Keys["general.file_type"], plain(m.Keys.Get("general.file_type")))
				}
			}
			keys := map[string][2]any{}
			for _, p := range m.Keys {
				if p.Name != "general.file_type" && !strings.HasPrefix(p.Name, "tokenizer.") {
					keys[p.Name] = plain(p.Value)
				}
			}
			delete(v.Keys, "general.file_type")
			require.Equal(t, v.Keys, keys)

			w := written{keys: m.Keys, values: map[string][]float32{}}
			for _, g := range m.Tensors {
				w.tensors, w.values[g.Name] = append(w.tensors, g.Info), g.Values
			}
			back, err := w.back(tensor.BF16)
			require.NoError(t, err)
			require.Empty(t, back.Notices)
			if name == "gptoss-mxfp4" {
				return // it comes back in other tensors, decoded
			}
			for _, r := range back.Tensors {
				s := c.info(t, r.Name)
				if name == "gemma3-rows" && strings.Contains(r.Name, "embed_tokens") {
					require.EqualValues(t, 320, r.Shape[0])
					continue
				}
				require.Equal(t, s.Shape, r.Shape, r.Name)
			}
			again, err := models.ParseConfig(back.Config)
			require.NoError(t, err)
			same, err := gguf.Forward(again, c.tensors, gguf.Options{Type: types["q8_0"], Vocabulary: 320})
			require.NoError(t, err)
			if name == "gemma3-rows" {
				return // what it means has fewer rows
			}
			for _, p := range m.Keys {
				if p.Name != "general.file_type" {
					require.Equal(t, p.Value, same.Keys.Get(p.Name), p.Name)
				}
			}
		})
	}
}
