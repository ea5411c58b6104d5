package train

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

// Comparison is what the same batch shows of two checkpoints.
type Comparison struct {
	Loss      float64 `json:"loss"`
	OtherLoss float64 `json:"other_loss"`
	// KL is the mean over all positions of KL(BASE || OTHER) of the distributions of the next token, in nats.
	KL float64 `json:"kl"`
	// Top1 is the share of positions with the same largest logit.
	Top1   float64      `json:"top1"`
	Layers []LayerError `json:"layers"`
}

// LayerError is how far the outputs of a block are apart: the norm of the difference over that of BASE's.
type LayerError struct {
	Layer         int     `json:"layer"` // from 0
	RelativeError float64 `json:"relative_error"`
}

// validateAgainst runs the batch through two checkpoints, block by block.
func (s *step) validateAgainst(ctx context.Context, o Options) (*Result, error) {
	other, err := open(ctx, o.Against, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer other.Close()
	t, err := newStep(ctx, other, o)
	if err != nil {
		return nil, err
	}
	for _, x := range []struct {
		what        string
		have, other int
	}{{"layers", len(s.layers), len(t.layers)}, {"features a token", s.hidden, t.hidden}, {"tokens in its vocabulary",
		s.vocab, t.vocab}} {
		if x.have != x.other {
			return nil, fmt.Errorf("%s: %w: it has %d %s and %s %d, expected the same: the two are compared layer by layer",
				tensor.Quote(o.Against), checkpoint.ErrRefused, x.other, x.what, tensor.Quote(s.base.Path), x.have)
		}
	}
	for _, x := range []*step{s, t} {
		if err := x.build(x.batch.Length); err != nil {
			return nil, err
		}
	}
	if err := reserve(o.Memory, false, s, t); err != nil {
		return nil, err
	}
	r := s.result()
	r.Against = &Comparison{}
	s.meter = newMeter(o.Progress, 2*len(s.blocks))
	t.meter = s.meter
	s.meter.begin("comparison")
	began := time.Now()
	if err := s.compare(t, r.Against); err != nil {
		return nil, err
	}
	r.LossBefore = r.Against.Loss
	r.TokensPerSecond = float64(len(s.batch.ids)) / time.Since(began).Seconds()
	s.bytes.Activations += t.bytes.Activations
	s.bytes.Logits += t.bytes.Logits
	s.bytes.Tiles += t.bytes.Tiles
	s.bytes.Weights += t.bytes.Weights
	s.conclude(r)
	return r, nil
}

// compare runs both block by block, then both heads.
func (s *step) compare(t *step, c *Comparison) error {
	if err := s.embed(); err != nil {
		return err
	}
	if err := t.embed(); err != nil {
		return err
	}
	for i := range s.blocks {
		if err := s.forwardOne(i); err != nil {
			return err
		}
		if err := t.forwardOne(i); err != nil {
			return err
		}
		c.Layers = append(c.Layers, LayerError{i, relativeError(s.state(i+1), t.state(i+1))})
	}
	if _, err := s.finish(); err != nil {
		return err
	}
	if _, err := t.finish(); err != nil {
		return err
	}
	return s.compareHeads(t, c)
}

// relativeError is the norm of x - y over that of x.
func relativeError(x, y kernels.Mat) float64 {
	var apart, whole float64
	for i := range x.Rows {
		b := row(y, i)
		for t, v := range row(x, i) {
			d := float64(v) - float64(b[t])
			apart += d * d
			whole += float64(v) * float64(v)
		}
	}
	if apart == 0 {
		return 0
	}
	return math.Sqrt(apart / whole)
}

// compareHeads computes losses, divergence and agreement, a chunk of tokens at a time.
func (s *step) compareHeads(t *step, c *Comparison) error {
	n := len(s.batch.ids)
	chunk := min(s.room.chunk, t.room.chunk)
	found := make([]position, n)
	for lo := 0; lo < n; lo += chunk {
		hi := min(lo+chunk, n)
		_, x, err := s.logits(s.normed, lo, hi)
		if err != nil {
			return err
		}
		_, y, err := t.logits(t.normed, lo, hi)
		if err != nil {
			return err
		}
		err = s.parts(hi-lo, 16, func(_ *worker, first, last int) {
			for i := first; i < last; i++ {
				found[lo+i] = comparePosition(column(x, i), column(y, i), x.Rows, s.batch.labels[lo+i])
			}
		})
		if err != nil {
			return err
		}
	}
	same := 0
	for _, p := range found {
		c.Loss += p.loss
		c.OtherLoss += p.otherLoss
		c.KL += p.kl
		if p.same {
			same++
		}
	}
	c.Loss /= float64(s.batch.count)
	c.OtherLoss /= float64(s.batch.count)
	c.KL /= float64(n)
	c.Top1 = float64(same) / float64(n)
	if v := c.Loss + c.OtherLoss + c.KL; math.IsNaN(v) || math.IsInf(v, 0) {
		return fmt.Errorf("%s: %w: the losses are %v and %v", s.network.head.module, ErrNotFinite, c.Loss, c.OtherLoss)
	}
	return nil
}

// position is what a position of the batch shows.
type position struct {
	loss, otherLoss, kl float64
	same                bool // the largest logit
}

// comparePosition compares the logits of a position, in float64.
func comparePosition(x, y strided, n, label int) (p position) {
	summary := func(z strided) (best int, log float64) {
		for i := range n {
			if *z.at(i) > *z.at(best) {
				best = i
			}
		}
		most, sum := float64(*z.at(best)), 0.0
		for i := range n {
			sum += math.Exp(float64(*z.at(i)) - most)
		}
		return best, most + math.Log(sum)
	}
	bestX, logX := summary(x)
	bestY, logY := summary(y)
	for i := range n {
		a, b := float64(*x.at(i))-logX, float64(*y.at(i))-logY
		p.kl += math.Exp(a) * (a - b)
	}
	if label != ignored {
		p.loss, p.otherLoss = logX-float64(*x.at(label)), logY-float64(*y.at(label))
	}
	p.same = bestX == bestY
	return p
}
