// Package gguf reads and lays out the files of llama.cpp
// (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): one file, or several that are one model, which need no
// index since each has all of their names in its own, model-00001-of-00003.gguf.
//
// A file is
//
//	header   "GGUF", version, number of tensors, number of keys
//	keys     for each a name, a type and a value: formats.Metadata
//	tensors  for each a name, its dimensions, a type and where its data begins
//	data     from the next multiple of general.alignment on, each tensor padded to such a multiple
//
// GGUF has the innermost dimension first; a tensor.Shape has it last. Types that consist of blocks are a
// tensor.Encoding with ggml's name for them, such as q4_K.
//
// Versions 2 and 3 are read, and version 3 is written. What is refused is what llama.cpp refuses, and a few things
// besides that it never writes: a boolean that is neither 0 nor 1, a tensor without elements, an alignment above 64
// KiB, a name with a NUL byte. Files of big-endian machines are read as far as their tensors are plain: their
// elements are swapped when they are read. Blocks and BF16 are ErrUnsupported there, for llama.cpp's own tools do not
// agree on their bytes.
//
// The keys that say which file of a model a file is, split.no and so on, are no part of the metadata: Layout makes
// them anew. All others come and go in their order with their types and their bytes, invalid UTF-8 included.
package gguf
