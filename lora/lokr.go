package lora

import (
	"fmt"

	"github.com/lorakit/lorakit/formats"
)

// LoKr (LyCORIS; Yeh et al., 2023) has the Kronecker product w1 ⊗ w2 * alpha / r for a delta, where each of both is
// a matrix or a product of rank r, and w2 of a convolution has its kernels, or is of Tucker's form with the tensor t2.

// loKr makes a module of its tensors.
func (c *Config) loKr(name string, p parts) (*Module, error) {
	rank, alpha, err := c.rankAndAlpha(name)
	if err != nil {
		return nil, err
	}
	pick := func(whole string, factors ...string) (bool, error) {
		rest := parts{}
		for _, n := range append(factors, whole) {
			if t := p[n]; t != nil {
				rest[n] = t
			}
		}
		switch {
		case rest.have(whole):
			return true, nil
		case rest.have(factors[:2]...), rest.have(factors...):
			return false, nil
		}
		return false, fmt.Errorf("%w: it has %v, expected %s, or %s and %s", ErrMalformed, p, whole, factors[0], factors[1])
	}
	var first, second Tiled
	if isWhole, err := pick("lokr_w1", "lokr_w1_a", "lokr_w1_b"); err != nil {
		return nil, err
	} else if !isWhole {
		first, err = factored(nil, p["lokr_w1_a"], p["lokr_w1_b"], rank)
		if err != nil {
			return nil, err
		}
	} else if t := p["lokr_w1"]; len(t.Shape) != 2 || t.Count() == 0 {
		return nil, fmt.Errorf("%w: it has %v, expected a matrix lokr_w1", ErrMalformed, p)
	} else {
		first = asOne(matrixOf(t))
	}
	isWhole, err := pick("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
	if err != nil {
		return nil, err
	}
	whole := p["lokr_w2"]
	switch {
	case !isWhole:
		second, err = factored(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"], rank)
		if err != nil {
			return nil, err
		}
	case len(whole.Shape) < 2 || len(whole.Shape) > 4 || whole.Count() == 0:
		return nil, fmt.Errorf("%w: it has %v, expected lokr_w2 (out, in) or with a kernel of one or two dimensions",
			ErrMalformed, p)
	default:
		second = asOne(matrixOf(whole))
	}
	// Row (i, k) and column (j, l) are those of w1 and w2: one of w1 stands for as many as w2 has.
	first.Row.Each, first.Col.Each = second.Left.Rows, second.Right.Cols
	like := p["lokr_w1"]
	if like == nil {
		like = p["lokr_w1_a"]
	}
	rows, err := elements(first.Left.Rows, second.Left.Rows)
	if err != nil {
		return nil, err
	}
	cols, err := elements(first.Right.Cols, second.Right.Cols)
	if err != nil {
		return nil, err
	}
	if whole != nil && len(whole.Shape) == 3 {
		if first, second, err = lineKernels(first, whole, rows, cols); err != nil {
			return nil, err
		}
	}
	m, err := hadamard(name, like, first, second, rows, cols)
	if err != nil {
		return nil, err
	}
	m.setScaling(alpha / float64(rank))
	switch {
	case whole != nil && len(whole.Shape) > 2:
		m.Form, m.Kernel = Conv, whole.Shape[2:]
	case p["lokr_t2"] != nil:
		m.setKernel(p["lokr_t2"].Shape[2:])
	}
	return m, nil
}

// asOne is a matrix that is no product.
func asOne(m Matrix) Tiled {
	if m.Cols <= m.Rows {
		return Tiled{Left: m, Right: Matrix{Rows: m.Cols, Cols: m.Cols}, Row: Tiling{Each: 1}, Col: Tiling{Each: 1}}
	}
	return Tiled{Left: Matrix{Rows: m.Rows, Cols: m.Rows}, Right: m, Row: Tiling{Each: 1}, Col: Tiling{Each: 1}}
}

// lineKernels is what PEFT makes of a whole w2 (out2, in2, kernel) of a one-dimensional convolution. torch.kron puts
// a dimension before w1 and not behind it, so that what comes out lies as if w2 were the first of both: row (k, i) and
// column (l, j, kernel).
func lineKernels(w1 Tiled, w2 *formats.Tensor, rows, cols int64) (first, second Tiled, err error) {
	out1, in1, in2, kernel := w1.Left.Rows, w1.Right.Cols, w2.Shape[1], w2.Shape[2]
	if _, err := elements(w2.Shape[0], cols); err != nil {
		return first, second, err
	}
	spread := computedTensor(w2, func() ([]float32, error) {
		v, err := Floats(w2)
		if err != nil {
			return nil, err
		}
		out := make([]float32, 0, w2.Shape[0]*cols)
		for at := int64(0); at < int64(len(v)); at += kernel {
			for range in1 {
				out = append(out, v[at:at+kernel]...)
			}
		}
		return out, nil
	}, w2.Shape[0], in2*in1*kernel)
	first, second = w1, asOne(matrixOf(spread))
	first.Row, first.Col = Tiling{Each: 1}, Tiling{Each: kernel}
	second.Row.Each = out1
	return first, second, nil
}
