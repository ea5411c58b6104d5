package models

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func TestParseConfig(t *testing.T) {
	c, err := ParseConfig([]byte(`{
  "architectures": ["Mamba2ForCausalLM"],
  "model_type": "mamba2",
  "text_config": {"dtype": "float32", "tie_word_embeddings": true},
  "time_step_limit": [0.0, Infinity],
  "low": -Infinity, "none": NaN, "say": "NaN and \"Infinity",
  "quantization_config": {"limit": Infinity, "b": 1, "a": 2},
  "torch_dtype": "torch.bfloat16"
}`))
	require.NoError(t, err)
	assert.Equal(t, "mamba2", c.ModelType)
	assert.Equal(t, "Mamba2ForCausalLM", c.Architecture)
	assert.False(t, c.Assumed)
	assert.Equal(t, "bfloat16", c.DType)
	assert.Equal(t, `{"limit": Infinity, "b": 1, "a": 2}`, string(c.Quantization))
	require.NotNil(t, c.TieWordEmbeddings)
	assert.True(t, *c.TieWordEmbeddings)

	c,
		err = ParseConfig(
		[]byte(
			`{"vision_config": {"torch_dtype": null}, "text_config": {"torch_dtype": "float16"}, "quantization_config": null}`))
	require.NoError(t, err)
	assert.Equal(t, "float16", c.DType)
	assert.Nil(t, c.Quantization)
	assert.Nil(t, c.TieWordEmbeddings)
	assert.Empty(t, c.Architecture)
}

func TestArchitectureOfTheModelType(t *testing.T) {
	for kind, want := range map[string]string{
		"llama": "LlamaForCausalLM", "gemma2": "Gemma2ForCausalLM", "t5": "T5ForConditionalGeneration", "bert": "BertModel",
		"vit":     "ViTModel",
		"whisper": "WhisperForConditionalGeneration", "gemma3": "Gemma3ForConditionalGeneration",
	} {
		c, err := ParseConfig([]byte(`{"architectures": null, "model_type": "` + kind + `"}`))
		require.NoError(t, err)
		assert.Equal(t, want, c.Architecture, kind)
		assert.True(t, c.Assumed, kind)
	}
	c, err := ParseConfig([]byte(`{"model_type": "no such"}`))
	require.NoError(t, err)
	assert.False(t, c.Assumed)
	_, known := Load(c)
	assert.False(t, known)
}

func TestParseConfigRefuses(t *testing.T) {
	for name, b := range map[string]string{
		"empty":           "",
		"array":           "[]",
		"string":          `"x"`,
		"truncated":       `{"a": 1`,
		"twice":           `{"a": 1, "a": 2}`,
		"twice inside":    `{"b": {"a": 1, "a": 2}}`,
		"trailing":        `{} {}`,
		"utf-8":           "{\"a\": \"\xff\"}",
		"byte order mark": "\xef\xbb\xbf{}",
		"comma":           `{"a": 1,}`,
		"single quotes":   `{'a': 1}`,
		"literal as name": `{NaN: 1}`,
		"digits and NaN":  `{"a": 1NaN}`,
		"NaN and digits":  `{"a": NaN1}`,
		"exponent":        `{"a": 1e-Infinity}`,
		"minus NaN":       `{"a": -NaN}`,
		"model type":      `{"model_type": 3}`,
		"architectures":   `{"architectures": "LlamaForCausalLM"}`,
		"architecture":    `{"architectures": [3]}`,
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseConfig([]byte(b))
			require.Error(t, err)
			assert.NotContains(t, err.Error(), "\n")
			assert.NotErrorIs(t, err, ErrLimit)
		})
	}
	_, err := ParseConfig([]byte(`{"a": ` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + "}"))
	assert.ErrorIs(t, err, ErrLimit)
	_, err = ParseConfig(append([]byte("{}"), bytes.Repeat([]byte(" "), MaxConfigSize)...))
	assert.ErrorIs(t, err, ErrLimit)
}

