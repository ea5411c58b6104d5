package lora

import (
	"fmt"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// LoHa (FedPara; Hyeon-Woo et al., 2021) has the delta (w1_a·w1_b) ⊙ (w2_a·w2_b) * alpha / r. Of a convolution the
// products are the kernels as they lie, or with the tensors t each is of Tucker's form.

// loHa makes a module of the four matrices.
func (c *Config) loHa(name string, p parts) (*Module, error) {
	rank, alpha, err := c.rankAndAlpha(name)
	if err != nil {
		return nil, err
	}
	tucker := p["hada_t1"] != nil || p["hada_t2"] != nil
	matrices := p.have("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
	if tucker {
		matrices = p.have("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
	}
	if !matrices {
		return nil, fmt.Errorf("%w: it has %v, expected hada_w1_a, hada_w1_b, hada_w2_a and hada_w2_b, and hada_t1 and "+
			"hada_t2 both or none", ErrMalformed, p)
	}
	first, err := factored(p["hada_t1"], p["hada_w1_a"], p["hada_w1_b"], rank)
	if err != nil {
		return nil, err
	}
	second, err := factored(p["hada_t2"], p["hada_w2_a"], p["hada_w2_b"], rank)
	if err != nil {
		return nil, err
	}
	rows, cols := first.Left.Rows, first.Right.Cols
	if second.Left.Rows != rows || second.Right.Cols != cols {
		return nil, fmt.Errorf("%w: it has %v, which make a first product of %d x %d and a second one of %d x %d",
			ErrMalformed, p, rows, cols, second.Left.Rows, second.Right.Cols)
	}
	m, err := hadamard(name, p["hada_w1_a"], first, second, rows, cols)
	if err != nil {
		return nil, err
	}
	m.setScaling(alpha / float64(rank))
	if tucker {
		m.setKernel(p["hada_t1"].Shape[2:])
	}
	return m, nil
}

// factored is wa (rows, rank) · wb (rank, cols); or where there is a t (rank, rank, kernel…), wa (rank, rows) and
// wb (rank, in) times it: element (o, i, k) is the sum over p and q of wa[p, o] * t[p, q, k] * wb[q, i].
func factored(t, wa, wb *formats.Tensor, rank int64) (Tiled, error) {
	a, b := matrixOf(wa), matrixOf(wb)
	bad := func(want string) error {
		p := parts{wa.Name: wa, wb.Name: wb}
		if t != nil {
			p[t.Name] = t
		}
		return fmt.Errorf("%w: it has %v, expected %s", ErrMalformed, p, fmt.Sprintf(want, rank))
	}
	if len(wa.Shape) != 2 || len(wb.Shape) != 2 || wa.Count() == 0 || wb.Count() == 0 || b.Rows != rank {
		return Tiled{}, bad("matrices of rank %d")
	}
	if t == nil {
		if a.Cols != rank {
			return Tiled{}, bad("matrices of rank %d")
		}
		return Tiled{Left: a, Right: b, Row: Tiling{Each: 1}, Col: Tiling{Each: 1}}, nil
	}
	if a.Rows != rank || len(t.Shape) != 4 || t.Shape[0] != rank || t.Shape[1] != rank || t.Count() == 0 {
		return Tiled{}, bad("matrices and a tensor of rank %d")
	}
	n, err := elements(b.Cols, t.Shape[2], t.Shape[3])
	if err != nil {
		return Tiled{}, err
	}
	if _, err := elements(rank, n); err != nil {
		return Tiled{}, err
	}
	right := computedTensor(t, func() ([]float32, error) { return tuckerRight(t, b) }, rank, n)
	return Tiled{Left: a.Transposed(), Right: matrixOf(right), Row: Tiling{Each: 1}, Col: Tiling{Each: 1}}, nil
}

// tuckerRight is the sum over q of t[p, q, k] * wb[q, i], as (rank, in * kernel).
func tuckerRight(t *formats.Tensor, wb Matrix) ([]float32, error) {
	core, err := Floats(t)
	if err != nil {
		return nil, err
	}
	b, err := wb.Read()
	if err != nil {
		return nil, err
	}
	rank, in, kernel := int(t.Shape[0]), b.Cols, int(t.Shape[2]*t.Shape[3])
	v := make([]float32, rank*in*kernel)
	for p := range rank {
		for q := range rank {
			from := core[(p*rank+q)*kernel:][:kernel]
			for i := range in {
				to, f := v[(p*in+i)*kernel:][:kernel], b.Data[q*b.RowStride+i]
				for k := range to {
					to[k] += float32(from[k] * f)
				}
			}
		}
	}
	return v, nil
}

// elements is the product of sizes, or an error where no tensor can have as many elements.
func elements(sizes ...int64) (int64, error) {
	n, err := tensor.Shape(sizes).Count()
	if err == nil && n > 1<<48 {
		err = fmt.Errorf("%d elements", n)
	}
	if err != nil {
		return 0, fmt.Errorf("%w: its tensors are for a weight that no memory holds: %w", ErrMalformed, err)
	}
	return n, nil
}
