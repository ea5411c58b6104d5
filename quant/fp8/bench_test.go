package fp8_test

import (
	"testing"

	"github.com/lorakit/lorakit/quant/fp8"
	"github.com/lorakit/lorakit/quant/quanttest"
)

func BenchmarkTypes(b *testing.B) { quanttest.Benchmark(b, fp8.Scheme{}, "fp8", nil) }
