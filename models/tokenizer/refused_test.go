package tokenizer

import (
	"bytes"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
)

const smallest = `{"added_tokens":[{"id":3,"content":"<e>","special":true}],"pre_tokenizer":{"type":"ByteLevel"},` +
	`"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":[["a","b"]]}}`

// edited is a tokenizer.json in which old has become something else.
func edited(t testing.TB, old, with string) Files {
	require.Contains(t, smallest, old)
	return Files{tokenizerJSON: []byte(strings.Replace(smallest, old, with, 1))}
}

// modelOf is a tokenizer.model of pieces.
func modelOf(pieces ...piece) []byte { return (&model{pieces: pieces}).append(nil) }

func TestRefused(t *testing.T) {
	unigram := protowire.AppendTag(modelOf(piece{"a", 0, normal}), fieldTrainer, protowire.BytesType)
	unigram = protowire.AppendBytes(unigram, appendNumber(nil, trainerModelType, 1))
	strange := appendMessage(nil, fieldPieces, appendNumber(nil, pieceType, 9))
	for _, c := range []struct {
		name  string
		files Files
		kind  error
		says  string
	}{
		{"nothing", Files{}, formats.ErrMalformed, "found no tokenizer.json and no tokenizer.model"},
		{"no JSON", Files{tokenizerJSON: []byte("{")}, formats.ErrMalformed, "tokenizer.json: found what is no JSON"},
		{"deep", Files{tokenizerJSON: []byte(strings.Repeat("[", 1<<20))}, formats.ErrMalformed, "tokenizer.json: "},
		{"twice", edited(t, `"a":0`, `"a":0,"a":5`), formats.ErrMalformed, "duplicate"},
		{"no UTF-8", edited(t, `"a":0`, "\"\xff\":0"), formats.ErrMalformed, "UTF-8"},
		{"half a surrogate", edited(t, `"a":0`, `"\ud800":0`), formats.ErrMalformed, "surrogate"},
		{"one id twice", edited(t, `"a":0`, `"a":1`), formats.ErrMalformed, `id 1: found the tokens "a" and "b"`},
		{"a negative id", edited(t, `"a":0`, `"a":-1`), formats.ErrMalformed, `token "a": found the id -1`},
		{"a fraction", edited(t, `"a":0`, `"a":0.5`), formats.ErrMalformed, `found the id 0.5`},
		{"a far id", edited(t, `"a":0`, `"a":2147483647`), formats.ErrMalformed, "less than the vocab_size 4"},
		{"a huge id", edited(t, `"a":0`, `"a":99999999999`), formats.ErrMalformed, "expected a whole number"},
		{"a far added id", edited(t, `"id":3`, `"id":4`), formats.ErrMalformed, "found the id 4, expected 3"},
		{"an added id that is taken", edited(t, `"id":3`, `"id":2`), formats.ErrMalformed, "found the id 2, expected 3"},
		{"an added id of none", edited(t, `"id":3`, `"id":-3`), formats.ErrMalformed, "found the id -3"},
		{"an added token of another id", edited(t, `"<e>"`, `"a"`), formats.ErrMalformed, "found the ids 0 and 3"},
		{"half a merge", edited(t, `["a","b"]`, `["a"]`), formats.ErrMalformed, "merge 0: found [\"a\"]"},
		{"no merges", edited(t, `[["a","b"]]`, `7`), formats.ErrMalformed, "merges: found 7"},
		{"Unigram", edited(t, `"BPE"`, `"Unigram"`), formats.ErrUnsupported, `a model of type "Unigram"`},
		{"a processor", edited(t, `"model"`, `"post_processor":[1],"model"`), formats.ErrMalformed, "post_processor"},
		{"an own list", Files{tokenizerJSON: []byte(smallest), tokenizerConfig: []byte("[]")}, formats.ErrMalformed,
			"tokenizer_config.json"},
		{"a decoder", Files{tokenizerJSON: []byte(smallest),
			tokenizerConfig: []byte(`{"added_tokens_decoder":{"x":{"content":""}}}`)}, formats.ErrMalformed, `found the id "x"`},
		{"a big vocabulary", Files{tokenizerJSON: []byte(smallest), configJSON: []byte(`{"vocab_size":2000000000}`)},
			formats.ErrLimit, "found a vocab_size of 2000000000, expected at most 131076 with 4 tokens"},
		{"a small vocabulary", Files{tokenizerJSON: []byte(smallest), configJSON: []byte(`{"vocab_size":3}`)},
			formats.ErrMalformed, `token "<e>": found the id 3, expected less than the vocab_size 3`},
		{"no vocabulary", Files{tokenizerJSON: []byte(smallest), configJSON: []byte(`{"vocab_size":0}`)},
			formats.ErrMalformed, "found a vocab_size of 0"},
		{"a text for a size", Files{tokenizerJSON: []byte(smallest), configJSON: []byte(`{"vocab_size":"4"}`)},
			formats.ErrMalformed, "vocab_size: found \"4\""},
		{"a bos past the end", Files{tokenizerJSON: []byte(smallest), configJSON: []byte(`{"bos_token_id":4}`)},
			formats.ErrMalformed, "config.json: bos_token: found the id 4, expected less than the vocab_size 4"},
		{"a bos below", Files{tokenizerJSON: []byte(smallest), configJSON: []byte(`{"bos_token_id":-1}`)},
			formats.ErrMalformed, "bos_token_id: found -1"},
		{"a model cut short", Files{tokenizerModel: modelOf(piece{"a", 0, normal})[:5]}, formats.ErrMalformed,
			"tokenizer.model: byte 0: found the field 1 cut short"},
		{"a length past the end", Files{tokenizerModel: []byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f}}, formats.ErrMalformed,
			"tokenizer.model: byte 0"},
		{"an empty model", Files{tokenizerModel: {}}, formats.ErrMalformed, "found no pieces"},
		{"a piece without text", Files{tokenizerModel: modelOf(piece{"", 0, normal})}, formats.ErrMalformed,
			"piece 0: found no text"},
		{"many pieces", Files{tokenizerModel: bytes.Repeat([]byte{0x0a, 3, 0x0a, 1, 'a'}, maxTokens+1)}, formats.ErrLimit,
			"tokenizer.model: pieces: found more than 1048576"},
		{"many merges", edited(t, `["a","b"]`, `"a b"`+strings.Repeat(`,"a b"`, maxTokens)), formats.ErrLimit,
			"tokenizer.json: merges: found more than 1048576"},
		{"a Unigram model", Files{tokenizerModel: unigram}, formats.ErrUnsupported, "a model of type 1"},
		{"a type of none", Files{tokenizerModel: strange}, formats.ErrMalformed, "piece 0: found the type 9"},
		{"no template", Files{tokenizerJSON: []byte(smallest), tokenizerConfig: []byte(`{"chat_template":{"a":1}}`)},
			formats.ErrMalformed, `tokenizer_config.json: chat_template: found {"a":1}, expected text or a list`},
		{"many templates", Files{tokenizerJSON: []byte(smallest),
			tokenizerConfig: []byte(`{"chat_template":[{}` + strings.Repeat(`,{}`, 256) + `]}`)}, formats.ErrLimit,
			"found 257 chat templates, expected at most 256"},
		{"a line twice", Files{vocabTxt: []byte("a\nb\na\n")}, formats.ErrMalformed, `the token "a" in the lines 1 and 3`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := ToGGUF(c.files, Options{})
			require.ErrorIs(t, err, c.kind)
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "\n")
			require.NotContains(t, err.Error(), "malformed: malformed")
			require.Less(t, len(err.Error()), 1000)
		})
	}
	_, _, err := ToGGUF(Files{tokenizerJSON: make([]byte, MaxFileBytes+1)}, Options{})
	require.ErrorIs(t, err, formats.ErrLimit)
}

