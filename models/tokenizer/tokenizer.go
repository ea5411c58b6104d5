package tokenizer

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// The limits of what is read.
const (
	// MaxFileBytes is more than the files of any tokenizer have; the largest known have 40 MB.
	MaxFileBytes = 64 << 20
	// maxTokens is more than any vocabulary has; the largest known have some 260,000 tokens, and 600,000 merges.
	maxTokens = 1 << 20
	// maxPadding is how many ids a vocabulary may have past its last token, whatever vocab_size a config says.
	maxPadding = 1 << 17
	// maxTemplates is more than the chat templates of any model.
	maxTemplates = 256
)

// Files are small files of a folder, by their names in it.
type Files map[string][]byte

// List is the files in the order of their names.
func (f Files) List() []formats.File {
	var list []formats.File
	for _, name := range slices.Sorted(maps.Keys(f)) {
		list = append(list, formats.File{Name: name, Data: f[name]})
	}
	return list
}

const (
	tokenizerJSON    = "tokenizer.json"
	tokenizerModel   = "tokenizer.model"
	tokenizerConfig  = "tokenizer_config.json"
	addedTokens      = "added_tokens.json"
	specialTokensMap = "special_tokens_map.json"
	vocabTxt         = "vocab.txt"
	configJSON       = "config.json"
	templateJinja    = "chat_template.jinja"
	templateJSON     = "chat_template.json"
	templatesFolder  = "additional_chat_templates"
	templateSuffix   = ".jinja"
)

// Reads reports whether ToGGUF reads a file of that name, a path with slashes.
func Reads(name string) bool {
	switch name {
	case tokenizerJSON, tokenizerModel, tokenizerConfig, addedTokens, specialTokensMap, vocabTxt, configJSON,
		templateJinja, templateJSON:
		return true
	}
	return path.Dir(name) == templatesFolder && strings.HasSuffix(name, templateSuffix)
}

// Options are what files and keys do not say themselves.
type Options struct {
	// Architecture is GGUF's name of the model's architecture.
	Architecture string
	// PreTokenizer is llama.cpp's name for the cut that is made before merges. It wins over what the files say, and is
	// refused where it is none for their kind of tokenizer; empty finds it.
	PreTokenizer string
	// VocabSize is taken where config.json does not say it: the default of the model's class. 0 is the number of tokens.
	VocabSize int
}

// ErrNone says that there is no tokenizer among the files.
var ErrNone = fmt.Errorf("no tokenizer: %w", formats.ErrMalformed)

var errNone = fmt.Errorf("found no %s and no %s, expected one of them: %w", tokenizerJSON, tokenizerModel, ErrNone)

// Types of tokens, as GGUF numbers them.
const (
	normal      int32 = 1
	unknown     int32 = 2
	control     int32 = 3
	userDefined int32 = 4
	unused      int32 = 5
	byteToken   int32 = 6
)

// Models of tokenizers, as GGUF calls them.
const (
	modelSentencePiece = "llama"
	modelBPE           = "gpt2"
	modelWordPiece     = "bert"
)

// Keys of GGUF.
const (
	keyModel       = "tokenizer.ggml.model"
	keyPre         = "tokenizer.ggml.pre"
	keyTokens      = "tokenizer.ggml.tokens"
	keyScores      = "tokenizer.ggml.scores"
	keyTypes       = "tokenizer.ggml.token_type"
	keyMerges      = "tokenizer.ggml.merges"
	keySegments    = "tokenizer.ggml.token_type_count"
	keySpacePrefix = "tokenizer.ggml.add_space_prefix"
	keyLowercase   = "tokenizer.ggml.normalizer.lowercase"
	keyAccents     = "tokenizer.ggml.normalizer.strip_accents"
	keyTemplate    = "tokenizer.chat_template"
	keyTemplates   = "tokenizer.chat_templates"
)

// space is what SentencePiece writes for a space.
const space = "▁"

// vocabulary is what a GGUF file says of tokens and how text becomes them.
type vocabulary struct {
	model  string
	pre    string
	tokens []string
	types  []int32
	scores []float32 // of SentencePiece
	merges []string  // of byte-level BPE

	// lenient drops ids of special tokens that are past the vocabulary: the converter does so where it knows its size.
	lenient bool
}

// padded is a vocabulary of n tokens that nobody has named yet.
func padded(model string, n int) *vocabulary {
	v := &vocabulary{model: model, tokens: make([]string, n), types: make([]int32, n)}
	for i := range v.tokens {
		v.tokens[i] = fmt.Sprintf("[PAD%d]", i)
		v.types[i] = unused
	}
	return v
}

