package fp8_test

import (
	"testing"

	"github.com/lorakit/lorakit/quant/fp8"
	"github.com/lorakit/lorakit/quant/quanttest"
)

// FuzzScheme has checkpoints with other configs, shapes and bytes read.
func FuzzScheme(f *testing.F) {
	quanttest.Fuzz(f, fp8.Scheme{},
		"../../fixtures/compressed/fp8-bf16.safetensors",
		"../../fixtures/compressed/fp8-ue8m0-f32.safetensors",
		"../../fixtures/compressed/fp8-whole.safetensors",
		"../../fixtures/compressed/fp8-experts.safetensors",
		"../../fixtures/compressed/fp8-early.safetensors",
		"../../fixtures/compressed/fp8-e2m1.safetensors",
	)
}