// Memory is bounded by the size of the files, whatever numbers are in them.
func TestMemory(t *testing.T) {
	for _, files := range []Files{
		{tokenizerJSON: []byte(smallest), configJSON: []byte(`{"vocab_size":2147483647}`)},
		{tokenizerJSON: []byte(strings.Replace(smallest, `"id":3`, `"id":2147483647`, 1))},
		{tokenizerModel: []byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0x07, 0x0a}},
		{tokenizerModel: modelOf(piece{"a", 0, normal}), configJSON: []byte(`{"vocab_size":131073}`),
			tokenizerConfig: []byte(`{"added_tokens_decoder":{"2147483647":{"content":"a"}}}`)},
	} {
		allocated := testing.AllocsPerRun(1, func() { _, _, _ = ToGGUF(files, Options{}) })
		require.Less(t, allocated, 400_000.)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _, _ = ToGGUF(files, Options{})
		runtime.ReadMemStats(&after)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(16<<20))
	}
}

// A cut that has no name is an error that shows it; a name that is given wins over all.
func TestUnknownPreTokenizer(t *testing.T) {
	files := edited(t, `{"type":"ByteLevel"}`,
		`{"type":"Sequence","pretokenizers":[{"type":"Punctuation"}, {"type":"ByteLevel","use_regex":false}]}`)
	_, _, err := ToGGUF(files, Options{})
	require.ErrorIs(t, err, formats.ErrUnsupported)
	require.ErrorContains(t, err, `[{"type":"Punctuation"},{"type":"ByteLevel","use_regex":false}]`)
	require.Equal(t, "PreTokenizer", hint.Of(err)[0].Option)
	for _, f := range []Files{files, {tokenizerJSON: []byte(smallest)}} {
		keys, _, err := ToGGUF(f, Options{PreTokenizer: "falcon"})
		require.NoError(t, err)
		require.Equal(t, "falcon", keys.Get(keyPre))
	}
	keys, _, err := ToGGUF(files, Options{PreTokenizer: "falcon"})
	require.NoError(t, err)
	_, _, err = FromGGUF(keys, Options{})
	require.ErrorIs(t, err, formats.ErrUnsupported)
	require.ErrorContains(t, err, `found "falcon", expected one of command-r, dbrx,`)
	require.Equal(t, "PreTokenizer", hint.Of(err)[0].Option)
	_, _, err = FromGGUF(keys, Options{PreTokenizer: "gpt-2"})
	require.NoError(t, err)
}

