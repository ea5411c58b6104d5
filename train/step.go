package train

import (
	"errors"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/internal/kernels"
)

// ErrNotFinite says that a weight, an activation, a loss or a gradient is a NaN or an infinity.
var ErrNotFinite = errors.New("not finite")

// step takes training steps of a network on a batch.
type step struct {
	*crew
	*network
	batch *Batch
	slab  slab // of the block that is computed
	room  room
	// hidden states: the inputs of the blocks, one after the other, and what the last one gives. A step without a
	// backward pass has two, which take turns.
	states []kernels.Mat
	normed kernels.Mat // the last of them, normalised
	g      kernels.Mat // the gradient that goes backward through the blocks
	bytes  Bytes
	held   int64 // bytes of the adapter's values, gradients and moments
	meter  *meter
}

// room is memory that all blocks use.
type room struct {
	chunk  int       // how many tokens' logits are computed at once
	logits []float32 // chunk of them
	wide   []float32 // the packed input of a projection
	low    []float32 // the packed inner values of an adapter
	gu     []float32 // their gradient
	shared shared    // of weights
	// Of the last norm, whose room outlives the head.
	normFactor, normMean []float32
}

// take takes one step: the loss and all gradients, forward and backward, then AdamW. It returns the loss before the
// update. Step numbers begin with 1.
func (s *step) take(number int, rate float64, gradients func() error) (float64, error) {
	for _, p := range s.adapter.trainables {
		clear(p.gradient)
	}
	loss, err := s.forwardAndBackward()
	if err != nil {
		return 0, err
	}
	for _, p := range s.adapter.trainables {
		if i := firstNotFinite(p.gradient); i >= 0 {
			return 0, fmt.Errorf("tensor %q: %w: element %d of its gradient is %v", p.name, ErrNotFinite, i, p.gradient[i])
		}
	}
	if err := gradients(); err != nil {
		return 0, err
	}
	for _, p := range s.adapter.trainables {
		err := s.parts(len(p.value), 1024, func(_ *worker, lo, hi int) { adamW(p, lo, hi, number, rate) })
		if err != nil {
			return 0, err
		}
	}
	return loss, nil
}

// forwardAndBackward computes the loss, and adds to the gradients of all that is trained.
func (s *step) forwardAndBackward() (float64, error) {
	if err := s.forwardBlocks(); err != nil {
		return 0, err
	}
	// The head: the loss, and its gradient by what the last block gives.
	norm, err := s.finish()
	if err != nil {
		return 0, err
	}
	sum, err := s.forwardLoss(s.normed, s.normed, s.batch.labels, s.batch.count)
	if err != nil {
		return 0, err
	}
	clearRows(s.g, 0, s.g.Rows)
	if err := s.backwardNorm(&norm, s.g, s.normed); err != nil {
		return 0, err
	}
	// The blocks, the last one first. Each is computed once more, from its input.
	for i := len(s.blocks) - 1; i >= 0; i-- {
		run := s.begin(i, true)
		if err := s.forwardBlock(run, kernels.Mat{}, s.states[i], false); err != nil {
			return 0, err
		}
		if err := s.backwardBlock(run, s.g); err != nil {
			return 0, err
		}
		if at := notFinite(s.g); at >= 0 {
			return 0, fmt.Errorf("%s: %w: the gradient of its input is, at token %d", s.layers[i].name, ErrNotFinite, at)
		}
		s.meter.add(backwardPasses)
	}
	if err := s.backwardEmbedding(); err != nil {
		return 0, err
	}
	return sum / float64(s.batch.count), nil
}

// loss computes the loss alone.
func (s *step) loss() (float64, error) {
	if err := s.forwardBlocks(); err != nil {
		return 0, err
	}
	if _, err := s.finish(); err != nil {
		return 0, err
	}
	sum, err := s.forwardLoss(s.normed, kernels.Mat{}, s.batch.labels, s.batch.count)
	return sum / float64(s.batch.count), err
}

