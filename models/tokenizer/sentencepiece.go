package tokenizer

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// Fields of a tokenizer.model, as sentencepiece_model.proto has them.
const (
	fieldPieces     = 1
	fieldTrainer    = 2
	fieldNormalizer = 3

	pieceText  = 1
	pieceScore = 2
	pieceType  = 3

	trainerModelType    = 3
	trainerVocabSize    = 4
	trainerByteFallback = 35
	trainerUnknown      = 40
	trainerBOS          = 41
	trainerEOS          = 42
	trainerPad          = 43

	trainerUnknownPiece = 45
	trainerBOSPiece     = 46
	trainerEOSPiece     = 47

	normalizerName          = 1
	normalizerDummyPrefix   = 3
	normalizerExtraSpaces   = 4
	normalizerEscapesSpaces = 5

	modelTypeUnigram = 1 // that of a file which does not say it
	modelTypeBPE     = 2
)

// padScore is the score of an id that no token has.
const padScore = -10000

// piece is a token of a tokenizer.model. Its types are numbered as those of GGUF are.
type piece struct {
	text  string
	score float32
	kind  int32
}

// sentencePiece reads tokenizer.model, and the files with tokens that are added to it.
func (r *reader) sentencePiece(b []byte) (*vocabulary, error) {
	pieces, err := readPieces(b)
	if err != nil {
		return nil, err
	}
	n, err := vocabSize(r.config, r.o, len(pieces))
	if err != nil {
		return nil, err
	}
	v := padded(modelSentencePiece, n)
	v.pre, v.lenient = usualCut, true
	v.scores = slices.Repeat([]float32{padScore}, n)
	for id, p := range pieces[:min(n, len(pieces))] {
		if p.kind == userDefined {
			p.kind = normal
		}
		v.tokens[id], v.scores[id], v.types[id] = p.text, p.score, p.kind
	}
	if len(pieces) > n {
		r.note("%s: %d tokens from id %d on are left out, past the vocab_size %d", tokenizerModel, len(pieces)-n, n, n)
	}
	return v, r.addTokens(v)
}

// addTokens puts in the tokens that other files add, in the converter's order: a later one replaces an earlier one.
func (r *reader) addTokens(v *vocabulary) error {
	put := func(file string, id int, text string, kind int32) {
		if id >= len(v.tokens) {
			r.note("%s: token %s is left out, its id %d is past the vocab_size %d", file, tensor.Quote(text), id,
				len(v.tokens))
			return
		}
		v.tokens[id], v.scores[id], v.types[id] = text, noScore, kind
	}
	if b, ok := r.files[addedTokens]; ok {
		list, err := readAdded(b)
		if err != nil {
			return err
		}
		for _, e := range list {
			put(addedTokens, e.id, e.text, userDefined)
		}
	}
	for _, t := range r.own.decoder {
		text, kind := r.addedKind(t.content, t.special)
		put(tokenizerConfig, t.id, text, kind)
	}
	if r.arch.AddedAsTheyAre && r.json != nil {
		for _, a := range r.json.AddedTokens {
			text, kind := r.addedKind(a.Content, a.Special)
			put(tokenizerJSON, int(a.ID), text, kind)
		}
	}
	return nil
}

// addedKind is how an added token is written, and its type.
func (r *reader) addedKind(text string, special bool) (string, int32) {
	switch {
	case special || !r.arch.AddedAsTheyAre && looksSpecial(text):
		return text, control
	case r.arch.AddedAsTheyAre:
		return text, userDefined
	}
	return strings.ReplaceAll(text, space, " "), userDefined
}

// readPieces reads the tokens of a tokenizer.model. The bytes of a token are kept, UTF-8 or not.
func readPieces(b []byte) ([]piece, error) {
	var pieces []piece
	kind := uint64(modelTypeUnigram)
	err := fields(b, func(n protowire.Number, f field) error {
		switch n {
		case fieldPieces:
			p, err := readPiece(f)
			if err != nil {
				return fmt.Errorf("piece %d: %w", len(pieces), err)
			}
			if len(pieces) == maxTokens {
				return errTokens
			}
			pieces = append(pieces, p)
		case fieldTrainer:
			return fields(f.bytes, func(n protowire.Number, f field) error {
				if n == trainerModelType {
					kind = f.number
				}
				return nil
			})
		}
		return nil
	})
	switch {
	case errors.Is(err, formats.ErrLimit):
		return nil, fmt.Errorf("%s: pieces: %w", tokenizerModel, err)
	case err != nil:
		return nil, malformedf("%s: %v", tokenizerModel, err)
	case len(pieces) == 0:
		return nil, malformedf("%s: found no pieces, expected some", tokenizerModel)
	case kind != modelTypeBPE:
		return nil, unsupportedf("%s: found a model of type %d (1 is Unigram), expected 2, BPE", tokenizerModel, kind)
	}
	return pieces, nil
}

