package train

import (
	"fmt"
	"math"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
)

// MultiplyAdds counts the multiply-adds of one step, two floating-point operations each, as far as matrix products go;
// norms, rotations, activations and the optimizer are a small part of it.
type MultiplyAdds struct {
	Forward  int64 `json:"forward"`
	Backward int64 `json:"backward"`
	// Recomputation is what a step takes again that keeps the input of each block alone.
	Recomputation int64 `json:"recomputation"`
	// FullFineTuning is forward and backward of a step that trains all weights, without recomputation.
	FullFineTuning int64 `json:"full_fine_tuning"`
}

// Adapted is a module that is trained, by the run-time name of the module, of experts by that of the parameter.
type Adapted struct {
	Name    string
	In, Out int // of the matrix, or of each expert's
	Rank    int // 0 where the matrix is trained itself, without factors
	Experts int // how many are stacked; 0 for a single matrix
}

// parameters counts what is trained of it.
func (a Adapted) parameters() int64 { return a.matrices() * a.each() }

// each is what is trained of each matrix.
func (a Adapted) each() int64 {
	if a.Rank == 0 {
		return int64(a.In) * int64(a.Out)
	}
	return int64(a.Rank) * (int64(a.In) + int64(a.Out))
}

func (a Adapted) matrices() int64 { return max(1, int64(a.Experts)) }

// multiplyAdds counts a step of rows of length tokens each. A linear layer of N weights takes N a token for its output
// and N for the gradient of its input, and where it is trained itself N for that of its weight. A pair of factors takes
// rank*(in+out) each for its output, and for the gradients of its input and of itself. Attention takes
// 2*length²*heads*headDim a row and layer, and twice that backward; no product is saved by the mask. Of experts those
// count that a token takes.
//
// Blocks are recomputed in the backward pass, but for the last product of an MLP, which nothing needs there unless a
// norm follows it. Of experts it is counted.
func (s *spec) multiplyAdds(rows, length int, adapters []Adapted) MultiplyAdds {
	tokens := int64(rows) * int64(length)
	var again, dropped, attention int64 // again, dropped: weights of the blocks
	for i := range s.layers {
		l := &s.layers[i]
		again += l.weights()
		if l.mlp != nil && l.afterMLP == nil {
			dropped += l.mlp.down.weights()
		}
		attention += 2 * tokens * int64(length) * int64(l.attention.heads) * int64(l.attention.headDim)
	}
	linear := (again + s.head.weights()) * tokens

	var adapted, adaptedAgain, whole int64
	for _, a := range adapters {
		n := s.taken(a) * tokens
		if a.Rank == 0 {
			whole += n
			continue
		}
		adapted += n
		if s.inLayer(a.Name) {
			adaptedAgain += n
		}
	}
	return MultiplyAdds{
		Forward:        linear + attention + adapted,
		Backward:       linear + 2*attention + 2*adapted + whole,
		Recomputation:  (again-dropped)*tokens + attention + adaptedAgain,
		FullFineTuning: 3*linear + 3*attention,
	}
}

// checkTokens refuses a batch whose multiply-adds an int64 does not hold.
func (s *spec) checkTokens(tokens int) error {
	t := float64(tokens)
	products := float64(s.head.in) * float64(s.head.out)
	for i := range s.layers {
		l := &s.layers[i]
		products += float64(l.weights()) + 2*t*float64(l.attention.heads)*float64(l.attention.headDim)
	}
	if 8*t*products > math.MaxInt64 {
		return fmt.Errorf("%w: a batch of %d tokens takes more multiply-adds than can be counted", checkpoint.ErrRefused,
			tokens)
	}
	return nil
}

// taken is how many trained elements of a module a token is multiplied with. In an embedding a row is looked up.
func (s *spec) taken(a Adapted) int64 {
	if a.Name == s.embedding {
		return int64(a.Rank) * int64(a.Out)
	}
	if a.Experts == 0 {
		return a.each()
	}
	for i := range s.layers {
		if e := s.layers[i].experts; e != nil && (a.Name == e.gateUp || a.Name == e.down) {
			return int64(e.topK) * a.each()
		}
	}
	return a.parameters()
}

// inLayer reports whether a module belongs to a block.
func (s *spec) inLayer(module string) bool {
	for i := range s.layers {
		if strings.HasPrefix(module, s.layers[i].name+".") {
			return true
		}
	}
	return false
}

// weights counts the elements of the matrices that a token is multiplied with in a block.
func (l *layer) weights() int64 {
	a := &l.attention
	n := a.out.weights()
	for _, x := range []*linear{a.q, a.k, a.v, a.fused} {
		if x != nil {
			n += x.weights()
		}
	}
	if l.mlp != nil {
		for _, x := range []*linear{l.mlp.gate, l.mlp.up, l.mlp.gateUp, &l.mlp.down} {
			if x != nil {
				n += x.weights()
			}
		}
	}
	if e := l.experts; e != nil {
		n += e.router.weights() + int64(e.topK)*3*int64(e.width)*int64(e.hidden)
	}
	return n
}

func (l *linear) weights() int64 { return int64(l.in) * int64(l.out) }