func TestEditConfig(t *testing.T) {
	quantization := []byte(`{"b": null, "a": [1.50, {}, []], "limit": {"c": true}}`)
	for name, c := range map[string]struct {
		in, want string
		edits    []Edit
	}{
		"sorted, two spaces": {
			"{\n  \"model_type\": \"x\",\n  \"vocab\": 1e3\n}\n",
			"{\n  \"model_type\": \"x\",\n  \"quantization_config\": {\n    \"b\": null,\n    \"a\": [\n      1.50,\n      " +
				"{},\n      []\n    ],\n    \"limit\": {\n      \"c\": true\n    }\n  },\n  \"vocab\": 1e3\n}\n",
			[]Edit{Set("quantization_config", quantization)},
		},
		"sorted, goes first": {`{"z": 1, "zz": 2}`, `{"a": 3, "z": 1, "zz": 2}`, []Edit{Set("a", []byte("3"))}},
		"not sorted, four spaces, carriage returns": {
			"{\r\n    \"z\" : Infinity,\r\n    \"a\" : -0.0\r\n}",
			"{\r\n    \"z\" : Infinity,\r\n    \"a\" : -0.0,\r\n    \"m\" : {\r\n        \"x\" : 1\r\n    }\r\n}",
			[]Edit{Set("m", []byte(`{"x":1}`))},
		},
		"compact": {`{"b":1,"a":2}`, `{"b":1,"a":2,"c":{"x":[1,2]}}`, []Edit{Set("c", []byte(`{"x": [1, 2]}`))}},
		"python's": {`{"b": 1, "a": 2}`, `{"b": 1, "a": 2, "c": {"x": [1, 2], "y": {}}}`,
			[]Edit{Set("c", []byte(`{"x":[1,2],"y":{}}`))}},
		"tabs":           {"{\n\t\"b\": 1\n}", "{\n\t\"b\": 1,\n\t\"c\": [\n\t\t1\n\t]\n}", []Edit{Set("c", []byte(`[1]`))}},
		"empty":          {"{ }", "{\n  \"c\": 1\n}", []Edit{Set("c", []byte("1"))}},
		"in place":       {`{"c": [1, 2], "b": 7}`, `{"c": 3, "b": 7}`, []Edit{Set("c", []byte("3"))}},
		"escaped name":   {`{"\u0063": 1}`, `{"\u0063": 3}`, []Edit{Set("c", []byte("3"))}},
		"remove first":   {"{\n  \"a\": 1,\n  \"b\": NaN\n}", "{\n  \"b\": NaN\n}", []Edit{Remove("a")}},
		"remove last":    {"{\n  \"a\": 1,\n  \"b\": {\"x\": 2}\n}", "{\n  \"a\": 1\n}", []Edit{Remove("b")}},
		"remove middle":  {`{"a": 1, "b": 2, "c": 3}`, `{"a": 1, "c": 3}`, []Edit{Remove("b")}},
		"remove only":    {"{\n  \"a\": 1\n}\n", "{}\n", []Edit{Remove("a")}},
		"remove nothing": {`{"a": 1}`, `{"a": 1}`, []Edit{Remove("b")}},
		"dtype": {
			`{"dtype": "float32", "text_config": {"torch_dtype": "float32", "x": {"dtype": "float32"}, "audio_config": {"dtype": "float16"}}, "vision_config": {"dtype": null}, "quantization_config": {"dtype": "float32"}, "torch_dtype": null}`,
			`{"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "x": {"dtype": "float32"}, "audio_config": {"dtype": "bfloat16"}}, "vision_config": {"dtype": null}, "quantization_config": {"dtype": "float32"}, "torch_dtype": "bfloat16"}`,
			[]Edit{SetDType("bfloat16")},
		},
		"at a path": {`{"a": {"x": {"n": 1}, "y": 2}, "b": 3}`, `{"a": {"x": {"n": 7}, "y": 2}, "b": 3}`,
			[]Edit{SetAt("a.x.n", []byte("7"))}},
		"at a path, new": {"{\n  \"a\": {\n    \"y\": 2\n  }\n}", "{\n  \"a\": {\n    \"x\": false,\n    \"y\": 2\n  }\n}",
			[]Edit{SetAt("a.x", []byte("false"))}},
		"at a path with Infinity": {`{"b": {"n": -Infinity, "x": true}, "a": NaN}`, `{"b": {"n": -Infinity, "x": 7}, "a": NaN}`,
			[]Edit{SetAt("b.x", []byte("7"))}},
		"removed from a section": {`{"b": {"n": Infinity, "x": {"y": 1}}, "c": 2}`, `{"b": {"n": Infinity}, "c": 2}`,
			[]Edit{Remove("b.x"), Remove("b.z"), Remove("c.x"), Remove("d.x")}},
		"at a path of none": {`{"a": 1, "c": 2}`, `{"a": 1, "b": {"x": 7}, "c": 2}`, []Edit{SetAt("b.x", []byte("7"))}},
		"several": {`{"a": 1, "dtype": "float32"}`, `{"b": 2, "dtype": "float16"}`,
			[]Edit{SetDType("float16"), Set("b", []byte("2")), Remove("a")}},
	} {
		t.Run(name, func(t *testing.T) {
			in := []byte(c.in)
			got, err := EditConfig(in, c.edits...)
			require.NoError(t, err)
			assert.Equal(t, c.want, string(got))
			assert.Equal(t, c.in, string(in), "the input is not to be written to")
		})
	}
	_, err := EditConfig([]byte(`{"a": 1, "a": 2}`), Remove("a"))
	assert.Error(t, err)
	_, err = EditConfig([]byte(`{}`), Set("a", []byte("{")))
	assert.Error(t, err)
}

