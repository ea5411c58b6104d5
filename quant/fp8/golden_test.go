package fp8_test

import (
	"testing"

	"github.com/lorakit/lorakit/quant/fp8"
	"github.com/lorakit/lorakit/quant/quanttest"
)

// TestGolden holds weights against what the peers make of them.
func TestGolden(t *testing.T) {
	for _, name := range []string{"fp8-bf16", "fp8-f16", "fp8-f32", "fp8-ue8m0-bf16",
		"fp8-ue8m0-f16", "fp8-ue8m0-f32", "fp8-whole",
		"fp8-experts", "fp8-early", "fp8-e2m1"} {
		t.Run(name, func(t *testing.T) {
			quanttest.Check(t, fp8.Scheme{}, quanttest.Open(t, "../../fixtures/compressed/"+name+".safetensors"))
		})
	}
}
