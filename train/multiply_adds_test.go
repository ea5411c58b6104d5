package train

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

// giga is a number of floating-point operations in units of 10^9, of multiply-adds.
func giga(multiplyAdds int64) float64 { return 2 * float64(multiplyAdds) / 1e9 }

// TestMultiplyAddsOf1B: 256 tokens through the shape of TinyLlama, an adapter of rank 8 on all linear layers.
func TestMultiplyAddsOf1B(t *testing.T) {
	s := assume(1_100_048_384).spec()
	adapter := s.linears(8)
	var trainable int64
	for _, a := range adapter {
		trainable += a.parameters()
	}
	assert.EqualValues(t, 6_307_840, trainable)

	n := s.multiplyAdds(1, 256, adapter)
	assert.InDelta(t, 1624, giga(n.FullFineTuning), 0.5)
	assert.InDelta(t, 1104, giga(n.Forward+n.Backward), 0.5)
	assert.InDelta(t, 1486, giga(n.Forward+n.Backward+n.Recomputation), 0.5)
	assert.InDelta(t, 0.68, float64(n.Forward+n.Backward)/float64(n.FullFineTuning), 0.005)

	down := int64(22) * 2048 * 5632 * 256
	assert.InDelta(t, 1615, giga(n.Forward+n.Backward+n.Recomputation+down), 0.5)

	// Without an adapter only the base's products are left; they grow with the rows, attention with their length.
	none := s.multiplyAdds(1, 256, nil)
	assert.Equal(t, 3*256*trainable, n.Forward+n.Backward-none.Forward-none.Backward)
	two := s.multiplyAdds(2, 128, nil)
	attention := int64(2) * 256 * 256 * 2048 * 22
	assert.Equal(t, none.Forward-attention/2, two.Forward)
	assert.Equal(t, none.Backward-attention, two.Backward)
}

// TestMultiplyAddsOfExperts: of experts those that a token takes, in an embedding no product with A.
func TestMultiplyAddsOfExperts(t *testing.T) {
	const tokens, hidden, width, count, topK = 10, 8, 6, 4, 2
	attend := attention{heads: 2, keyHeads: 1, headDim: 4, fused: &linear{in: hidden, out: 16}, out: linear{in: 8, out: 8}}
	router := linear{module: "layers.0.mlp.gate", in: hidden, out: count}
	s := &spec{
		embedding: "embed", head: linear{module: "lm_head", in: hidden, out: 20},
		layers: []layer{{name: "layers.0", attention: attend, experts: &experts{
			count: count, topK: topK, router: router, gateUp: "layers.0.mlp.experts.gate_up_proj",
			down: "layers.0.mlp.experts.down_proj", hidden: hidden, width: width,
		}}},
	}
	block := int64(hidden*16 + 8*8 + hidden*count + topK*3*width*hidden)
	scores := int64(2 * tokens * tokens * 2 * 4)
	n := s.multiplyAdds(1, tokens, nil)
	assert.Equal(t, tokens*(block+hidden*20)+scores, n.Forward)
	assert.Equal(t, tokens*(block+hidden*20)+2*scores, n.Backward)
	assert.Equal(t, tokens*block+scores, n.Recomputation)
	assert.Equal(t, 3*n.Forward, n.FullFineTuning)

	for _, x := range []struct {
		adapted                             Adapted
		forward, backward, again, trainable int64
	}{
		{Adapted{s.layers[0].experts.gateUp, hidden, 2 * width, 3, count}, topK * 3 * 20, 2 * topK * 3 * 20, topK * 3 * 20,
			count * 3 * 20},
		{Adapted{router.module, hidden, count, 2, 0}, 2 * 12, 2 * 2 * 12, 2 * 12, 2 * 12},
		{Adapted{"lm_head", hidden, 20, 2, 0}, 2 * 28, 2 * 2 * 28, 0, 2 * 28},
		{Adapted{"embed", 20, hidden, 2, 0}, 2 * hidden, 2 * 2 * hidden, 0, 2 * 28},
		{Adapted{"lm_head", hidden, 20, 0, 0}, 0, hidden * 20, 0, hidden * 20}, // trained itself
		{Adapted{"embed", 20, hidden, 0, 0}, 0, 0, 0, hidden * 20},
	} {
		m := s.multiplyAdds(1, tokens, []Adapted{x.adapted})
		assert.Equal(t, tokens*x.forward, m.Forward-n.Forward, x.adapted)
		assert.Equal(t, tokens*x.backward, m.Backward-n.Backward, x.adapted)
		assert.Equal(t, tokens*x.again, m.Recomputation-n.Recomputation, x.adapted)
		assert.Equal(t, n.FullFineTuning, m.FullFineTuning, x.adapted)
		assert.Equal(t, x.trainable, x.adapted.parameters(), x.adapted)
	}
}

// TestMultiplyAddsUnderNorms: a norm after the MLP needs what the MLP has given, so nothing of it is left out.
func TestMultiplyAddsUnderNorms(t *testing.T) {
	s := assume(134_515_008).spec()
	before := s.multiplyAdds(1, 16, nil).Recomputation
	for i := range s.layers {
		s.layers[i].afterMLP = &norm{}
	}
	assert.Equal(t, int64(16*30*576*1536), s.multiplyAdds(1, 16, nil).Recomputation-before)
}
