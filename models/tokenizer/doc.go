// Package tokenizer carries tokenizers between the small files of a Hugging Face folder and the keys of a GGUF file.
//
// ToGGUF makes of the files the keys that llama.cpp's converter makes of them, with the same types, and FromGGUF makes
// files of keys that tokenize text to the same ids. Both are functions of their arguments: nothing is read or written.
// What models have for themselves is data (data/architectures.json), and so are the cuts that are made before merges
// (data/pretokenizers.json), which llama.cpp knows by name and a tokenizer.json spells out.
package tokenizer
