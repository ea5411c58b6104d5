package lora

import (
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// AdaLoRA (Zhang et al., 2023) has the delta B·diag(E)·A * alpha / (init_r + 1e-5), where training has
// left each module some of its init_r directions: rank_pattern lists which, and the file holds those alone.

// parseKept reads the rank_pattern of AdaLoRA: which directions are left, by module.
func parseKept(v jsontext.Value) (map[string][]bool, error) {
	if empty(v) {
		return nil, nil
	}
	var lists map[string][]bool
	if err := json.Unmarshal(v, &lists); err != nil {
		return nil, fmt.Errorf("rank_pattern: %w: expected a list of true and false for each module", ErrMalformed)
	}
	kept := map[string][]bool{}
	for key, list := range lists {
		i := strings.LastIndex(key, ".lora_")
		if i < 0 {
			return nil, fmt.Errorf("rank_pattern: %w: %s names no lora_E of a module", ErrMalformed, tensor.Quote(key))
		}
		name := inModel(key[:i])
		if kept[name] != nil {
			return nil, fmt.Errorf("rank_pattern: %w: %s is there twice", ErrMalformed, tensor.Quote(name))
		}
		kept[name] = list
	}
	return kept, nil
}

// adaLoRA makes a module of A (rank, in), E (rank, 1) and B (out, rank), or none where the rank is 0.
func (c *Config) adaLoRA(name string, p parts) (*Module, error) {
	if n := p["ranknum"]; n != nil { // saved along with an embedding
		v, err := small(n)
		if err != nil {
			return nil, err
		}
		if v != float32(c.Rank) {
			return nil, fmt.Errorf("%w: its ranknum is %g, and init_r is %d", ErrMalformed, v, c.Rank)
		}
		p = p.without("ranknum")
	}
	A, B, E := p["lora_A"], p["lora_B"], p["lora_E"]
	if !p.have("lora_A", "lora_B", "lora_E") || len(A.Shape) != 2 || len(B.Shape) != 2 || A.Shape[0] != B.Shape[1] ||
		!slices.Equal(E.Shape, tensor.Shape{A.Shape[0], 1}) {
		return nil, fmt.Errorf("%w: it has %v, expected lora_A (rank, in), lora_B (out, rank) and lora_E (rank, 1)",
			ErrMalformed, p)
	}
	rank := int64(c.Rank)
	if list, ok := c.kept[name]; ok {
		if int64(len(list)) != rank {
			return nil, fmt.Errorf("%w: rank_pattern lists %d directions of it, and init_r is %d", ErrMalformed, len(list), rank)
		}
		rank = 0
		for _, k := range list {
			if k {
				rank++
			}
		}
	}
	if A.Shape[0] != rank {
		return nil, fmt.Errorf("%w: it has rank %d in its tensors and %d by adapter_config.json", ErrMalformed, A.Shape[0],
			rank)
	}
	if rank == 0 {
		return nil, nil
	}
	m := &Module{Name: name, Param: "weight", A: scaledRows(matrixOf(A), E), B: matrixOf(B), Rank: int(rank),
		Reshaped: true}
	alpha := c.Alpha
	if !(alpha > 0) {
		alpha = float64(rank)
	}
	m.Scaling = alpha / (float64(c.Rank) + 1e-5)
	m.Alpha = m.Scaling * float64(rank)
	return m, nil
}

// small reads a tensor of one element.
func small(t *formats.Tensor) (float32, error) {
	if t.Count() != 1 {
		return 0, fmt.Errorf("%w: tensor %s has the shape %v, expected one element", ErrMalformed, tensor.Quote(t.Name),
			t.Shape)
	}
	v, err := Floats(t)
	if err != nil {
		return 0, err
	}
	return v[0], nil
}

// scaledRows is a matrix that lies by rows, each row times an element of a vector.
func scaledRows(m Matrix, by *formats.Tensor) Matrix {
	return matrixOf(computedTensor(m.T, func() ([]float32, error) {
		f, err := Floats(by)
		if err != nil {
			return nil, err
		}
		v := make([]float32, m.Rows*m.Cols)
		for i := range m.Rows {
			row, err := Floats(part(m.T, m.Offset+i*m.RowStride, m.Cols))
			if err != nil {
				return nil, err
			}
			for j, x := range row {
				v[i*m.Cols+int64(j)] = x * f[i]
			}
		}
		return v, nil
	}, m.Rows, m.Cols))
}

// part is n elements of a tensor of a file, from number lo on.
func part(t *formats.Tensor, lo, n int64) *formats.Tensor {
	width := t.DType.Bits() / 8
	p := *t
	p.Shape, p.Offset, p.Bytes = tensor.Shape{n}, t.Offset+lo*width, n*width
	return &p
}
