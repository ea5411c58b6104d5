package modelopt_test

import (
	"testing"

	"github.com/lorakit/lorakit/quant/modelopt"
	"github.com/lorakit/lorakit/quant/quanttest"
)

// TestGolden holds weights against what the peers make of them.
func TestGolden(t *testing.T) {
	for _, name := range []string{"modelopt-nvfp4", "modelopt-fp8"} {
		t.Run(name, func(t *testing.T) {
			quanttest.Check(t, modelopt.Scheme{}, quanttest.Open(t, "../../fixtures/compressed/"+name+".safetensors"))
		})
	}
}