// A name that a kind of tokenizers has no cut of is refused with those that it has, both ways.
func TestAskedPreTokenizer(t *testing.T) {
	pieces := Files{tokenizerModel: modelOf(piece{"<unk>", 0, unknown}, piece{"a", -1, normal})}
	words := Files{vocabTxt: []byte("[UNK]\na\n")}
	bpe := Files{tokenizerJSON: []byte(smallest)}
	for _, c := range []struct {
		files     Files
		name      string
		arch      string
		want      string // of the way to GGUF, "" where it has the name
		wantSpelt string // of the way back
	}{
		{bpe, "qwen2", "", "", ""},
		{bpe, "my-own", "", `found "my-own" for a tokenizer of the model "gpt2", expected one of a.x-4.0, afmoe,`,
			`expected one of command-r, dbrx,`},
		{bpe, "falcon", "", "", `expected one of command-r, dbrx,`},
		{bpe, "jina-v2-en", "", `found "jina-v2-en"`, `found "jina-v2-en"`},
		{pieces, "qwen2", "llama", `the model "llama", expected one of default:`, `expected one of default:`},
		{pieces, "default", "llama", "", ""},
		{words, "qwen2", "bert", `the model "bert", expected one of jina-v2-en:`, `expected one of jina-v2-en:`},
		{words, "jina-v2-en", "bert", "", ""},
	} {
		asked := Options{Architecture: c.arch, PreTokenizer: c.name}
		keys, _, err := ToGGUF(c.files, Options{Architecture: c.arch})
		require.NoError(t, err)
		_, _, to := ToGGUF(c.files, asked)
		_, _, back := FromGGUF(keys, asked)
		for err, want := range map[*error]string{&to: c.want, &back: c.wantSpelt} {
			if want == "" {
				require.NoError(t, *err, c.name)
				continue
			}
			require.ErrorIs(t, *err, formats.ErrUnsupported)
			require.ErrorContains(t, *err, want)
		}
	}
}

