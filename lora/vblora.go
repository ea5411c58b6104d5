package lora

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// VB-LoRA (Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", 2024) makes the rows of A
// and the columns of B, in pieces, of one bank of vectors for all modules: each piece is the mean of the topk vectors
// that have the largest logits, weighted by their softmax. A file has the logits, or of those of the topk vectors the
// numbers and all weights but the last, which add up to 1.

// vbParts are the names of its tensors.
var vbParts = []string{"vblora_logits_A", "vblora_logits_B", "vblora_logits_A_topk_indices",
	"vblora_logits_A_topk_weights", "vblora_logits_B_topk_indices", "vblora_logits_B_topk_weights",
	"vblora_vector_bank"}

func init() {
	parsers[vbLoRA] = func(c *Config) error {
		o, err := c.vbOptions()
		c.Rank, c.Alpha = int(o.rank), float64(o.rank) // the delta is as it comes out
		return err
	}
}

// vbOptions are what a config says of VB-LoRA.
type vbOptions struct {
	rank, topk, vectors, length int64
	onlyTop                     bool
}

func (c *Config) vbOptions() (o vbOptions, err error) {
	for _, f := range []struct {
		at        *int64
		name      string
		otherwise int64
	}{{&o.rank, "r", 4}, {&o.topk, "topk", 2}, {&o.vectors, "num_vectors", 256}, {&o.length, "vector_length", 256}} {
		if *f.at, err = c.fields.whole(f.name, f.otherwise, 1); err != nil {
			return o, err
		}
	}
	if o.topk > o.vectors {
		return o, fmt.Errorf("%w: topk is %d, and num_vectors %d", ErrMalformed, o.topk, o.vectors)
	}
	o.onlyTop, err = c.fields.truth("save_only_topk_weights", false)
	return o, err
}

// sharedVBLoRA takes the bank out of the modules.
func (a *Adapter) sharedVBLoRA(modules map[string]parts) (parts, error) {
	o, err := a.Config.vbOptions()
	if err != nil {
		return nil, a.named(err)
	}
	shared, err := a.sharedParts(modules, "vblora_vector_bank")
	if err != nil {
		return nil, err
	}
	if bank := shared["vblora_vector_bank"]; bank == nil || len(bank.Shape) != 2 || bank.Shape[0] != o.vectors ||
		bank.Shape[1] != o.length {
		return nil, fmt.Errorf("%s: %w: it has the shared tensors [%v], expected vblora_vector_bank (%d, %d)", a.Path,
			ErrMalformed, shared, o.vectors, o.length)
	}
	return shared, nil
}

// vbLoRA makes a module of the logits of A (r, inputs / length, vectors) and of B (outputs / length, r, vectors).
func (c *Config) vbLoRA(name string, p, shared parts) (*Module, error) {
	o, err := c.vbOptions()
	if err != nil {
		return nil, err
	}
	var x [2]*vbMix
	for i, key := range []string{"vblora_logits_A", "vblora_logits_B"} {
		x[i] = &vbMix{vbOptions: o, bank: shared["vblora_vector_bank"], main: p[key], last: o.vectors}
		if o.onlyTop {
			x[i].main, x[i].weights, x[i].last = p[key+"_topk_indices"], p[key+"_topk_weights"], o.topk
		}
	}
	want := []string{"vblora_logits_A", "vblora_logits_B"}
	if o.onlyTop {
		want = vbParts[2:6]
	}
	bad := func() error {
		return fmt.Errorf("%w: it has %v, expected for A (%d, inputs / %d, %d) and for B (outputs / %d, %d, %d), "+
			"save_only_topk_weights %t", ErrMalformed, p, o.rank, o.length, x[0].last, o.length, o.rank, x[1].last,
			o.onlyTop)
	}
	if !p.have(want...) {
		return nil, bad()
	}
	for i, m := range x {
		s := m.main.Shape
		if len(s) != 3 || s[i] != o.rank || s[1-i] < 1 || s[2] != m.last {
			return nil, bad()
		}
		if w := m.weights; w != nil && (len(w.Shape) != 3 || w.Shape[0] != s[0] || w.Shape[1] != s[1] ||
			w.Shape[2] != o.topk-1 || !m.main.DType.Integer()) {
			return nil, bad()
		}
		if w := m.main; !w.DType.Integer() && !w.DType.Float() && w.DType != tensor.F64 {
			return nil, bad()
		}
		if m.pieces, err = elements(s[0], s[1]); err == nil {
			_, err = elements(m.pieces, o.length)
		}
		if err != nil {
			return nil, err
		}
	}
	in, out := x[0].main.Shape[1]*o.length, x[1].main.Shape[0]*o.length
	A := computedTensor(x[0].main, x[0].values, o.rank, in)
	// Piece (i, k) of B is a part of its column k, so that the elements of a vector lie apart.
	B := computedTensor(x[1].main, func() ([]float32, error) {
		v, err := x[1].values()
		if err != nil {
			return nil, err
		}
		b := make([]float32, len(v))
		for i := range out {
			for k := range o.rank {
				b[i*o.rank+k] = v[(i/o.length*o.rank+k)*o.length+i%o.length]
			}
		}
		return b, nil
	}, out, o.rank)
	m := &Module{Name: name, Param: "weight", A: matrixOf(A), B: matrixOf(B), Rank: int(o.rank)}
	m.setScaling(1)
	return m, nil
}

