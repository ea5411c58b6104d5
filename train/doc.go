// Package train takes a real training step through a checkpoint, to show that it still computes and learns: a frozen
// base of any container and scheme, the trainable tensors of a LoRA adapter, AdamW.
//
// The step is that of torch, transformers and PEFT, in float32. step.go is its text: forward through the blocks, the
// loss, backward through the blocks, the update. A block is block.go, with attention.go, mlp.go, experts.go and
// norm.go; linear.go is the product that all of them are made of. Weights come from the file by tiles and are never
// kept; the blocks are computed again in the backward pass, so that only their inputs outlive the forward pass.
//
// All activations are matrices of features by tokens: a column is a token, and the rows of a batch follow each other.
// Every number has one order in which it is summed, so that the result depends neither on threads nor on memory.
//
// Sources: Hu et al., "LoRA" (2021); Dettmers et al., "QLoRA" (2023); Liu et al., "DoRA" (2024); Loshchilov and Hutter,
// "Decoupled Weight Decay Regularization" (2019); Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
package train
