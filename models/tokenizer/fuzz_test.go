package tokenizer

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// everyArchitecture are those that have something for themselves, and one that has nothing.
var everyArchitecture = []string{"", "llama", "gemma3", "phi3", "qwen2", "bert"}

// throughBoth reads files that may be anything. What is read of them is written, and read again the same.
func throughBoth(t *testing.T, files Files, arch uint8) {
	o := Options{Architecture: everyArchitecture[int(arch)%len(everyArchitecture)]}
	keys, _, err := ToGGUF(files, o)
	if err != nil {
		return
	}
	require.NoError(t, keys.Check())
	tokens := keys.Get(keyTokens).([]string)
	made, _, err := FromGGUF(keys, o)
	if err != nil {
		return
	}
	o.VocabSize, o.PreTokenizer = len(tokens), keys.Get(keyPre).(string)
	again, _, err := ToGGUF(made, o)
	require.NoError(t, err)
	if made[tokenizerModel] != nil && !slices.Contains(keys.Get(keyTypes).([]int32), unknown) {
		return // sentencepiece wants one, so that another token has become it
	}
	keys = lost(keys, made, o)
	for _, name := range []string{keyTokens, keyTypes, keyMerges, keyModel, keyPre} {
		require.Equal(t, keys.Get(name), again.Get(name), name)
	}
}

func FuzzTokenizerJSON(f *testing.F) {
	for arch := range everyArchitecture {
		f.Add([]byte(smallest), []byte(`{"bos_token":"<e>"}`), []byte(`{"eos_token_id":1}`), uint8(arch))
	}
	for _, dir := range cases(f) {
		files, _ := folder(f, dir)
		if b, ok := files[tokenizerJSON]; ok {
			f.Add(b, files[tokenizerConfig], files[configJSON], uint8(1))
			f.Add(b, files[tokenizerConfig], files[configJSON], uint8(5))
		}
	}
	f.Fuzz(func(t *testing.T, file, own, config []byte, arch uint8) {
		throughBoth(t, Files{tokenizerJSON: file, tokenizerConfig: own, configJSON: config}, arch)
	})
}

func FuzzTokenizerModel(f *testing.F) {
	for arch := range everyArchitecture {
		f.Add(modelOf(piece{"<unk>", 0, unknown}, piece{"▁a", -1, normal}, piece{"<s>", 0, control},
			piece{"u", -2, userDefined}), []byte(`{"added_tokens_decoder":{"4":{"content":"<|e|>"},"1":{"content":"▁ b"}}}`),
			[]byte(`{"x":5}`), uint8(arch))
	}
	for _, dir := range cases(f) {
		files, _ := folder(f, dir)
		if b, ok := files[tokenizerModel]; ok {
			for arch := range everyArchitecture {
				f.Add(b, files[tokenizerConfig], files[addedTokens], uint8(arch))
			}
		}
	}
	f.Fuzz(func(t *testing.T, file, own, added []byte, arch uint8) {
		files := Files{tokenizerModel: file, tokenizerConfig: own}
		if len(added) > 0 {
			files[addedTokens] = added
		}
		throughBoth(t, files, arch)
	})
}
