package lora

import (
	"fmt"
	"maps"
	"slices"

	"github.com/lorakit/lorakit/tensor"
)

// RandLoRA (Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", 2025) has one
// random A (r, 1, narrowest side) and B (widest side, bases, r) for all modules, and for each module lambda (r,
// bases) and gamma (bases, narrow side): the delta is the product of B and of lambda ⊙ A ⊙ gamma, scaled by alpha /
// r, with B on the wider side of the weight. In B's rows a base stands before its r elements, in A's the other way
// round.

func init() {
	parsers[randLoRA] = func(c *Config) error {
		r, err := c.fields.whole("r", 32, 1)
		c.Rank = int(r)
		if err == nil {
			c.Alpha, err = c.fields.number("randlora_alpha", 640)
		}
		return err
	}
}

// sharedRandLoRA takes the random matrices out of the modules. PEFT stores the same ones with each module, and once
// more.
func (a *Adapter) sharedRandLoRA(modules map[string]parts) (parts, error) {
	shared, err := a.sharedParts(modules, "randlora_A", "randlora_B")
	if err != nil {
		return nil, err
	}
	r, A, B := int64(a.Config.Rank), shared["randlora_A"], shared["randlora_B"]
	switch {
	case A == nil && B == nil:
		return nil, fmt.Errorf("%s: %w: it has no randlora_A and randlora_B, since save_projection is false: PEFT "+
			"draws them from projection_prng_key with torch's generator; save it with save_projection", a.Path, ErrUnsupported)
	case A == nil || B == nil || len(A.Shape) != 3 || len(B.Shape) != 3 || A.Shape[0] != r || A.Shape[1] != 1 ||
		B.Shape[2] != r || A.Count() < 1 || B.Count() < 1:
		return nil, fmt.Errorf("%s: %w: it has %v, expected randlora_A (%d, 1, narrow side) and randlora_B "+
			"(wide side, bases, %d)", a.Path, ErrMalformed, shared, r, r)
	}
	return shared, nil
}

// sharedParts takes tensors that all modules share out of them, wherever they stand. Copies have to be the same.
func (a *Adapter) sharedParts(modules map[string]parts, names ...string) (parts, error) {
	shared := parts{}
	for _, module := range slices.Sorted(maps.Keys(modules)) { // "base_model" is the first to have them
		p := modules[module]
		for _, name := range names {
			t := p[name]
			if t == nil {
				continue
			}
			o := shared[name]
			if o == nil {
				shared[name] = t
				continue
			}
			if same, err := sameBytes(o, t); err != nil || !same {
				if err == nil {
					err = fmt.Errorf("%w: it differs from %s", ErrMalformed, tensor.Quote(o.Name))
				}
				return nil, a.failed(t, err)
			}
		}
		if modules[module] = p.without(names...); len(modules[module]) == 0 {
			delete(modules, module)
		}
	}
	return shared, nil
}

// randLoRA makes a module of lambda and gamma and the shared matrices.
func (c *Config) randLoRA(name string, p, shared parts) (*Module, error) {
	lambda, gamma, r := p["randlora_lambda"], p["randlora_gamma"], int64(c.Rank)
	if !p.have("randlora_lambda", "randlora_gamma") || len(lambda.Shape) != 2 || len(gamma.Shape) != 2 ||
		lambda.Shape[0] != r || lambda.Shape[1] != gamma.Shape[0] || lambda.Count() < 1 || gamma.Count() < 1 {
		return nil, fmt.Errorf("%w: it has %v, expected randlora_lambda (%d, bases) and randlora_gamma (bases, "+
			"narrow side)", ErrMalformed, p, r)
	}
	bases, narrow := gamma.Shape[0], gamma.Shape[1]
	A, B := shared["randlora_A"], shared["randlora_B"]
	if bases != (narrow+r-1)/r || narrow > A.Shape[2] || bases > B.Shape[1] {
		return nil, fmt.Errorf("%w: it has %v for the shared %v, expected as many bases as a narrow side of %d "+
			"has ranks of %d", ErrMalformed, p, shared, narrow, r)
	}
	rank, err := elements(bases, r)
	if err != nil {
		return nil, err
	}
	if _, err := elements(rank, narrow); err != nil {
		return nil, err
	}
	scaled := matrixOf(computedTensor(A, func() ([]float32, error) {
		a, err := Floats(A)
		if err != nil {
			return nil, err
		}
		l, err := Floats(lambda)
		if err != nil {
			return nil, err
		}
		g, err := Floats(gamma)
		if err != nil {
			return nil, err
		}
		v := make([]float32, 0, rank*narrow)
		for i := range r {
			row := a[i*A.Shape[2]:][:narrow]
			for b := range bases {
				f := l[i*bases+b]
				for j, x := range row {
					v = append(v, float32(f*x)*g[b*narrow+int64(j)])
				}
			}
		}
		return v, nil
	}, rank, narrow))
	wide := Matrix{T: B, RowStride: B.Shape[1] * r, ColStride: 1, Rows: B.Shape[0], Cols: rank}
	m := &Module{Name: name, Param: "weight", Rank: int(rank)}
	m.A, m.B = Matrix{T: scaled.T, Rows: rank}, Matrix{T: B, Cols: rank}
	m.setScaling(c.Alpha / float64(r))
	m.fit = func(m *Module, outputs, inputs int64) error {
		side := max(outputs, inputs)
		if min(outputs, inputs) != narrow || side > wide.Rows {
			return fmt.Errorf("%w: its gamma is for a narrow side of %d, and randlora_B for a wide one of %d at most",
				ErrBase,
				narrow, wide.Rows)
		}
		if m.A, m.B = scaled, wide.rows(0, side); inputs > outputs {
			m.A, m.B = m.B.Transposed(), m.A.Transposed()
		}
		return nil
	}
	return m, nil
}
