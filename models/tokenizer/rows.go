package tokenizer

// Rows is how many rows of an embedding have tokens, where a model's class has more than the tokenizer (Gemma 3): the
// number that llama.cpp's converter cuts it to. That is the size of the vocabulary with a tokenizer.model; with a
// tokenizer.json alone it is the number of entries of its two lists, added up, though some may be in both.
func Rows(files Files, o Options) (int, error) {
	r := &reader{files: files, o: o, arch: architectureOf(o.Architecture)}
	if err := r.open(); err != nil {
		return 0, err
	}
	if b, ok := files[tokenizerModel]; ok {
		pieces, err := readPieces(b)
		if err != nil {
			return 0, err
		}
		return vocabSize(r.config, o, len(pieces))
	}
	if r.json == nil {
		return 0, errNone
	}
	return len(r.json.vocab) + len(r.json.AddedTokens), nil
}
