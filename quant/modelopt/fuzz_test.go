package modelopt_test

import (
	"testing"

	"github.com/lorakit/lorakit/quant/modelopt"
	"github.com/lorakit/lorakit/quant/quanttest"
)

// FuzzScheme has checkpoints with other configs, shapes and bytes read.
func FuzzScheme(f *testing.F) {
	quanttest.Fuzz(f, modelopt.Scheme{},
		"../../fixtures/compressed/modelopt-nvfp4.safetensors",
		"../../fixtures/compressed/modelopt-fp8.safetensors",
	)
}
