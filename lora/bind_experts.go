package lora

import (
	"fmt"

	"github.com/lorakit/lorakit/tensor"
)

// apart binds a stack whose experts have matrices of their own, as in MLX: to the stack's parameter, or to those of
// its experts.
func (b *binder) apart(i int, a Weighted, m *Module) error {
	spots, err := b.expertSpots(m)
	if err != nil {
		return err
	}
	for e, s := range spots {
		A, B := m.expert(int64(e), m.Experts)
		if err := s.p.whole(); err != nil {
			return fmt.Errorf("module %s: %w", tensor.Quote(m.Name), err)
		}
		_, rows := s.rows()
		if len(s.p.shape) != 2 || A.Cols != s.p.shape[1] || B.Rows != rows {
			return fmt.Errorf("module %s: %w: lora_a %v and lora_b %v of an expert do not fit %s of shape %v",
				tensor.Quote(m.Name), ErrBase, A, B, tensor.Quote(s.p.name), s.p.shape)
		}
		if err := b.claim(i, m, s); err != nil {
			return err
		}
		b.spread(Update{Adapter: i, Module: m, Name: m.Name, Expert: int64(e) + 1, Rank: int64(m.Rank),
			Scale: float32(a.Weight * m.Scaling), Left: B, Right: A, OutputRows: true}, s)
	}
	return nil
}
