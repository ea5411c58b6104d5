package gguf_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/x448/float16"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

const fixtures = "../../fixtures/gguf-models"

// names lists the models of the fixtures.
func names(t *testing.T) []string {
	entries, err := os.ReadDir(fixtures)
	require.NoError(t, err)
	var list []string
	for _, e := range entries {
		if e.IsDir() {
			list = append(list, e.Name())
		}
	}
	require.Len(t, list, 22)
	return list
}

// checkpoint is a model of the fixtures, whole in memory.
type checkpoint struct {
	config  *models.Config
	tensors []tensor.Info
	data    map[string][]byte
}

func open(t *testing.T, name string) checkpoint {
	dir := filepath.Join(fixtures, name)
	b, err := os.ReadFile(filepath.Join(dir, "config.json"))
	require.NoError(t, err)
	c := checkpoint{data: map[string][]byte{}}
	c.config, err = models.ParseConfig(b)
	require.NoError(t, err)
	container, err := safetensors.Format{}.Open(context.Background(), storage.Local(dir, storage.Options{}), "")
	require.NoError(t, err)
	defer container.Close()
	for _, s := range container.Tensors() {
		data := make([]byte, s.Bytes)
		_, err := s.Data.ReadAt(data, s.Offset)
		require.NoError(t, err)
		c.tensors = append(c.tensors, s.Info)
		c.data[s.Name] = data
	}
	return c
}

func (c checkpoint) info(t *testing.T, name string) tensor.Info {
	i := slices.IndexFunc(c.tensors, func(s tensor.Info) bool { return s.Name == name })
	require.GreaterOrEqual(t, i, 0, name)
	return c.tensors[i]
}

// expected is what llama.cpp's converter makes of a model in one type.
type expected struct {
	Keys    map[string][2]any `json:"keys"`
	Tensors map[string][3]any `json:"tensors"`
}

var types = map[string]gguf.Type{"f32": gguf.F32, "f16": gguf.F16, "bf16": gguf.BF16, "q8_0": gguf.Q8_0}

// expectations are those of all types. The converter's keys differ from those of f32 where a type has its own.
func expectations(t *testing.T, name string) map[string]expected {
	b, err := os.ReadFile(filepath.Join(fixtures, name, "expected.json"))
	require.NoError(t, err)
	all := map[string]expected{}
	require.NoError(t, json.Unmarshal(b, &all))
	require.Len(t, all, len(types))
	for typ, e := range all {
		for k, v := range all["f32"].Keys {
			if _, ok := e.Keys[k]; !ok {
				e.Keys[k] = v
			}
		}
		all[typ] = e
	}
	return all
}

// contents computes the bytes of a tensor of a GGUF file.
func (c checkpoint) contents(t *testing.T, g gguf.Tensor) []byte {
	x := slices.Clone(g.Values)
	for _, name := range g.Sources {
		s := c.info(t, name)
		all := make([]float32, s.Count())
		require.NoError(t, tensor.ToFloats(all, c.data[name], s.DType))
		part := make([]float32, g.View.Count())
		gguf.Gather(g.View, 0, g.View.Count(), part, all, 0)
		if g.Shift != 0 {
			require.NoError(t, gguf.Shift(part, g.Shift, s.DType))
		}
		x = append(x, part...)
	}
	require.EqualValues(t, g.Count(), len(x), g.Name)
	if g.Encoding.Name != "" {
		return q8(x)
	}
	size, err := g.Size()
	require.NoError(t, err)
	b := make([]byte, size)
	require.NoError(t, tensor.FromFloats(b, g.DType, x))
	return b
}

// q8 stores numbers as Q8_0, in blocks of a scale and 32 bytes.
func q8(x []float32) []byte {
	var out []byte
	for block := range slices.Chunk(x, 32) {
		most := float32(0)
		for _, v := range block {
			most = max(most, float32(math.Abs(float64(v))))
		}
		scale := most / 127
		inverse := float32(0)
		if scale != 0 {
			inverse = 1 / scale
		}
		out = binary.LittleEndian.AppendUint16(out, float16.Fromfloat32(scale).Bits())
		for _, v := range block {
			out = append(out, byte(int8(math.Round(float64(v*inverse)))))
		}
	}
	return out
}

// free are the keys of a model card, and those of the tokenizer.
func free(key string) bool {
	return key == "general.name" || key == "general.size_label" ||
		strings.HasPrefix(key, "tokenizer.") && key != "tokenizer.ggml.add_space_prefix"
}

// plain is a value of a key as the expectations have it.
func plain(v any) [2]any {
	switch v := v.(type) {
	case string:
		return [2]any{"string", v}
	case bool:
		return [2]any{"bool", v}
	case float32:
		return [2]any{"float32", float64(v)}
	case uint32:
		return [2]any{"uint32", float64(v)}
	}
	return [2]any{"another type", v}
}

// TestForward: every model becomes what llama.cpp's converter makes of it: keys and their types, names, types, shapes
// and bytes of tensors.
func TestForward(t *testing.T) {
	for _, name := range names(t) {
		c := open(t, name)
		for typ, want := range expectations(t, name) {
			t.Run(name+"/"+typ, func(t *testing.T) {
				m, err := gguf.Forward(c.config, c.tensors, gguf.Options{Type: types[typ], Vocabulary: 320})
				require.NoError(t, err)
				require.NoError(t, m.Keys.Check())
				require.Empty(t, m.Notices)
				keys := map[string][2]any{}
				for _, p := range m.Keys {
					keys[p.Name] = plain(p.Value)
				}
				for k, v := range want.Keys {
					if !free(k) {
						require.Equal(t, v, keys[k], k)
						delete(keys, k)
					}
				}
				require.Empty(t, keys)
				for _, g := range m.Tensors {
					w, ok := want.Tensors[g.Name]
					require.True(t, ok, g.Name)
					require.Equal(t, w[0], strings.ToUpper(g.Type()), g.Name)
					shape := w[1].([]any)
					require.Len(t, g.Shape, len(shape), g.Name)
					for i, d := range shape {
						require.EqualValues(t, d, g.Shape[len(shape)-1-i], g.Name)
					}
					sum := sha256.Sum256(c.contents(t, g))
					require.Equal(t, w[2], hex.EncodeToString(sum[:]), g.Name)
					delete(want.Tensors, g.Name)
				}
				require.Empty(t, want.Tensors)
			})
		}
	}
}

var _ = formats.ErrMalformed
