package formats_test

import (
	"math"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/lorakit/lorakit/formats"
)

func TestMetadata(t *testing.T) {
	for want, value := range map[string]any{
		"as it is \"": "as it is \"", "true": true, "-5": int8(-5), "18446744073709551615": uint64(math.MaxUint64),
		"0.1": float32(0.1), "1e-05": 1e-5,
		"NaN": math.NaN(), "-Inf": float32(math.Inf(-1)),
		`["a", "b\n"]`: []string{"a", "b\n"}, "[1, 2]": []uint32{1, 2}, "[0.1, 1e+20]": []float32{0.1, 1e20}, "[]": []int64{},
		"[false]": []bool{false}, "[7, 8]": []uint8{7, 8},
	} {
		p := formats.Pair{Name: "x", Value: value}
		assert.NoError(t, formats.Metadata{p}.Check(), want)
		assert.Equal(t, want, p.Text())
	}
	for _, value := range []any{nil, 1, uint(1), []any{"a"}, map[string]string{}, [2]bool{}, struct{}{}} {
		assert.ErrorContains(t, formats.Metadata{{Name: "x", Value: value}}.Check(), `metadata "x": found a`)
	}
	m := formats.Metadata{{Name: "b", Value: "1"}, {Name: "a", Value: uint8(2)}}
	assert.NoError(t, m.Check())
	assert.Equal(t, uint8(2), m.Get("a"))
	assert.Nil(t, m.Get("c"))
	assert.ErrorContains(t, append(m, m[0]).Check(), `metadata "b": found it twice`)
	assert.Equal(t, formats.Metadata{{Name: "a", Value: "2"}, {Name: "b", Value: "1"}},
		formats.Texts(map[string]string{"b": "1", "a": "2"}))
	assert.Nil(t, formats.Texts(nil))
	assert.NotNil(t, formats.Texts(map[string]string{}))
}
