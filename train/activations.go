package train

// logitsChunk is how many tokens' logits there are at once.
const logitsChunk = 64

// activationBytes counts what a step keeps, in float32, that recomputes block by block: the input of each block, one
// block's activations with their gradients, and a chunk of logits. The batch is one row.
func (s *spec) activationBytes(tokens int) (activations, logits int64) {
	t := int64(tokens)
	var block int64
	for i := range s.layers {
		block = max(block, s.layers[i].activations(t))
	}
	activations = 4 * (t*int64(s.hidden)*int64(len(s.layers)) + block)
	return activations, 4 * min(t, logitsChunk) * int64(s.vocab)
}

// activations counts the numbers of one block for its backward pass: what its norms and the attention give, its middle
// and the MLP's inside, the gradients of the block's output and of the MLP's inside, and one head's scores.
func (l *layer) activations(tokens int64) int64 {
	hidden := int64(l.attention.out.out)
	heads := int64(l.attention.heads+l.attention.keyHeads) * int64(l.attention.headDim)
	var inside int64 // of the MLP: gate, up and their product
	if m := l.mlp; m != nil {
		inside = 3 * int64(m.down.in)
		if m.gate == nil && m.gateUp == nil {
			inside = 2 * int64(m.down.in)
		}
	}
	if e := l.experts; e != nil {
		inside = 3 * int64(e.width) * int64(e.topK)
	}
	return tokens*(4*hidden+2*heads+2*inside) + tokens*tokens
}
