package tokenizer

import (
	_ "embed" // for the data
	"strconv"
	"sync"

	"github.com/go-json-experiment/json"
)

//go:embed data/architectures.json
var architecturesJSON []byte

// architecture is what an architecture has for itself.
type architecture struct {
	// Like is another one, which has the same.
	Like string `json:"like"`
	// SentencePiece prefers tokenizer.model to tokenizer.json.
	SentencePiece bool `json:"sentencepiece"`
	// ByteFallback takes a tokenizer.json with bytes as tokens for SentencePiece without scores.
	ByteFallback bool `json:"byte_fallback"`
	// ReadsAddPrefixSpace heeds add_prefix_space of tokenizer_config.json.
	ReadsAddPrefixSpace bool `json:"reads_add_prefix_space"`
	// AddSpacePrefix is the value that SentencePiece always has.
	AddSpacePrefix *bool `json:"add_space_prefix"`
	// AddedAsTheyAre takes added tokens by their word: none looks special, and no ▁ becomes a space.
	AddedAsTheyAre bool `json:"added_as_they_are"`
	// ByteLevelClass is the tokenizer_class for which tokenizer.json is read though there is a tokenizer.model.
	ByteLevelClass string `json:"byte_level_class"`
	// Class is the tokenizer_class that is written for what is not byte-level.
	Class string `json:"class"`
	// TypeVocabSize is what a config without type_vocab_size means.
	TypeVocabSize int `json:"type_vocab_size"`
	// Sizes has keys that models of that vocab_size have.
	Sizes map[string]map[string]any `json:"sizes"`
}

var architectures = sync.OnceValue(func() map[string]architecture {
	var all map[string]architecture
	if err := json.Unmarshal(architecturesJSON, &all, json.RejectUnknownMembers(true)); err != nil {
		panic(err) // the data is part of the program
	}
	return all
})

// architectureOf is the empty one where an architecture has nothing for itself.
func architectureOf(name string) architecture {
	a := architectures()[name]
	if a.Like != "" {
		a = architectures()[a.Like]
	}
	return a
}

// bySize adds the keys that models of that size have.
func (a architecture) bySize(c *config, tokens int, k *keyList) error {
	n, ok, err := c.count("vocab_size")
	if err != nil {
		return err
	}
	if !ok {
		n = tokens
	}
	for name, value := range a.Sizes[strconv.Itoa(n)] {
		switch v := value.(type) {
		case bool:
			k.set("tokenizer.ggml."+name, v)
		case float64:
			if int(v) < tokens {
				k.set("tokenizer.ggml."+name, uint32(v))
			}
		}
	}
	return nil
}
