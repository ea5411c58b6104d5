package mxfp4_test

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant/mxfp4"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

func BenchmarkTypes(b *testing.B) {
	s := &quanttest.Stored{Data: map[string][]byte{}}
	for name, shape := range map[string]tensor.Shape{"p_blocks": {2, 2880, 90, 16}, "p_scales": {2, 2880, 90}} {
		info := tensor.Info{Name: name, DType: tensor.U8, Shape: shape}
		data := make([]byte, info.Count())
		for i := range data {
			data[i] = byte(120 + rand.IntN(8))
		}
		s.Add(info, data)
	}
	found, err := mxfp4.Scheme{}.Find(context.Background(), s)
	require.NoError(b, err)
	quanttest.Read(b, "mxfp4-blocks", s, found[0])
}
