// Package safetensors reads and lays out checkpoints in the safetensors format
// (https://huggingface.co/docs/safetensors): one file, or a folder of shards with an index
// (https://huggingface.co/docs/safetensors/metadata_parsing).
//
// A file is
//
//	8 bytes  N, the length of the header, unsigned, little-endian
//	N bytes  a JSON object, padded with spaces
//	the rest the tensors' data, row-major, little-endian, without holes
//
// The object has, for each tensor, its name with
//
//	{"dtype": "BF16", "shape": [2, 3], "data_offsets": [BEGIN, END]}
//
// where the offsets count from the end of the header, and optionally the name "__metadata__" with an object of
// strings.
//
// What is accepted is what the reference implementation (https://github.com/huggingface/safetensors, release 0.8.0)
// accepts, down to the leniency of its JSON reader: unknown fields are skipped, the three fields may come as an array,
// a dtype as {"BF16": null}. Two things differ. A tensor name that occurs twice is refused, and so is one of the
// metadata, since one of the two would be lost unseen; the reference lets the last one win. And what exceeds [Limits]
// is refused with formats.ErrLimit, as is a dimension of 2^63 or more, which an empty tensor could have.
// fixtures/malformed has a corpus with the reference's verdicts, and a script that compares the two on random files.
//
// Which file of a folder is read, and what of its index is believed, follows transformers: model.safetensors comes
// before model.safetensors.index.json; a shard is read whole, so a tensor that only the shard knows is part of the
// checkpoint. Stricter than transformers, a tensor that the index puts in a shard that does not have it, a tensor in
// two shards and a name twice in the index are errors. Shards stand beside their index: a name with a folder in it is
// refused, and so is one that leaves the folder, see storage.Folder. A folder without those two names may have
// adapter_model.safetensors, or else one single file or index of any name; where several could be meant, the error
// lists them.
package safetensors