// Every row is found again by the parts that are written for it, also with a Split that removes.
func TestPreTokenizers(t *testing.T) {
	for _, row := range knownCuts().Rows {
		b, err := json.Marshal(row.spelled())
		require.NoError(t, err)
		norm, err := json.Marshal(typed{row.Normalizer})
		require.NoError(t, err)
		for arch, want := range row.ByArchitecture {
			r := &reader{o: Options{Architecture: arch}}
			name, err := r.nameFor(b, norm)
			require.NoError(t, err)
			require.Equal(t, want, name)
		}
		r := &reader{o: Options{Architecture: "another"}}
		name, err := r.nameFor(b, norm)
		require.NoError(t, err)
		require.Equal(t, row.Name, name)
		removed := strings.ReplaceAll(string(b), `"Isolated","invert":false`, `"Removed","invert":true`)
		name, err = r.nameFor([]byte(removed), norm)
		require.NoError(t, err)
		require.Equal(t, row.Name, name)
		for _, name := range row.names() {
			found, ok := rowOf(name)
			require.True(t, ok)
			require.Equal(t, row.Name, found.Name)
		}
		if strings.Contains(removed, "Removed") {
			_, err = r.nameFor([]byte(strings.ReplaceAll(removed, `"invert":true`, `"invert":false`)), norm)
			require.Error(t, err)
		}
	}
}

// changed are keys with one value changed, or left out where it is nil.
func changed(keys formats.Metadata, name string, value any) formats.Metadata {
	k := keyList{slices.Clone(keys)}
	if value == nil {
		return slices.DeleteFunc(k.list, func(p formats.Pair) bool { return p.Name == name })
	}
	k.set(name, value)
	return k.list
}

