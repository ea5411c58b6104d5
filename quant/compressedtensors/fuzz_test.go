package compressedtensors_test

import (
	"testing"

	"github.com/lorakit/lorakit/quant/compressedtensors"
	"github.com/lorakit/lorakit/quant/quanttest"
)

// FuzzScheme has checkpoints with other configs, shapes and bytes read.
func FuzzScheme(f *testing.F) {
	quanttest.Fuzz(f, compressedtensors.Scheme{},
		"../../fixtures/compressed/nvfp4-bf16.safetensors",
		"../../fixtures/compressed/w4a16-f16.safetensors",
		"../../fixtures/compressed/w3a16-asymmetric.safetensors",
		"../../fixtures/compressed/w8a8-channel-asymmetric-bf16.safetensors",
		"../../fixtures/compressed/fp8-block.safetensors",
		"../../fixtures/compressed/fp8-tensor.safetensors",
		"../../fixtures/compressed/mxfp8-f16.safetensors",
	)
}
