package mxfp4_test

import (
	"testing"

	"github.com/lorakit/lorakit/quant/mxfp4"
	"github.com/lorakit/lorakit/quant/quanttest"
)

// TestGolden holds weights against what the peers make of them.
func TestGolden(t *testing.T) {
	for _, name := range []string{"gpt-oss"} {
		t.Run(name, func(t *testing.T) {
			quanttest.Check(t, mxfp4.Scheme{}, quanttest.Open(t, "../../fixtures/compressed/"+name+".safetensors"))
		})
	}
}
