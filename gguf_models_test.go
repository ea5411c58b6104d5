package lorakit_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

const ggufModels = "fixtures/gguf-models"

// converted is what llama.cpp's converter makes of a model in a type: of each key its type and value, of each tensor
// its type, its dimensions, the innermost first, and the SHA-256 of its bytes.
type converted struct {
	Keys    map[string][2]any `json:"keys"`
	Tensors map[string][3]any `json:"tensors"`
}

// ggufExpectations are those of a model by type. Keys that are as in f32 are not repeated there.
func ggufExpectations(t *testing.T, name string) map[string]converted {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(ggufModels, name, "expected.json"))
	require.NoError(t, err)
	all := map[string]converted{}
	require.NoError(t, json.Unmarshal(b, &all))
	for typ, e := range all {
		keys := maps.Clone(all["f32"].Keys)
		maps.Copy(keys, e.Keys)
		all[typ] = converted{keys, e.Tensors}
	}
	require.Len(t, all, 4)
	return all
}

// ggufNames lists the models that llama.cpp's converter has seen.
func ggufNames(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(ggufModels, "*", "expected.json"))
	require.NoError(t, err)
	require.Len(t, files, 22)
	for i, f := range files {
		files[i] = filepath.Base(filepath.Dir(f))
	}
	return files
}

// asType are the options that write a type of llama.cpp's converter.
func asType(typ string) lorakit.ConvertOptions {
	if typ == "q8_0" {
		return lorakit.ConvertOptions{Quantize: typ}
	}
	return lorakit.ConvertOptions{DType: typ}
}

// textOnly are the tensors of a model that GGUF has a place for, by the names that they come back with.
func textOnly(all map[string]entry) map[string]entry {
	text := map[string]entry{}
	for name, e := range all {
		if strings.Contains(name, "vision") || strings.Contains(name, "multi_modal") || strings.HasPrefix(name, "pooler.") {
			continue
		}
		text[strings.TrimPrefix(name, "language_model.")] = e
	}
	return text
}

// TestModelsToGGUF: a model is, tensor for tensor and key for key, what llama.cpp's converter makes of it.
func TestModelsToGGUF(t *testing.T) {
	t.Parallel()
	for _, name := range ggufNames(t) {
		for typ, want := range ggufExpectations(t, name) {
			t.Run(name+"/"+typ, func(t *testing.T) {
				t.Parallel()
				out := filepath.Join(t.TempDir(), "out.gguf")
				r, err := lorakit.Convert(t.Context(), filepath.Join(ggufModels, name), out, asType(typ))
				require.NoError(t, err)
				require.Equal(t, "gguf", r.Format)
				keys := map[string]any{}
				for _, p := range opened(t, out).Metadata() {
					keys[p.Name] = p.Value
				}
				for key, v := range want.Keys {
					if key == "general.name" ||
						strings.HasPrefix(key, "tokenizer.") && key != "tokenizer.ggml.add_space_prefix" {
						continue // there is no tokenizer in the fixtures
					}
					require.Contains(t, keys, key)
					require.EqualValues(t, v[1], jsonValue(t, keys[key]), key)
					delete(keys, key)
				}
				delete(keys, "general.name")
				require.Empty(t, keys)

				got := load(t, out)
				require.Equal(t, slices.Sorted(maps.Keys(want.Tensors)), names(got))
				for tensor, w := range want.Tensors {
					g := got[tensor]
					shape := w[1].([]any)
					require.Len(t, g.Shape, len(shape), tensor)
					for i, d := range shape {
						require.EqualValues(t, d, g.Shape[len(shape)-1-i], tensor)
					}
					require.Equal(t, w[0], strings.ToUpper(g.Type()), tensor)
					sum := sha256.Sum256(g.data)
					require.Equal(t, w[2], hex.EncodeToString(sum[:]), tensor)
				}
			})
		}
	}
}

// jsonValue is a key's value as JSON has it.
func jsonValue(t *testing.T, v any) any {
	t.Helper()
	if f, ok := v.(float32); ok {
		v = float64(f) // with all digits
	}
	b, err := json.Marshal(v)
	require.NoError(t, err)
	var out any
	require.NoError(t, json.Unmarshal(b, &out))
	return out
}

// TestModelsThroughGGUF: a model that has been a GGUF file has its tensors again, byte for byte, and is the same GGUF
// file once more.
func TestModelsThroughGGUF(t *testing.T) {
	t.Parallel()
	for _, name := range ggufNames(t) {
		for _, dtype := range []string{"keep", "f32"} {
			t.Run(name+"/"+dtype, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				src, file, back := filepath.Join(ggufModels, name), filepath.Join(dir, "x.gguf"), filepath.Join(dir, "back")
				_, err := lorakit.Convert(t.Context(), src, file, lorakit.ConvertOptions{DType: dtype})
				require.NoError(t, err)
				as := map[string]string{"gpt2": "f16"}[name]
				if as == "" {
					as = "bf16"
				}
				_, err = lorakit.Convert(t.Context(), file, back, lorakit.ConvertOptions{DType: as})
				require.NoError(t, err)
				want, got := textOnly(load(t, src)), load(t, back)
				require.Equal(t, names(want), names(got))
				for k, w := range want {
					require.Equal(t, w.DType, got[k].DType, k)
					require.Equal(t, w.Shape, got[k].Shape, k)
					require.True(t, string(w.data) == string(got[k].data), k)
				}

				again := filepath.Join(dir, "again.gguf")
				_, err = lorakit.Convert(t.Context(), back, again, lorakit.ConvertOptions{DType: dtype})
				require.NoError(t, err)
				sameTensors(t, load(t, file), load(t, again))
				v, err := lorakit.Verify(t.Context(), file, lorakit.ReadOptions{})
				require.NoError(t, err)
				require.Empty(t, v.Problems)
			})
		}
	}
}

// sameTensors holds tensors against others, byte for byte.
func sameTensors(t *testing.T, want, got map[string]entry) {
	t.Helper()
	require.Equal(t, names(want), names(got))
	for k, w := range want {
		require.Equal(t, w.Info, got[k].Info, k)
		require.True(t, string(w.data) == string(got[k].data), "%s differs", k)
	}
}

// TestTurnedTensorsAreNotCopied: bytes that lie otherwise in the source are read in tiles that are large enough, and
// that the memory has room for. Copied piece by piece they would be read element by element.
func TestTurnedTensorsAreNotCopied(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "x.gguf")
	_, err := lorakit.Convert(t.Context(), filepath.Join(ggufModels, "gpt2"), file, lorakit.ConvertOptions{})
	require.NoError(t, err)
	for src, turned := range map[string]string{
		filepath.Join(ggufModels, "gptoss"): "ffn_down_exps.weight", filepath.Join(ggufModels, "gpt2"): "attn_qkv.weight",
		file: "attn.c_attn.weight",
	} {
		dst := "dry.gguf"
		if src == file {
			dst = "dry"
		}
		r, err := lorakit.Convert(t.Context(), src, dst, lorakit.ConvertOptions{DryRun: true})
		require.NoError(t, err)
		seen := 0
		for _, j := range r.Plan.Shards[0].Jobs {
			if strings.HasSuffix(j.Weight, turned) {
				seen++
				require.False(t, j.Copy, j.Weight)
			}
		}
		require.Positive(t, seen, turned)
	}
}
