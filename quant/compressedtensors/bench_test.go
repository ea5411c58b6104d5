package compressedtensors_test

import (
	"testing"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/compressedtensors"
	"github.com/lorakit/lorakit/quant/quanttest"
)

func BenchmarkTypes(b *testing.B) {
	for _, typ := range []string{
		"fp8-channel", "fp8-block", "w8a8", "w3a16", "w4a16", "w8a16", "nvfp4", "mxfp4", "mxfp8",
	} {
		quanttest.Benchmark(b, compressedtensors.Scheme{}, typ, nil)
	}
	for _, typ := range []string{"w3a16", "w4a16", "w8a16"} {
		quanttest.Benchmark(b, compressedtensors.Scheme{}, typ, quant.Params{{Name: "asymmetric", Value: true}})
	}
}
