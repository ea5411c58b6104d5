package tokenizer

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
)

// expected is what llama.cpp's converter makes of the files beside it.
type expected struct {
	Architecture string `json:"architecture"`
	PreTokenizer string `json:"pre_tokenizer"`
	Keys         map[string]struct {
		Type  []string       `json:"type"`
		Value jsontext.Value `json:"value"`
	} `json:"keys"`
}

func (e expected) options() Options {
	return Options{Architecture: e.Architecture, PreTokenizer: e.PreTokenizer}
}

// values are the keys with the types of a GGUF file.
func (e expected) values(t testing.TB) map[string]any {
	values := map[string]any{}
	for name, k := range e.Keys {
		switch kind := k.Type[len(k.Type)-1]; {
		case len(k.Type) == 1 && kind == "STRING":
			values[name] = as[string](t, k.Value)
		case len(k.Type) == 1 && kind == "BOOL":
			values[name] = as[bool](t, k.Value)
		case len(k.Type) == 1 && kind == "UINT32":
			values[name] = as[uint32](t, k.Value)
		case kind == "STRING":
			values[name] = as[[]string](t, k.Value)
		case kind == "INT32":
			values[name] = as[[]int32](t, k.Value)
		case kind == "FLOAT32":
			values[name] = as[[]float32](t, k.Value)
		default:
			t.Fatalf("%s: a type that is not known: %v", name, k.Type)
		}
	}
	return values
}

func as[T any](t testing.TB, v jsontext.Value) T {
	var to T
	require.NoError(t, json.Unmarshal(v, &to))
	return to
}

// folder reads the files of a case.
func folder(t testing.TB, dir string) (Files, expected) {
	files := Files{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		files[filepath.ToSlash(name)] = b
		return err
	}))
	var e expected
	require.NoError(t, json.Unmarshal(files["keys.json"], &e))
	delete(files, "keys.json")
	return files, e
}

// write writes the files of a folder.
func write(t testing.TB, dir string, files Files) {
	for name, b := range files {
		path := filepath.Join(dir, filepath.FromSlash(name))
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o777))
		require.NoError(t, os.WriteFile(path, b, 0o666))
	}
}

func cases(t testing.TB) []string {
	dirs, err := filepath.Glob("../../fixtures/tokenizers/*/keys.json")
	require.NoError(t, err)
	require.GreaterOrEqual(t, len(dirs), 22)
	for i, d := range dirs {
		dirs[i] = filepath.Dir(d)
	}
	return dirs
}

// mapped are keys by their names, each of which is there once.
func mapped(t testing.TB, keys formats.Metadata) map[string]any {
	require.NoError(t, keys.Check())
	m := map[string]any{}
	for _, p := range keys {
		m[p.Name] = p.Value
	}
	return m
}

// same holds keys against each other, one by one.
func same(t testing.TB, want, got map[string]any) {
	require.ElementsMatch(t, slices.Collect(maps.Keys(want)), slices.Collect(maps.Keys(got)))
	for name, w := range want {
		require.IsType(t, w, got[name], name)
		switch w := w.(type) {
		case []string:
			list(t, name, w, got[name].([]string))
		case []int32:
			list(t, name, w, got[name].([]int32))
		case []float32:
			list(t, name, w, got[name].([]float32))
		default:
			require.Equal(t, w, got[name], name)
		}
	}
}

// list says where lists differ, of which there are long ones.
func list[T comparable](t testing.TB, name string, want, got []T) {
	require.Len(t, got, len(want), name)
	for i := range want {
		require.Equal(t, want[i], got[i], "%s[%d]", name, i)
	}
}

// The keys of every kind of model are those that llama.cpp's converter writes, with their types.
func TestKeys(t *testing.T) {
	for _, dir := range cases(t) {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			files, e := folder(t, dir)
			keys, _, err := ToGGUF(files, e.options())
			require.NoError(t, err)
			same(t, e.values(t), mapped(t, keys))
		})
	}
}

// lost changes keys as a tokenizer.model among the files does: added tokens that look special are, ▁ in others is a
// space, and the id of unk is that of config.json alone.
func lost(keys formats.Metadata, files Files, o Options) formats.Metadata {
	if files[tokenizerModel] == nil {
		return keys
	}
	tokens, types := slices.Clone(keys.Get(keyTokens).([]string)), slices.Clone(keys.Get(keyTypes).([]int32))
	for id, kind := range types {
		if kind != userDefined || architectureOf(o.Architecture).AddedAsTheyAre {
			continue
		}
		if looksSpecial(tokens[id]) {
			types[id] = control
		} else {
			tokens[id] = strings.ReplaceAll(tokens[id], space, " ")
		}
	}
	k := keyList{slices.Clone(keys)}
	k.set(keyTokens, tokens)
	k.set(keyTypes, types)
	return slices.DeleteFunc(k.list, func(p formats.Pair) bool { return p.Name == idKeys["unk"] })
}

// What is made of the keys has the same keys again.
func TestBackAndForth(t *testing.T) {
	for _, dir := range cases(t) {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			files, e := folder(t, dir)
			keys, _, err := ToGGUF(files, e.options())
			require.NoError(t, err)
			made, _, err := FromGGUF(keys, e.options())
			require.NoError(t, err)
			made[configJSON] = files[configJSON]                 // the model's part, which has ids and the size
			if to := os.Getenv("LORAKIT_TOKENIZERS"); to != "" { // for interop/tokenizer_ids.py
				write(t, filepath.Join(to, filepath.Base(dir)), made)
			}
			again, _, err := ToGGUF(made, e.options())
			require.NoError(t, err)
			keys = lost(keys, made, e.options())
			same(t, mapped(t, keys), mapped(t, again))
		})
	}
}
