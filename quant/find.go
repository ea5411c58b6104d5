package quant

import (
	"context"
	"fmt"

	"github.com/lorakit/lorakit/tensor"
)

// FindEach is the Find of a scheme that knows each weight by one of its tensors: open makes the Decoder of the weight
// that a tensor has the bulk of, and nil of all other tensors. An error of it gets the tensor's name.
func FindEach(ctx context.Context, s Stored, open func(t tensor.Info) (Decoder, error)) ([]Decoder, error) {
	var found []Decoder
	for _, t := range s.Tensors() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		d, err := open(t)
		if err != nil {
			return nil, fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), err)
		}
		if d != nil {
			found = append(found, d)
		}
	}
	return found, nil
}