// vbMix is one of both matrices, in pieces.
type vbMix struct {
	vbOptions
	bank, main, weights *formats.Tensor // main are the logits, or where there are weights the numbers of the vectors
	last, pieces        int64
}

// values makes the pieces, one after the other.
func (x *vbMix) values() ([]float32, error) {
	bank, err := Floats(x.bank)
	if err != nil {
		return nil, err
	}
	at, weights, err := x.chosen()
	if err != nil {
		return nil, err
	}
	v := make([]float32, x.pieces*x.length)
	for i := range x.pieces {
		piece := v[i*x.length:][:x.length]
		for j := range piece {
			sum := 0.0
			for k := i * x.topk; k < (i+1)*x.topk; k++ {
				sum += float64(weights[k] * float64(bank[at[k]*x.length+int64(j)]))
			}
			piece[j] = float32(sum)
		}
	}
	return v, nil
}

// chosen are the numbers of the topk vectors of each piece, and their weights.
func (x *vbMix) chosen() (at []int64, weights []float64, err error) {
	n := x.pieces * x.topk
	if x.weights == nil {
		logits, err := Floats(x.main)
		if err != nil {
			return nil, nil, err
		}
		at, weights = make([]int64, 0, n), make([]float64, 0, n)
		for i := range x.pieces {
			piece := logits[i*x.vectors:][:x.vectors]
			top := largest(piece, x.topk)
			sum := 0.0
			for _, k := range top {
				w := exponential(float64(piece[k]) - float64(piece[top[0]]))
				at, weights, sum = append(at, k), append(weights, w), sum+w
			}
			for k := range top {
				weights[i*x.topk+int64(k)] /= sum
			}
		}
		return at, weights, nil
	}
	if at, err = integers(x.main); err != nil {
		return nil, nil, err
	}
	stored, err := Floats(x.weights)
	if err != nil {
		return nil, nil, err
	}
	weights = make([]float64, 0, n)
	for i := range x.pieces {
		rest := 1.0
		for _, w := range stored[i*(x.topk-1):][:x.topk-1] {
			weights, rest = append(weights, float64(w)), rest-float64(w)
		}
		weights = append(weights, max(rest, 0)) // which rounding may leave a little below
		if rest < -1e-4 {
			return nil, nil, fmt.Errorf("%s: tensor %s: %w: the weights of piece %d are more than 1", x.weights.File,
				tensor.Quote(x.weights.Name), ErrMalformed, i)
		}
	}
	for i, k := range at {
		if k < 0 || k >= x.vectors {
			return nil, nil, fmt.Errorf("%s: tensor %s: %w: element %d is %d, expected one of %d vectors", x.main.File,
				tensor.Quote(x.main.Name), ErrMalformed, i, k, x.vectors)
		}
	}
	for i, w := range weights {
		if w < 0 {
			return nil, nil, fmt.Errorf("%s: tensor %s: %w: a weight of piece %d is %g, expected none below 0",
				x.weights.File, tensor.Quote(x.weights.Name), ErrMalformed, int64(i)/x.topk, w)
		}
	}
	return at, weights, nil
}

// largest are the places of the k largest of some numbers, the largest first, and of equal ones the first.
func largest(v []float32, k int64) []int64 {
	top := make([]int64, 0, k+1)
	for i, f := range v {
		if int64(len(top)) == k && f <= v[top[k-1]] {
			continue
		}
		top = append(top, int64(i))
		for j := len(top) - 1; j > 0 && v[top[j]] > v[top[j-1]]; j-- {
			top[j], top[j-1] = top[j-1], top[j]
		}
		top = top[:min(int64(len(top)), k)]
	}
	return top
}

// integers reads a tensor of integers.
func integers(t *formats.Tensor) ([]int64, error) {
	raw := make([]byte, t.Bytes)
	if _, err := t.ReadAt(raw, 0); err != nil {
		return nil, err
	}
	v := make([]int64, t.Count())
	for i := range v {
		switch t.DType {
		case tensor.U8:
			v[i] = int64(raw[i])
		case tensor.I8:
			v[i] = int64(int8(raw[i]))
		case tensor.I16:
			v[i] = int64(int16(binary.LittleEndian.Uint16(raw[2*i:])))
		case tensor.I32:
			v[i] = int64(int32(binary.LittleEndian.Uint32(raw[4*i:])))
		case tensor.I64:
			v[i] = int64(binary.LittleEndian.Uint64(raw[8*i:]))
		default:
			return nil, fmt.Errorf("%s: tensor %s: %w: its type is %s, expected integers", t.File, tensor.Quote(t.Name),
				ErrMalformed, t.DType)
		}
	}
	return v, nil
}

// exponential is e to the x, for x up to 0: that of the math package is another function on each kind of machine.
func exponential(x float64) float64 {
	const ln2High, ln2Low = 6.93147180369123816490e-01, 1.90821492927058770002e-10
	if x < -745 {
		return 0
	}
	k := math.Round(x / math.Ln2)
	r := x - float64(k*ln2High) - float64(k*ln2Low)
	sum := 1.0
	for n := 14.0; n > 0; n-- { // 1 + r/1·(1 + r/2·(1 + …
		sum = 1 + float64(r*sum)/n
	}
	return math.Ldexp(sum, int(k))
}
