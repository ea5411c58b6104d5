package lora

import (
	"fmt"
	"slices"

	"github.com/lorakit/lorakit/tensor"
)

// VeRA (Kopiczko et al., 2023) has one random A (rank, widest in) and B (widest out, rank) for all modules, of which
// each takes what it needs: the delta is diag(lambda_b)·B[:out]·diag(lambda_d)·A[:, :in].

// sharedVeRA takes the shared matrices out of the modules. PEFT stores them once, or draws them again from a seed.
func (a *Adapter) sharedVeRA(modules map[string]parts) (parts, error) {
	shared, err := a.sharedParts(modules, "vera_A", "vera_B")
	if err != nil {
		return nil, err
	}
	A, B := shared["vera_A"], shared["vera_B"]
	switch {
	case A == nil && B == nil:
		return nil, fmt.Errorf("%s: %w: it has no vera_A and vera_B, since save_projection is false: PEFT draws them from "+
			"projection_prng_key with torch's generator; save it with save_projection", a.Path, ErrUnsupported)
	case A == nil || B == nil || len(A.Shape) != 2 || len(B.Shape) != 2 || A.Shape[0] != int64(a.Config.Rank) ||
		B.Shape[1] != A.Shape[0]:
		return nil, fmt.Errorf("%s: %w: it has %v, expected vera_A (%d, in) and vera_B (out, %d)", a.Path, ErrMalformed,
			shared, a.Config.Rank, a.Config.Rank)
	}
	return shared, nil
}

// veRA makes a module of lambda_b (out) and lambda_d (rank) and the shared matrices.
func (c *Config) veRA(name string, p, shared parts) (*Module, error) {
	b, d := p["vera_lambda_b"], p["vera_lambda_d"]
	rank := int64(c.Rank)
	if !p.have("vera_lambda_b", "vera_lambda_d") || len(b.Shape) != 1 || !slices.Equal(d.Shape, tensor.Shape{rank}) {
		return nil, fmt.Errorf("%w: it has %v, expected vera_lambda_b (out) and vera_lambda_d (%d)", ErrMalformed, p, rank)
	}
	A, B := matrixOf(shared["vera_A"]), matrixOf(shared["vera_B"])
	if b.Shape[0] < 1 || b.Shape[0] > B.Rows || A.Cols < 1 {
		return nil, fmt.Errorf("%w: its vera_lambda_b has %d elements, and the shared vera_A and vera_B are %v and %v",
			ErrMalformed, b.Shape[0], A, B)
	}
	m := &Module{Name: name, Param: "weight", A: scaledRows(A, d), B: scaledRows(B.rows(0, b.Shape[0]), b),
		Rank: int(rank), Alpha: float64(rank), Scaling: 1}
	m.fit = func(m *Module, _, inputs int64) error {
		if inputs <= A.Cols { // else it does not fit
			m.A = scaledRows(A.cols(0, inputs), d)
		}
		return nil
	}
	return m, nil
}
