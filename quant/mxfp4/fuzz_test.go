package mxfp4_test

import (
	"testing"

	"github.com/lorakit/lorakit/quant/mxfp4"
	"github.com/lorakit/lorakit/quant/quanttest"
)

// FuzzScheme has checkpoints with other configs, shapes and bytes read.
func FuzzScheme(f *testing.F) {
	quanttest.Fuzz(f, mxfp4.Scheme{},
		"../../fixtures/compressed/gpt-oss.safetensors",
	)
}