// What the standard library writes, in any layout, is edited as it would write the edited thing.
func TestEditConfigKeepsTheLayout(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		value := rapid.Custom(func(t *rapid.T) any {
			return rapid.SampledFrom([]any{nil, true, 1.5, "a,b:{\"", []any{}, []any{1.0, "x"}, map[string]any{},
				map[string]any{"k": []any{map[string]any{"z": 0.0}}}}).Draw(t, "value")
		})
		m := rapid.MapOfN(rapid.StringMatching(`[a-z"\\é]{1,4}`), value, 1, 6).Draw(t, "config")
		indent := rapid.SampledFrom([]string{"", " ", "  ", "    ", "\t"}).Draw(t, "indent")
		write := func(m map[string]any) string {
			var b bytes.Buffer
			e := json.NewEncoder(&b)
			e.SetEscapeHTML(false)
			e.SetIndent("", indent)
			require.NoError(t, e.Encode(m))
			return b.String()
		}
		before := write(m)
		name := rapid.StringMatching(`[a-z]{1,4}`).Draw(t, "name")
		v := value.Draw(t, "new")
		raw, err := json.Marshal(v)
		require.NoError(t, err)
		got, err := EditConfig([]byte(before), Set(name, raw))
		require.NoError(t, err)
		_, had := m[name]
		m[name] = v
		assert.Equal(t, write(m), string(got))
		if !had {
			got, err = EditConfig(got, Remove(name))
			require.NoError(t, err)
			assert.Equal(t, before, string(got))
		}
	})
}

func FuzzConfig(f *testing.F) {
	for _, s := range []string{`{}`, `{"a": NaN, "dtype": "x"}`, "{\n \"b\": [Infinity, -Infinity]}",
		`{"text_config": {"dtype": null}}`, `{"quantization_config": {}}`,
		`{"architectures": ["T5Model"], "model_type": "t5"}`} {
		f.Add([]byte(s), "quantization_config", []byte(`{"x": [1]}`))
	}
	f.Fuzz(func(t *testing.T, b []byte, name string, value []byte) {
		c, err := ParseConfig(b)
		if err == nil {
			m, _ := Load(c)
			m.Tensor("model.layers.0.mlp.up_proj.weight", []int64{2, 2})
		}
		got, err := EditConfig(b, Set(name, value), SetDType("float16"))
		if err != nil {
			return
		}
		c, err = ParseConfig(got)
		if err == nil {
			if _, there := c.value(name); !there && !strings.Contains(name, ".") {
				t.Fatalf("%q is not in %q", name, got)
			}
		}
		back, err := EditConfig(got, Remove(name))
		if err != nil {
			t.Fatalf("%q: %v", got, err)
		}
		if _, err := EditConfig(back, Remove(name)); err != nil {
			t.Fatalf("%q: %v", back, err)
		}
	})
}

// TestQuantizationKeys: both members that say how weights are quantised, and MLX's only where it is one.
func TestQuantizationKeys(t *testing.T) {
	for config, want := range map[string][]string{
		`{"a": Infinity}`: nil,
		`{"quantization": {"group_size": 64, "bits": 4}}`:             {"quantization"},
		`{"compression_config": {"b": 1}}`:                            {"compression_config"},
		`{"compression_config": 1}`:                                   nil,
		`{"text_config": {"quantization_config": {"b": 1}}}`:          {"text_config.quantization_config"},
		`{"text_config": {"quantization_config": null}}`:              nil,
		`{"quantization_config": null, "quantization": {"by": "me"}}`: {"quantization_config"},
		`{"quantization_config": {}, "a": NaN, "quantization": {"group_size": 64}}`: {"quantization_config",
			"quantization"},
	} {
		c, err := ParseConfig([]byte(config))
		require.NoError(t, err)
		assert.Equal(t, want, c.QuantizationKeys, config)
		assert.True(t, json.Valid(c.JSON()), config)
		assert.Len(t, c.JSON(), len(config))
	}
}