// vocabSize is how many tokens the model has: its config says it, else the caller, else what was found. Past the last
// id that was found there may be only so many more, since memory is taken for them.
func vocabSize(c *config, o Options, found int) (int, error) {
	n, ok, err := c.count("vocab_size")
	switch {
	case err != nil:
		return 0, err
	case !ok && o.VocabSize > 0:
		n = o.VocabSize
	case !ok:
		n = found
	}
	if n > found+maxPadding {
		return 0, fmt.Errorf("%s: found a vocab_size of %d, expected at most %d with %d tokens: %w", configJSON, n,
			found+maxPadding, found, formats.ErrLimit)
	}
	if n == 0 {
		return 0, malformedf("%s: found a vocab_size of 0, expected tokens", configJSON)
	}
	return n, nil
}

// ToGGUF makes the keys of a GGUF file of the files of a folder. Notes say what was taken otherwise than the files
// say it.
func ToGGUF(files Files, o Options) (formats.Metadata, []string, error) {
	r := &reader{files: files, o: o, arch: architectureOf(o.Architecture)}
	if err := r.open(); err != nil {
		return nil, nil, err
	}
	v, err := r.vocabulary()
	if err == nil {
		err = o.checkAsked(v.model, false)
	}
	if err != nil {
		return nil, nil, err
	}
	keys, err := r.keys(v)
	if err != nil {
		return nil, nil, err
	}
	return keys, r.notes, nil
}

// reader reads the files of a folder.
type reader struct {
	files  Files
	o      Options
	arch   architecture
	config *config        // config.json
	own    *tokenizerOwn  // tokenizer_config.json
	json   *tokenizerFile // tokenizer.json, or nil
	named  namedTokens    // the special tokens beside it
	notes  []string
}

func (r *reader) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// open reads what every kind of tokenizer has.
func (r *reader) open() (err error) {
	for name, b := range r.files {
		if Reads(name) && len(b) > MaxFileBytes {
			return fmt.Errorf("%s: found %d bytes, expected at most %d: %w", formats.Display(name), len(b), MaxFileBytes,
				formats.ErrLimit)
		}
	}
	if r.config, err = readConfig(r.files[configJSON]); err != nil {
		return err
	}
	if r.own, err = readOwn(r.files[tokenizerConfig]); err != nil {
		return err
	}
	if b, ok := r.files[tokenizerJSON]; ok {
		if r.json, err = readTokenizerFile(b); err != nil {
			return err
		}
		return r.addBeside()
	}
	return nil
}

// vocabulary reads the tokens, of the file that the converter prefers.
func (r *reader) vocabulary() (*vocabulary, error) {
	b, pieces := r.files[tokenizerModel]
	pieces = pieces && (r.arch.SentencePiece || r.json == nil)
	if class := r.arch.ByteLevelClass; class != "" && r.own.text("tokenizer_class") == class && r.json != nil {
		pieces = false
	}
	switch lines, ok := r.files[vocabTxt]; {
	case pieces:
		return r.sentencePiece(b)
	case r.json == nil && ok:
		return r.wordPieceLines(lines)
	case r.json == nil:
		return nil, errNone
	}
	switch kind := r.json.kind(); kind {
	case "BPE":
		if r.arch.ByteFallback && r.json.Model.ByteFallback && r.json.decodesInSequence() {
			return r.byteFallback()
		}
		return r.byteLevel()
	case "WordPiece":
		return r.wordPiece()
	default:
		return nil, fmt.Errorf("%s: found a model of type %s, expected BPE or WordPiece: %w", tokenizerJSON,
			tensor.Quote(kind), formats.ErrUnsupported)
	}
}

// keys writes the vocabulary, and what is said beside it, as GGUF has it.
func (r *reader) keys(v *vocabulary) (formats.Metadata, error) {
	var k keyList
	if v.model == modelWordPiece {
		n, ok, err := r.config.count("type_vocab_size")
		if err != nil {
			return nil, err
		}
		if !ok {
			n = max(r.arch.TypeVocabSize, 1)
		}
		k.set(keySegments, uint32(n))
	}
	k.set(keyModel, v.model)
	k.set(keyPre, v.pre)
	k.set(keyTokens, v.tokens)
	if v.scores != nil {
		k.set(keyScores, v.scores)
	}
	k.set(keyTypes, v.types)
	if len(v.merges) > 0 { // no empty array is written
		k.set(keyMerges, v.merges)
	}
	if err := r.special(v, &k); err != nil {
		return nil, err
	}
	if r.arch.ReadsAddPrefixSpace {
		if add, ok := r.own.flag("add_prefix_space"); ok {
			k.set(keySpacePrefix, add)
		}
	}
	if add := r.arch.AddSpacePrefix; add != nil && v.model == modelSentencePiece {
		k.set(keySpacePrefix, *add)
	}
	return k.list, r.arch.bySize(r.config, len(v.tokens), &k)
}

// keyList is a list of keys in which a later value replaces an earlier one.
type keyList struct{ list formats.Metadata }

func (k *keyList) set(name string, value any) {
	if i := slices.IndexFunc(k.list, func(p formats.Pair) bool { return p.Name == name }); i >= 0 {
		k.list[i].Value = value
		return
	}
	k.list = append(k.list, formats.Pair{Name: name, Value: value})
}

func malformedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrMalformed)...)
}

func unsupportedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrUnsupported)...)
}
