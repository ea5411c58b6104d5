package columns_test

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/awq"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

// TestAWQGolden decodes what AutoAWQ has packed to what it decodes.
func TestAWQGolden(t *testing.T) {
	files, err := filepath.Glob(folder + "awq-*.safetensors")
	require.NoError(t, err)
	golden(t, awq.Scheme{}, files)
}

// TestAWQMalformed refuses what cannot be, in one line that names the tensor.
func TestAWQMalformed(t *testing.T) {
	config := quanttest.Replaced
	for want, change := range map[string]func(m *quanttest.Stored){
		`"m0.scales" is missing`:                             quanttest.Removed("m0.scales"),
		`"m0.qzeros" is missing`:                             quanttest.Removed("m0.qzeros"),
		`"m0.qweight" is missing`:                            quanttest.Removed("m0.qweight"),
		"it is I16 [256, 20], expected I32":                  quanttest.Shaped("m0.qweight", tensor.I16, 256, 20),
		`"m0.scales" is F16 [2, 152], expected F16 [2, 160]`: quanttest.Shaped("m0.scales", tensor.F16, 2, 152),
		`"m0.qzeros" is I32 [1, 20], expected I32 [2, 20]`:   quanttest.Shaped("m0.qzeros", tensor.I32, 1, 20),
		"bits 8, expected 4":                                 config(`"bits": 4`, `"bits": 8`),
		"group_size 0, expected -1":                          config(`"group_size": 128`, `"group_size": 0`),
		`"m0.scales" is F16 [2, 160], expected F16 [4, 160]`: config(`"group_size": 128`, `"group_size": 64`),
	} {
		m, _ := openFixture(t, folder+"awq-128.safetensors")
		change(m)
		_, err := awq.Scheme{}.Find(t.Context(), m)
		require.ErrorIs(t, err, quant.ErrMalformed, want)
		assert.ErrorContains(t, err, want)
		assert.ErrorContains(t, err, `tensor "m0.`)
	}
}

// TestAWQLayouts: what is AWQ's and not read is left alone and named.
func TestAWQLayouts(t *testing.T) {
	for config, want := range map[string]string{
		`"version": "gemm"`: "", `"version": "GEMM"`: "", `"format": "gemm"`: "", `"version": null`: "",
		`"version": "exllama"`:                      "",
		`"version": "gemv"`:                         "gemv",
		`"version": "gemv_fast"`:                    "gemv_fast",
		`"version": "marlin"`:                       "marlin",
		`"version": "gemv", "backend": "llm-awq"`:   "llm-awq",
		`"format": "llm-awq"`:                       "llm-awq",
		`"version": "next", "backend": "autoawq"`:   `"next"`,
		`"version": "gemm", "backend": "llm-awq" `:  "llm-awq",
		`"version": "gemv", "zero_point": "\u0000"`: "gemv",
	} {
		d, ok := awq.Scheme{}.Declaration([]byte(`{"quant_method": "awq", "bits": 4, "group_size": 32, ` + config + `}`))
		require.True(t, ok)
		assert.Contains(t, d.Unread.Name, want)
		assert.Equal(t, want == "", d.Unread == quant.Layout{}, config)
	}
}

// TestAWQNotWritten refuses with what to take instead.
func TestAWQNotWritten(t *testing.T) {
	_, err := awq.Scheme{}.Spec("awq", nil)
	require.ErrorIs(t, err, quant.ErrUnsupported)
	require.Len(t, hint.Of(err), 1)
	assert.Equal(t, "w4a16", hint.Of(err)[0].Value)
}

func FuzzAWQ(f *testing.F) {
	f.Add(int64(4), int64(32), []byte{0, 64, 2}, []byte{3, 2, 16}, []byte{0, 2, 2}, make([]byte, 99))
	f.Add(int64(4), int64(-1), []byte{0, 33, 1}, []byte{4, 1, 8}, []byte{0, 1, 1}, []byte("abcdefgh"))
	f.Fuzz(func(t *testing.T, bits, group int64, codes, scales, zeros, data []byte) {
		config := map[string]any{"quant_method": "awq", "bits": bits, "group_size": group, "version": "gemm"}
		fuzz(t, awq.Scheme{}, config, map[string][]uint8{"qweight": codes, "scales": scales, "qzeros": zeros}, data)
	})
}