func TestRefusedKeys(t *testing.T) {
	bpe, _, err := ToGGUF(Files{tokenizerJSON: []byte(smallest)}, Options{})
	require.NoError(t, err)
	spm, _, err := ToGGUF(Files{tokenizerModel: modelOf(piece{"<unk>", 0, unknown}, piece{"a", -1, normal},
		piece{"b", -2, normal})}, Options{})
	require.NoError(t, err)
	for _, c := range []struct {
		keys  formats.Metadata
		name  string
		value any
		kind  error
		says  string
	}{
		{bpe, keyModel, nil, formats.ErrMalformed, "found no tokenizer.ggml.model"},
		{bpe, keyModel, "t5", formats.ErrUnsupported, `found "t5"`},
		{bpe, keyModel, uint32(1), formats.ErrMalformed, "found a uint32, expected a string"},
		{bpe, keyTokens, nil, formats.ErrMalformed, "found no tokenizer.ggml.tokens"},
		{bpe, keyTokens, "a", formats.ErrMalformed, "found a string, expected a []string"},
		{bpe, keyTokens, []string{"a", "b", "a", "<e>"}, formats.ErrMalformed, `found "a" with the ids 0 and 2`},
		{bpe, keyTokens, []string{"a", "b", "\xff", "<e>"}, formats.ErrUnsupported, "no UTF-8"},
		{bpe, keyTokens, []string{"a", "b", "ab", ""}, formats.ErrMalformed, "token 3: found an empty one"},
		{bpe, keyTypes, []int32{1, 1, 1}, formats.ErrMalformed, "found 3 values, expected 4"},
		{bpe, keyTypes, []int32{1, 1, 1, 7}, formats.ErrMalformed, "token 3: found the type 7"},
		{bpe, keyTypes, []int32{1, 1, 1, -1}, formats.ErrMalformed, "token 3: found the type -1"},
		{bpe, keyScores, []float32{1}, formats.ErrMalformed, "found 1 values, expected 4"},
		{bpe, keyMerges, []string{"ab"}, formats.ErrMalformed, `merge "ab": found no two tokens`},
		{bpe, keyMerges, []string{" ab"}, formats.ErrMalformed, `merge " ab": found no two tokens`},
		{bpe, keyMerges, []string{"b a"}, formats.ErrMalformed, `found no token "ba"`},
		{bpe, keyMerges, []string{"c a"}, formats.ErrMalformed, `found no token "c"`},
		{bpe, keyPre, nil, formats.ErrUnsupported, "tokenizer.ggml.pre: found none, expected one of"},
		{bpe, keyPre, "unheard", formats.ErrUnsupported, "unheard"},
		{bpe, idKeys["bos"], uint32(4), formats.ErrMalformed, "found the id 4, expected less than the number of tokens, 4"},
		{bpe, idKeys["eos"], int32(3), nil, ""},
		{bpe, idKeys["eos"], uint64(3), nil, ""},
		{bpe, keyTypes, []uint32{1, 1, 1, 3}, nil, ""},
		{bpe, idKeys["eos"], "1", formats.ErrMalformed, "found a string, expected a whole number"},
		{bpe, idKeys["eos"], int32(-1), formats.ErrMalformed, "found the id -1, expected less than"},
		{bpe, idKeys["eos"], uint64(1 << 63), formats.ErrMalformed, "found the id 9223372036854775807, expected less than"},
		{bpe, keyTypes, []uint32{1, 1, 1, 1 << 31}, formats.ErrMalformed, "token 3: found the type -1"},
		{bpe, keyTypes, []float32{1, 1, 1, 3}, formats.ErrMalformed, "found a []float32, expected whole numbers"},
		{bpe, keyTypes, int32(1), formats.ErrMalformed, "found a int32, expected a []int32"},
		{bpe, keyScores, []float32{0, 0, float32(math.NaN()), 0}, formats.ErrMalformed, "token 2: found a NaN"},
		{bpe, addKey("bos"), true, formats.ErrMalformed, "found true without tokenizer.ggml.bos_token_id"},
		{bpe, keyTemplates, make([]string, 257), formats.ErrLimit, "found 257 names, expected at most 256"},
		{bpe, keyTemplate, []string{}, formats.ErrMalformed, "tokenizer.chat_template: found a []string"},
		{spm, keyTypes, []int32{1, 1, 2}, nil, ""},
		{spm, keyTypes, []int32{2, 2, 1}, formats.ErrMalformed, "the tokens 0 and 1 of type 2"},
		{spm, keyTypes, []int32{2, 6, 1}, formats.ErrMalformed, "found 1 tokens of type 6"},
		{spm, keyTokens, []string{"x", "a", "a"}, formats.ErrMalformed, `found "a" with the ids 1 and 2`},
		{spm, keyTokens, []string{"x", "", "a"}, formats.ErrMalformed, "token 1: found an empty one"},
		{changed(spm, keyTypes, []int32{1, 1, 1}), keyTokens, []string{"x", "y", "z"}, formats.ErrMalformed,
			"found no token of type 2"},
	} {
		t.Run(fmt.Sprintf("%s=%v", c.name, c.value), func(t *testing.T) {
			_, _, err := FromGGUF(changed(c.keys, c.name, c.value), Options{})
			if c.kind == nil {
				require.NoError(t, err)
				return
			}
			require.ErrorIs(t, err, c.kind)
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

// Bytes of pieces are kept, UTF-8 or not, and so are scores, bit for bit.
func TestBytesAreKept(t *testing.T) {
	scores := []float32{0, -1, float32(math.Copysign(0, -1)), float32(math.Inf(-1)), 1e-45}
	pieces := []piece{{"<unk>", 0, unknown}}
	for i, text := range []string{"\xff\xfe", "a\x00b", "\xe2\x96", "é", "\xed\xa0\x80"} {
		pieces = append(pieces, piece{text, scores[i], normal})
	}
	keys, _, err := ToGGUF(Files{tokenizerModel: modelOf(pieces...)}, Options{})
	require.NoError(t, err)
	files, _, err := FromGGUF(keys, Options{})
	require.NoError(t, err)
	got, err := readPieces(files[tokenizerModel])
	require.NoError(t, err)
	require.Len(t, got, len(pieces))
	for i, p := range pieces {
		require.Equal(t, p.text, got[i].text)
		require.Equal(t, p.kind, got[i].kind)
		require.Equal(t, math.Float32bits(p.score), math.Float32bits(got[i].score))
	}
}

// Models of some sizes have keys of their own.
func TestSizes(t *testing.T) {
	files := Files{tokenizerJSON: []byte(smallest)}
	for size, want := range map[int]map[string]any{
		49152: {addKey("bos"): false},
		32016: {"tokenizer.ggml.prefix_token_id": uint32(32007), "tokenizer.ggml.suffix_token_id": uint32(32008),
			"tokenizer.ggml.middle_token_id": uint32(32009), "tokenizer.ggml.eot_token_id": uint32(32010)},
	} {
		files[configJSON] = fmt.Appendf(nil, `{"vocab_size":%d}`, size)
		for _, arch := range []string{"llama", "granite", "qwen2"} {
			keys, _, err := ToGGUF(files, Options{Architecture: arch})
			require.NoError(t, err)
			for name, value := range want {
				if arch == "qwen2" {
					value = nil
				}
				require.Equal(t, value, keys.Get(name), "%s %s", arch, name)
			}
		}
	}
}

func TestRows(t *testing.T) {
	spm := modelOf(piece{"a", 0, normal}, piece{"b", 0, normal})
	for _, c := range []struct {
		files Files
		want  int
	}{
		{Files{tokenizerModel: spm}, 2},
		{Files{tokenizerModel: spm, tokenizerJSON: []byte(smallest)}, 2},
		{Files{tokenizerModel: spm, configJSON: []byte(`{"vocab_size":7,"text_config":{"vocab_size":5}}`)}, 5},
		{Files{tokenizerJSON: []byte(smallest), configJSON: []byte(`{"vocab_size":7}`)}, 4},
	} {
		n, err := Rows(c.files, Options{})
		require.NoError(t, err)
		require.Equal(t, c.want, n)
	}
	_, err := Rows(Files{}, Options{})
	require.ErrorIs(t, err, formats.ErrMalformed)
}

// Chat templates are found in every file that has them, in the converter's order.
func TestChatTemplates(t *testing.T) {
	files := Files{tokenizerJSON: []byte(smallest), tokenizerConfig: []byte(`{"tokenizer_class":"X"}`),
		templateJSON: []byte(`{"chat_template":"of json"}`)}
	is := func(name string, want any) {
		t.Helper()
		keys, _, err := ToGGUF(files, Options{})
		require.NoError(t, err)
		require.Equal(t, want, keys.Get(name))
	}
	is(keyTemplate, "of json")
	files[templateJinja] = []byte("of\r\njinja\rx")
	is(keyTemplate, "of\njinja\nx")
	files["additional_chat_templates/tool use.jinja"] = []byte("tools")
	files["additional_chat_templates/rag.jinja"] = []byte("rag")
	files["additional_chat_templates/deep/er.jinja"] = []byte("no")
	is(keyTemplate, "of\njinja\nx")
	is(keyTemplates, []string{"rag", "tool_use"})
	is(keyTemplate+".tool_use", "tools")
	files[tokenizerConfig] = []byte(`{"chat_template":null}`)
	is(keyTemplate, nil)
	files[tokenizerConfig] = []byte(`{"chat_template":""}`) // gguf-py writes no empty text
	is(keyTemplate, nil)
	files[tokenizerConfig] = []byte(`{"chat_template":"own"}`)
	is(keyTemplate, "own")
	files[tokenizerConfig] = []byte(`{}`) // which the converter takes for none
	is(keyTemplate, nil)
}

// A vocab.txt alone is WordPiece, with the names that special tokens usually have.
func TestVocabTxtAlone(t *testing.T) {
	files := Files{vocabTxt: []byte("[PAD]\n[UNK]\r\na\n##b\n"), configJSON: []byte(`{"vocab_size":6,"pad_token_id":0}`)}
	keys, _, err := ToGGUF(files, Options{Architecture: "bert"})
	require.NoError(t, err)
	require.Equal(t, []string{"[PAD]", "[UNK]", "▁a", "b", "▁[PAD4]", "▁[PAD5]"}, keys.Get(keyTokens))
	require.Equal(t, []int32{3, 3, 1, 1, 5, 5}, keys.Get(keyTypes))
	require.Equal(t, uint32(2), keys.Get(keySegments))
	made, _, err := FromGGUF(keys, Options{Architecture: "bert"})
	require.NoError(t, err)
	require.Equal(t, "[PAD]\n[UNK]\na\n##b\n", string(made[vocabTxt]))
	_, _, err = ToGGUF(files, Options{Architecture: "llama"})
	require.ErrorContains(t, err, "found a vocab.txt alone")
}

// sentencepiece looks for its special pieces by their text, which is not "<s>" in every model.
func TestSpecialPiecesByText(t *testing.T) {
	keys := formats.Metadata{{Name: keyModel, Value: modelSentencePiece}, {Name: keyPre, Value: "default"},
		{Name: keyTokens, Value: []string{"<pad>", "<eos>", "<bos>", "<what>", "a", "<s>"}},
		{Name: keyScores, Value: []float32{0, 0, 0, 0, -1, -2}}, {Name: keyTypes, Value: []int32{3, 3, 3, 2, 1, 1}},
		{Name: idKeys["bos"], Value: uint32(2)}, {Name: idKeys["eos"], Value: uint32(1)}}
	files, _, err := FromGGUF(keys, Options{Architecture: "gemma3"})
	require.NoError(t, err)
	found := map[protowire.Number]string{}
	require.NoError(t, fields(files[tokenizerModel], func(n protowire.Number, f field) error {
		if n != fieldTrainer {
			return nil
		}
		return fields(f.bytes, func(n protowire.Number, f field) error {
			found[n] = string(f.bytes)
			return nil
		})
	}))
	require.Equal(t, "<what>", found[trainerUnknownPiece])
	require.Equal(t, "<bos>", found[trainerBOSPiece])
	require.Equal(t, "<eos>", found[trainerEOSPiece])
}

// Added tokens that do not follow the vocabulary, or that merges make, are a part of it; else they would get other ids.
func TestAddedTokensKeepTheirIDs(t *testing.T) {
	for _, c := range []struct {
		tokens []string
		types  []int32
		merges []string
		inside bool
	}{
		{[]string{"a", "b", "ab", "<e>"}, []int32{1, 1, 1, 3}, []string{"a b"}, false},
		{[]string{"<e>", "a", "b", "ab"}, []int32{3, 1, 1, 1}, []string{"a b"}, true},
		{[]string{"a", "b", "[PAD2]", "<e>"}, []int32{1, 1, 5, 3}, nil, true},
		{[]string{"a", "b", "ab", "<e>"}, []int32{1, 1, 4, 3}, []string{"a b"}, true},
	} {
		keys := formats.Metadata{{Name: keyModel, Value: modelBPE}, {Name: keyPre, Value: "gpt-2"},
			{Name: keyTokens, Value: c.tokens}, {Name: keyTypes, Value: c.types}, {Name: keyMerges, Value: c.merges}}
		files, _, err := FromGGUF(keys, Options{})
		require.NoError(t, err)
		f, err := readTokenizerFile(files[tokenizerJSON])
		require.NoError(t, err)
		require.Equal(t, c.inside, slices.ContainsFunc(f.vocab, func(e entry) bool { return e.text == "<e>" }))
		again, _, err := ToGGUF(files, Options{VocabSize: len(c.tokens)})
		require.NoError(t, err)
		require.Equal(t, c.tokens, again.Get(keyTokens))
	}
}
