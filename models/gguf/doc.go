// Package gguf says how a model of transformers stands in the GGUF files of llama.cpp, and the way back: the names of
// its tensors, what is done to each of them, their types, and the keys that a config.json becomes.
//
// What is particular to an architecture is data, a file for each; one engine reads them in both directions. Another
// architecture whose tensors need no new operation is a file and no code. The values agree with llama.cpp's own
// converter (convert_hf_to_gguf.py), whose modules the data was checked against by running it.
//
// Nothing here touches the values of tensors but for the few that Forward makes of the config: a Tensor says by a View
// and a number to add what is to be done, for a pipeline that has the values in tiles.
//
// # Data
//
// A file of data has
//
//	architecture    general.architecture
//	classes         the classes in config.json that it is for; a GGUF file becomes the first whose when, a key that has
//	                to be there and not 0, holds; "never" is for classes that others stand in for. defaults are what
//	                the class takes for members that are missing, rope_theta and rope_parameters those of its rotary
//	                embeddings; config is what a config.json made of a GGUF file has besides
//	cut, prefix     what stands before names in some checkpoints only: cut is left out, prefix is put there
//	endings         older endings of names
//	skip            beginnings of names that GGUF has no place for
//	surplus_layers  whether layers past the last one are left out, else they are an error
//	zero_biases     whether biases are left out, which then have to be 0
//	plus_one        tensors whose names end so have 1 added
//	tensors         rows: a module of the checkpoint, its GGUF name or a list of several, and operations. # is the
//	                number of the layer, @ that of an expert or head. Endings .weight and .bias are carried over unless
//	                the GGUF name has one. "" has no place in GGUF. Of several rows with one GGUF name the first is the
//	                way back
//	need_tensors    tensors without which a file is refused; need_layer those of each layer, alternatives told apart by
//	                |, each of several tensors joined by +
//	made            tensors that are made of the config
//	keys            rows: a key without the architecture, its type, an expression over the config's members, and what
//	                stands for a missing one
//	need_keys       keys without which a config is refused; omit_zero those that are left out where they are 0
//	words           numbers that keys have for words
//	fixed           keys that are always the same
//	must            members that llama.cpp has no key for, and the only value that it computes with, "" for none
//	not_null        members that may not be null: transformers computes without them then, GGUF has no word for that, and
//	                llama.cpp would take the default
//	implied         the same as must, where another value changes what is computed, but is let pass with a notice: is,
//	                or then where the model has when layers
//	assumed         keys for which llama.cpp takes something where they are missing, and what transformers computes with
//	full_every      which layers see everything, of which llama.cpp has no key either: each so manieth; all without it
//	rows            members that are the number of rows of a tensor
//	back            members by types and expressions over keys and other members, for keys that are no member by
//	                themselves; rope_config members of rope_parameters that a yarn scaling has besides
//	tensors_say     members that tell whether a tensor is there
//
// The operations of a row are
//
//	permute N                the halves of each of N heads become pairs, as llama.cpp has rotary embeddings
//	transpose                the last two dimensions are exchanged; "transpose first" those of the first part alone
//	rows vocabulary          rows past the tokenizer's vocabulary are cut off
//	alternate rows, columns  the even ones are the first part, the odd ones the second; "alternate blocks" are rows of
//	                         MXFP4 blocks
//	halves of rows           the first half is the first part, the second the second
//	heads N A B              the first A rows of each of N heads are the first part, the other B the second
//	stack N                  tensors numbered 0 to N-1 become one, with a dimension more
//	mxfp4 blocks, scales     the two tensors that blocks of MXFP4 are made of
//	unless M                 the tensor is left out where the member M of the config is true
package gguf