// finish normalises what the last block gives, and returns that pass through the last norm.
func (s *step) finish() (normalised, error) {
	n := normalised{normal: s.network.finalNorm, factor: s.room.normFactor[:s.normed.Cols]}
	if n.kind == layerNorm {
		n.mean = s.room.normMean[:s.normed.Cols]
	}
	err := s.forwardNorm(&n, s.normed, s.state(len(s.blocks)))
	if at := notFinite(s.normed); err == nil && at >= 0 {
		err = fmt.Errorf("%s: %w: what it gives for token %d", n.module, ErrNotFinite, at)
	}
	return n, err
}

// state is the input of block i, or what the last block gives.
func (s *step) state(i int) kernels.Mat { return s.states[i%len(s.states)] }

// forwardBlocks computes the embedding and all blocks.
func (s *step) forwardBlocks() error {
	if err := s.embed(); err != nil {
		return err
	}
	for i := range s.blocks {
		if err := s.forwardOne(i); err != nil {
			return err
		}
	}
	return nil
}

// embed computes the input of the first block.
func (s *step) embed() error {
	if err := s.findAllNorms(); err != nil {
		return err
	}
	x := s.state(0)
	clearRows(x, 0, x.Rows)
	if err := s.forwardLookup(s.network.embedding, x, s.batch.ids); err != nil {
		return err
	}
	if s.network.positions != nil {
		if err := s.forwardLookup(s.network.positions, x, s.batch.positions()); err != nil {
			return err
		}
	}
	if at := notFinite(x); at >= 0 {
		return fmt.Errorf("%s: %w: what it gives for token %d", s.network.embedding.module, ErrNotFinite, at)
	}
	return nil
}

// forwardOne computes a block.
func (s *step) forwardOne(i int) error {
	y := s.state(i + 1)
	if err := s.forwardBlock(s.begin(i, false), y, s.state(i), true); err != nil {
		return err
	}
	if at := notFinite(y); at >= 0 {
		return fmt.Errorf("%s: %w: what it gives for token %d", s.layers[i].name, ErrNotFinite, at)
	}
	s.meter.add(1)
	return nil
}

// backwardEmbedding is the backward pass of the embeddings, with g the gradient of what they give.
func (s *step) backwardEmbedding() error {
	if s.network.positions != nil {
		if err := s.backwardLookup(s.network.positions, s.g, s.batch.positions()); err != nil {
			return err
		}
	}
	return s.backwardLookup(s.network.embedding, s.g, s.batch.ids)
}

// begin makes room for a block.
func (s *step) begin(i int, backward bool) *blockRun {
	s.slab.reset()
	return s.slab.run(s.blocks[i], s.hidden, s.normed.Cols, s.batch.Length, backward)
}

// findAllNorms computes the norms of DoRA for the factors as they are now.
func (s *step) findAllNorms() error {
	if s.adapter == nil {
		return nil
	}
	for p := range s.projections() {
		if err := s.findNorms(p); err != nil {
			return err
		}
	}
	if err := s.findLookupNorms(s.network.embedding); err != nil || s.network.positions == nil {
		return err
	}
	return s.findLookupNorms(s.network.positions)
}

// gradientNorm is the L2 norm of all gradients.
func (s *step) gradientNorm() float64 {
	var sum float64
	for _, p := range s.adapter.trainables {
		sum += kernels.SquaredNorm(p.gradient)
	}
	return math.Sqrt(sum)
}

// notFinite is the first column that has a NaN or an infinity, or -1.
func notFinite(m kernels.Mat) int {
	first := -1
	for i := range m.Rows {
		if t := firstNotFinite(row(m, i)); t >= 0 && (first < 0 || t < first) {
			first = t
		}
	}
	return first
}

// firstNotFinite is the first element that is a NaN or an infinity, or -1.
func firstNotFinite(x []float32) int {
	for i, v := range x {
		if v-v != 0 {
			return i
		}
	}
	return -1
}
