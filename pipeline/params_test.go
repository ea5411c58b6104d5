package pipeline_test

import "github.com/lorakit/lorakit/quant"

// The parameters of nf4 and fp4 that tests use.
var (
	block64       = quant.Params{{Name: "block_size", Value: int64(64)}}
	block64double = quant.Params{{Name: "block_size", Value: int64(64)}, {Name: "double_quant", Value: true}}
)

// roundTripNF4 is what QLoRA has seen of a weight.
var roundTripNF4 = &quant.Spec{Type: "nf4", Params: block64double}
