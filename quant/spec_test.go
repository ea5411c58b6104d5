package quant_test

import (
	"context"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// TestSpecJSON: a spec in a saved plan is one object with its parameters beside its type, and comes back equal.
func TestSpecJSON(t *testing.T) {
	for want, s := range map[string]quant.Spec{
		`{"type":"int8"}`: {Type: "int8"},
		`{"type":"nf4","block_size":64,"double_quant":true,"allow_non_finite":true}`: {
			Type: "nf4", AllowNonFinite: true,
			Params: quant.Params{{Name: "block_size", Value: int64(64)}, {Name: "double_quant", Value: true}},
		},
		`{"type":"x","scale":"e8m0"}`: {Type: "x", Params: quant.Params{{Name: "scale", Value: "e8m0"}}},
	} {
		b, err := json.Marshal(s)
		require.NoError(t, err)
		assert.Equal(t, want, string(b))
		var back quant.Spec
		require.NoError(t, json.Unmarshal(b, &back))
		assert.True(t, s.Equal(back), "%v %v", s, back)
	}
	var s quant.Spec
	for _, bad := range []string{`[]`, `{"type":"nf4","block_size":[]}`, `{"type":"nf4","block_size":1e99}`, `{"type"`} {
		assert.Error(t, json.Unmarshal([]byte(bad), &s), bad)
	}
}

func TestSpecString(t *testing.T) {
	s := quant.Spec{Type: "hqq", Params: quant.Params{
		{Name: "group_size", Value: int64(64)}, {Name: "symmetric", Value: true}, {Name: "double_quant", Value: false}}}
	assert.Equal(t, "hqq, group 64, symmetric", s.String())
}

// named is a scheme that has a name and types, and is never used.
type named struct {
	name  string
	types []quant.Type
}

func (s named) Name() string        { return s.name }
func (s named) Types() []quant.Type { return s.types }
func (named) Spec(typ string, _ quant.Params) (quant.Spec, error) {
	return quant.Spec{Type: typ}, nil
}
func (named) Find(context.Context, quant.Stored) ([]quant.Decoder, error) { return nil, nil }
func (named) Encoder(context.Context, quant.Spec, tensor.Info) (quant.Encoder, error) {
	return nil, quant.ErrUnsupported
}
func (named) Config([]quant.Assigned, []string) (string, []byte, error) { return "", nil, nil }
func (named) Declaration([]byte) (quant.Declaration, bool)              { return quant.Declaration{}, false }

// TestRegister: names and types are each one scheme's, and can be typed.
func TestRegister(t *testing.T) {
	var r quant.Registry
	require.NoError(t, r.Register(named{"a", []quant.Type{{Name: "q4"}, {Name: "q8_0"}}}))
	for _, bad := range []named{
		{"a", nil}, {"", nil}, {"A", nil}, {"a b", nil}, {"b", []quant.Type{{Name: "q4"}}}, {"b", []quant.Type{{Name: ""}}},
		{"b", []quant.Type{{Name: "x"}, {Name: "x"}}}, {"b", []quant.Type{{Name: "keep"}}},
		{"b", []quant.Type{{Name: "none"}}},
	} {
		assert.ErrorIs(t, r.Register(bad), quant.ErrRegistered, "%v", bad)
	}
	require.NoError(t, r.Register(named{"b", []quant.Type{{Name: "w4a16"}}}))
	assert.Equal(t, []string{"a", "b"}, r.Names())
	s, err := r.ForType("w4a16")
	require.NoError(t, err)
	assert.Equal(t, "b", s.Name())
	_, err = r.ForType("q5")
	require.ErrorIs(t, err, quant.ErrUnknown)
	assert.ErrorContains(t, err, "q4, q8_0, w4a16")
}
