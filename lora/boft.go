package lora

import (
	"fmt"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// BOFT (Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", 2023) rotates the inputs
// of a module as OFT does, several times over: each butterfly factor but the last permutes them before its blocks and
// back after them. Then it scales the outputs: diag(s)·W·B₀ᵀ·B₁ᵀ·…

func init() {
	parsers[boft] = func(c *Config) error {
		_, _, _, err := c.boftOptions()
		return err
	}
}

// boftOptions are the size and the number of the blocks, one of which is 0, and the number of factors.
func (c *Config) boftOptions() (size, num, factors int64, err error) {
	if size, err = c.fields.whole("boft_block_size", 4, 0); err != nil {
		return size, num, factors, err
	}
	if num, err = c.fields.whole("boft_block_num", 0, 0); err != nil {
		return size, num, factors, err
	}
	if factors, err = c.fields.whole("boft_n_butterfly_factor", 1, 1); err == nil && (size == 0) == (num == 0) {
		err = fmt.Errorf("%w: boft_block_size is %d and boft_block_num %d, expected one of both to be 0", ErrMalformed,
			size, num)
	}
	return size, num, factors, err
}

// boft makes a module of boft_R (factors, blocks, size, size) and boft_s (outputs).
func (c *Config) boft(name string, p parts) (*Module, error) {
	size, num, factors, err := c.boftOptions()
	if err != nil {
		return nil, err
	}
	r, s := p["boft_R"], p["boft_s"]
	if !p.have("boft_R", "boft_s") || len(r.Shape) != 4 || r.Shape[2] != r.Shape[3] || r.Count() < 1 ||
		len(s.Shape) != 2 || min(s.Shape[0], s.Shape[1]) != 1 {
		return nil, fmt.Errorf("%w: it has %v, expected boft_R (factors, blocks, size, size) and boft_s (outputs, 1)",
			ErrMalformed, p)
	}
	x := &boftTransform{r: r, s: s, factors: r.Shape[0], blocks: r.Shape[1], size: r.Shape[2]}
	switch {
	case size != 0 && x.size != size, num != 0 && x.blocks != num:
		err = fmt.Errorf("%w: it has %d blocks of %d, and boft_block_size is %d and boft_block_num %d", ErrMalformed,
			x.blocks, x.size, size, num)
	case x.factors != factors && x.factors != 1: // PEFT trains one without its kernel for CUDA
		err = fmt.Errorf("%w: it has %d butterfly factors, and boft_n_butterfly_factor is %d", ErrMalformed, x.factors,
			factors)
	case x.factors > 32 || x.factors > 1 && (x.size%2 != 0 || x.blocks%(1<<(x.factors-1)) != 0):
		err = fmt.Errorf("%w: it has %d butterfly factors for %d blocks of %d, which has to be even, expected a number "+
			"of blocks that 2 to the number of factors less one divides", ErrMalformed, x.factors, x.blocks, x.size)
	}
	if err != nil {
		return nil, err
	}
	return transformed(name, r, x), nil
}

// boftTransform is that of BOFT.
type boftTransform struct {
	r, s                  *formats.Tensor
	factors, blocks, size int64
	inverted              bool
}

// Fit holds the blocks against the inputs, and the scales against the outputs.
func (x *boftTransform) Fit(outputs, inputs int64) error {
	if x.size > inputs || x.blocks != inputs/x.size || inputs%x.size != 0 || x.s.Count() != outputs {
		return fmt.Errorf("%w: it has %d blocks of %d for its inputs, and %d scales for its outputs", ErrBase, x.blocks,
			x.size, x.s.Count())
	}
	return nil
}

// Bytes is the memory of the blocks, twice, of the permutations and the scales, and for making a block.
func (x *boftTransform) Bytes(inputs int64) int64 {
	return 8*x.r.Count() + 4*x.factors*inputs + 4*x.s.Count() + 8*x.size*x.size
}

// Load makes the factors.
func (x *boftTransform) Load(inputs int64) (RowMap, error) {
	v, err := Floats(x.r)
	if err != nil {
		return nil, err
	}
	scales, err := Floats(x.s)
	if err != nil {
		return nil, err
	}
	n := int(x.size)
	q, all := make([]float64, n*n), int(x.blocks)*n*n
	var maps rowMaps
	for i := range int(x.factors) {
		f := &blockProduct{size: n, blocks: make([]float32, all)}
		if x.factors > 1 {
			f.order = butterfly(int(inputs), int(x.blocks)>>i, n/2)
		}
		for b := range int(x.blocks) {
			a := v[i*all+b*n*n:][:n*n]
			for k := range n {
				for l := range n {
					q[k*n+l] = float64(a[k*n+l])*0.5 - float64(a[l*n+k])*0.5 // halves are exact
				}
			}
			if !cayley(q, n) || !narrowed(f.blocks[b*n*n:][:n*n], q, n, !x.inverted) {
				return nil, fmt.Errorf("%s: tensor %s: %w: the rotation of block %d of factor %d has no finite values",
					x.r.File, tensor.Quote(x.r.Name), ErrMalformed, b, i)
			}
		}
		maps = append(maps, f)
	}
	if x.inverted {
		slices.Reverse(maps)
		for i, s := range scales {
			if scales[i] = 1 / s; scales[i]-scales[i] != 0 {
				return nil, fmt.Errorf("%s: tensor %s: %w: element %d is %g, by which it cannot be divided", x.s.File,
					tensor.Quote(x.s.Name), ErrUnsupported, i, s)
			}
		}
	}
	return append(maps, rowScales(scales)), nil
}

// Inverse rotates and scales back.
func (x *boftTransform) Inverse() (Transform, error) {
	inverse := *x
	inverse.inverted = !x.inverted
	return &inverse, nil
}

// butterfly is where a factor's permutation puts n inputs: within each of a number of groups, the even ones of its
// pieces of half a block before the odd ones.
func butterfly(n, groups, half int) []int32 {
	order, size := make([]int32, n), n/groups
	at := 0
	for g := 0; g < n; g += size {
		for odd := range 2 {
			for piece := g + odd*half; piece < g+size; piece += 2 * half {
				for i := range half {
					order[at] = int32(piece + i)
					at++
				}
			}
		}
	}
	return order
}
