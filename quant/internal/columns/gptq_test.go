package columns_test

import (
	"encoding/binary"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/gptq"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

const folder = "../../../fixtures/columns/"

// TestGPTQGolden decodes what GPTQModel has packed to what it decodes.
func TestGPTQGolden(t *testing.T) {
	files, err := filepath.Glob(folder + "gptq-*.safetensors")
	require.NoError(t, err)
	golden(t, gptq.Scheme{}, files)
}

// TestGPTQWithoutIndex: a g_idx in order says what is known without it.
func TestGPTQWithoutIndex(t *testing.T) {
	m, expected := openFixture(t, folder+"gptq-4-v1.safetensors")
	m.Remove("m1.g_idx")
	found, err := gptq.Scheme{}.Find(t.Context(), m)
	require.NoError(t, err)
	for _, d := range found {
		got, err := quanttest.Tile(m, d, 0, d.Info().Count())
		require.NoError(t, err)
		require.Equal(t, expected[d.Info().Name], got)
	}
	assert.Equal(t, []string{"m1.qweight", "m1.scales", "m1.qzeros"}, found[1].Parts())
}

// TestGPTQDynamic: bits and groups that differ by module are told by the shapes.
func TestGPTQDynamic(t *testing.T) {
	m, expected := openFixture(t, folder+"gptq-8-v1-act.safetensors")
	m.JSON = []byte(`{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": true,
		"dynamic": {"+:m0": {"bits": 8, "group_size": 128}}}}`)
	found, err := gptq.Scheme{}.Find(t.Context(), m)
	require.NoError(t, err)
	require.Len(t, found, 1)
	got, err := quanttest.Tile(m, found[0], 0, found[0].Info().Count())
	require.NoError(t, err)
	assert.Equal(t, expected["m0.weight"], got)
	assert.Equal(t, "gptq, bits 8, group 32", found[0].Spec().String())
}

// TestGPTQDynamicAmbiguous: rows of so few inputs that words of two widths hold them are refused.
func TestGPTQDynamicAmbiguous(t *testing.T) {
	m, _ := openFixture(t, folder+"gptq-8-v1-act.safetensors")
	m.JSON = []byte(`{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {}}}`)
	quanttest.Shaped("m0.qweight", tensor.I32, 2, 136)(m)
	quanttest.Shaped("m0.g_idx", tensor.I32, 16)(m)
	_, err := gptq.Scheme{}.Find(t.Context(), m)
	require.ErrorIs(t, err, quant.ErrMalformed)
	require.ErrorContains(t, err, `"m0.qweight" of shape [2, 136] may have 3 bits or 4`)
}

// TestGPTQMalformed refuses what cannot be, in one line that names the tensor.
func TestGPTQMalformed(t *testing.T) {
	config := quanttest.Replaced
	for want, change := range map[string]func(m *quanttest.Stored){
		`"m0.scales" is missing`:                                  quanttest.Removed("m0.scales"),
		`"m0.qzeros" is missing`:                                  quanttest.Removed("m0.qzeros"),
		`"m0.g_idx" is missing`:                                   quanttest.Removed("m0.g_idx"),
		`"m0.qweight" is missing`:                                 quanttest.Removed("m0.qweight"),
		`"m0.weight" is there too`:                                quanttest.Shaped("m0.weight", tensor.F16, 136, 96),
		"it is I64 [12, 136], expected I32":                       quanttest.Shaped("m0.qweight", tensor.I64, 12, 136),
		`"m0.qweight" is I32 [11, 136], expected I32 [12, 136]`:   quanttest.Shaped("m0.qweight", tensor.I32, 11, 136),
		`"m0.scales" is I32 [3, 136]`:                             quanttest.Shaped("m0.scales", tensor.I32, 3, 136),
		`"m0.scales" is F16 [4, 136], expected F16 [3, 136]`:      quanttest.Shaped("m0.scales", tensor.F16, 4, 136),
		`"m0.qzeros" is I32 [3, 16], expected I32 [3, 17]`:        quanttest.Shaped("m0.qzeros", tensor.I32, 3, 16),
		`"m0.g_idx" is I64 [96], expected I32 [96]`:               quanttest.Shaped("m0.g_idx", tensor.I64, 96),
		`"m0.g_idx" is of shape [96, 1]`:                          quanttest.Shaped("m0.g_idx", tensor.I32, 96, 1),
		"it has 1048577 inputs in 32769 groups, expected at most": quanttest.Shaped("m0.g_idx", tensor.I32, 1<<20+1),
		"expected some of each":                                   quanttest.Shaped("m0.g_idx", tensor.I32, 0),
		"bits 9, expected 2, 3, 4 or 8":                           config(`"bits": 4`, `"bits": 9`),
		"bits 0, expected 2, 3, 4 or 8":                           config(`"bits": 4`, `"bits": 0`),
		"group_size 0, expected -1":                               config(`"group_size": 32`, `"group_size": 0`),
		"group_size -2, expected -1":                              config(`"group_size": 32`, `"group_size": -2`),
	} {
		m, _ := openFixture(t, folder+"gptq-4-v2-act.safetensors")
		change(m)
		_, err := gptq.Scheme{}.Find(t.Context(), m)
		require.ErrorIs(t, err, quant.ErrMalformed, want)
		assert.ErrorContains(t, err, want)
		assert.ErrorContains(t, err, `tensor "m`)
		assert.NotContains(t, err.Error(), "\n")
	}
}

// TestGPTQMembers refuses members of a config.json that are of another kind, by their names.
func TestGPTQMembers(t *testing.T) {
	for _, wrong := range []string{`"bits": "4"`, `"bits": 4.5`, `"bits": 1e99`, `"group_size": true`, `"desc_act": 1`,
		`"checkpoint_format": 2`, `"pack_dtype": []`} {
		name, _, _ := strings.Cut(strings.Trim(wrong, `"`), `"`)
		m, _ := openFixture(t, folder+"gptq-4-v2-act.safetensors")
		object := `{"quant_method": "gptq", ` + wrong + `}`
		m.JSON = []byte(`{"quantization_config": ` + object + `}`)
		_, err := gptq.Scheme{}.Find(t.Context(), m)
		require.ErrorIs(t, err, quant.ErrMalformed, wrong)
		assert.ErrorContains(t, err, "config.json: quantization_config: ")
		assert.ErrorContains(t, err, name)
		assert.NotContains(t, err.Error(), "\n")
		_, ours := gptq.Scheme{}.Declaration([]byte(object))
		assert.True(t, ours)
	}
}

// TestGPTQIndex refuses groups that are not there, when the weight is found, and where they come up later too.
func TestGPTQIndex(t *testing.T) {
	for want, g := range map[string]int32{"the group -1 for input 5": -1, "the group 3 for input 5, expected 0 to 2": 3,
		"the group -2147483648 for": -1 << 31} {
		m, _ := openFixture(t, folder+"gptq-4-v2-act.safetensors")
		found, err := gptq.Scheme{}.Find(t.Context(), m)
		require.NoError(t, err)
		binary.LittleEndian.PutUint32(m.Data["m0.g_idx"][4*5:], uint32(g))
		_, err = gptq.Scheme{}.Find(t.Context(), m)
		require.ErrorIs(t, err, quant.ErrMalformed)
		assert.ErrorContains(t, err, `tensor "m0.qweight": malformed quantised weight: "m0.g_idx" has `+want)
		_, err = quanttest.Tile(m, found[0], 0, found[0].Unit())
		require.ErrorIs(t, err, quant.ErrMalformed)
		assert.ErrorContains(t, err, `"m0.g_idx" has `+want)
	}
}

// TestGPTQLongIndex finds the last input's group too, of more inputs than are read at once.
func TestGPTQLongIndex(t *testing.T) {
	const in = 1 << 15
	m := random(4, 8, in, "gptq", true)
	_, err := gptq.Scheme{}.Find(t.Context(), m)
	require.NoError(t, err)
	binary.LittleEndian.PutUint32(m.Data["m.g_idx"][4*(in-1):], in/128)
	_, err = gptq.Scheme{}.Find(t.Context(), m)
	require.ErrorIs(t, err, quant.ErrMalformed)
	assert.ErrorContains(t, err, `"m.g_idx" has the group 256 for input 32767, expected 0 to 255`)
}

// TestGPTQLayouts: what is GPTQ's and not read is left alone and named.
func TestGPTQLayouts(t *testing.T) {
	for config, want := range map[string]string{
		`"bits": 4`: "", `"bits": 4, "checkpoint_format": "gptq_v2"`: "", `"bits": 4, "format": "GPTQ"`: "",
		`"bits": 4, "checkpoint_format": "marlin"`: "marlin",
		`"bits": 4, "is_marlin_format": true`:      "marlin",
		`"bits": 4, "checkpoint_format": "gptq_p"`: "planar",
		`"bits": 5`: "planar",
		`"bits": 4, "checkpoint_format": "bitblas"`:                 `"bitblas"`,
		`"bits": 4, "checkpoint_format": "gptq", "pack_dtype": "x"`: `words of "x"`,
	} {
		object := `{"quant_method": "gptq", "group_size": 32, ` + config + `}`
		d, ok := gptq.Scheme{}.Declaration([]byte(object))
		require.True(t, ok)
		assert.True(t, d.Unsaid)
		assert.Contains(t, d.Unread.Name, want)
		assert.Equal(t, want == "", d.Unread == quant.Layout{}, config)
		if want == "" {
			continue
		}
		assert.NotEmpty(t, d.Unread.Advice)
		m, _ := openFixture(t, folder+"gptq-4-v2-act.safetensors")
		m.JSON = []byte(`{"quantization_config": ` + object + `}`)
		found, err := gptq.Scheme{}.Find(t.Context(), m)
		require.NoError(t, err)
		assert.Empty(t, found)
	}
	_, ok := gptq.Scheme{}.Declaration([]byte(`{"quant_method": "awq"}`))
	assert.False(t, ok)
}

// TestGPTQNotWritten refuses with what to take instead.
func TestGPTQNotWritten(t *testing.T) {
	_, err := gptq.Scheme{}.Spec("gptq", nil)
	require.ErrorIs(t, err, quant.ErrUnsupported)
	require.Len(t, hint.Of(err), 1)
	assert.Equal(t, "w4a16", hint.Of(err)[0].Value)
	_, err = gptq.Scheme{}.Spec("nf4", nil)
	require.ErrorIs(t, err, quant.ErrUnknown)
	_, err = gptq.Scheme{}.Encoder(t.Context(), quant.Spec{Type: "gptq"}, tensor.Info{})
	require.ErrorIs(t, err, quant.ErrUnsupported)
	_, _, err = gptq.Scheme{}.Config(nil, nil)
	require.ErrorIs(t, err, quant.ErrUnsupported)
}

func FuzzGPTQ(f *testing.F) {
	f.Add(int64(4), int64(32), true, false,
		[]byte{0, 8, 16}, []byte{3, 2, 16}, []byte{0, 2, 2}, []byte{0, 64}, make([]byte, 99))
	f.Add(int64(3), int64(-1), false, true,
		[]byte{0, 3, 33}, []byte{4, 1, 33}, []byte{0, 1, 4}, []byte{}, []byte("abcdefgh"))
	f.Add(int64(2), int64(16), false, true,
		[]byte{0, 2, 7}, []byte{2, 3, 7}, []byte{0, 3, 1}, []byte{0, 41}, []byte{1, 0, 0, 0, 2})
	f.Fuzz(func(t *testing.T, bits, group int64, act, dynamic bool, codes, scales, zeros, index, data []byte) {
		config := map[string]any{"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act}
		if dynamic {
			config["dynamic"] = map[string]any{}
		}
		fuzz(t, gptq.Scheme{}, config,
			map[string][]uint8{"qweight": codes, "scales": scales, "qzeros": zeros, "g_idx": index}, data)
	})
}
