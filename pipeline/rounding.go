package pipeline

import (
	"context"
	"math"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/tensor"
)

// Rounding says what roundings may have taken of a weight.
type Rounding struct {
	Tensor string `json:"tensor"`
	// Relative is the norm of the error to be expected over that of the weight.
	Relative float64 `json:"relative"`
}

// RoundedTwice says, for each weight of merged that its adapters change, how far the weight in result, from which they
// were subtracted, is to be expected from what it was before they were merged: the error of one rounding to merged and
// of another to result, which is uniform within a step of each number. Weights that are quantised are left out: their
// error is that of the quantisation.
func RoundedTwice(ctx context.Context, merged *Merged, result *checkpoint.Checkpoint) ([]Rounding, error) {
	list := []Rounding{}
	byName := map[string]*checkpoint.Weight{}
	for _, w := range result.Weights {
		byName[w.Name] = w
	}
	reader := checkpoint.NewReader(nil)
	for _, w := range merged.Weights {
		r := byName[w.Name]
		if w.Change == nil || r == nil || w.base == nil || w.base.Decodes() || r.Decodes() ||
			!w.base.DType.Float() || !r.DType.Float() {
			continue
		}
		if ctx.Err() != nil {
			return nil, ErrInterrupted
		}
		var noise, square float64
		for _, x := range []*checkpoint.Weight{w.base, r} {
			n := x.Count()
			const step = 64 << 10
			values := make([]float32, min(step, n))
			for lo := int64(0); lo < n; lo += step {
				hi := min(lo+step, n)
				b, err := reader.Read(x, lo, hi, false)
				if err != nil {
					return nil, x.Failed(err)
				}
				v := values[:hi-lo]
				if err := tensor.ToFloats(v, b, x.Values); err != nil {
					return nil, x.Failed(err)
				}
				sum := 0.0
				for _, f := range v {
					sum += squaredStep(f, x.DType)
				}
				noise += sum / 12 // the variance of what is uniform within a step
				if x == r {
					for _, f := range v {
						square += float64(float64(f) * float64(f))
					}
				}
			}
		}
		if square > 0 {
			list = append(list, Rounding{w.Name, math.Sqrt(noise / square)})
		}
	}
	return list, nil
}

// squaredStep is the square of the distance of x to the next number of a type.
func squaredStep(x float32, d tensor.DType) float64 {
	exponent := int(math.Float32bits(x)>>23&0xff) - 127
	switch d {
	case tensor.BF16:
		exponent -= 7
	case tensor.F16:
		exponent = max(exponent, -14) - 10
	default:
		exponent -= 23
	}
	if exponent < -500 || x == 0 {
		return 0
	}
	return math.Float64frombits(uint64(2*exponent+1023) << 52)
}