func readPiece(f field) (piece, error) {
	p := piece{kind: normal}
	err := fields(f.bytes, func(n protowire.Number, f field) error {
		switch n {
		case pieceText:
			p.text = string(f.bytes)
		case pieceScore:
			p.score = math.Float32frombits(uint32(f.number))
		case pieceType:
			if f.number < uint64(normal) || f.number > uint64(byteToken) {
				return fmt.Errorf("found the type %d, expected 1 to 6", f.number)
			}
			p.kind = int32(f.number)
		}
		return nil
	})
	if err == nil && p.text == "" {
		err = errors.New("found no text, expected some")
	}
	return p, err
}

// field is the value of a field of a message: bytes or a number, by its type on the wire.
type field struct {
	bytes  []byte
	number uint64
}

// fields goes through a message in its order.
func fields(b []byte, each func(protowire.Number, field) error) error {
	for size := len(b); len(b) > 0; {
		at := size - len(b)
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fmt.Errorf("byte %d: found no field, expected one", at)
		}
		b = b[n:]
		var f field
		switch kind {
		case protowire.BytesType:
			f.bytes, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			f.number, n = protowire.ConsumeVarint(b)
		case protowire.Fixed32Type:
			var v uint32
			v, n = protowire.ConsumeFixed32(b)
			f.number = uint64(v)
		default:
			n = protowire.ConsumeFieldValue(number, kind, b)
		}
		if n < 0 {
			return fmt.Errorf("byte %d: found the field %d cut short or broken, expected all of it", at, number)
		}
		b = b[n:]
		if err := each(number, f); err != nil {
			return err
		}
	}
	return nil
}

// model is what a tokenizer.model has beside its tokens. An id below 0 is none.
type model struct {
	pieces                 []piece
	unknown, bos, eos, pad int
	dummyPrefix            bool
	byteFallback           bool
}

// append writes a tokenizer.model.
func (m *model) append(b []byte) []byte {
	for _, p := range m.pieces {
		var one []byte
		one = protowire.AppendTag(one, pieceText, protowire.BytesType)
		one = protowire.AppendString(one, p.text)
		one = protowire.AppendTag(one, pieceScore, protowire.Fixed32Type)
		one = protowire.AppendFixed32(one, math.Float32bits(p.score))
		if p.kind != normal {
			one = appendNumber(one, pieceType, int(p.kind))
		}
		b = appendMessage(b, fieldPieces, one)
	}
	var t []byte
	t = appendNumber(t, trainerModelType, modelTypeBPE)
	t = appendNumber(t, trainerVocabSize, len(m.pieces))
	t = appendNumber(t, trainerByteFallback, int(protowire.EncodeBool(m.byteFallback)))
	t = appendNumber(t, trainerUnknown, m.unknown)
	t = appendNumber(t, trainerBOS, m.bos)
	t = appendNumber(t, trainerEOS, m.eos)
	t = appendNumber(t, trainerPad, m.pad)
	// sentencepiece finds them by their text, and takes "<s>" and the like where it is not said.
	t = m.appendPiece(t, trainerUnknownPiece, m.unknown)
	t = m.appendPiece(t, trainerBOSPiece, m.bos)
	t = m.appendPiece(t, trainerEOSPiece, m.eos)
	b = appendMessage(b, fieldTrainer, t)

	n := protowire.AppendTag(nil, normalizerName, protowire.BytesType)
	n = protowire.AppendString(n, "identity")
	n = appendNumber(n, normalizerDummyPrefix, int(protowire.EncodeBool(m.dummyPrefix)))
	n = appendNumber(n, normalizerExtraSpaces, 0)
	n = appendNumber(n, normalizerEscapesSpaces, 1)
	return appendMessage(b, fieldNormalizer, n)
}

// appendPiece writes the text of a piece, if the id is of one.
func (m *model) appendPiece(b []byte, field protowire.Number, id int) []byte {
	if id < 0 || id >= len(m.pieces) {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), m.pieces[id].text)
}

func appendMessage(b []byte, field protowire.Number, message []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), message)
}

func appendNumber(b []byte, field protowire.Number, n int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), uint64(int64(n)))
}
